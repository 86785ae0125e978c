"""Codecs -> how fast they code, beside what their parts alone would take and beside a plain loop with compressai.

    planes -> encode_scale, recorded -> calls of the network, parts for the entropy coder
                                        `-> again, and nothing else: the limit

Every string that is coded here is decoded, and must give the sender's plane to the bit.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.lib.coding import FeatureCodec, build_codec, encode_scale, load_codec
from stages.lib.elic import Elic
from stages.lib.features import Features
from stages.lib.learned import STRIDE, LearnedCodec
from stages.lib.models import DEVICE
from stages.lib.params import InputError
from stages.lib.planes import Packing, pack, plane_shape
from stages.lib.progress import progress
from stages.lib.shards import map_shards

REPETITIONS = {"default": 7, "coco": 3}
CORES = len(os.sched_getaffinity(0))
THREADS = {"default": 1, "coco": CORES}  # a worker of `map_shards` has one; a large plane has the machine for itself
SIDES = (256, 512, 1024)  # of the planes whose coding is weighed
MOST_SYMBOLS = 1_000_000
COCO_CHANNELS = 256  # of torchvision's feature pyramids
FULL_SIZE = {  # the papers' networks
    "elic": {"N": 192, "M": 320, "groups": [16, 16, 32, 64, 192], "context": {"widths": [224, 128], "kernel": 5}},
    "tcm": {"N": 64, "M": 320},
}
PLAIN = {  # what a codec is compared with
    "elic": "Elic2022Official.compress and .decompress of compressai",
    "tcm": "a loop as in the authors' code, on compressai's coder",
}
GOALS = {"of_limit": 0.9, "entropy": 3.0, ("default", "cpu"): 2.0, ("coco", "cuda"): 5.0}
CLOSE = 0.005  # mean difference between planes from two orders of summation: a number in a thousand is rounded otherwise


def benchmark(params: dict[str, Any], data: Path, coco: tuple[int, int] | None) -> dict[str, Any]:
    """The report: `machine`, `cases` (one codec at one size each) and `memory`. `coco`: size of the large plane."""
    torch.set_num_threads(1)  # threads that this process had would be missing in its forks
    pairs = sorted({(c["model"], c["codec"]) for c in params["cells"].values() if c["codec"] in FULL_SIZE})
    inputs = {pair: _inputs(data, *pair) for pair in pairs}
    lmbda = params["lambdas"][next(iter(params["tasks"].values()))["precode"]]
    cases: dict[tuple[str, ...], Callable[[], dict[str, Any]]] = {}
    for (model, name), paths in inputs.items():
        cases[name, "default", model] = partial(default_case, name, *paths, lmbda)
    for name in FULL_SIZE if coco else ():
        cases[name, "coco", "random weights"] = partial(coco_case, name, coco)
    weights = [partial(peak_memory, inputs[pairs[0]][1], lmbda, side) for side in SIDES if pairs]
    memory = [apart(weigh) for weigh in progress(weights, "memory", len(weights))]
    measured = []
    for case, run in progress(cases.items(), "benchmark", len(cases)):
        for device in ("cpu", "cuda"):
            found = apart(run) if device == DEVICE.type else {"note": "not measured"}
            measured.append(dict(zip(("codec", "size", "weights"), case, strict=True)) | {"device": device} | found)
    return {"machine": _machine(), "repetitions": REPETITIONS, "cases": measured, "memory": memory}


def _inputs(data: Path, model: str, codec: str) -> tuple[Path, Path]:
    features, weights = data / "features" / f"{model}.h5", data / "codecs" / model / f"{codec}.pt"
    for path, stage in ((features, f"extract@{model}"), (weights, f"train_codec@{model}-{codec}")):
        if not path.is_file():
            raise InputError(f"{path}: is missing; run `dvc repro {stage}`")
    return features, weights


def _machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": (names + [platform.processor() or platform.machine()])[0],
        "cores": CORES,
        "gpu": torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "not measured",
        **{package: version(package) for package in ("torch", "constriction", "compressai")},
    }


def apart(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, from a process of its own (see `map_shards`), which alone ends where memory does not do."""
    try:
        (found,) = map_shards(lambda _: run(), [None])
        return found
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenProcessPool | MemoryError) or "allocate" in str(error):
            return {"note": "does not fit in memory"}
        raise


