"""Shards go to other processes and come back in order; what fails there fails here."""

import os
import subprocess
import sys
import time

import pytest
import torch

from stages.lib import shards
from stages.lib.params import InputError
from stages.lib.shards import map_shards


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_shards(workers, monkeypatch):
    monkeypatch.setattr(shards, "WORKERS", workers)

    def slow_first(shard: int) -> int:
        time.sleep(0.2 if shard == 0 else 0)
        return shard**2

    assert list(map_shards(slow_first, range(20))) == [k**2 for k in range(20)]


def test_workers_are_other_processes_with_one_thread(monkeypatch):
    monkeypatch.setattr(shards, "WORKERS", 2)
    before = torch.get_num_threads()
    found = list(map_shards(lambda _: (os.getpid(), torch.get_num_threads()), range(4)))
    assert os.getpid() not in {process for process, _ in found} and {threads for _, threads in found} == {1}
    assert torch.get_num_threads() == before


def test_bad_input_found_by_a_worker_is_raised_here():
    def refuse(shard: int) -> None:
        raise InputError(f"shard {shard}: bad")

    with pytest.raises(InputError, match="^shard 5: bad$"):
        list(map_shards(refuse, [5]))


def test_a_killed_worker_does_not_hang_the_stage(monkeypatch):
    monkeypatch.setattr(shards, "WORKERS", 1)
    with pytest.raises(Exception, match="terminated abruptly"):
        list(map_shards(lambda _: os._exit(9), [0]))


KILLED = """
import os, time
from stages.lib import shards
shards.WORKERS = 2
for process in shards.map_shards(lambda k: time.sleep(60 * (k > 1)) or os.getpid(), range(4)):
    print(process, flush=True)
"""


def test_workers_of_a_killed_stage_end():
    stage = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    workers = {int(stage.stdout.readline()) for _ in range(2)}
    stage.kill()
    stage.wait()
    deadline = time.monotonic() + 30
    while workers and time.monotonic() < deadline:
        workers = {process for process in workers if _lives(process)}
        time.sleep(0.1)
    assert not workers


def _lives(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split(") ")[1][0] != "Z"  # a zombie waits for its new parent only
    except FileNotFoundError:
        return False
