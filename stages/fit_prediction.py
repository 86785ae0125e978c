"""Features of `train` -> what stands in for a scale that is not sent, predicted from the next coarser one."""

from pathlib import Path

import torch

from stages.lib import prediction
from stages.lib.command import entry
from stages.lib.features import Features
from stages.lib.params import load_params


def main(features: Path, out: Path) -> None:
    torch.set_num_threads(1)  # the order of sums, and with it the last bits, would follow the number of cores
    prediction.save(out, prediction.fit(Features(features, "train"), load_params()["seed"]))


if __name__ == "__main__":
    entry(main)
