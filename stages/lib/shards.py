"""One function over the shards of a stage's work: here, in processes, or on a Ray cluster; a finished shard stays.

    load ---once in every worker--> function;   function(shard, path) writes one file

What comes out depends on neither executor, number of workers nor order: a shard is a fixed run of images, every worker
computes with one CPU thread, and the files are read in the order of the shards. Set by the environment, because
params.yaml holds what changes results:

    WORKERS=4        processes on this machine; 0: none but this one. Else one per GPU (one GPU: 0), or one per core.
    RAY_ADDRESS=...  a Ray cluster of equal machines that share this file system; `local` starts one on this machine.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import multiprocessing
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import uuid4

import torch

from stages.lib.files import atomic, disk_check
from stages.lib.models import DEVICE
from stages.lib.params import PACKAGES
from stages.lib.progress import progress
from stages.lib.schema import InputError, is_out_of_memory

if TYPE_CHECKING:
    from stages.lib.features import Shard

RETRIES = 5  # of a shard whose Ray node is lost

Item = TypeVar("Item")
Result = TypeVar("Result")
Load = Callable[[], Callable[[Item], Result]]  # must be picklable where workers are no forks: on GPUs and on Ray
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of all cores in a period, where a container has a limit


def map_shards(
    load: Callable[[], Callable[[Shard, Path], None]], shards: list[Shard], folder: Path, name: str, suffix: str = ".h5"
) -> list[Path]:
    """The files of the shards in `folder`, in the order of the shards; those that are there are not made again.

    Raises InputError as soon as one is made if the disk cannot hold as much for the other images.
    """
    paths = {shard.name: folder / f"{shard.name}{suffix}" for shard in shards}
    missing = [shard for shard in shards if not paths[shard.name].exists()]
    todo, checked = sum(len(shard.image_ids) for shard in missing), False
    with closing(execute(partial(_writer, load, paths), missing, name)) as finished:  # its workers end with the block
        for shard, size in progress(finished, name, todo, lambda done: len(done[0].image_ids)):
            if not checked:
                disk_check(folder, size / len(shard.image_ids) * (todo - len(shard.image_ids)))
                checked = True
    return list(paths.values())


def map_in_memory(function: Callable[[Item], Result], items: Sequence[Item], name: str) -> list[Result]:
    """The results in the order of the items; for work that is soon done again.

    Unlike that of shards it stays on this machine, and with a GPU in this process: `function` may hold what it likes,
    a detector for example, as forks share it.
    """
    numbered = list(enumerate(items))
    found = execute(lambda: lambda pair: function(pair[1]), numbered, name, anywhere=False)
    return [result for _, result in sorted((item[0], result) for item, result in progress(found, name, len(numbered)))]


@contextmanager
def unfinished(out: Path, *made_from: Any) -> Iterator[Path]:
    """The folder in which the shards of `out` gather; it outlives a killed stage, and goes when the block ends well.

    It is found again by what the shards are made from: `made_from` (a file or folder counts by the sizes and times of
    its files), the code, the libraries and the kind of device. What was made from something else is removed.
    """
    home = out.parent / f".unfinished-{out.name}"
    folder = home / _fingerprint(made_from)
    if home.is_dir():
        for other in home.iterdir():
            if other != folder:
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    if "RAY_ADDRESS" not in os.environ:  # where a node taken for lost may still write
        for half in folder.glob(".tmp-*"):  # a killed worker's
            half.unlink()
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            shutil.rmtree(home)
        raise
    shutil.rmtree(home)


def publish(paths: list[Path], folder: Path) -> None:
    """Shards -> the same files in `folder`, without a copy of the data where the file system has hard links.

    They stay where they are, too: a killed stage finds them again.
    """
    folder.mkdir()
    for path in paths:
        try:
            os.link(path, folder / path.name)
        except OSError:  # some that are shared or mounted from elsewhere refuse it
            shutil.copyfile(path, folder / path.name)


def _fingerprint(made_from: Any) -> str:
    code = sorted(Path(__file__).parent.parent.rglob("*.py"))
    about = [path.read_bytes() for path in code]
    about += [repr(_identity(part)).encode() for part in made_from]
    about += [line.encode() for line in _machine()]
    return hashlib.sha256(b"\0".join(about)).hexdigest()[:16]


def _machine() -> list[str]:
    """What else a result depends on: versions of the libraries, kind of device."""
    if DEVICE.type == "cuda":
        kinds = {torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())}
    else:
        fast = torch.cpu._is_avx512_bf16_supported()  # then networks compute in another type
        kinds = {f"{torch.backends.cpu.get_cpu_capability()} {fast}"}
    return [*(f"{package} {version(package)}" for package in PACKAGES), f"{DEVICE} {sorted(kinds)}"]


def _identity(part: Any) -> Any:
    if not isinstance(part, Path):
        return part
    files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part]
    return [(str(file), status.st_size, status.st_mtime_ns) for file, status in ((f, f.stat()) for f in files)]


def _writer(load: Callable[[], Callable[[Shard, Path], None]], paths: dict[str, Path]) -> Callable[[Shard], int]:
    """Shard -> its file's bytes, told by who wrote it: other machines may not see a new file at once."""
    function = load()

    def write(shard: Shard) -> int:
        # A node that Ray has lost may be alive, and still write the shard that is made elsewhere.
        with atomic(paths[shard.name], f"{uuid4().hex}-") as scratch:
            function(shard, scratch)
            return scratch.stat().st_size

    return write


