"""The benchmark measures what it says, checks what was coded, and its ratios follow from its times. No times here."""

import math
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from artifacts import write_features
from pytest import approx

from stages import benchmark as stage
from stages.benchmark import apart, benchmark, measuring
from stages.lib import benchmarking, learned
from stages.lib.benchmark_tables import SENDER, benchmark_tables
from stages.lib.benchmarking import measure, plain_compress, plain_network, record
from stages.lib.coding import FeatureCodec, build_codec, load_codec, pyramid_shapes, save_codec
from stages.lib.learned import LearnedCodec
from stages.lib.models import DEVICE, Sizes
from stages.lib.params import SCALES
from stages.lib.planes import Packing
from stages.lib.schema import InputError
from stages.lib.shards import forks
from stages.lib.tables import latex, markdown

CHANNELS = 5
TINY = {
    "elic": {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [8, 8], "kernel": 3}},
    "tcm": {
        "N": 8,
        "M": 32,
        "slices": 2,
        "head_dims": [4, 4, 8],
        "window": 4,
        "blocks": 1,
        "hyper_channels": 8,
        "context_widths": [16, 8, 8],
    },
}
PARAMS = {
    "lambdas": {"q1": 0.001, "q2": 0.02},
    "mfip": {"precode": "q2"},
    "cells": {codec: {"task": "detection", "model": "tiny", "codec": codec} for codec in (*TINY, "hevc")},
}
NOT_MEASURED = {"detector": "maskrcnn", "size": "coco", "device": "cpu", "note": "not measured"}
MEASURED = {
    "detector": "tiny",
    "size": "default",
    "device": "cpu",
    "images": 32,
    "variants": 60,
    "evaluations": 31,
    "seconds": {"ours": 10.0, "alike": 5.5, "plain": 77.7},
    "times_plain": {"ours": 7.77, "alike": 14.13},
    "equal": 0.999,
}
GROWN_STAGE = {
    "stage": "measure@tiny-hevc",
    "items": [32, 64, 128],
    "seconds": [3.5, 6.0, 11.0],
    "cpu_seconds": [3.0, 5.0, 9.0],
    "peak_mib": [600.0, 605.0, 612.0],
    "ratio": {"cpu_seconds": 3.0, "peak_mib": 1.02},
}
GROWN = {"times": [1, 2, 4], "before_mib": 412.3, "stages": [GROWN_STAGE]}
ONLINE = {
    "cell": "detection-tiny",
    "device": "cpu",
    "images": 3,
    "sender": {
        "seconds": {
            "uniform": {"backbone": 0.1, "coding": 0.7, "writing": 0.2},
            "adaptive": dict(zip(SENDER, (0.1, 0.6, 0.3, 0.25, 0.15, 0.2), strict=True)),
        },
        "peak_mib": 711.4,
    },
    "receiver": {
        "seconds": dict.fromkeys(("uniform", "adaptive"), {"decoding": 0.5, "heads": 0.25}),
        "peak_mib": 645.2,
    },
}
PARTS = ("encode", "decode", "network", "coder", "plain_compress", "plain_decompress")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A profile's folder `data` with features of two images and a codec of each kind, with random weights."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    sizes, items = Sizes((64, 64), (64, 64), (64, 64)), []
    for image_id in (1, 2):
        shapes = pyramid_shapes(sizes.padded)
        items.append(("fit", image_id, {s: torch.randn(1, CHANNELS, *shapes[s]) for s in SCALES}, sizes))
    (folder / "features").mkdir()
    write_features(folder / "features" / "tiny", items)
    for name in TINY:
        (folder / "losses/tiny" / name).mkdir(parents=True)
    packing = Packing("pca", {s: torch.eye(CHANNELS) for s in SCALES}, {s: torch.zeros(CHANNELS) for s in SCALES})
    for name, network in TINY.items():
        config = {"codec": name, "network": network, "packing": "pca", "lambda_range": [1e-4, 0.05], "gains": 3}
        save_codec(folder / "codecs/tiny" / f"{name}.pt", FeatureCodec(build_codec(config), packing, CHANNELS), config)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the command, and so that forks of this process do not wait for threads that they lack."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(data) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "FULL_SIZE", TINY)
        patch.setattr(stage, "REPETITIONS", {"default": 2, "coco": 1})
        patch.setattr(stage, "THREADS", {"default": 1, "coco": 1})
        patch.setattr(stage, "SIDES", (64, 128))
        others = {"measuring": [MEASURED, NOT_MEASURED], "online": [ONLINE], "growth": GROWN}
        return benchmark(PARAMS, data, (200, 180)) | others


