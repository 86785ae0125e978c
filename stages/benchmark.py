"""A finished run -> reports/benchmark.json, .md and .tex: speed beside limits and plain loops; memory as data grow.

Codecs beside their networks and coders alone, and a loop with compressai; measuring beside a loop of whole detectors;
the steps of sender and receiver beside plain coding; the heavy stages with one, two and four times as many images. Run
in a profile's folder, when the machine does nothing else.
"""

import argparse
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stages.lib.benchmark_tables import benchmark_tables
from stages.lib.benchmarking import measure, peak_memory
from stages.lib.coding import FeatureCodec, build_codec, load_codec
from stages.lib.command import run
from stages.lib.elic import Elic
from stages.lib.features import Features
from stages.lib.files import write_json, write_text
from stages.lib.growth import growth
from stages.lib.learned import STRIDE, LearnedCodec, fast_type
from stages.lib.models import DEVICE
from stages.lib.online import Cell
from stages.lib.online_costs import first_images, middle_price, receive, send
from stages.lib.params import load_params
from stages.lib.plain_measuring import compare, profile_case, random_case
from stages.lib.planes import Packing, pack, plane_shape
from stages.lib.progress import progress
from stages.lib.schema import InputError
from stages.lib.shards import cores, map_in_memory
from stages.lib.tables import latex, markdown

DATA, OUT = Path("data"), Path("reports/benchmark.json")
REPETITIONS = {"default": 15, "coco": 3}
CORES = cores()
THREADS = {"default": 1, "coco": CORES}  # as a worker of a stage has; a large plane has the machine for itself
SIDES = (256, 512, 1024)  # of the planes whose coding is weighed
COCO_CHANNELS, COCO_PLANE = 256, (2000, 2736)  # scale 0 of an image of 800 x 1216 px: 200 x 304, in tiles of three
FULL_SIZE = {  # the papers' networks
    "elic": {"N": 192, "M": 320, "groups": [16, 16, 32, 64, 192], "context": {"widths": [224, 128], "kernel": 5}},
    "tcm": {"N": 64, "M": 320},
}
PLAIN = {"elic": "compressai's Elic2022Official", "tcm": "a loop as LIC-TCM's authors wrote it, on compressai's coder"}
MEASURED = {"default": (32, 3), "coco": (2, 1)}  # images whose losses are measured, and how often
DETECTORS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")  # that are measured at COCO's size
COCO_IMAGE, COCO_STEPS = (800, 1066), {"q1": 1.0, "q2": 0.25}  # px; qualities: steps in standard deviations
NOT_MEASURED = {"note": "not measured"}


def main(coco: bool, size: tuple[int, int]) -> None:
    torch.set_num_threads(1)  # threads that this process started would be missing in its forks, which wait for them
    params = load_params()
    coders(params, DATA)
    online_cells(params, DATA)
    report: dict[str, Any] = {
        "growth": growth(params, Path("dvc.yaml"))
    }  # at first: its forks begin with what this process has loaded
    report |= benchmark(params, DATA, size if coco else None)
    report |= {"measuring": measuring(params, DATA, coco), "online": online(params, DATA)}
    write_json(OUT, report)
    tables = benchmark_tables(report)
    write_text(OUT.with_suffix(".md"), markdown(tables))
    write_text(OUT.with_suffix(".tex"), latex(tables, "benchmark"))
    print(markdown(tables))


