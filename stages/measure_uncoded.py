"""Features + detector -> each image's own accuracy with uncoded features, per task, and its loss without a scale."""

from pathlib import Path

import pandas as pd

from stages.lib.coco import ground_truth, load_split
from stages.lib.features import Features
from stages.lib.files import write_csv
from stages.lib.measuring import truths, uncoded_accuracies
from stages.lib.models import load_model
from stages.lib.params import entry, load_params
from stages.lib.prediction import load as load_predictor


def main(splits: Path, weights: Path, features: Path, prediction: Path, model: str, out: Path) -> None:
    described = load_params()["models"][model]
    detector, predictor, frames = load_model(weights, described), load_predictor(prediction), []
    for split in ("fit", "test"):
        part = load_split(splits, split)
        truth = truths({task: ground_truth(part, task) for task in described["tasks"]})
        frames.append(uncoded_accuracies(detector, Features(features, split), predictor, truth))
    write_csv(out, pd.concat(frames, ignore_index=True))


if __name__ == "__main__":
    entry(main)
