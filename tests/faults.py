"""Kills, lost workers, full disks and flipped bytes in every stage of profiles/smoke -> what became of each.

python -m tests.faults      minutes; prints tables, and ends with exit code 1 where anything was not as it must be

After one undisturbed run, every fault is made in a copy of its folder, and every rerun must end with the same bytes:

    killed      SIGKILL to the process group of a stage, at a random moment: its outputs are absent, or whole
    lost        SIGKILL to a worker, as of a machine that is out of memory: one line, finished shards stay
    starved     less memory than a stage needs: one line, finished shards stay
    full        less space than a stage writes: one line, no half output
    flipped     one bit of a stored file, for stages that read it: one line that names it or its folder, or DVC sees it

Stages run on the CPU, forks of a process that has made their imports. Texts and pictures: DVC alone has a checksum.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for one

import torch
from dvc.repo import Repo
from tabulate import tabulate

from stages.lib import ablation, benchmarking, bound, coding, examples, features, figures, online  # noqa: F401  see above
from stages.lib.files import RESERVE
from stages.lib.planning import address_of, become, begin, in_order
from tests.test_pipeline import change, dvc, project

KILLS, LOSSES, LIMITS, FLIPS = 10, 2, 4, 3  # of each stage; of each kind of file and stage that reads it
MEMORY = 4, 16  # squared, MiB: what a starved stage gets beyond what it has once its imports are made
SMALLER = {"fit: 16, test: 10": "fit: 6, test: 4", "batch: 2\n": "batch: 1\n"}  # as many faults in less time
LANES, SHARD_IMAGES, PATIENCE = 2, 2, 300  # faults at a time; so few that there are several shards; seconds
SHARDED = ("extract", "compress", "measure_uncoded", "measure", "evaluate", "ablate")
SCRATCH = (".tmp-", ".unfinished-")
CODED, STUDY = "data/coded/small", "data/evaluations/studies/detection-elic"
KINDS = {  # kind of file: its files, the stages that read it
    "picture of the data set": ("data/dataset/*/*.jpg", "train_model@small extract@small illustrate@small-elic"),
    "annotations": ("data/dataset/*/*.json", "train_model@small measure_uncoded@small"),
    "splits": ("data/dataset/*.json", "train_model@small extract@small measure_uncoded@small"),
    "detector": ("data/models/*.pt", "extract@small train_mfip@small-hevc"),
    "index of features": ("data/features/small/*.csv", "fit_prediction@small compress@small-hevc-q1"),
    "features of train": ("data/features/small/train*.h5", "fit_prediction@small train_codec@small-hevc"),
    "features": ("data/features/small/[ft][ie]*.h5", "compress@small-hevc-q1 measure_uncoded@small"),
    "prediction": ("data/predictions/*.pt", "measure_uncoded@small evaluate@small-hevc"),
    "codec": ("data/codecs/small/elic.pt", "compress@small-elic-q1 evaluate@small-elic"),
    "rotation of hevc": ("data/codecs/small/hevc.pt", "compress@small-hevc-q1 evaluate@small-hevc"),
    "coded shard, elic": (f"{CODED}/elic/*/*.h5", "measure@small-elic evaluate@small-elic"),
    "coded shard, hevc": (f"{CODED}/hevc/*/*.h5", "measure@small-hevc evaluate@small-hevc"),
    "ledger": (f"{CODED}/hevc/*.csv", "measure@small-hevc fit_loss_rate@keypoints-hevc evaluate@small-hevc report"),
    "uncoded losses": ("data/losses/small/uncoded.csv", "measure@small-hevc allocate@keypoints-hevc report"),
    "losses": ("data/losses/small/hevc/*.csv", "fit_loss_rate@keypoints-hevc train_mfip@small-hevc report"),
    "loss-rate model": ("data/loss_rate/small/*/*.json", "allocate@detection-elic allocate@keypoints-hevc report"),
    "importance": ("data/mfip/small/elic/*.csv", "allocate@detection-elic illustrate@small-elic report"),
    "errors of MFIP": ("data/mfip/small/*/*.json", "report"),
    "MFIP": ("data/mfip/small/elic/*.pt", "ablate@detection-elic"),
    "allocations": ("data/allocations/small/elic/*.csv", "evaluate@small-elic bound@detection-elic"),
    "evaluation": ("data/evaluations/small/*/*/*.csv", "report"),
    "bound": (f"{STUDY}/bound/**/*.csv", "report"),
    "ablation": (f"{STUDY}/ablation/*.csv", "report"),
    "illustration": ("data/illustrations/small/*/*.json", "report"),
    "picture of an illustration": ("data/illustrations/small/*/*.webp", "report"),
    "loss curve": ("reports/codecs/small/*/loss.csv", "report"),
}
NO_CHECKSUM = (".csv", ".json", ".jpg", ".webp")


class Stage(NamedTuple):
    """One stage of the profile."""

    address: str
    command: str
    outs: list[str]
    seconds: float  # that it takes undisturbed, without workers
    written: int  # bytes


class Found(NamedTuple):
    """What became of a fault."""

    table: str
    row: dict[str, Any]
    violations: list[str]


# ---------------------------------------------------------------- a profile's folder and its stages

whole: Path  # the undisturbed run
stages: dict[str, Stage] = {}
lane: Path  # of this process: a copy to make faults in


def content(folder: Path, outs: list[str]) -> dict[str, str]:
    """Every file of these outputs -> its hash."""
    places = [place for out in outs for place in (folder / out, *(folder / out).rglob("*")) if place.is_file()]
    return {str(place.relative_to(folder)): hashlib.md5(place.read_bytes()).hexdigest() for place in places}


def clear(folder: Path, outs: list[str]) -> None:
    """What DVC does before it runs a stage."""
    for place in (folder / out for out in outs):
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def start(stage: Stage, folder: Path, workers: int, memory: int | None = None) -> int:
    log = folder.with_suffix(".log")  # beside the lane: its disk may be full
    log.write_text("")  # a kill may come before the fork does that

    def run() -> None:
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
        become(stage.command, folder, workers)

    process = begin(run, log)
    os.setpgid(process, process)
    return process


def end(process: int, folder: Path) -> tuple[int, str]:
    """Exit status (below 0: a signal) and last words of a stage, which is killed if it hangs."""
    deadline = time.monotonic() + PATIENCE
    while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.01)
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, folder.with_suffix(".log").read_text(errors="replace").strip()


def undisturbed(dvc_stage: Any) -> Stage:
    outs = [str(Path(out.fs_path).relative_to(whole)) for out in dvc_stage.outs]
    stage, begun = Stage(address_of(dvc_stage), dvc_stage.cmd, outs, 0, 0), time.perf_counter()
    status, said = end(start(stage, whole, 0), whole)
    if status:
        sys.exit(f"{stage.address} failed undisturbed: {said}")
    written = sum((whole / name).stat().st_size for name in content(whole, outs))
    return stage._replace(seconds=time.perf_counter() - begun, written=written)


class Trial:
    """One stage in this lane, and what was not as it must be."""

    def __init__(self, address: str):
        self.stage, self.rng, self.violations = stages[address], random.Random(address), []
        self.should = content(whole, self.stage.outs)

    def start(self, workers: int = 2, memory: int | None = None) -> int:
        clear(lane, self.stage.outs)
        return start(self.stage, lane, workers, memory)

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.violations.append(f"{self.stage.address}: {what}")

    def shards(self) -> list[Path]:
        return [path for path in lane.glob("data/**/.unfinished-*/*/*") if not path.name.startswith(SCRATCH)]

    def expect_nothing_half(self, when: str) -> None:
        """A folder is there with all its files; those under reports/ are filled file by file."""
        there = {name: of for name, of in content(lane, self.stage.outs).items() if ".tmp-" not in name}
        for out in self.stage.outs:
            of_out = {name for name in self.should if name == out or name.startswith(f"{out}/")}
            all_of_it = out.startswith("reports/") or not (lane / out).exists() or of_out <= there.keys()
            self.expect(all_of_it, f"{when}: {out} is there in part")
        self.expect(there.items() <= self.should.items(), f"{when}: other bytes in {set(there) - set(self.should)}")

    def expect_one_line(self, status: int, said: str, *words: str) -> None:
        right = status == 2 and "Traceback" not in said and all(word in said.splitlines()[-1] for word in words)
        self.expect(right, f"ended with {status} and {said[-500:]!r}, not with one line about {words}")

    def finish(self, when: str) -> None:
        """Run again, undisturbed."""
        status, said = end(self.start(), lane)
        same = status == 0 and content(lane, self.stage.outs) == self.should
        self.expect(same, f"run again {when}: ended with {status}, {'same' if same else 'other'} bytes: {said[-500:]}")
        left = [str(path) for path in lane.rglob("*") if path.name.startswith(SCRATCH)]
        self.expect(not left, f"run again {when}: left {left}")

    def restore(self, *names: str) -> None:
        """As in the undisturbed run."""
        clear(lane, [*names, *(str(folder.relative_to(lane)) for folder in lane.rglob(".unfinished-*"))])
        for name in names:
            (shutil.copytree if (whole / name).is_dir() else shutil.copy2)(whole / name, lane / name)


# ---------------------------------------------------------------- faults


def killed(address: str) -> Found:
    """Kills of the stage alone, and with two workers."""
    trial, kills, resumed, begun = Trial(address), 0, 0, time.perf_counter()
    while kills < KILLS:
        process = trial.start(workers=kills % 2 * 2)
        time.sleep(trial.rng.uniform(0, trial.stage.seconds))
        os.killpg(process, signal.SIGKILL)
        status, said = end(process, lane)
        if status == 0:  # it was faster this time
            continue
        trial.expect(status == -signal.SIGKILL, f"failed before its kill: {said[-500:]}")
        kills, resumed = kills + 1, resumed + bool(trial.shards())
        trial.expect_nothing_half("after a kill")
        trial.finish("after a kill")
    row = {"stage": address, "kills": kills, "with finished shards": resumed}
    return Found("killed", row | {"seconds": time.perf_counter() - begun}, trial.violations)


def lost(address: str) -> Found:
    """One of two workers is killed once a shard is finished."""
    trial, losses, kept = Trial(address), 0, 0
    while losses < LOSSES:
        process = trial.start()
        done: list[Path] = []
        while not done and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.01)
            done = trial.shards()
        workers = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if workers:
            os.kill(int(trial.rng.choice(workers)), signal.SIGKILL)
        status, said = end(process, lane)
        if status == 0:  # there was no work left for a worker
            continue
        losses, kept = losses + 1, kept + len(done)
        trial.expect_one_line(status, said, "a worker was killed", "run it again")
        trial.expect(all(path.exists() for path in done), "a finished shard is gone")
        trial.expect_nothing_half("after the loss of a worker")
        trial.finish("after the loss of a worker")
    return Found("lost", {"stage": address, "workers lost": losses, "shards kept": kept}, trial.violations)


def starved(address: str) -> Found:
    """Memory ends at a random amount. Who is ended by a library in C cannot say so, so it is a worker that works."""
    trial, ended, kept = Trial(address), 0, 0
    for _ in range(LIMITS):
        mib = trial.rng.uniform(*MEMORY) ** 2
        status, said = end(trial.start(1, int(mib * 2**20)), lane)
        if status:  # else that was enough
            trial.expect_one_line(status, said, "out of memory")
            trial.expect_nothing_half(f"with {mib:.0f} MiB more")
            ended, kept = ended + 1, kept + len(trial.shards())
            trial.finish(f"after {mib:.0f} MiB more")
    return Found("starved", {"stage": address, "memory ended": ended, "shards kept": kept}, trial.violations)


def full(address: str) -> Found:
    """Half, then nothing of the space that the stage takes; HDF5 files want a reserve beside it."""
    trial, ballast, refused = Trial(address), lane / "ballast", 0
    of_files = RESERVE * any(name.endswith(".h5") for name in trial.should)
    for space in sorted({of_files + trial.stage.written // 2, trial.stage.written // 2, 0}, reverse=True):
        clear(lane, trial.stage.outs)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(lane).free - space, 1))
        status, said = end(trial.start(), lane)
        ballast.unlink()
        refused += status != 0
        trial.expect_one_line(status, said, "the disk", "free some space")
        trial.expect_nothing_half(f"with {space} bytes of space")
    trial.finish("with enough space")
    return Found("full", {"stage": address, "writes, kB": trial.stage.written / 1e3, "told": refused}, trial.violations)


def flipped(kind: str, address: str) -> Found:
    """Bits of a file's first and last bytes, and of any."""
    trial, pattern = Trial(address), KINDS[kind][0]
    rng, outcomes = random.Random(f"{kind} {address}"), dict.fromkeys(("named", "DVC alone", "same"), 0)
    for n in range(FLIPS):
        file = rng.choice(sorted(lane.glob(pattern)))
        at = flip(file, rng, 100 if n < 1 else -100 if n < 2 else 0)
        status, said = end(trial.start(0), lane)
        same = status == 0 and content(lane, trial.stage.outs) == trial.should
        name = str(file.relative_to(lane))
        what = f"byte {at} of {name} flipped"
        outcomes["named"] += bool(status)
        outcomes["same"] += same
        if status:
            trial.expect_one_line(status, said, re.split(r"[*[]", pattern)[0])
            trial.expect_nothing_half(what)
        elif not same:
            outcomes["DVC alone"] += 1
            trial.expect(name.endswith(NO_CHECKSUM), f"{what}: another result")
        trial.restore(name, *trial.stage.outs)
    return Found("flipped", {"kind": kind, "stage": address, "flips": FLIPS} | outcomes, trial.violations)