def coders(params: dict[str, Any], data: Path) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Model and learned codec of the cells -> features and weights. Raises InputError where a file is missing."""
    pairs = {(cell["model"], cell["codec"]) for cell in params["cells"].values() if cell["codec"] in FULL_SIZE}
    return {pair: _files(data, *pair) for pair in sorted(pairs)}


def benchmark(params: dict[str, Any], data: Path, size: tuple[int, int] | None) -> dict[str, Any]:
    """`machine`, `cases` (a codec at a size on a device: see `measure`) and `memory`. size: of the COCO plane."""
    files = coders(params, data)
    lmbda = params["lambdas"][params["mfip"]["precode"]]
    runs: dict[tuple[str, str, str], Callable[[], dict[str, Any]] | None]
    runs = {(codec, "default", model): partial(default, *paths, lmbda) for (model, codec), paths in files.items()}
    runs |= {(codec, "coco", "random"): partial(full_size, codec, size) if size else None for codec in FULL_SIZE}
    memory = [
        {"codec": codec, "weights": model, "side": side} | apart(partial(peak_memory, weights, lmbda, side))
        for (model, codec), (_, weights) in list(files.items())[:1]
        for side in SIDES
    ]
    cases = []
    for (codec, kind, weights), call in progress(runs.items(), "benchmark", len(runs)):
        for device in ("cpu", "cuda"):
            case = {"codec": codec, "size": kind, "weights": weights, "plain": PLAIN[codec], "device": device}
            cases.append(case | (apart(call) if call and device == DEVICE.type else NOT_MEASURED))
    return {"machine": machine(), "cases": cases, "memory": memory}


def _files(data: Path, model: str, codec: str) -> tuple[Path, Path]:
    features, weights = data / "features" / model, data / "codecs" / model / f"{codec}.pt"
    needed = {features: f"extract@{model}", weights: f"train_codec@{model}-{codec}"}
    needed[data / "losses" / model / codec] = f"measure@{model}-{codec}"  # made from all that is measured here
    for path, stage in needed.items():
        if not path.exists():
            raise InputError(f"{path} is missing; run `dvc repro {stage}`")
    return features, weights


def measuring(params: dict[str, Any], data: Path, coco: bool) -> list[dict[str, Any]]:
    """As `compare` finds them: the profile's detector with the first codec's features; torchvision's at COCO's size."""
    runs: dict[tuple[str, str], Callable[[], dict[str, Any]] | None]
    first = list(coders(params, data))[:1]
    runs = {(model, "default"): partial(of_profile, params, data, model, codec) for model, codec in first}
    runs |= {(name, "coco"): partial(of_torchvision, name) if coco else None for name in DETECTORS}
    return [
        {"detector": name, "size": size, "device": DEVICE.type} | (apart(call) if call else NOT_MEASURED)
        for (name, size), call in progress(runs.items(), "measuring", len(runs))
    ]


def online_cells(params: dict[str, Any], data: Path) -> dict[str, Path]:
    """The first cell with each learned codec -> its allocations. Raises InputError where they are missing."""
    names = {cell["codec"]: name for name, cell in reversed(params["cells"].items()) if cell["codec"] in FULL_SIZE}
    found = {}
    for name in sorted(names.values(), key=list(params["cells"]).index):
        task, model, codec = (params["cells"][name][key] for key in ("task", "model", "codec"))
        found[name] = data / "allocations" / model / codec / f"{task}.csv"
        if not found[name].exists():
            raise InputError(f"{found[name]} is missing; run `dvc repro allocate@{name}`")
    return found


def online(params: dict[str, Any], data: Path) -> list[dict[str, Any]]:
    """Sender and receiver of a cell for each learned codec, each in a process of its own: see `send` and `receive`."""
    images, cells = first_images(data / "dataset/splits.json"), online_cells(params, data)
    found = []
    for name, allocations in progress(cells.items(), "one image", len(cells)):
        cell = Cell(name, params=params, **params["cells"][name])
        sender = apart(partial(send, cell, images, middle_price(allocations)))
        receiver = sender if "note" in sender else apart(partial(receive, cell, sender.pop("files")))
        both = receiver if "note" in receiver else {"sender": sender, "receiver": receiver}
        found.append({"cell": name, "device": DEVICE.type, "images": len(images)} | both)
    return found


def of_profile(params: dict[str, Any], data: Path, model: str, codec: str) -> dict[str, Any]:
    count, repetitions = MEASURED["default"]
    case, seconds = profile_case(data, model, codec, params["models"][model], list(params["lambdas"]), count)
    return {"threads": THREADS["default"], "decode_seconds": seconds} | compare(case, repetitions)


def of_torchvision(name: str) -> dict[str, Any]:
    torch.set_num_threads(THREADS["coco"])
    count, repetitions = MEASURED["coco"]
    with TemporaryDirectory() as folder:
        case = random_case(Path(folder), name, COCO_IMAGE, count, COCO_STEPS)
        return {"threads": THREADS["coco"]} | compare(case, repetitions)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": [*names, platform.processor() or platform.machine()][0],
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "transforms": str(fast_type()).removeprefix("torch."),
        "cores": CORES,
        "gpu": torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "not measured",
        **{package: version(package) for package in ("torch", "constriction", "compressai")},
    }


def apart(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns. On a CPU it has a process of its own, which alone ends where memory does."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        (found,) = map_in_memory(lambda _: call(), [None], "benchmark")
        return found
    except InputError as error:  # out of memory, or killed for it
        if "memory" in str(error):
            return {"note": "does not fit in memory"}
        raise


def default(features: Path, weights: Path, lmbda: float) -> dict[str, Any]:
    """A profile's codec on the planes of the first images of `fit`."""
    reader = Features(features, "fit")
    pyramid = reader.pyramids(next(reader.batches()))
    return {"threads": THREADS["default"]} | measure(load_codec(weights), pyramid, lmbda, REPETITIONS["default"])


