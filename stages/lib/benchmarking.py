"""How fast a codec codes, beside what its parts alone take and beside a plain loop with compressai.

    planes -> encode_scale, recorded -> calls of the network, numbers for the entropy coder
                                        `--> again, and nothing else: the limit

Every string that is coded here is decoded, and must give the sender's plane to the bit.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import operator
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from compressai.ans import RansDecoder, RansEncoder
from torch import Tensor
from torch.nn import functional

from stages.lib.ans import Decoder, Part, Tables
from stages.lib.coding import FeatureCodec, encode_scale, load_codec
from stages.lib.elic import Elic
from stages.lib.learned import HYPER_STRIDE, LATENT_STRIDE, SCALE_TABLE, Code, Family, LearnedCodec
from stages.lib.models import DEVICE
from stages.lib.planes import pack
from stages.lib.shards import forks, map_in_memory
from stages.lib.tcm import LicTcm

MOST_NUMBERS = 1_000_000  # of the entropy coder's comparison
HASHED = bytes(2**24)

Run = Callable[[], Any]


@torch.inference_mode()
def measure(feature_codec: FeatureCodec, pyramid: dict[str, Tensor], lmbda: float, repetitions: int) -> dict[str, Any]:
    """One codec on the planes of feature maps, scale -> [N, C, H, W]; `seconds` are those of all the planes."""
    codec: Any = feature_codec.codec  # a learned one, or a family of them
    level = codec.level(lmbda)

    def encode() -> list[bytes]:
        return [r.data for scale, maps in pyramid.items() for r in encode_scale(maps, scale, level, feature_codec)]

    records, peak_mib = encode(), peak_of_process()
    stacks = [torch.stack([pack(f, s, feature_codec.packing)[0] for f in maps]) for s, maps in pyramid.items()]
    one, its_level = (codec.members[level], 0) if isinstance(codec, Family) else (codec, level)
    calls, coded = record(one, lambda: [codec.encode(stack.to(DEVICE), level) for stack in stacks])
    planes = [c.plane for of_stack in coded for c in of_stack]
    _same("string", bytes.__contains__, records, [c.string for of_stack in coded for c in of_stack])

    def decode() -> list[Tensor]:
        stacks = [([c.string for c in of_stack], tuple(of_stack[0].plane.shape)) for of_stack in coded]
        return [plane for strings, shape in stacks for plane in codec.decode(strings, level, shape)]

    net, inputs = plain_network(one, its_level), [_padded(plane, one.centre) for stack in stacks for plane in stack]
    plain = [plain_compress(net, x) for x in inputs]
    seconds = timings(
        {
            "encode": (encode, partial(_same, "record", operator.eq, records)),
            "decode": (decode, partial(_same, "plane", torch.equal, planes)),
            "network": (lambda: [call() for call in calls.network], None),
            "coder": (lambda: [one._tables.encode(parts) for parts in calls.coder], None),
            "plain_compress": (lambda: [plain_compress(net, x) for x in inputs], None),
            "plain_decompress": (lambda: [decompress() for decompress in plain], None),
        },
        repetitions,
    )
    samples, (numbers, tables) = sum(plane.numel() for plane in planes), _joined(sum(calls.coder, []))
    many, rans = [Part(numbers[:MOST_NUMBERS], tables[:MOST_NUMBERS])], Rans(net)
    return {
        "repetitions": repetitions,
        "planes": len(planes),
        "samples": samples,
        "symbols": len(numbers),
        "nonzero": float(np.mean(numbers != 0)),
        "peak_mib": peak_mib,
        "seconds": seconds,
        "samples_per_second": samples / seconds["encode"],
        "of_limit": (seconds["network"] + seconds["coder"]) / seconds["encode"],
        "times_plain": (seconds["plain_compress"] + seconds["plain_decompress"]) / seconds["encode"],
        "entropy_coding": entropy_coding(one._tables, rans, [many], repetitions),
        "entropy_coding_by_plane": entropy_coding(one._tables, rans, calls.coder, repetitions),
        "all_cores": all_cores(one._tables, many, repetitions) if forks() else {"note": "not measured"},
    }


def entropy_coding(tables: Tables, rans: Rans, strings: list[list[Part]], repetitions: int) -> dict[str, Any]:
    """The parts of strings through our coder and compressai's, on one core. `ratio`: how many times as fast ours is."""
    ours, theirs = [tables.encode(parts)[0] for parts in strings], [rans.encode(parts) for parts in strings]
    numbers = [_joined(parts)[0] for parts in strings]
    check = partial(_same, "string's list of numbers", np.array_equal, numbers)
    runs = {
        "encode": (lambda: [tables.encode(parts) for parts in strings], None),
        "decode": (lambda: [_read(tables, *pair) for pair in zip(ours, strings, strict=True)], check),
        "compressai_encode": (lambda: [rans.encode(parts) for parts in strings], None),
        "compressai_decode": (lambda: [rans.decode(*pair) for pair in zip(theirs, strings, strict=True)], check),
    }
    seconds, symbols = timings(runs, repetitions), sum(map(len, numbers))
    for coder in ("", "compressai_"):
        seconds[f"{coder}both"] = seconds[f"{coder}encode"] + seconds[f"{coder}decode"]
    return {
        "symbols": symbols,
        "strings": len(strings),
        "bytes": sum(map(len, ours)),
        "compressai_bytes": sum(map(len, theirs)),
        "seconds": seconds,
        "symbols_per_second": {name: symbols / value for name, value in seconds.items()},
        "ratio": {name: seconds[f"compressai_{name}"] / seconds[name] for name in ("encode", "decode", "both")},
    }


