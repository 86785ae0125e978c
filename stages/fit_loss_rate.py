"""Coded + losses of the fit split -> loss-rate, rate-phi and mean curves per scale, for one task and codec."""

from pathlib import Path

from stages.lib.files import write_json
from stages.lib.loss_rate import fit_scales, read_curves
from stages.lib.params import entry, load_params


def main(coded: Path, losses: Path, task: str, out: Path) -> None:
    params = load_params()
    qualities = list(params["lambdas"])
    precode = qualities.index(params["mfip"]["precode"])
    write_json(out, fit_scales(read_curves(coded, losses, qualities, task, "fit"), precode))


if __name__ == "__main__":
    entry(main)
