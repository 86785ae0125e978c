"""Bitstreams of all lambdas + detector -> per image, task and scale: the loss if it alone is coded, or skipped."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from stages.lib.coding import load_codec
from stages.lib.features import Features, Shard, shards_of
from stages.lib.files import atomic, read_csv, write_csv
from stages.lib.measuring import LOSSES, UNCODED, read_truths, single_scale_losses
from stages.lib.models import load_model
from stages.lib.params import entry, load_params
from stages.lib.prediction import load as load_predictor
from stages.lib.shards import map_shards, unfinished


def main(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    uncoded: Path,
    codec: Path,
    coded: Path,
    model: str,
    out: Path,
) -> None:
    """`coded` and `out` are folders, with <q>, <q>.csv and <q>.csv of each lambda."""
    params = load_params()
    described, qualities = params["models"][model], list(params["lambdas"])
    paths = splits, weights, features, prediction, uncoded, codec, coded
    image_ids = {split: Features(features, split).image_ids for split in ("fit", "test")}
    with unfinished(out, *paths, described, qualities) as folder:
        load = partial(measurer, *paths, described, qualities)
        found = map_shards(load, shards_of(image_ids), folder, "measure", ".csv")
        frame = pd.concat(map(read_csv, found)).sort_values(["split", "task", "image_id", "scale"], kind="stable")
        with atomic(out) as scratch:
            for quality, losses in frame.groupby("quality"):
                write_csv(scratch / f"{quality}.csv", losses[LOSSES])


def measurer(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    uncoded: Path,
    codec: Path,
    coded: Path,
    described: dict[str, Any],
    qualities: list[str],
) -> Callable[[Shard, Path], None]:
    """What writes the rows of a shard, of every quality."""
    detector, predictor = load_model(weights, described), load_predictor(prediction)
    feature_codec, clean, measures = load_codec(codec), read_csv(uncoded, UNCODED), {}
    for split in ("fit", "test"):
        part, truth = Features(features, split), read_truths(splits, split, described["tasks"])
        args = detector, part, coded, qualities, feature_codec, predictor, truth, clean
        measures[split] = single_scale_losses(*args)
    return lambda shard, path: write_csv(path, measures[shard.split](shard.image_ids))


if __name__ == "__main__":
    entry(main)