def full_size(codec: str, size: tuple[int, int]) -> dict[str, Any]:
    """A full-size network with random weights on one plane of at most `size`."""
    torch.set_num_threads(THREADS["coco"])
    torch.manual_seed(0)
    packing = Packing("tile", {}, {})
    _, rows, columns = plane_shape(COCO_CHANNELS, 1, 1, packing)
    features = torch.randn(1, COCO_CHANNELS, max(size[0] // rows, 1), max(size[1] // columns, 1))
    config = {"codec": codec, "packing": "tile", "network": FULL_SIZE[codec], "lambda_range": (1.0, 2.0), "gains": 2}
    built: Any = build_codec(config).eval().to(DEVICE).to(memory_format=torch.channels_last)
    plane = pack(features[0], "0", packing)[0]
    _as_if_trained(built, plane)
    feature_codec = FeatureCodec(built.update(), packing, COCO_CHANNELS)
    about = {"threads": THREADS["coco"], "plane": list(plane.shape[1:])}
    return about | measure(feature_codec, {"0": features}, 1.0, REPETITIONS["coco"])


@torch.no_grad()
def _as_if_trained(codec: LearnedCodec, plane: Tensor) -> None:
    """Random weights give latents that all round to one number; let them spread as trained ones do.

    The gains make the channels' standard deviations 0.1 to 1 quantiser steps, log-spaced (the small ELIC's scales at
    q3 lie there, half of them under 0.33), and the last layers of the entropy networks get these and the channels'
    means as biases: some 15 % of the numbers are not 0, and they use many tables.
    """
    net = codec.net
    side = 8 * STRIDE
    y = net.g_a(plane[None, :, :side, :side].to(DEVICE) - codec.centre)[0]
    scales = torch.logspace(-1, 0, len(y))[torch.randperm(len(y))].to(DEVICE)
    gain = scales / y.std((1, 2)).clamp(min=1e-12)
    codec.log_gain.copy_(gain.log().expand_as(codec.log_gain))
    codec.log_inverse.copy_(-codec.log_gain)
    codec.thrift = 0.0  # the sender weighs bits against error, but without trained gains no weight makes sense
    means = y.mean((1, 2)) * gain
    if isinstance(net, Elic):
        boards = net.latent_codec["y"]
        last = [boards[f"y{k}"].entropy_parameters[-1] for k in range(len(net.groups))]
        biases = [torch.cat(pair) for pair in zip(scales.split(net.groups), means.split(net.groups), strict=True)]
    else:
        last = [model.scale[-1] for model in net.slices] + [model.mean[-1] for model in net.slices]
        biases = [*scales.chunk(len(net.slices)), *means.chunk(len(net.slices))]
    for layer, bias in zip(last, biases, strict=True):
        layer.weight.mul_(0.1)
        layer.bias.copy_(bias)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.benchmark", description=__doc__)
    parser.add_argument("--coco", action="store_true", help="the papers' networks on a plane of COCO size, too")
    parser.add_argument("--size", type=int, nargs=2, default=COCO_PLANE, metavar=("H", "W"), help="of that plane")
    run(parser, main)
