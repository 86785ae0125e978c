"""Feature and coded folders as the stages write them, made in this process."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stages.lib.accuracy import Matches
from stages.lib.coding import FeatureCodec, compress_shard, read_ledger
from stages.lib.evaluating import Choices, Point, choices_of, evaluator, read_matches
from stages.lib.features import Features, shards_of, write_index, write_shard
from stages.lib.files import atomic, write_csv
from stages.lib.models import Sizes


def write_features(
    folder: Path, items: Iterable[tuple[str, int, dict[str, Tensor], Sizes]], dtype: str = "float32"
) -> Path:
    """Items (split, image id, pyramid, sizes), in any order."""
    by_key = {(split, image_id): item for split, image_id, *item in items}
    splits = {split: [i for s, i in by_key if s == split] for split, _ in by_key}
    with atomic(folder) as scratch:
        scratch.mkdir()
        for shard in shards_of(splits):
            of_shard = ((i, *by_key[shard.split, i]) for i in shard.image_ids)
            write_shard(scratch / f"{shard.name}.h5", of_shard, dtype)
        write_index(scratch)
    return folder


def write_coded(folder: Path, quality: str, splits: list[Features], feature_codec: FeatureCodec, lmbda: float) -> Path:
    """`folder` as `coded` of dvc.yaml: the folder <quality> of records, and the ledger <quality>.csv."""
    paths, level = [], feature_codec.codec.level(lmbda)
    with atomic(folder / quality) as scratch:
        scratch.mkdir()
        for features in splits:
            for shard in shards_of({features.split: features.image_ids}):
                path = scratch / f"{shard.name}.h5"
                compress_shard(path, features, shard.image_ids, feature_codec, level)
                paths.append(folder / quality / path.name)
    write_csv(folder / f"{quality}.csv", read_ledger(paths))
    return folder / quality


def evaluate(
    folder: Path, features: Features, allocations: dict[str, pd.DataFrame], *args: Any
) -> dict[str, tuple[Choices, dict[Point, Matches]]]:
    """Task -> its choices, and the matches of all points, by a file in `folder`; `args` as `evaluator` has them."""
    choices = {task: choices_of(allocation) for task, allocation in allocations.items()}
    detector, coded, qualities, feature_codec, predictor, truth = args
    measure = evaluator(detector, features, coded, qualities, feature_codec, predictor, choices, truth)
    path = folder / "matches.h5"
    measure(features.image_ids, path)
    return {task: (chosen, dict(read_matches([path], task, chosen.points))) for task, chosen in choices.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Of two state dicts."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