# ---------------------------------------------------------------- executors


def execute(
    load: Load[Item, Result], items: Sequence[Item], name: str, anywhere: bool = True
) -> Generator[tuple[Item, Result], None, None]:
    """Every item with its result, as they are finished. What `function` raises is raised here; no item is begun then.

    name: of the work, for the message of InputError when a worker is killed. anywhere: `load` is picklable.
    """
    if not items:
        return
    try:
        if anywhere and "RAY_ADDRESS" in os.environ:
            yield from _on_ray(load, items, name)
        elif count := workers() if anywhere else forks():
            yield from _in_processes(load, items, min(count, len(items)), name)
        else:
            yield from _here(load, items)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "what is finished is kept; run the stage again with fewer WORKERS, or lower models.*.image_size"
        raise InputError(f"{name}: out of memory ({error}); {remedy}") from None


def workers() -> int:
    """How many processes work on this machine besides this one."""
    text = os.environ.get("WORKERS")
    if text is None:
        if DEVICE.type == "cpu":  # small networks gain little from a second thread, all from a second process
            return cores()
        return torch.cuda.device_count() if torch.cuda.device_count() > 1 else 0
    if not text.isdecimal():
        raise InputError(f"WORKERS is {text!r}: it must be a whole number of at least 0; unset it for one per core")
    return int(text)


def forks() -> int:
    """How many processes `map_in_memory` begins; 0: none but this one."""
    return workers() if DEVICE.type == "cpu" else 0


def cores() -> int:
    """How many of them this process may keep busy, its container's limit included."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = QUOTA.read_text().split() if QUOTA.is_file() else ("max", "1")
    return allowed if quota == "max" else min(allowed, max(math.ceil(int(quota) / int(period)), 1))


def _here(load: Load[Item, Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        function = load()
        for item in items:
            yield item, function(item)
    finally:
        torch.set_num_threads(threads)


class _Failed(NamedTuple):
    """What a worker sends in place of a result."""

    error: Exception


def _in_processes(
    load: Load[Item, Result], items: Sequence[Item], count: int, name: str
) -> Iterator[tuple[Item, Result]]:
    """A pipe for each worker: a ProcessPoolExecutor's locks and threads may wait forever once one of them is lost."""
    # A fork needs no second import of torch; but CUDA does not survive one.
    context: Any = multiprocessing.get_context("fork" if DEVICE.type == "cpu" else "spawn")
    remedy = f"run it again, with WORKERS={count // 2}"
    todo, done = list(reversed(items)), 0
    processes, idle = [], []
    busy: dict[Connection, Item] = {}
    try:
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, load, os.getpid(), number))
                process.start()
                theirs.close()  # the pipe ends with the worker
                processes.append(process)
                idle.append(ours)
        except OSError as error:
            raise InputError(f"{name}: no {count} processes can be begun here ({error.strerror}); {remedy}") from None
        while todo or busy:
            try:
                while todo and idle:
                    idle[-1].send(todo[-1])
                    busy[idle.pop()] = todo.pop()
                finished: list[Any] = wait(list(busy))
                ready = [(busy.pop(pipe), pipe, pipe.recv()) for pipe in finished]
            except (EOFError, OSError):
                raise InputError(
                    f"{name}: a worker was killed, as a machine does that is out of memory; {done} of {len(items)} "
                    f"parts were done and are kept where the stage has shards: {remedy}"
                ) from None
            idle += [pipe for _, pipe, _ in ready]
            for item, _, found in ready:
                if isinstance(found, _Failed):
                    raise found.error
                yield item, found
                done += 1
    finally:
        try:
            for pipe in busy:  # after an error: what others have begun is finished
                with suppress(EOFError, OSError):
                    pipe.recv()
        finally:
            for process in processes:
                process.kill()
                process.join()