# ---- cases


def default_case(name: str, features: Path, weights: Path, lmbda: float) -> dict[str, Any]:
    """The profile's codec on the first batch of images of `fit`."""
    reader, feature_codec = Features(features, "fit"), load_codec(weights)
    return measure(name, "default", feature_codec, reader.pyramids(next(reader.batches())), lmbda)


def coco_case(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """A full-size network at random weights on one plane of about this size."""
    torch.set_num_threads(THREADS["coco"])
    packing = Packing("tile", {}, {})
    _, rows, columns = plane_shape(COCO_CHANNELS, 1, 1, packing)
    torch.manual_seed(0)
    features = torch.randn(1, COCO_CHANNELS, max(size[0] // rows, 1), max(size[1] // columns, 1))
    config = {"codec": name, "packing": "tile", "network": FULL_SIZE[name], "lambda_range": (1.0, 2.0), "gains": 2}
    codec = build_codec(config).eval().to(DEVICE).to(memory_format=torch.channels_last)
    plane, _ = pack(features[0], "0", packing)
    _as_if_trained(codec, functional.pad(plane, (0, STRIDE, 0, STRIDE), value=0.5)[:, :256, :256].to(DEVICE))
    return measure(name, "coco", FeatureCodec(codec.update(), packing, COCO_CHANNELS), {"0": features}, 1.0)


@torch.no_grad()
def _as_if_trained(codec: LearnedCodec, plane: Tensor) -> None:
    """Random weights give latents that all round to the same number. Let them spread as trained ones do.

    Standard deviations of the channels, in quantiser steps: log-spaced from 0.1 to 1 (0.11 to 1 in the small ELIC at
    q3, half of it under 0.33), which the gains bring about. The last layers of the entropy networks expect them: bias =
    deviation and mean of the channel, so that the numbers use many tables. About a fifth of the numbers is not 0.
    """
    side = [n // STRIDE * STRIDE for n in plane.shape[1:]]
    y = codec.net.g_a(plane[None, :, : side[0], : side[1]] - codec.centre)[0]
    deviations = torch.logspace(-1, 0, len(y), device=y.device)[torch.randperm(len(y))]
    gain = deviations / y.std((1, 2)).clamp(min=1e-12)
    codec.log_gain.copy_(gain.log().expand_as(codec.log_gain))
    codec.log_inverse.copy_(-codec.log_gain)
    net, means = codec.net, y.mean((1, 2)) * gain
    if isinstance(net, Elic):
        boards = [net.latent_codec["y"][f"y{k}"] for k in range(len(net.groups))]
        layers = [board.entropy_parameters[-1] for board in boards]
        pairs = zip(deviations.split(net.groups), means.split(net.groups), strict=True)
        biases = [torch.cat(pair) for pair in pairs]
    else:
        layers = [layer for model in net.slices for layer in (model.scale[-1], model.mean[-1])]
        parts = zip(deviations.chunk(len(net.slices)), means.chunk(len(net.slices)), strict=True)
        biases = [bias for pair in parts for bias in pair]
    for layer, bias in zip(layers, biases, strict=True):
        layer.weight.mul_(0.1)
        layer.bias.copy_(bias)


@torch.inference_mode()
def measure(
    name: str, size: str, feature_codec: FeatureCodec, pyramid: dict[str, Tensor], lmbda: float
) -> dict[str, Any]:
    """One codec on the planes of feature maps, scale -> [N, C, H, W]; all times are of all these planes."""
    codec, packing, _ = feature_codec
    level, repetitions = codec.level(lmbda), REPETITIONS[size]
    stacks = [torch.stack([pack(f, scale, packing)[0] for f in maps]) for scale, maps in pyramid.items()]

    def encode() -> list[bytes]:
        maps = pyramid.items()
        return [record.data for scale, f in maps for record in encode_scale(f, scale, level, feature_codec)]

    def decode() -> list[Tensor]:
        return [codec.decode(strings, level, tuple(stack.shape[1:])) for strings, stack in zip(coded_strings, stacks)]

    records, peak = encode(), _peak_mib()
    calls, coded = record(codec, stacks, level)
    ...
