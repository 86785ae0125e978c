"""Coded + losses of the fit split -> loss-rate, rate-phi and mean curves per scale, for one task and codec."""

from pathlib import Path

from stages.lib.command import entry
from stages.lib.files import write_json
from stages.lib.loss_rate import fit_scales, read_curves
from stages.lib.params import load_params, precode_of


def main(coded: Path, losses: Path, uncoded: Path, task: str, out: Path) -> None:
    params = load_params()
    qualities = list(params["lambdas"])
    write_json(out, fit_scales(read_curves(coded, losses, uncoded, qualities, task, "fit"), precode_of(params)))


if __name__ == "__main__":
    entry(main)
