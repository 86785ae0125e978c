"""Shards on the nodes of a cluster: the same bytes as here, whatever is lost; what goes wrong there is told here."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_shards import SHARDS, contents, run

from stages.lib import shards
from stages.lib.schema import InputError
from stages.lib.shards import execute


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray", reason="Ray is optional: pip install -r requirements-ray.txt")
    import ray
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    monkeypatch.setenv("PYTHONPATH", path)  # of the nodes' workers
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield SimpleNamespace(nodes=nodes, lose=lambda node: cluster.remove_node(node, allow_graceful=False))
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_changes_no_byte(tmp_path, cluster, monkeypatch):
    progress, seen = shards.progress, []

    def lose_a_node(items, *args):
        for item in progress(items, *args):
            if not seen:
                cluster.lose(cluster.nodes[0])
            seen.append(item[0].name)
            yield item

    monkeypatch.setattr(shards, "progress", lose_a_node)
    run(tmp_path / "ray", pause=1.0, log=tmp_path / "log")
    assert sorted(seen) == [shard.name for shard in SHARDS]
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(shards, "progress", progress)
    run(tmp_path / "here")
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert str(os.getpid()) not in {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}


def test_bad_input_found_on_a_cluster_is_raised_here(tmp_path, cluster):
    class Refused:
        def __call__(self):
            raise InputError("shard: bad")

    with pytest.raises(InputError, match="^shard: bad$") as found:
        list(execute(Refused(), [0], "work"))
    assert type(found.value) is InputError


def test_a_bug_on_a_cluster_keeps_its_traceback_and_memory_its_remedy(cluster):
    with pytest.raises(KeyError, match="^'lost'$") as found:
        list(execute(lambda: lambda _: {}["lost"], [0], "work"))
    assert "in <lambda>" in str(found.value.__cause__)

    def need_more(_: int) -> None:
        raise MemoryError("Unable to allocate 8 EiB")

    with pytest.raises(InputError, match="^work: out of memory .Unable to allocate 8 EiB.; .*fewer WORKERS"):
        list(execute(lambda: need_more, [0], "work"))


def test_a_node_with_other_libraries_or_processors_is_refused(cluster, monkeypatch):
    here = shards._machine()
    monkeypatch.setattr(shards, "_machine", lambda: [*here[:-1], "cuda ['another']"])
    with pytest.raises(
        InputError, match="^node .* of the Ray cluster has cpu .*, the machine of the stage cuda .*equal"
    ):
        list(execute(lambda: lambda item: item, [0], "work"))


def test_a_worker_of_a_cluster_that_ends_again_and_again_is_told(cluster, monkeypatch):
    monkeypatch.setattr(shards, "RETRIES", 0)
    with pytest.raises(InputError, match="^work: Ray lost a worker 1 times .*run the stage again"):
        list(execute(lambda: lambda _: os._exit(1), [0], "work"))


def test_a_cluster_that_does_not_answer_is_told(monkeypatch):
    pytest.importorskip("ray", reason="Ray is optional: pip install -r requirements-ray.txt")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(InputError, match="RAY_ADDRESS is 'nowhere'"):
        list(execute(lambda: lambda _: None, [0], "work"))
