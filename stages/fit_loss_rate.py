"""Coded + losses of the fit split -> loss-rate, rate-phi and mean curves per scale, for one task and codec."""

from pathlib import Path

from stages.lib.files import write_json
from stages.lib.loss_rate import fit_scales, read_curves
from stages.lib.params import entry, load_params


def main(coded: Path, losses: Path, task: str, out: Path) -> None:
    write_json(out, fit_scales(read_curves(coded, losses, list(load_params()["lambdas"]), task, "fit")))


if __name__ == "__main__":
    entry(main)
