"""Curves and predicted weights of test + loss-rate model -> phi per method, operating point, image and scale."""

from pathlib import Path

from stages.lib.allocation import allocate, read_weights
from stages.lib.files import read_json, write_csv
from stages.lib.loss_rate import read_curves
from stages.lib.params import entry, load_params


def main(coded: Path, losses: Path, loss_rate: Path, weights: Path, task: str, out: Path) -> None:
    params = load_params()
    test = read_curves(coded, losses, list(params["lambdas"]), task, "test")
    predicted = read_weights(weights, "test", test.image_ids)
    write_csv(out, allocate(test, read_json(loss_rate), predicted, params["tasks"][task]["points"]))


if __name__ == "__main__":
    entry(main)
