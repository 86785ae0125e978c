"""Bitstreams of all lambdas + detector -> per image, task and scale: the loss if it alone is coded, or skipped."""

from pathlib import Path

import pandas as pd

from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import load_codec
from stages.lib.features import Features
from stages.lib.files import atomic, read_csv, write_csv
from stages.lib.measuring import single_scale_losses, truths
from stages.lib.models import load_model
from stages.lib.params import entry, load_params
from stages.lib.prediction import load as load_predictor


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
    """`coded` and `out` are folders, with files <q>.h5, <q>.csv and <q>.csv of each lambda."""
    params = load_params()
    described = params["models"][model]
    detector, predictor = load_model(weights, described), load_predictor(prediction)
    feature_codec, clean, frames = load_codec(codec), read_csv(uncoded), []
    for split in ("fit", "test"):
        part = load_split(splits, split)
        truth = truths({task: ground_truth(part, task) for task in described["tasks"]})
        images, lambdas = Features(features, split), list(params["lambdas"])
        frames.append(single_scale_losses(detector, images, coded, lambdas, feature_codec, predictor, truth, clean))
    losses = pd.concat(frames)
    with atomic(out) as scratch:
        for quality in params["lambdas"]:
            write_csv(scratch / f"{quality}.csv", losses[losses["quality"] == quality].drop(columns="quality"))


if __name__ == "__main__":
    entry(main)