@pytest.fixture
def elic(data) -> FeatureCodec:
    return load_codec(data / "codecs/tiny/elic.pt")


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def test_every_codec_is_measured_at_both_sizes_on_this_device_alone(report):
    cases = {(case["codec"], case["size"], case["device"]): case for case in report["cases"]}
    assert set(cases) == {(c, s, d) for c in TINY for s in ("default", "coco") for d in ("cpu", "cuda")}
    for (_, _, device), case in cases.items():
        assert ("note" in case) == (device != DEVICE.type)
    assert [(weighed["codec"], weighed["side"]) for weighed in report["memory"]] == [("elic", 64), ("elic", 128)]


def test_every_number_is_finite_and_positive(report):
    for entry in [*report["cases"], *report["memory"]]:
        assert all(math.isfinite(n) and n > 0 for n in numbers(entry))
    named = {"processor", "vectors", "transforms", "cores", "gpu", "torch", "constriction", "compressai"}
    assert set(report["machine"]) == named


def test_ratios_follow_from_the_times(report):
    for case in (case for case in report["cases"] if "note" not in case):
        seconds = case["seconds"]
        assert tuple(seconds) == PARTS
        assert case["samples_per_second"] == approx(case["samples"] / seconds["encode"])
        assert case["of_limit"] == approx((seconds["network"] + seconds["coder"]) / seconds["encode"])
        plain = seconds["plain_compress"] + seconds["plain_decompress"]
        assert case["times_plain"] == approx(plain / seconds["encode"])
        for coding in (case["entropy_coding"], case["entropy_coding_by_plane"]):
            times, ratio = coding["seconds"], coding["ratio"]
            assert ratio["encode"] == approx(times["compressai_encode"] / times["encode"])
            assert times["both"] == approx(times["encode"] + times["decode"])
            assert ratio["both"] == approx(times["compressai_both"] / times["both"])
            assert coding["symbols_per_second"]["decode"] == approx(coding["symbols"] / times["decode"])
        if forks():
            cores = case["all_cores"]
            assert cores["of_linear"] == approx(cores["seconds"]["one"] / cores["seconds"]["all"])
            assert cores["of_linear_hash"] < 1.5


def test_samples_and_strings_are_those_of_all_planes(report):
    default, coco = (case for case in report["cases"] if case["codec"] == "elic" and "note" not in case)
    areas = [height * width for height, width in pyramid_shapes((64, 64)).values()]
    assert default["samples"] == 2 * sum(areas) * 6  # five channels in a grid of 2 x 3 tiles
    assert default["entropy_coding_by_plane"]["strings"] == default["planes"] == 2 * len(SCALES)
    assert coco["samples"] == 3 * 200 * 180  # 256 channels in tiles of three, 10 x 9 of them
    assert coco["planes"] == 1 and coco["plane"] == [200, 180]


def test_random_full_size_networks_code_numbers_as_trained_ones_do(report):
    for case in (case for case in report["cases"] if case["size"] == "coco" and "note" not in case):
        assert 0.08 < case["nonzero"] < 0.4