def all_cores(tables: Tables, parts: list[Part], repetitions: int) -> dict[str, Any]:
    """Encoding and decoding by one process, then by one on every core at a time, each a copy.

    of_linear: times as much, to as many times one; of_linear_hash: the same of SHA-256, which says what the machine's
    cores have in common.
    """
    runs: dict[str, Run] = {
        "coder": lambda: _read(tables, tables.encode(parts)[0], parts),
        "hash": lambda: hashlib.sha256(HASHED).digest(),
    }

    def medians(begin: Run) -> dict[str, float]:
        begin()  # all of them; and again after each run, when the slowest is done
        return timings({name: (run, lambda _: begin()) for name, run in runs.items()}, repetitions)

    processes = forks()
    barrier = multiprocessing.get_context("fork").Barrier(processes)
    together = map_in_memory(lambda _: medians(barrier.wait), range(processes), "all cores")
    alone, slowest = medians(lambda: None), {name: max(each[name] for each in together) for name in runs}
    return {
        "processes": processes,
        "seconds": {"one": alone["coder"], "all": slowest["coder"]},
        "of_linear": alone["coder"] / slowest["coder"],
        "of_linear_hash": alone["hash"] / slowest["hash"],
    }


@torch.inference_mode()
def peak_memory(weights: Path, lmbda: float, side: int) -> dict[str, Any]:
    """MiB of a process that codes one square plane, and of the same process before."""
    codec, packing, _ = load_codec(weights)
    noise = torch.randn(1, packing.plane_channels, side, side, generator=torch.Generator().manual_seed(0))
    planes, level, before_mib = (0.5 + 0.1 * noise).to(DEVICE), codec.level(lmbda), peak_of_process()
    (coded,), peak_mib = codec.encode(planes, level), peak_of_process()
    c, height, width = coded.plane.shape
    _same("plane", torch.equal, [coded.plane], list(codec.decode([coded.string], level, (c, height, width))))
    return {"device": DEVICE.type, "before_mib": before_mib, "peak_mib": peak_mib}