def _serve(pipe: Connection, load: Load, parent: int, number: int) -> None:
    """A worker: items received -> what `function` makes of them, or its error."""
    function = None
    with suppress(EOFError, BrokenPipeError):  # the stage was killed
        while True:
            item = pipe.recv()
            try:
                function = function or _begun(load, parent, number)
                pipe.send(function(item))
            except Exception as error:
                if not (isinstance(error, InputError) or is_out_of_memory(error)):
                    error.add_note(traceback.format_exc())  # where in the worker
                pipe.send(_Failed(error))


def _begun(load: Load[Item, Result], parent: int, number: int) -> Callable[[Item], Result]:
    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    return load()


def _end_with(parent: int) -> None:
    """A killed stage must not leave workers behind that are at work."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _on_ray(load: Load[Item, Result], items: Sequence[Item], name: str) -> Iterator[tuple[Item, Result]]:
    try:
        import ray
    except ImportError:
        raise InputError("RAY_ADDRESS is set, but Ray is missing: pip install -r requirements-ray.txt") from None
    if not ray.is_initialized():
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        try:
            ray.init(
                runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, logging_level=logging.WARNING
            )
        except (ConnectionError, ValueError) as error:
            address = os.environ["RAY_ADDRESS"]
            raise InputError(f"RAY_ADDRESS is {address!r}: no Ray cluster answers there ({error}); unset it") from None
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # max_calls: what a worker has loaded is for all its shards; with a GPU, Ray would begin another for each.
    task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, max_calls=0)(_run_on_ray)
    number, work, machine = next(_jobs), ray.put(load), _machine()
    waiting = {task.remote((os.getpid(), number), machine, work, os.getcwd(), item): item for item in items}
    try:
        while waiting:
            (finished,), _ = ray.wait(list(waiting))
            yield waiting.pop(finished), ray.get(finished)
    except ray.exceptions.RayTaskError as error:  # its words are the traceback of the worker
        raise error.cause from None if isinstance(error.cause, InputError) else error
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        why = str(error).partition("\n")[0]
        remedy = "what is finished is kept: run the stage again, with fewer tasks at a time on a node"
        raise InputError(f"{name}: Ray lost a worker {RETRIES + 1} times ({why}); {remedy}") from None
    finally:
        for left in waiting:
            ray.cancel(left)


_jobs = itertools.count()
_job: tuple[int, int] | None = None  # that this worker of Ray has loaded
_function: Callable | None = None


def _run_on_ray(job: tuple[int, int], machine: list[str], load: Load, folder: str, item: Any) -> Any:
    global _function, _job
    os.chdir(folder)  # paths of a stage begin at the profile's folder
    if _function is None or job != _job:
        # What one node codes, another decodes, and their entropy parameters must agree to the bit.
        for there, here in zip(machine, _machine(), strict=True):
            if here != there:
                node = f"node {platform.node()} of the Ray cluster has {here}, the machine of the stage {there}"
                raise InputError(f"{node}; use equal machines with equal libraries")
        torch.set_num_threads(1)
        _function, _job = load(), job
    return _function(item)