def flip(file: Path, rng: random.Random, within: int) -> int:
    """One bit of a random byte, of the first or last so many or of all (0), in a file in its place -> which byte."""
    data = bytearray(file.read_bytes())
    at = rng.choice(range(len(data))[:within] if within > 0 else range(len(data))[within:])
    data[at] ^= 1 << rng.randrange(8)
    file.unlink()  # it may be a link
    file.write_bytes(data)
    return at


def seen_by_dvc(kind: str) -> Found:
    """A bit of one file of the undisturbed run, which DVC has hashed."""
    file = random.Random(kind).choice(sorted(whole.glob(KINDS[kind][0])))
    data = file.read_bytes()
    flip(file, random.Random(kind), 0)
    with chdir(whole):
        status = Repo().status(["dvc.yaml"])
    changes = [change for of_stage in status.values() for change in of_stage if isinstance(change, dict)]
    named = {Path(path) for change in changes for found in change.values() for path in found}
    file.write_bytes(data)
    own = [str(path) for path in named if file.relative_to(whole).is_relative_to(path)]
    row = {"kind": kind, "dvc status names": " ".join(own)}
    return Found("dvc", row, [] if own else [f"dvc status does not name {file.relative_to(whole)}: {status}"])


@contextmanager
def lanes() -> Iterator[bool]:
    """Copies of the undisturbed run, each on a small disk of its own; yields whether that is allowed here."""
    places, mounted = [whole.with_name(f"lane-{n}") for n in range(LANES)], []
    size = 3 * sum(stage.written for stage in stages.values()) + 2 * RESERVE
    try:
        for place in places:
            place.mkdir()
            words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
            if subprocess.run(words, capture_output=True).returncode == 0:
                mounted.append(place)
            shutil.copytree(whole, place, dirs_exist_ok=True)
        yield len(mounted) == LANES
    finally:
        for place in mounted:
            subprocess.run(["umount", place], check=True)