def timings(runs: Mapping[str, tuple[Run, Callable | None]], repetitions: int) -> dict[str, float]:
    """Runs and what checks their results -> median seconds. They take turns: a slow minute is one for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, (run, check) in runs.items():
            _finish()
            start = time.perf_counter()
            found = run()
            _finish()
            seconds[name].append(time.perf_counter() - start)
            if check:
                check(found)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---- what a codec asks of its parts


class Calls(NamedTuple):
    network: list[Run]  # the same calls, with the same arguments
    coder: list[list[Part]]  # of each string


def record(codec: LearnedCodec, run: Run) -> tuple[Calls, Any]:
    """The calls that `run` makes of the codec's network and entropy coder, and its result."""
    net, transforms, tables, calls = codec.net, codec._transforms, codec._tables, Calls([], [])

    def kept(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            calls.network.append(partial(part, x))
            return part(x)

        return call

    def walk(side: Tensor, y: Tensor, code: Code) -> Tensor:
        coded: list[Tensor] = []

        def keep(*part: Any) -> Tensor:
            coded.append(code(*part))
            return coded[-1]

        def again() -> Tensor:
            parts = iter(coded)
            return net.walk(side, y, lambda *_: next(parts))

        calls.network.append(again)
        return net.walk(side, y, keep)

    def encode(parts: list[Part]) -> tuple[bytes, int]:
        calls.coder.append(parts)
        return tables.encode(parts)

    models = {name: getattr(net, name) for name in ("entropy_bottleneck", "gaussian_conditional")}
    hyper = {name: kept(getattr(net, name)) for name in ("h_a", "h_s")}
    own = vars(codec)
    own["net"] = SimpleNamespace(walk=walk, **models, **hyper)  # is found before the sub-module
    own["_transforms"] = {kind: tuple(map(kept, pair)) for kind, pair in transforms.items()}
    own["_tables"] = SimpleNamespace(bits=tables.bits, encode=encode)
    try:
        return calls, run()
    finally:
        del own["net"]
        codec._transforms, codec._tables = transforms, tables


# ---- the same with compressai


def plain_network(codec: LearnedCodec, level: int) -> Elic | LicTcm:
    """The network with gain and centre inside, in plain memory layout, and compressai's tables."""
    net = copy.deepcopy(codec.net).to(memory_format=torch.contiguous_format)
    gain, inverse = (codec._at(table, codec._position_of(level)) for table in (codec.log_gain, codec.log_inverse))
    net.g_a.register_forward_pre_hook(lambda _, x: x[0] - codec.centre)
    net.g_a.register_forward_hook(lambda *call: call[-1] * gain)
    net.g_s.register_forward_pre_hook(lambda _, y_hat: y_hat[0] * inverse)
    net.g_s.register_forward_hook(lambda *call: call[-1] + codec.centre)
    net.update(SCALE_TABLE, force=True)
    return net


def plain_compress(net: Elic | LicTcm, x: Tensor) -> Run:
    """Padded plane [1, c, H, W] -> what decompresses it. ELIC: compressai's own; LIC-TCM: as its authors wrote it.

    Numbers are rounded to the nearest; what a sender may do beyond that is the project's own.
    """
    if isinstance(net, Elic):
        coded = net.compress(x)
        return lambda: net.decompress(coded["strings"], coded["shape"])["x_hat"]
    gaussian, symbols, indexes = net.gaussian_conditional, [], []
    models = gaussian.quantized_cdf.tolist(), gaussian.cdf_length.tolist(), gaussian.offset.tolist()
    y = net.g_a(x)
    z = net.h_a(y)
    z_strings, size = net.entropy_bottleneck.compress(z), z.shape[2:]

    def send(part: Tensor, _: slice, scales: Tensor, means: Tensor) -> Tensor:
        numbers = gaussian.quantize(part, "symbols", means)
        symbols.extend(numbers.flatten().tolist())
        indexes.extend(gaussian.build_indexes(scales).flatten().tolist())
        return numbers + means

    net.walk(net.h_s(net.entropy_bottleneck.decompress(z_strings, size)), y, send)
    string = RansEncoder().encode_with_indexes(symbols, indexes, *models)

    def decompress() -> Tensor:
        decoder = RansDecoder()
        decoder.set_stream(string)

        def receive(part: Tensor, _: slice, scales: Tensor, means: Tensor) -> Tensor:
            numbers = decoder.decode_stream(gaussian.build_indexes(scales).flatten().tolist(), *models)
            return torch.tensor(numbers, dtype=part.dtype, device=part.device).view(part.shape) + means

        side = net.h_s(net.entropy_bottleneck.decompress(z_strings, size))
        return net.g_s(net.walk(side, torch.zeros_like(y), receive)).clamp(0, 1)

    return decompress


class Rans:
    """compressai's coder on the tables of a network, numbered as in `learned`: Gaussians, then channels of z."""

    def __init__(self, net: Elic | LicTcm):
        models, names = (net.gaussian_conditional, net.entropy_bottleneck), ("quantized_cdf", "cdf_length", "offset")
        self.models = [[row for model in models for row in getattr(model, name).tolist()] for name in names]

    def encode(self, parts: list[Part]) -> bytes:
        numbers, tables = _joined(parts)
        return RansEncoder().encode_with_indexes(numbers.tolist(), tables.tolist(), *self.models)

    def decode(self, string: bytes, parts: list[Part]) -> np.ndarray:
        tables = _joined(parts)[1].tolist()
        return np.array(RansDecoder().decode_with_indexes(string, tables, *self.models), dtype=np.int32)


# ---- small parts


def _joined(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([part.numbers for part in parts]), np.concatenate([part.tables for part in parts])


def _read(tables: Tables, string: bytes, parts: list[Part]) -> np.ndarray:
    decoder = Decoder(tables, string)
    numbers = np.concatenate([decoder.read(part.tables) for part in parts])
    decoder.close()
    return numbers


def _padded(plane: Tensor, value: float) -> Tensor:
    """[c, H, W] -> [1, c, H, W] on DEVICE, H and W multiples of 64, as compressai's models need them."""
    (height, width), stride = plane.shape[1:], LATENT_STRIDE * HYPER_STRIDE
    return functional.pad(plane[None].to(DEVICE), (0, -width % stride, 0, -height % stride), value=value)


def _same(what: str, equal: Callable[[Any, Any], bool], wanted: list, found: list) -> None:
    if not all(map(equal, wanted, found)):
        raise ValueError(f"a {what} is another the second time: the codec is broken on this machine; run the tests")


def _finish() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_of_process() -> float:
    """MiB; of the GPU where there is one."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
