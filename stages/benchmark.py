"""Codecs -> reports/benchmark.json: speed beside its limit and beside a plain loop with compressai, peak memory.

Run in a profile's folder, on a machine that does nothing else, after `dvc repro train_codec@small-elic`.
"""

import argparse
from pathlib import Path

from stages.lib.benchmarking import benchmark, table
from stages.lib.files import write_json
from stages.lib.online import run
from stages.lib.params import load_params

DATA, OUT = Path("data"), Path("reports/benchmark.json")
COCO_PLANE = (2000, 2736)  # 256 channels of 200 x 304 in tiles of three: scale 0 of an image of 800 x 1216 px


def main(coco: bool, size: tuple[int, int]) -> None:
    report = benchmark(load_params(), DATA, tuple(size) if coco else None)
    write_json(OUT, report)
    print(table(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.benchmark", description=__doc__)
    parser.add_argument("--coco", action="store_true", help="the paper's networks on a plane of COCO size, too")
    parser.add_argument("--size", type=int, nargs=2, default=COCO_PLANE, metavar=("H", "W"), help="of that plane")
    run(parser, main)
