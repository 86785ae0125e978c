"""One function over many shards of a stage's work, on all cores, with results that no worker count can change."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from stages.lib.models import DEVICE

Shard, Result = TypeVar("Shard"), TypeVar("Result")

# A GPU is fed by this process. On a CPU small networks gain little from a second thread, all from a second process.
WORKERS = 0 if DEVICE.type == "cuda" else len(os.sched_getaffinity(0))

_function: Callable | None = None  # of a worker; inherited, so it need not be picklable


def map_shards(function: Callable[[Shard], Result], shards: Iterable[Shard]) -> Iterator[Result]:
    """The results in the order of the shards. A worker is a fork with one thread: as many as there are cores.

    One thread each, so the same sums are made in the same order, and streams coded on one machine decode on another
    with more cores. What `function` raises is raised here; files that it reads must be opened by the worker itself.
    """
    if WORKERS == 0:
        yield from map(function, shards)
        return
    context = multiprocessing.get_context("fork")  # no second import of torch, weights are shared
    with ProcessPoolExecutor(WORKERS, context, _start, (function, os.getpid())) as pool:
        yield from pool.map(_run, shards)


def _start(function: Callable, parent: int) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed stage must not leave workers behind that wait for work."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(shard: Shard) -> Result:
    return _function(shard)
