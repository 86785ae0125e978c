"""Curves and predicted importance of test + loss-rate model -> phi per method, operating point, image and scale."""

from pathlib import Path

from stages.lib.allocation import allocate, read_importance
from stages.lib.command import entry
from stages.lib.files import write_csv
from stages.lib.loss_rate import read_curves, read_fit
from stages.lib.params import load_params, precode_of


def main(coded: Path, losses: Path, uncoded: Path, loss_rate: Path, importance: Path, task: str, out: Path) -> None:
    params = load_params()
    qualities = list(params["lambdas"])
    test = read_curves(coded, losses, uncoded, qualities, task, "test")
    predicted = read_importance(importance, "test", test.image_ids)
    fit, points = read_fit(loss_rate, len(qualities)), params["tasks"][task]["points"]
    write_csv(out, allocate(test, fit, predicted, precode_of(params), points))


if __name__ == "__main__":
    entry(main)
