"""Shards go to other processes or machines; what comes back depends on none of them, and what is done stays done."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.lib import files, shards
from stages.lib.features import SHARD_IMAGES, Shard, shards_of
from stages.lib.schema import InputError
from stages.lib.shards import map_in_memory, map_shards, publish, unfinished

SHARDS = shards_of({"fit": range(3 * SHARD_IMAGES + 5), "test": range(100, 100 + SHARD_IMAGES)})


def load(pause: float = 0.0, log: Path | None = None) -> Callable[[Shard, Path], None]:
    """Writes the ids and a sum of floats that threads could change."""
    weights = torch.arange(1, 100_001).reciprocal()

    def write(shard: Shard, path: Path) -> None:
        time.sleep(pause)
        if log:
            with open(log, "a") as file:
                file.write(f"{shard.name} {os.getpid()} {torch.get_num_threads()}\n")
        path.write_text(f"{shard.split} {shard.image_ids} {(weights * shard.number).sum().item():.20f}")

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(folder: Path, **options) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return map_shards(partial(load, **options), SHARDS, folder, "work")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_every_image_is_in_one_shard_of_at_most_so_many():
    assert [len(shard.image_ids) for shard in SHARDS] == [SHARD_IMAGES] * 3 + [5, SHARD_IMAGES]
    assert [i for s in SHARDS if s.split == "fit" for i in s.image_ids] == list(range(3 * SHARD_IMAGES + 5))
    assert shards_of({"fit": [3, 1, 2]}) == [Shard("fit", 0, [1, 2, 3])]


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    found = []
    for count in ("0", "1", "3"):
        monkeypatch.setenv("WORKERS", count)
        paths = run(tmp_path / count)
        assert [path.name for path in paths] == [f"{shard.name}.h5" for shard in SHARDS]
        found.append(contents(tmp_path / count))
    assert found[0] == found[1] == found[2] and len(found[0]) == len(SHARDS)


def test_workers_that_are_no_forks_as_with_gpus_change_no_byte(tmp_path, monkeypatch):
    context = multiprocessing.get_context
    for count in ("0", "1"):
        monkeypatch.setenv("WORKERS", count)
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: context("spawn"))
        run(tmp_path / count)
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_workers_are_other_processes_with_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKERS", "2")
    before = torch.get_num_threads()
    run(tmp_path / "w", log=tmp_path / "log")
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert str(os.getpid()) not in {process for _, process, _ in lines} and {threads for *_, threads in lines} == {"1"}
    assert torch.get_num_threads() == before


def test_a_finished_shard_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKERS", "0")
    run(tmp_path / "w")
    (tmp_path / "w" / f"{SHARDS[2].name}.h5").unlink()
    run(tmp_path / "w", log=tmp_path / "log")
    assert (tmp_path / "log").read_text().split()[0] == SHARDS[2].name
    assert len((tmp_path / "log").read_text().splitlines()) == 1


KILLED = """
import sys
from functools import partial
from pathlib import Path
from test_shards import SHARDS, load
from stages.lib.shards import map_shards
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
map_shards(partial(load, 0.4, folder.parent / "log"), SHARDS, folder, "work")
"""


def test_a_killed_stage_goes_on_from_the_last_finished_shard_and_its_workers_end(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKERS", "2")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    stage = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "w")], env={**os.environ, "PYTHONPATH": path}
    )
    log = tmp_path / "log"
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    workers = {int(line.split()[1]) for line in log.read_text().splitlines()}
    deadline = time.monotonic() + 30
    while any(map(_lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_lives, workers))
    done = set(contents(tmp_path / "w"))
    assert 0 < len(done) < len(SHARDS)
    log.unlink()
    run(tmp_path / "w", log=log)
    again = {f"{line.split()[0]}.h5" for line in log.read_text().splitlines()}
    assert not again & {name for name in done if not name.startswith(".tmp-")}
    run(tmp_path / "other")
    assert contents(tmp_path / "w") == contents(tmp_path / "other")


def _lives(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split(") ")[1][0] != "Z"  # a zombie waits for its new parent only
    except FileNotFoundError:
        return False


def test_what_the_shards_are_made_from_tells_whether_they_still_count(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_text("a")
    with pytest.raises(KeyboardInterrupt), unfinished(out, source, 1) as first:
        (first / "fit-00000.h5").write_text("done")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), unfinished(out, source, 1) as same:
        assert same == first and (same / "fit-00000.h5").exists()
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), unfinished(out, source, 2) as other:
        assert list(other.iterdir()) == [] and not first.exists()
        raise KeyboardInterrupt
    source.write_text("b")
    with unfinished(out, source, 2) as changed:
        assert changed != other and not other.exists()
    assert sorted(tmp_path.iterdir()) == [source]


def test_what_a_killed_worker_wrote_half_is_removed_but_not_while_nodes_may_write(tmp_path, monkeypatch):
    def left_over() -> set[str]:
        with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / "out") as folder:
            found = {path.name for path in folder.iterdir()}
            for name in ("fit-00000.h5", ".tmp-1a2b-fit-00001.h5"):
                (folder / name).write_text("data")
            raise KeyboardInterrupt
        return found

    assert left_over() == set() and left_over() == {"fit-00000.h5"}
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert left_over() == {"fit-00000.h5", ".tmp-1a2b-fit-00001.h5"}


def test_published_shards_are_whole_with_and_without_hard_links(tmp_path, monkeypatch):
    paths = run(tmp_path / "w")
    publish(paths, tmp_path / "linked")
    assert (tmp_path / "linked" / paths[0].name).samefile(paths[0])

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    publish(paths, tmp_path / "copied")
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked") == contents(tmp_path / "w")


def test_libraries_and_kind_of_processor_tell_it_too(tmp_path, monkeypatch):
    def folder_of_shards() -> Path:
        with unfinished(tmp_path / "out") as folder:
            return folder

    seen = {folder_of_shards(), folder_of_shards()}
    for module, name in ((shards, "version"), (torch.backends.cpu, "get_cpu_capability")):
        monkeypatch.setattr(module, name, lambda *_: "another")
        seen.add(folder_of_shards())
    assert len(seen) == 3


def test_two_that_write_one_shard_do_not_mix(tmp_path, monkeypatch):
    """As where Ray took a node for lost, and it was not."""
    inner = run(tmp_path / "w")[0].read_bytes()
    (tmp_path / "w" / f"{SHARDS[0].name}.h5").unlink()

    def write(shard: Shard, path: Path) -> None:
        path.write_text("half")
        shards._writer(partial(load), {shard.name: tmp_path / "w" / f"{shard.name}.h5"})(shard)
        assert path.read_text() == "half" and (tmp_path / "w" / f"{shard.name}.h5").read_bytes() == inner
        load()(shard, path)

    monkeypatch.setenv("WORKERS", "0")
    map_shards(lambda: write, SHARDS[:1], tmp_path / "w", "work")
    assert (tmp_path / "w" / f"{SHARDS[0].name}.h5").read_bytes() == inner


def test_a_container_has_as_many_workers_as_it_may_keep_busy(tmp_path, monkeypatch):
    monkeypatch.delenv("WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(shards, "QUOTA", tmp_path / "cpu.max")
    assert shards.workers() == 64
    for text, count in (("max 100000", 64), ("250000 100000", 3), ("50000 100000", 1)):
        shards.QUOTA.write_text(f"{text}\n")
        assert shards.workers() == count


def test_with_a_gpu_what_stays_in_memory_stays_in_this_process(monkeypatch):
    """A process for each GPU would have to pickle what it works with."""
    monkeypatch.setattr(shards, "DEVICE", torch.device("cuda"))
    monkeypatch.setenv("WORKERS", "2")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    here = []
    assert map_in_memory(lambda item: here.append(item) or os.getpid(), [1, 2], "work") == [os.getpid()] * 2
    assert here == [1, 2]


# ---- failures


@pytest.mark.parametrize("count", ["0", "2"])
def test_bad_input_found_by_a_worker_is_raised_here(monkeypatch, count):
    monkeypatch.setenv("WORKERS", count)

    def refuse(item: int) -> None:
        raise InputError(f"shard {item}: bad")

    with pytest.raises(InputError, match="^shard 5: bad$"):
        map_in_memory(refuse, [5], "work")


def test_results_in_memory_come_in_the_order_of_the_items(monkeypatch):
    for count in ("0", "3"):
        monkeypatch.setenv("WORKERS", count)
        assert map_in_memory(lambda item: item**2, range(20), "work") == [k**2 for k in range(20)]


def test_a_killed_worker_is_told_with_a_remedy(monkeypatch):
    monkeypatch.setenv("WORKERS", "2")
    with pytest.raises(InputError, match="work: a worker was killed.*WORKERS=1"):
        map_in_memory(lambda _: os.kill(os.getpid(), signal.SIGKILL), [0, 1], "work")


def test_a_worker_that_is_killed_before_it_has_work_is_told_with_a_remedy(monkeypatch):
    monkeypatch.setenv("WORKERS", "2")
    monkeypatch.setattr(shards, "_serve", lambda *_: os._exit(9))
    with pytest.raises(InputError, match="work: a worker was killed.*0 of 2 parts .*WORKERS=1"):
        map_in_memory(lambda item: item, [0, 1], "work")


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_what_other_workers_have_begun_is_finished(tmp_path, monkeypatch, end):
    def work(item: int) -> None:
        if item == 0:
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("bad")
        (tmp_path / "begun").touch()
        time.sleep(0.5)
        (tmp_path / f"{item}").write_bytes(b"")

    monkeypatch.setenv("WORKERS", "2")
    with pytest.raises(InputError):
        map_in_memory(work, [0, 1, 2], "work")
    assert (tmp_path / "1").exists() and not (tmp_path / "2").exists() and not multiprocessing.active_children()


def test_no_worker_outlives_an_error_here(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise InputError("the disk")

    monkeypatch.setenv("WORKERS", "2")
    monkeypatch.setattr(shards, "disk_check", refuse)
    with pytest.raises(InputError, match="the disk") as error:
        run(tmp_path / "w", pause=0.1)
    assert error.value.__traceback__ and not multiprocessing.active_children()  # its frames are alive
    assert 2 <= len(contents(tmp_path / "w")) < len(SHARDS)


def test_where_in_a_worker_an_error_was_is_told(monkeypatch):
    def faulty(_: int) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setenv("WORKERS", "1")
    with pytest.raises(ZeroDivisionError) as found:
        map_in_memory(faulty, [0], "work")
    assert "in faulty" in found.value.__notes__[0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("can't start new thread"),
    ],
)
@pytest.mark.parametrize("count", ["0", "1"])
def test_out_of_memory_is_told_with_a_remedy(monkeypatch, error, count):
    monkeypatch.setenv("WORKERS", count)

    def fail(_: int) -> None:
        raise error

    with pytest.raises(InputError, match="work: out of memory.*WORKERS"):
        map_in_memory(fail, [0], "work")


@pytest.mark.parametrize("ask", [torch.ones, np.ones, bytearray])
def test_a_worker_that_gets_no_more_memory_says_so(monkeypatch, ask):
    monkeypatch.setenv("WORKERS", "1")

    def need_more(_: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**24
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        ask(2**30)

    with pytest.raises(InputError, match="work: out of memory.*WORKERS"):
        map_in_memory(need_more, [0], "work")


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_a_machine_that_begins_no_more_processes_says_so(monkeypatch, begun):
    fork, left = os.fork, iter(range(begun))

    def fork_or_fail() -> int:
        if next(left, None) is None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setenv("WORKERS", "3")
    monkeypatch.setattr(os, "fork", fork_or_fail)
    with pytest.raises(InputError, match="work: no 3 processes can be begun here .*WORKERS=1"):
        map_in_memory(lambda item: item, range(5), "work")
    assert not multiprocessing.active_children()


def test_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("WORKERS", "0")

    def fail(_: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        map_in_memory(fail, [0], "work")


@pytest.mark.parametrize("text", ["two", "-1", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("WORKERS", text)
    with pytest.raises(InputError, match="WORKERS is"):
        map_in_memory(lambda _: None, [0], "work")


def test_a_disk_too_small_for_the_other_shards_is_told_after_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKERS", "0")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="GB are needed; free some space"):
        run(tmp_path / "w")
    assert len(contents(tmp_path / "w")) == 1
