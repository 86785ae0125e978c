"""A profile, run with few images and steps -> what each of its stages will take: items, disk, memory, hours.

The stages are those that DVC resolves from dvc.yaml; each runs in a fork of this process, without workers, at two
sample sizes. What grows between the two is an item's, the rest the stage's own:

    hours(items, workers) = start + fixed + of_item * items / workers
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import networkx
import pandas as pd
import yaml
from dvc.repo import Repo

from stages.lib.params import InputError, check_params, entry, load_params
from stages.lib.progress import progress

SAMPLE_PIXELS, SAMPLE = 2**19, (4, 8)  # images of a split in the smaller sample: by their size, between these
SHARDED = ("extract", "compress", "measure_uncoded", "measure", "evaluate", "ablate")  # work for many workers


class Run(NamedTuple):
    """One stage of a sample."""

    stage: str  # as in dvc.yaml
    address: str  # with its item, as `dvc repro` takes it
    seconds: float
    peak_mib: float
    written: int  # bytes


def items_of(params: dict[str, Any], stage: str, address: str) -> int:
    """What a stage works through: images, or steps of training."""
    images, of_train = params["prepare"]["images"], params["extract"]["train_images"]
    named = address.partition("@")[2]
    if stage == "train_model":
        return params["models"][named]["steps"]
    if stage == "train_codec":
        described = params["codecs"][next(codec for codec in params["codecs"] if named.endswith(f"-{codec}"))]
        return described.get("steps", 0) + described.get("entropy_steps", 0)
    both = images["fit"] + images["test"]
    counts = {
        "prepare": both + images["train"],
        "extract": both + of_train,
        "fit_prediction": of_train,
        "fit_loss_rate": images["fit"],
        "train_mfip": both,
        "report": 0,
    }
    of_test = ("allocate", "evaluate", "bound", "ablate", "illustrate")
    return images["test"] if stage in of_test else counts.get(stage, both)


def plan(profile: Path) -> pd.DataFrame:
    """Folder of a profile -> a row for each kind of stage: stage, runs, items, disk_gb, peak_gb, start_h, of_items_h.

    items: of all its runs; start_h: what does not become less with more workers.
    """
    with chdir(profile):
        return _plan(load_params())


def _plan(params: dict[str, Any]) -> pd.DataFrame:
    start = start_seconds()
    side = max(model["image_size"]["max"] for model in params["models"].values())
    few = min(max(SAMPLE_PIXELS // side**2, SAMPLE[0]), SAMPLE[1])
    samples = [sampled(params, few), sampled(params, 2 * few)]
    for sample in samples:
        check_params(sample)
    measured = [run_sample(sample, Path("dvc.yaml").resolve()) for sample in samples]
    rows = []
    for first, second in zip(*measured, strict=True):
        counts = [items_of(p, first.stage, first.address) for p in (*samples, params)]
        seconds, written = (
            _extrapolated(counts, getattr(first, of), getattr(second, of)) for of in ("seconds", "written")
        )
        sharded = first.stage in SHARDED
        rows.append(
            {
                "stage": first.stage,
                "runs": 1,
                "items": counts[-1],
                "disk_gb": sum(written) / 1e9,
                "peak_gb": max(first.peak_mib, second.peak_mib) / 1024,
                "start_h": (start + seconds[0] + (0 if sharded else seconds[1])) / 3600,
                "of_items_h": seconds[1] / 3600 if sharded else 0.0,
            }
        )
    how = dict.fromkeys(("runs", "items", "disk_gb", "start_h", "of_items_h"), "sum") | {"peak_gb": "max"}
    return pd.DataFrame(rows).groupby("stage", sort=False).agg(how).reset_index()


def _extrapolated(counts: list[int], first: float, second: float) -> tuple[float, float]:
    """What two samples took, and the items of both and of the profile -> (fixed, of the profile's items)."""
    few, more, all_of_them = counts
    of_item = max(second - first, 0) / (more - few) if more > few else 0.0
    return max(first - of_item * few, 0), of_item * all_of_them


def sampled(params: dict[str, Any], few: int) -> dict[str, Any]:
    """The profile with so many images of each split, and as many steps of each training; paths are absolute."""
    sample = yaml.safe_load(yaml.safe_dump(params))
    images = sample["prepare"]["images"]
    for split in images:
        images[split] = min(images[split], few)
    sample["extract"]["train_images"] = min(sample["extract"]["train_images"], few)
    for section in (*sample["models"].values(), *sample["codecs"].values()):
        for key in ("steps", "entropy_steps"):
            if key in section:
                section[key] = min(section[key], few)
        for key in ("weights", "init"):
            if section.get(key) and Path(section[key]).suffix:  # else a name of torchvision's
                section[key] = str(Path(section[key]).resolve())
        for member in section.get("family", ()):
            member["weights"] = str(Path(member["weights"]).resolve())
    if sample["prepare"]["coco_root"]:
        sample["prepare"]["coco_root"] = str(Path(sample["prepare"]["coco_root"]).resolve())
    return sample | {"root": str(Path(sample["root"]).resolve())}


def run_sample(params: dict[str, Any], dvc_yaml: Path) -> list[Run]:
    """Every stage of a sampled profile, in a folder that is gone afterwards."""
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it tells of the folder's new repository
    with TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name).resolve()
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
        (folder / "dvc.yaml").write_bytes(dvc_yaml.read_bytes())
        graph = Repo.init(name, no_scm=True).index.graph  # a stage -> those that it depends on
        stages = list(reversed(list(networkx.lexicographical_topological_sort(graph, key=lambda s: s.addressing))))
        return [_run(stage, folder) for stage in progress(stages, "sample, stages", len(stages))]


def _run(stage: Any, folder: Path) -> Run:
    words = shlex.split(stage.cmd)  # PYTHONPATH=... python -m stages.<name> arguments
    log, start = folder / "log", time.perf_counter()
    process = os.fork()  # with all imports made
    if process == 0:
        _become(words[3], words[4:], folder, log)
    _, status, usage = os.wait4(process, 0)
    if status:
        said = log.read_text(encoding="utf-8").strip().splitlines()
        raise InputError(f"stage {stage.addressing} failed on a sample: {said[-1] if said else 'without a word'}")
    outs = [Path(out.fs_path) for out in stage.outs]
    files = [file for out in outs for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    name = stage.addressing.rpartition(":")[2]
    return Run(words[3].removeprefix("stages."), name, time.perf_counter() - start, usage.ru_maxrss / 1024, written)


def _become(module: str, arguments: list[str], folder: Path, log: Path) -> None:
    """What a forked process does instead of this one."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        os.environ["WORKERS"] = "0"
        os.environ.pop("RAY_ADDRESS", None)
        sys.argv = [module, *arguments]
        entry(_main_of(module))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main_of(module: str) -> Callable[..., None]:
    return importlib.import_module(module).main


def start_seconds() -> float:
    """How long a stage's process takes until its imports are made."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import stages.lib.measuring"], check=True, env=_environment())
    return time.perf_counter() - start


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