def take_lane(number: Any) -> None:
    """What a process of the pool does first."""
    global lane
    with number.get_lock():
        lane = whole.with_name(f"lane-{number.value}")
        number.value += 1


def call(fault: Callable[..., Found], *names: str) -> Found:
    found = fault(*names)
    print(found.table, *names, *found.violations, sep="; ", flush=True)
    return found


def all_faults() -> list[Found]:
    with lanes() as are_disks:
        faults = [(killed, address) for address in stages]
        faults += [(fault, a) for fault in (lost, starved) for a in stages if a.partition("@")[0] in SHARDED]
        faults += [(flipped, kind, reader) for kind, (_, readers) in KINDS.items() for reader in readers.split()]
        if are_disks:
            faults += [(full, address) for address in stages]
        else:
            print("full: left out, no file system can be mounted here", flush=True)
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(LANES, context, take_lane, (context.Value("i", 0),)) as pool:
            found = [future.result() for future in [pool.submit(call, *fault) for fault in faults]]
        results = [content(whole.with_name(name), ["data", "reports"]) for name in ("smoke", "lane-0", "lane-1")]
        same = results[0] == results[1] == results[2]
        found.append(Found("all", {"files": len(results[0])}, [] if same else ["the copies differ at the end"]))
    dvc(whole, "commit", "-f", "-q", "dvc.yaml")
    return found + [call(seen_by_dvc, kind) for kind in KINDS]


def main() -> None:
    global whole
    begun = time.perf_counter()
    torch.set_num_threads(1)
    features.SHARD_IMAGES = coding.SHARD_IMAGES = SHARD_IMAGES
    del figures.FORMATS["png"]  # a second file of each figure, as long in the making
    with TemporaryDirectory(prefix="faults-") as name:
        whole = project(Path(name).resolve())
        for numbers, smaller in SMALLER.items():
            change(whole, numbers, smaller)
        for stage in in_order(Repo(whole)):
            if Path(stage.path).parent == whole:
                stages[address_of(stage)] = undisturbed(stage)
        found = all_faults()
    for table in dict.fromkeys(of.table for of in found):
        print(f"\n{table}\n{tabulate([of.row for of in found if of.table == table], 'keys', floatfmt='.1f')}")
    violations = [violation for of in found for violation in of.violations]
    print(f"\n{len(violations)} violations, {(time.perf_counter() - begun) / 60:.0f} minutes", *violations, sep="\n")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
