"""Files of a profile, and ways to break them."""

import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import pandas as pd
import torch
import yaml
from PIL import Image

TRAIN_JSON = "coco/annotations/instances_train2017.json"
PERSONS_JSON = "coco/annotations/person_keypoints_train2017.json"
FIRST = "coco/train2017/0001.png"  # 17 x 23 px
FIRST_JPG = FIRST.replace("png", "jpg")
SPLITS, MODEL, WEIGHTS = "data/dataset/splits.json", "data/models/small.pt", "weights/small.pt"
PREDICTION = "data/predictions/small.pt"
CODED, LOSSES, UNCODED = "data/coded/small/elic", "data/losses/small/elic", "data/losses/small/uncoded.csv"
FITTED = "data/loss_rate/small/elic/detection.json"
PREDICTED = "data/mfip/small/elic/detection.csv"
POINTS = "data/evaluations/small/elic/detection/points.csv"
MFIP_ERRORS = "data/mfip/small/elic/detection.json"
LOSS_CURVE = "reports/codecs/small/elic/loss.csv"

FEATURES, CODEC, REAL = "data/features/small", "data/codecs/small/elic.pt", "data/real"  # REAL: coded features
INDEX, SHARD, RECORDS = f"{FEATURES}/index.csv", f"{FEATURES}/fit-00000.h5", f"{REAL}/q1/fit-00000.h5"

NAN, INF = float("nan"), float("inf")

Break = Callable[[], object]


def put(name: str, content: str | bytes) -> None:
    remove(name)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> None:
    shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink(missing_ok=True)


def nothing() -> None:
    """The command alone is wrong."""


def gone(name: str) -> Break:
    return lambda: remove(name)


def folder(name: str) -> Break:
    return lambda: (remove(name), Path(name).mkdir())


def text(name: str, content: str | bytes) -> Break:
    return lambda: put(name, content)


def cut(name: str, share: float = 0.5) -> Break:
    return lambda: put(name, (data := Path(name).read_bytes())[: int(share * len(data))])


def damaged(name: str, dataset: str) -> Break:
    """One bit of a dataset's values."""

    def flip() -> None:
        with h5py.File(name) as file:
            at = file[dataset].id.get_chunk_info(0).byte_offset + 10
        data = bytearray(Path(name).read_bytes())
        data[at] ^= 16
        put(name, bytes(data))

    return flip


def other(name: str, source: str) -> Break:
    return lambda: put(name, Path(source).read_bytes())


def variable(name: str, value: str) -> Break:
    return lambda: os.environ.update({name: value})


def full_disk() -> None:
    shutil.disk_usage = lambda _: SimpleNamespace(free=1)


def also(*breaks: Break) -> Break:
    return lambda: [of() for of in breaks]


def link(name: str, target: str) -> Break:
    return lambda: (remove(name), Path(name).symlink_to(target))


MISSING = object()


def value(name: str, key: str, new: Any) -> Break:
    """Another value at a key, as "annotations.0.bbox", of a JSON or YAML file."""

    def edit() -> None:
        read, write = (json.loads, json.dumps) if name.endswith(".json") else (yaml.safe_load, yaml.safe_dump)
        place = data = read(Path(name).read_text())
        *parts, last = key.split(".")
        for part in parts:
            place = place[int(part) if isinstance(place, list) else part]
        if new is MISSING:
            del place[last]
        else:
            place[last] = new
        put(name, write(data))

    return edit


def lacks(name: str, key: str) -> Break:
    return value(name, key, MISSING)


def params(key: str, new: Any) -> Break:
    return value("params.yaml", key, new)


def line(content: str) -> Break:
    """One more line of params.yaml."""
    return lambda: put("params.yaml", f"{Path('params.yaml').read_text()}{content}\n")


def first(key: str, new: Any, number: int = 0) -> Break:
    """Of the first annotation, of an image that is chosen, or another one."""
    return value(TRAIN_JSON, f"annotations.{number}.{key}", new)


def other_person() -> None:
    """A data set whose persons are category 7, of a detector of keypoints alone."""
    data = json.loads(Path(PERSONS_JSON).read_text())
    for item in data["annotations"]:
        item["category_id"] = 7
    data["categories"][0]["id"] = 7
    put(PERSONS_JSON, json.dumps(data))
    params("models.small.tasks", ["detection", "keypoints"])()


def image(key: str, new: Any) -> Break:
    """Of the first image, in both files of annotations."""
    return also(*(value(name, f"images.-1.{key}", new) for name in (TRAIN_JSON, PERSONS_JSON)))


def table(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Break:
    def edit() -> None:
        frame = change(pd.read_csv(name, dtype=str))
        remove(name)
        frame.to_csv(name, index=False)

    return edit


def cell(name: str, column: str, value: str, row: int = 0) -> Break:
    return table(name, lambda t: t.assign(**{column: [*t[column][:row], value, *t[column][row + 1 :]]}))


def without(name: str, column: str) -> Break:
    return table(name, lambda t: t.drop(columns=column))


def png(width: int, height: int) -> bytes:
    """Declares any size; holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def deep(name: str) -> Break:
    """A picture of 16 bits, as cameras of depth or heat write it."""
    return lambda: (remove(name), Image.new("I;16", (17, 23)).save(name))


def truncated_jpeg() -> None:
    Image.effect_noise((17, 23), 90).save(FIRST_JPG)
    cut(FIRST_JPG)()
    image("file_name", "0001.jpg")()


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def saved(change: Callable[[dict], Any], name: str = WEIGHTS, target: str | None = None) -> Break:
    """What `change` makes of some weights, in `target`, or in their place."""

    def edit() -> None:
        checkpoint = torch.load(name, weights_only=True)
        remove(target or name)
        torch.save(change(checkpoint), target or name)

    return edit


def flipped() -> None:
    """One bit of the largest tensor: the file opens, and torch.load sees nothing."""
    with zipfile.ZipFile(WEIGHTS) as file:
        largest = max(file.infolist(), key=lambda part: part.file_size)
    data = bytearray(Path(WEIGHTS).read_bytes())
    at = largest.header_offset + 1000 + largest.file_size // 2
    data[at] ^= 1
    put(WEIGHTS, bytes(data))
    torch.load(WEIGHTS, weights_only=True)


def inflated() -> None:
    """A part that is compressed, and far larger than the file."""
    with zipfile.ZipFile(WEIGHTS) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    remove(WEIGHTS)
    with zipfile.ZipFile(WEIGHTS, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(name, bytes(10**8) if name.endswith("data/0") else data)


def pth(name: str, break_: Break = nothing) -> Break:
    return also(saved(lambda c: c["state"], target=name), params("models.small.weights", name), break_)


def bits(change: Callable[[bytearray], object], valid: bool = False) -> Break:
    """Another bitstream; valid: with the CRC of what it holds."""

    def edit() -> None:
        data = bytearray(Path("image.mfb").read_bytes())
        change(data)
        put("image.mfb", bytes(data[:-4]) + struct.pack("<I", zlib.crc32(data[:-4])) if valid else bytes(data))

    return edit