def test_the_tables_have_a_line_for_every_question(report):
    tables = benchmark_tables(report)
    assert all(len(row) == len(table.headers) for table in tables for row in table.rows)
    assert latex(tables, "benchmark").count(r"\begin{tabular}") == len(tables)
    lines = markdown(tables).splitlines()
    for name in TINY:
        for what in ("network + entropy coder alone", stage.PLAIN[name], "encode", "decode", "both", "strings"):
            assert sum(what in line and f"| {name} " in line for line in lines) >= 2, (name, what)
    assert sum("| 200 x 180 " in line for line in lines) >= 2 and sum("not measured" in line for line in lines) >= 5
    (measured,) = (line for line in lines if line.startswith("| tiny "))
    said = ("60 variants", "10.0 s", "31 evaluations", "77.7 s", "5.5 s", "7.77", "14.13", "99.90%")
    assert all(text in measured for text in said)
    (grown,) = (line for line in lines if "measure@tiny-hevc" in line)
    taken = ("32, 64, 128", "3.5, 6.0, 11.0", "3.0, 5.0, 9.0", "3.00", "600, 605, 612", "1.02")
    assert all(re.search(rf"\| +{re.escape(text)} +\|", grown) for text in (*taken, "at most 4"))
    plain, adaptive = (line for line in lines if "detection-tiny" in line)
    plain, adaptive = (re.sub(r"[ |]+", " ", line) for line in (plain, adaptive))
    assert plain.endswith(" uniform 0.100 0.700 0.200 1.000 1.00 0.500 0.250 0.750 711 645 ")
    assert adaptive.endswith(" 1.600 1.60 0.500 0.250 0.750 711 645 ")
    assert any("412 MiB" in line for line in lines)
    assert sum(bool(re.match(r"\| elic +\| (64 x 64|128 x 128) ", line)) for line in lines) == 2
    one = {**report, "cases": [{**report["cases"][0], "note": "does not fit in memory"}]}
    assert "does not fit in memory" in markdown(benchmark_tables(one))


def test_recorded_calls_are_the_coding_again(elic):
    """The limit is honest only if it is all of the network's and the coder's work, with the same result."""
    planes = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    calls, coded = record(elic.codec, lambda: elic.codec.encode(planes, 90))
    assert [elic.codec._tables.encode(parts)[0] for parts in calls.coder] == [c.string for c in coded]
    assert len(calls.network) == 2 * len(("g_a", "h_a", "h_s", "walk", "g_s"))
    with torch.inference_mode():
        *_, y_hat, x_hat = [call() for call in calls.network[:5]]
    assert torch.equal(x_hat[0, :, :64, :96].float() + elic.codec.centre, coded[0].plane)
    assert y_hat.shape == (1, 32, 4, 6)
    again = elic.codec.encode(planes, 90)  # nothing of the recording is left
    assert [c.string for c in again] == [c.string for c in coded] and len(calls.coder) == 2


@pytest.mark.parametrize("name", TINY)
def test_the_plain_loop_codes_the_same_planes(name, data, monkeypatch):
    """It does the same work, but for the type of the transforms and the sender's thrift."""
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", torch.float32)
    codec, planes = load_codec(data / f"codecs/tiny/{name}.pt").codec, torch.rand(1, 1, 64, 128).to(DEVICE)
    codec.thrift = 0.0
    codec.log_gain.data += 3  # numbers that are not all 0
    with torch.inference_mode():
        (coded,) = codec.encode(planes, 90)
        plane = plain_compress(plain_network(codec, 90), planes)()[0]
    assert (plane - coded.plane.clamp(0, 1)).abs().mean() < 1e-4
    assert (codec.decode([coded.string], 90, (1, 64, 128))[0] - 0.5).abs().max() > 1e-2


def test_another_plane_at_the_receiver_raises(elic, monkeypatch):
    right = LearnedCodec.decode
    monkeypatch.setattr(LearnedCodec, "decode", lambda *args: right(*args).nextafter(torch.tensor(torch.inf)))
    with pytest.raises(ValueError, match="plane is another the second time"):
        apart(lambda: measure(elic, {"0": torch.randn(1, CHANNELS, 16, 16)}, 0.01, 1))


def test_another_string_the_second_time_raises(elic, monkeypatch):
    right, turns = LearnedCodec.encode, iter(range(100))
    monkeypatch.setattr(
        LearnedCodec, "encode", lambda self, x, level, *rest: right(self, x, level + next(turns), *rest)
    )
    with pytest.raises(ValueError, match="string is another the second time"):
        measure(elic, {"0": torch.randn(1, CHANNELS, 16, 16)}, 0.01, 1)


