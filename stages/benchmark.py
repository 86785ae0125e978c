"""A finished run -> reports/benchmark.json: speed beside its limits and beside plain loops; memory as data grow.

Codecs beside their networks and coders alone, and a loop with compressai; measuring beside a loop of whole detectors;
the steps of sender and receiver beside plain coding; the heavy stages with one, two and four times as many images. Run
in a profile's folder, when the machine does nothing else.
"""

import argparse
import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else its look for GPUs makes them useless to forks

import torch
from tabulate import tabulate
from torch import Tensor

from stages.lib.benchmarking import measure, peak_memory
from stages.lib.coding import FeatureCodec, build_codec, load_codec
from stages.lib.command import run
from stages.lib.elic import Elic
from stages.lib.features import Features
from stages.lib.files import write_json
from stages.lib.growth import growth
from stages.lib.learned import STRIDE, LearnedCodec, fast_type
from stages.lib.models import DEVICE
from stages.lib.online import Cell
from stages.lib.online_costs import PLAIN as PLAIN_CODING
from stages.lib.online_costs import first_images, middle_price, receive, send
from stages.lib.params import load_params
from stages.lib.plain_measuring import compare, profile_case, random_case
from stages.lib.planes import Packing, pack, plane_shape
from stages.lib.progress import progress
from stages.lib.schema import InputError
from stages.lib.shards import cores, map_in_memory

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
GOALS = {("default", "cpu"): 2, ("coco", "cuda"): 5}  # times the plain loop
MEASURED = {"default": (32, 3), "coco": (2, 1)}  # images whose losses are measured, and how often
DETECTORS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")  # that are measured at COCO's size
COCO_IMAGE, COCO_STEPS = (800, 1066), {"q1": 1.0, "q2": 0.25}  # px; qualities: steps in standard deviations
MEASURING_GOAL, PEAK_GOAL = "at least 5", "at most 1.1"
SENDER, RECEIVER = ("backbone", "precoding", "MFIP", "allocation", "coding", "writing"), ("decoding", "heads")
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
    print(table(report))


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


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a table each for codecs, measuring, one image and growth, a line for each question."""
    head = ["codec", "size", "device", "", "measured", "ratio", "goal"]
    rows = [row for case in report["cases"] for row in _rows(case)]
    for weighed in report["memory"]:
        plane = f"{weighed['side']} x {weighed['side']}"
        text = weighed.get("note") or f"{weighed['peak_mib']:.0f} MiB, {weighed['before_mib']:.0f} before"
        rows.append([weighed["codec"], plane, weighed.get("device", DEVICE.type), "peak memory of one plane", text])
    of_measuring = ["detector", "size", "device", "images", "measure", "plain loop", "ratio", "for a variant", "goal"]
    of_measuring.append("equal results")
    grown, (few, *_, many) = report["growth"], report["growth"]["times"]
    ratio = f"{many} x to {few} x images"
    of_growth = ["stage", "items", "seconds", "CPU seconds", ratio, "goal", "peak, MiB", ratio, "goal"]
    of_online = ["cell", "device", "qualities", *SENDER, "sender", f"to {PLAIN_CODING}", *RECEIVER, "receiver"]
    of_online.append("peak, MiB: sender, receiver")
    facts = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    tables = (
        ("Codecs", head, rows),
        ("Losses of one coded scale", of_measuring, [_measuring_row(case) for case in report["measuring"]]),
        ("One image, seconds", of_online, [row for case in report["online"] for row in _online_rows(case)]),
        ("Growth", of_growth, [_growth_row(stage, many / few) for stage in grown["stages"]]),
    )
    grid = partial(tabulate, tablefmt="github", disable_numparse=True)
    parts = [f"{title}\n\n{grid(rows, head)}" for title, head, rows in tables]
    return "\n\n".join([*parts, f"Peak of a process that does nothing: {grown['before_mib']:.0f} MiB.", facts])


def _measuring_row(case: dict[str, Any]) -> list[str]:
    key = [case["detector"], case["size"], case["device"]]
    if "note" in case:
        return [*key, "", case["note"]]
    seconds = case["seconds"]
    return [
        *key,
        str(case["images"]),
        f"{case['variants']} variants, skipped ones too: {seconds['ours']:.1f} s",
        f"{case['evaluations']} evaluations: {seconds['plain']:.1f} s",
        f"{case['times_plain']:.2f}",
        f"{case['times_plain_each']:.2f}",
        MEASURING_GOAL,
        f"{case['equal']:.2%}",
    ]


def _online_rows(case: dict[str, Any]) -> list[list[str]]:
    if "note" in case:
        return [[case["cell"], case["device"], "all", case["note"]]]
    sender, receiver = case["sender"]["seconds"], case["receiver"]["seconds"]
    totals = {way: sum(steps.values()) for way, steps in sender.items()}
    peaks = f"{case['sender']['peak_mib']:.0f}, {case['receiver']['peak_mib']:.0f}"
    return [
        [
            case["cell"],
            case["device"],
            way,
            *(f"{steps[step]:.3f}" if step in steps else "" for step in SENDER),
            f"{totals[way]:.3f}",
            f"{totals[way] / totals[PLAIN_CODING]:.2f}",
            *(f"{receiver[way][step]:.3f}" for step in RECEIVER),
            f"{sum(receiver[way].values()):.3f}",
            peaks,
        ]
        for way, steps in sender.items()
    ]


def _growth_row(stage: dict[str, Any], times: float) -> list[str]:
    items, peaks = (", ".join(f"{value:.0f}" for value in stage[name]) for name in ("items", "peak_mib"))
    seconds, of_cpu = (", ".join(f"{value:.1f}" for value in stage[name]) for name in ("seconds", "cpu_seconds"))
    goals = f"at most {times:.0f}", PEAK_GOAL
    ratios = [f"{stage['ratio'][name]:.2f}" for name in ("cpu_seconds", "peak_mib")]
    return [stage["stage"], items, seconds, of_cpu, ratios[0], goals[0], peaks, ratios[1], goals[1]]


def _rows(case: dict[str, Any]) -> list[list[str]]:
    key = [case["codec"], " x ".join(map(str, case.get("plane", [case["size"]]))), case["device"]]
    if "note" in case:
        return [[*key, "all", case["note"]]]
    seconds, goal = case["seconds"], GOALS.get((case["size"], case["device"]))
    plain = seconds["plain_compress"] + seconds["plain_decompress"]
    speed = f"{case['samples_per_second'] / 1e6:.3f} M samples/s"
    rows = [
        ["compress, to network + entropy coder alone", speed, f"{case['of_limit']:.2f}", "0.9"],
        [
            f"compress and reconstruct, to compress + decompress of {case['plain']}",
            f"{seconds['encode']:.2f} s, {plain:.2f} s",
            f"{case['times_plain']:.2f}",
        ],
    ]
    if goal:
        rows[-1].append(str(goal))
    for name, coding in (("", case["entropy_coding"]), (", plane by plane", case["entropy_coding_by_plane"])):
        for way in ("encode", "decode", "both"):
            rate = f"{coding['symbols_per_second'][way] / 1e6:.1f} M symbols/s"
            rows.append([f"entropy coding, to compressai's: {way}{name}", rate, f"{coding['ratio'][way]:.2f}", "3"])
        sizes = coding["bytes"], coding["compressai_bytes"]
        text = f"{sizes[0]}, {sizes[1]} bytes"
        rows.append([f"strings, to compressai's{name}", text, f"{sizes[0] / sizes[1]:.4f}"])
    together = case["all_cores"]
    if "note" in together:
        rows.append(["entropy coding on all cores", together["note"]])
    else:
        what = f"entropy coding by {together['processes']} processes, to as many times one"
        rows.append([what, f"{together['seconds']['all']:.3f} s each", f"{together['of_linear']:.2f}"])
        rows[-1].append(f"near 1; SHA-256: {together['of_linear_hash']:.2f}")
    return [[*key, *row] for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.benchmark", description=__doc__)
    parser.add_argument("--coco", action="store_true", help="the papers' networks on a plane of COCO size, too")
    parser.add_argument("--size", type=int, nargs=2, default=COCO_PLANE, metavar=("H", "W"), help="of that plane")
    run(parser, main)
