"""Profile -> what its run will take here: items, disk, memory and hours of each stage, from samples of it.

python -m stages.plan [PROFILE]     the folder of a profile, else the working folder
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from stages.lib import measuring  # noqa: F401  its imports are made before the samples are forked
from stages.lib.command import run
from stages.lib.planning import plan
from stages.lib.shards import workers


def main(profile: Path) -> None:
    print(table(plan(profile), max(workers(), 1), shutil.disk_usage(profile).free / 1e9))


def table(found: pd.DataFrame, count: int, free_gb: float) -> str:
    """What `plan` found, for one worker and for `count` of them."""
    serial, shared = (found["start_h"] + found["of_items_h"] / n for n in (1, count))
    shown = found[["stage", "runs", "items", "disk_gb", "peak_gb"]].assign(serial=serial, shared=shared)
    shown.loc[len(shown)] = {
        "stage": "all",
        "runs": found["runs"].sum(),
        "items": "",  # of one stage images, of another steps
        "disk_gb": found["disk_gb"].sum(),
        "peak_gb": found["peak_gb"].max(),
        "serial": serial.sum(),
        "shared": shared.sum(),
    }
    headers = ["stage", "runs", "items", "disk, GB", "peak memory of a process, GB"]
    headers += ["hours, 1 worker", f"hours, {count} workers"]
    rows = tabulate(shown.to_numpy().tolist(), headers, floatfmt=".3f", intfmt=",")
    return f"{rows}\n\nThe disk has {free_gb:.0f} GB free; where DVC's cache cannot link files, it needs them twice."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.plan", description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", type=Path, default=Path())
    run(parser, main)