def test_other_numbers_from_an_entropy_decoder_raise(elic, monkeypatch):
    right = benchmarking.Rans.decode
    monkeypatch.setattr(benchmarking.Rans, "decode", lambda *args: right(*args) + 1)
    with pytest.raises(ValueError, match="numbers is another the second time"):
        measure(elic, {"0": torch.randn(1, CHANNELS, 16, 16)}, 0.01, 1)


@pytest.mark.skipif(not forks(), reason="on a GPU the work has no process of its own")
def test_only_memory_that_ran_out_becomes_a_note():
    def fails(error: Exception):
        def run():
            raise error

        return run

    def is_killed():
        os.kill(os.getpid(), signal.SIGKILL)

    note = {"note": "does not fit in memory"}
    assert apart(is_killed) == note
    assert apart(fails(MemoryError())) == note
    assert apart(fails(RuntimeError("DefaultCPUAllocator: can't allocate memory"))) == note
    with pytest.raises(RuntimeError, match="shapes"):
        apart(fails(RuntimeError("shapes do not match")))


@pytest.mark.parametrize(
    ("lost", "remedy"),
    [("features", "extract@tiny"), ("codecs", "train_codec@tiny-elic"), ("losses", "measure@tiny-elic")],
)
def test_missing_files_are_named_with_the_stage_that_makes_them(data, tmp_path, lost, remedy):
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / lost)
    with pytest.raises(InputError, match=rf"{lost}/.* is missing; run `dvc repro {remedy}`"):
        benchmark(PARAMS, tmp_path / "data", None)


def test_losses_are_measured_with_the_first_codec_of_the_profile_and_at_cocos_size_if_asked(data, monkeypatch):
    monkeypatch.setattr(stage, "of_profile", lambda params, data, *names: {"called": names})
    monkeypatch.setattr(stage, "of_torchvision", lambda name: {"called": name})
    cases = measuring(PARAMS, data, coco=True)
    assert [case["called"] for case in cases] == [("tiny", "elic"), *stage.DETECTORS]
    assert [case.get("note") for case in measuring(PARAMS, data, coco=False)] == [None] + ["not measured"] * 2


def test_without_a_learned_codec_no_losses_are_measured(data):
    hevc_alone = PARAMS | {"cells": {"c": {"task": "detection", "model": "tiny", "codec": "hevc"}}}
    assert [case["detector"] for case in measuring(hevc_alone, data, coco=False)] == list(stage.DETECTORS)


def test_one_image_is_sent_and_received_by_the_first_cell_of_each_learned_codec(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"detection.csv is missing; run `dvc repro allocate@elic`"):
        stage.online_cells(PARAMS, tmp_path)
    for codec in TINY:
        path = tmp_path / f"allocations/tiny/{codec}/detection.csv"
        path.parent.mkdir(parents=True)
        path.touch()
    cells = PARAMS["cells"] | {"second": {"task": "segmentation", "model": "tiny", "codec": "elic"}}
    monkeypatch.setattr(stage, "first_images", lambda splits: ["1.png"])
    monkeypatch.setattr(stage, "middle_price", lambda path: 0.5)
    monkeypatch.setattr(stage, "send", lambda *words: {"sent": words[1:], "files": {"uniform": [b"1"]}})
    monkeypatch.setattr(stage, "receive", lambda cell, files: {"received": files})
    found = stage.online(PARAMS | {"cells": cells}, tmp_path)
    assert [case["cell"] for case in found] == list(TINY)
    assert all(case["sender"] == {"sent": (["1.png"], 0.5)} for case in found)
    assert all(case["receiver"] == {"received": {"uniform": [b"1"]}} for case in found)
    monkeypatch.setattr(stage, "apart", lambda call: {"note": "does not fit in memory"})
    assert all(case["note"] and "sender" not in case for case in stage.online(PARAMS, tmp_path))


def test_the_command_says_in_one_line_what_is_missing(tmp_path, monkeypatch, capsys):
    shutil.copy(Path(__file__).parent.parent / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    monkeypatch.delitem(sys.modules, "stages.benchmark")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("stages.benchmark", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["data/features/small is missing; run `dvc repro extract@small`"]
    assert not (tmp_path / "reports").exists()
