"""The first images of test, sent and received as single files -> seconds of each step, beside plain coding."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from stages.lib.benchmarking import peak_of_process
from stages.lib.bitstream import parse
from stages.lib.coco import image_path, load_split
from stages.lib.comparing import ANCHOR
from stages.lib.files import read_csv
from stages.lib.online import Cell, Stopwatch, decode, encode, load_networks
from stages.lib.params import precode_of

METHOD = "mfiba_skip"
IMAGES, REPETITIONS = 3, 3

Run = Callable[[], tuple[Any, dict[str, float]]]  # what it made, seconds of its steps
Files = dict[str, list[bytes]]  # way to choose qualities -> the files of the images


def first_images(splits_json: Path) -> list[Path]:
    split = load_split(splits_json, "test")
    return [image_path(split, image_id) for image_id in split.image_ids[:IMAGES]]


def middle_price(allocations: Path) -> float:
    """lambda' of the middle one of a cell's operating points."""
    found = read_csv(allocations, ["method", "point", "lambda_prime"])
    prices = found[found["method"] == METHOD].groupby("point")["lambda_prime"].first()
    return float(prices.iloc[len(prices) // 2])


def send(cell: Cell, images: list[Path], price: float) -> dict[str, Any]:
    """`seconds` of the sender's steps for each way to choose qualities, peak_mib, and the files.

    The precoding's quality for all scales; a price of bits; as many bits as the precoding has, for which qualities
    between the lambdas are coded until the size fits.
    """
    ways: dict[str, dict[str, Any]] = {
        ANCHOR: {"phi": precode_of(cell.params)},
        f"{METHOD}, price given": {"lambda_prime": price},
        f"{METHOD}, bits given": {},
    }

    def sent(image: Path, choice: dict[str, Any]) -> tuple[bytes, dict[str, float]]:
        encoded = encode(image, cell, **choice)
        return encoded.data, encoded.seconds

    runs: dict[str, list[Run]] = {
        way: [partial(sent, image, choice) for image in images] for way, choice in ways.items()
    }
    files, seconds = _timed(runs)
    return {"seconds": seconds, "peak_mib": peak_of_process(), "files": files}


def receive(cell: Cell, files: Files) -> dict[str, Any]:
    """`seconds` of the receiver's steps for the same files, and peak_mib."""
    networks = load_networks(cell)

    def received(data: bytes) -> tuple[None, dict[str, float]]:
        clock = Stopwatch()
        decode(parse(data), cell, networks, clock)
        return None, clock.seconds

    _, seconds = _timed({way: [partial(received, data) for data in of_way] for way, of_way in files.items()})
    return {"seconds": seconds, "peak_mib": peak_of_process()}


def _timed(runs: dict[str, list[Run]]) -> tuple[dict[str, list[Any]], dict[str, dict[str, float]]]:
    """A run for each image and way -> what they made, median seconds of each step. Ways take turns, as in `timings`."""
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in runs}
    for _ in range(REPETITIONS):
        made: dict[str, list[Any]] = {way: [] for way in runs}
        for of_ways in zip(*runs.values(), strict=True):  # an image
            for way, run in zip(runs, of_ways, strict=True):
                found, seconds = run()
                made[way].append(found)
                taken[way].append(seconds)
    return made, {way: {step: median(s[step] for s in times) for step in times[0]} for way, times in taken.items()}
