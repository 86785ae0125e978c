"""Features + codec -> bitstreams + bit ledger, for one lambda."""

from pathlib import Path

from stages.lib.coding import load_codec, write_coded
from stages.lib.features import Features
from stages.lib.params import entry, load_params


def main(features: Path, codec: Path, quality: str, out: Path, ledger: Path) -> None:
    lmbda = load_params()["lambdas"][quality]
    splits = [Features(features, split) for split in ("fit", "test")]
    write_coded(out, ledger, splits, load_codec(codec), lmbda)


if __name__ == "__main__":
    entry(main)
