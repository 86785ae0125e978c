"""A profile, run with few images and steps -> what each of its stages will take: items, disk, memory, hours.

The stages are those that DVC resolves from dvc.yaml; each runs in a fork of this process, without workers, in samples
of two sizes. What grows between the two is an item's, the rest the stage's own:

    hours(items, workers) = start + fixed + of_item * items / workers

What trains runs in a third one with more steps alone, as `train_codec` passes over images, too. Where images are
large, an image and quality takes minutes on a CPU, but a stage's own part is small: what codes, or decodes, then runs
once, for two of the qualities.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path
from resource import struct_rusage
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import networkx
import pandas as pd
import yaml
from dvc.repo import Repo

from stages.lib.params import check_params, load_params
from stages.lib.progress import progress
from stages.lib.schema import InputError

SAMPLE_PIXELS, SAMPLE = 2**19, (4, 8)  # images of a split in the smaller sample: by their size, between these
TRAIN_TIMES = 8  # as many images of `train`: one at least must show an object, for keypoints a person
GAUSS = (1 - 3**-0.5) / 2  # from either end of a range, where the quadrature of two points has them
BEFORE_CODING = ("prepare", "train_model", "extract", "fit_prediction", "train_codec", "measure_uncoded")
TRAINING = ("train_model", "train_codec")  # whose items are steps
EVERY_QUALITY = ("compress", "measure", "evaluate", "bound", "ablate", "illustrate")  # work for each of `lambdas`
SHARDED = ("extract", "compress", "measure_uncoded", "measure", "evaluate", "bound", "ablate")  # work for many workers


class Run(NamedTuple):
    """One stage of a sample."""

    stage: str  # as in dvc.yaml
    address: str  # with its item, as `dvc repro` takes it
    seconds: float
    cpu_seconds: float  # of its user and system time: what others do on the machine is not in them
    peak_mib: float
    written: int  # bytes


class Sample(NamedTuple):
    """A profile with fewer images, steps or qualities, and those of its stages that were run."""

    params: dict[str, Any]
    runs: list[Run]


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
        "report": 0,
    }
    of_test = ("allocate", "evaluate", "bound", "ablate", "illustrate")
    return images["test"] if stage in of_test else counts.get(stage, both)


def plan(profile: Path) -> pd.DataFrame:
    """Folder of a profile -> a row for each kind of stage: stage, runs, items, disk_gb, peak_gb, start_h, of_items_h.

    items: of all its runs; start_h: what does not become less with more workers.
    """
    with chdir(profile):
        params = load_params()
        start = start_seconds()
        side = max(model["image_size"]["max"] for model in params["models"].values())
        few = min(max(SAMPLE_PIXELS // side**2, SAMPLE[0]), SAMPLE[1])
        large = SAMPLE[0] * side**2 > SAMPLE_PIXELS
        step = 1 if large else few

        def ran(images: int, steps: int, wanted: list[str]) -> Sample:
            sample = sampled(params, images, steps, two_qualities=large)
            return Sample(sample, run_sample(sample, Path("dvc.yaml"), wanted))

        base = ran(few, step, [])
        addresses = [run.address for run in base.runs if not large or run.stage in BEFORE_CODING]
        trained = [
            run.address for run in base.runs if run.stage in TRAINING and items_of(params, run.stage, run.address)
        ]
        more_steps = ran(few, 2 * step, trained) if trained else Sample(base.params, [])
        return planned(params, base, ran(2 * few, step, addresses), more_steps, start)


def planned(
    params: dict[str, Any], base: Sample, more_images: Sample, more_steps: Sample, start: float
) -> pd.DataFrame:
    """What samples of a profile took, and a process until its imports are made, in seconds -> as `plan`.

    A stage of `base` alone is taken to have no part of its own.
    """
    others = [{run.address: run for run in sample.runs} for sample in (more_images, more_steps)]
    rows = []
    for run in base.runs:
        trains = run.stage in TRAINING
        other = others[trains].get(run.address)
        few, of_all = (items_of(p, run.stage, run.address) for p in (base.params, params))
        if other:
            more = items_of((more_steps if trains else more_images).params, run.stage, run.address)
            counts, first, second = [few, more, of_all], run, other
        else:
            counts, first, second = [0, few, of_all], run._replace(seconds=0, written=0), run
        fixed, of_items = _extrapolated(counts, first.seconds, second.seconds)
        if run.stage == "train_codec" and run.address in others[0]:  # its passes over the images, before any step
            of_train = [p["extract"]["train_images"] for p in (base.params, more_images.params, params)]
            _, passes = _extrapolated(of_train, run.seconds, others[0][run.address].seconds)
            fixed += passes * (1 - of_train[0] / of_train[2])
        # `compress` is a stage of one quality.
        share = len(params["lambdas"]) / len(base.params["lambdas"]) if run.stage in EVERY_QUALITY else 1
        runs = share if run.stage == "compress" else 1
        sharded = run.stage in SHARDED
        rows.append(
            {
                "stage": run.stage,
                "runs": runs,
                "items": of_all * runs,
                "disk_gb": sum(_extrapolated(counts, first.written, second.written)) * share / 1e9,
                "peak_gb": max(run.peak_mib, second.peak_mib) / 1024,
                "start_h": ((start + fixed) * runs + (0 if sharded else of_items * share)) / 3600,
                "of_items_h": of_items * share / 3600 if sharded else 0.0,
            }
        )
    how = dict.fromkeys(("runs", "items", "disk_gb", "start_h", "of_items_h"), "sum") | {"peak_gb": "max"}
    found = pd.DataFrame(rows).groupby("stage", sort=False).agg(how).reset_index()
    return found.round({"runs": 0, "items": 0}).astype({"runs": int, "items": int})


def _extrapolated(counts: list[int], first: float, second: float) -> tuple[float, float]:
    """What two samples took, and the items of both and of the profile -> (fixed, of the profile's items).

    The line goes through the larger sample, which tells more; neither of its two parts is below 0.
    """
    few, more, all_of_them = counts
    if more <= few:
        return second, 0.0
    of_item = min(max(second - first, 0) / (more - few), second / more)
    return second - of_item * more, of_item * all_of_them


def sampled(params: dict[str, Any], few: int, steps: int | None = None, two_qualities: bool = False) -> dict[str, Any]:
    """The profile with at most `few` images of a split, and steps of a training, for a folder anywhere.

    steps: where they are not `few`, too. two_qualities: of many the two whose mean is nearest to that of all, for what
    grows smoothly with the quality.
    """
    sample = json.loads(json.dumps(params))  # a copy, of plain values
    if two_qualities:
        names = list(sample["lambdas"])
        low = round(GAUSS * (len(names) - 1))
        sample["lambdas"] = {name: sample["lambdas"][name] for name in (names[low], names[-1 - low])}
        sample["mfip"]["precode"] = names[low]
    images, extract = sample["prepare"]["images"], sample["extract"]
    for split in images:
        images[split] = min(images[split], few * (TRAIN_TIMES if split == "train" else 1))
    extract["train_images"] = min(extract["train_images"], few)
    for section in (*sample["models"].values(), *sample["codecs"].values()):
        for key in ("steps", "entropy_steps"):
            if key in section:
                section[key] = min(section[key], few if steps is None else steps)
        for key in ("weights", "init"):
            if section.get(key) and Path(section[key]).suffix:  # else a name of torchvision's
                section[key] = str(Path(section[key]).resolve())
        for member in section.get("family", ()):
            member["weights"] = str(Path(member["weights"]).resolve())
    if sample["prepare"]["coco_root"]:
        sample["prepare"]["coco_root"] = str(Path(sample["prepare"]["coco_root"]).resolve())
    sample["root"] = str(Path(sample["root"]).resolve())
    check_params(sample)
    return sample


def run_sample(params: dict[str, Any], dvc_yaml: Path, wanted: Sequence[str] = ()) -> list[Run]:
    """Every stage of a sampled profile, or the `wanted` ones and those before them, in a folder that is soon gone.

    The folder lies where the profile does: its disk has space for features, and is the one whose speed counts.
    """
    with TemporaryDirectory(prefix=".tmp-sample-", dir=Path()) as name:
        return run_stages(params, dvc_yaml, Path(name).resolve(), wanted)


def run_stages(params: dict[str, Any], dvc_yaml: Path, folder: Path, wanted: Sequence[str] = ()) -> list[Run]:
    """As `run_sample`, in an empty folder (an absolute path), which then holds all that the stages wrote."""
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it tells of the folder's new repository
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    (folder / "dvc.yaml").write_bytes(dvc_yaml.read_bytes())
    stages = in_order(Repo.init(folder, no_scm=True), wanted)
    title = f"sample of {params['prepare']['images']['test']} images, stages"
    return [_run(stage, folder) for stage in progress(stages, title, len(stages))]


def in_order(repo: Repo, wanted: Sequence[str] = ()) -> list[Any]:
    """DVC's stages, or the `wanted` ones and those before them, each after those that it depends on."""
    graph = repo.index.graph  # a stage -> those that it depends on
    if wanted:
        ends = [stage for stage in graph if address_of(stage) in wanted]
        graph = graph.subgraph({*ends}.union(*(networkx.descendants(graph, stage) for stage in ends)))
    return list(reversed(list(networkx.lexicographical_topological_sort(graph, key=address_of))))


def address_of(stage: Any) -> str:
    """As `dvc repro` takes it in the profile's folder."""
    return stage.addressing.rpartition(":")[2]


def _run(stage: Any, folder: Path) -> Run:
    log, start = folder / "log", time.perf_counter()
    status, usage = forked(partial(become, stage.cmd, folder), log)
    seconds = time.perf_counter() - start
    if status:
        said = log.read_text(encoding="utf-8").strip().splitlines() or ["without a word"]
        how = f"was killed by signal {-status}, as where memory runs out" if status < 0 else f"failed: {said[-1]}"
        raise InputError(f"sample of {Path.cwd()}: stage {address_of(stage)} {how}")
    outs = [Path(out.fs_path) for out in stage.outs]
    files = [file for out in outs for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    cpu_seconds, peak_mib = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    return Run(address_of(stage).partition("@")[0], address_of(stage), seconds, cpu_seconds, peak_mib, written)


def become(command: str, folder: Path, workers: int = 0) -> None:
    """What a fork does to be the command of a stage."""
    module, *arguments = shlex.split(command.partition(" -m ")[2])  # PYTHONPATH=... python -m stages.<name> arguments
    os.chdir(folder)
    os.environ["WORKERS"] = str(workers)
    os.environ.pop("RAY_ADDRESS", None)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def forked(call: Callable[[], None], log: Path = Path(os.devnull)) -> tuple[int, struct_rusage]:
    """`call` in a fork, with all imports made, its words in `log` -> its exit status (below 0: a signal) and usage."""
    _, status, usage = os.wait4(begin(call, log), 0)
    return os.waitstatus_to_exitcode(status), usage


def begin(call: Callable[[], None], log: Path) -> int:
    """The same, not waited for -> the id of the process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            call()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return process


def start_seconds() -> float:
    """How long a stage's process takes until its imports are made."""
    start, path = time.perf_counter(), {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", "import stages.lib.measuring"], check=True, env=os.environ | path)
    return time.perf_counter() - start
