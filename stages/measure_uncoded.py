"""Features + detector -> each image's own accuracy with uncoded features, per task, and its loss without a scale."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from stages.lib.command import entry
from stages.lib.features import Features, Shard, shards_of
from stages.lib.files import read_csv, write_csv
from stages.lib.measuring import read_truths, uncoded_accuracies
from stages.lib.models import load_model
from stages.lib.params import load_params
from stages.lib.prediction import load as load_predictor
from stages.lib.shards import map_shards, unfinished


def main(splits: Path, weights: Path, features: Path, prediction: Path, model: str, out: Path) -> None:
    described = load_params()["models"][model]
    paths = splits, weights, features, prediction
    image_ids = {split: Features(features, split).image_ids for split in ("fit", "test")}
    with unfinished(out, *paths, described) as folder:
        load = partial(measurer, *paths, described)
        found = map_shards(load, shards_of(image_ids), folder, "measure uncoded", ".csv")
        frame = pd.concat(map(read_csv, found))
        write_csv(out, frame.sort_values(["split", "task", "image_id", "scale"], kind="stable"))


def measurer(
    splits: Path, weights: Path, features: Path, prediction: Path, described: dict[str, Any]
) -> Callable[[Shard, Path], None]:
    """What writes the rows of a shard."""
    detector, predictor = load_model(weights, described), load_predictor(prediction)
    parts = {s: (Features(features, s), read_truths(splits, s, described["tasks"])) for s in ("fit", "test")}

    def measure(shard: Shard, path: Path) -> None:
        part, truth = parts[shard.split]
        write_csv(path, uncoded_accuracies(detector, part, predictor, truth, shard.image_ids))

    return measure


if __name__ == "__main__":
    entry(main)
