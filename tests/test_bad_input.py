"""Whatever is wrong with an input: one line that says what and where, exit code 2, and nothing is written.

A row of BAD: a command, what is broken in a profile that it would accept, and what the line must say, " ... " standing
for anything. Commands run in this process, as `python -m stages.<name>` runs them.
"""

import json
import os
import re
import runpy
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import write_folder
from PIL import Image

from stages import report
from stages.lib import mfip, prediction
from stages.lib.coding import FeatureCodec, build_codec, save_codec
from stages.lib.files import write_csv, write_json
from stages.lib.models import build, save_model
from stages.lib.params import SCALES
from stages.lib.planes import Packing

ROOT = Path(__file__).parents[1]
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

PREPARE = "prepare data/new"
TRAIN = f"train_model {SPLITS} small data/new.pt"
EXTRACT = f"extract {SPLITS} {MODEL} small data/new"
COMPRESS = f"compress {FEATURES} {CODEC} q1 data/new data/new.csv"
MEASURE = f"measure {SPLITS} {MODEL} {FEATURES} {PREDICTION} {UNCODED} {CODEC} {REAL} small data/new"
FIT = f"fit_loss_rate {CODED} {LOSSES} {UNCODED} detection data/new.json"
ALLOCATE = f"allocate {CODED} {LOSSES} {UNCODED} {FITTED} {PREDICTED} detection data/new.csv"
REPORT = "report data reports"
ENCODE = "encode image.png -o new.mfb --cell detection-elic"
DECODE = "decode image.mfb -o new.json --cell detection-elic"
COMMANDS = (PREPARE, TRAIN, EXTRACT, FIT, ALLOCATE, REPORT, ENCODE, f"{ENCODE} --phi 0", DECODE)


# ---------------------------------------------------------------- a profile that every command accepts


def write_params() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"] |= {"source": "coco", "coco_root": "coco", "images": {"train": 3, "fit": 2, "test": 2}}
    params["extract"]["train_images"] = 2
    params["models"]["small"] |= {"image_size": {"min": 32, "max": 48}, "weights": WEIGHTS}
    params["lambdas"] = {"q1": 0.0005, "q2": 0.008}
    network = {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [8, 8], "kernel": 3}}
    params["codecs"] = {"elic": params["codecs"]["elic"] | {"network": network, "gains": 3}}
    params["mfip"]["precode"] = "q1"
    params["cells"] = {"detection-elic": {"task": "detection", "model": "small", "codec": "elic"}}
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def write_networks() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    torch.manual_seed(0)
    detector = build(params["models"]["small"], 8, 2)
    channels = detector.backbone.out_channels
    for path in (WEIGHTS, MODEL):
        save_model(Path(path), detector, 8, 2, half=True)
    config = params["codecs"]["elic"] | {"codec": "elic"}
    packing = Packing("pca", *({scale: of for scale in SCALES} for of in (torch.eye(channels), torch.zeros(channels))))
    save_codec(Path("data/codecs/small/elic.pt"), FeatureCodec(build_codec(config), packing, channels), config)
    prediction.save(Path(PREDICTION), prediction.Predictor(channels))
    mfip.save(Path("data/mfip/small/elic/detection.pt"), mfip.MFIP(channels, 4))


def write_tables() -> None:
    """Made-up tables of the images 5, 6 (test) and 7, 8 (fit)."""
    rng = np.random.default_rng(0)
    keys = [(split, i, s) for split, ids in (("test", (5, 6)), ("fit", (7, 8))) for i in ids for s in SCALES]
    rows = pd.DataFrame(keys, columns=["split", "image_id", "scale"])
    drawn = dict(zip(("drop", "loss", "loss_skipped"), rng.uniform(0.1, 1, (3, len(rows))), strict=True))
    for q in (1, 2):
        ledger = {"pixels": 64, "bits": q * rng.integers(500, 999, len(rows)), "mse": 0.1 / q, "mse_feature": 0.2 / q}
        ledger |= {"bytes_latent": 40, "bytes_hyper": 9, "bytes_header": 3, "bytes_range": 4, "estimated_bits": 400.0}
        write_csv(Path(f"{CODED}/q{q}.csv"), rows.assign(**ledger))
        lost = {name: values / q for name, values in drawn.items()}
        write_csv(Path(f"{LOSSES}/q{q}.csv"), rows.assign(task="detection", clean=0.5, **lost))
    write_csv(Path(UNCODED), rows.assign(task="detection", clean=0.5, utility=1.0, loss_skipped=2.0))
    write_csv(Path(PREDICTED), rows.assign(weight=0.2, sensitivity=1.0))
    errors = {"kl": 0.1, "mae": 0.1}
    sensitivity = {scale: {"r2": None} for scale in SCALES}
    held_out = {"network": errors, "constant": errors}
    write_json(Path(MFIP_ERRORS), {"held_out": held_out, "sensitivity": sensitivity, "flags": ["constant"]})
    points = [("none", 0), *((method, point) for method in ("uniform", "mfiba") for point in range(3))]
    rates = {"bits_per_image": [0, 1e3, 2e3, 4e3, 8e2, 2e3, 4e3], "accuracy": [0.6, 0.2, 0.4, 0.5, 0.2, 0.4, 0.5]}
    table = pd.DataFrame(points, columns=["method", "point"]).assign(bpp=1.0, n_images=2, **rates)
    table = table.assign(task="detection", codec="elic", accuracy_name="box AP", split="test")
    write_csv(Path(POINTS), table[report.RD_POINTS])
    resamples = pd.concat([table[1:].assign(resample=r) for r in range(3)])
    write_csv(Path(POINTS).with_name("bootstrap.csv"), resamples[report.RESAMPLES])
    write_json(
        Path("data/illustrations/small/elic/detection.json"), {"method": "mfiba", "examples": [], "skeletons": {}}
    )
    Path("dvc.lock").write_text("stages: {}")
    write_csv(Path(LOSS_CURVE), pd.DataFrame(columns=["step", "loss", "bpp_plane", "mse"]))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile's folder, made by its own commands where these are quick."""
    folder = tmp_path_factory.mktemp("bad") / "profile"
    write_folder(folder / "coco", "train2017", 1, 3)
    write_folder(folder / "coco", "val2017", 5, 4)
    (folder / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params()
        write_networks()
        write_tables()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save("image.png")
        assert run(PREPARE.replace("new", "dataset"), patch) == 0
        assert run(FIT.replace("data/new.json", FITTED), patch) == 0
        assert run(EXTRACT.replace("data/new", FEATURES), patch) == 0
        for q in ("q1", "q2"):
            assert run(COMPRESS.replace("q1", q).replace("data/new", f"{REAL}/{q}"), patch) == 0
        assert run(ENCODE.replace("new", "image") + " --phi 0", patch) == 0
    return folder


@pytest.fixture
def copy(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break, whose files are links to those of the profile: `put` writes another file in their place."""
    folder = tmp_path / "profile"
    shutil.copytree(profile, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORKERS", "0")  # no time for processes; some rows set another
    monkeypatch.setattr(shutil, "disk_usage", shutil.disk_usage)  # some rows replace it
    return folder


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    stage, *words = command.split()
    monkeypatch.setattr(sys, "argv", [f"stages/{stage}.py", *words])
    try:
        runpy.run_module(f"stages.{stage}", run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path -> size and time of the last write, of folders 0: what is written and removed leaves no trace."""
    found = {path: path.lstat() for path in folder.rglob("*") if ".unfinished-" not in str(path)}  # whole shards stay
    return {str(p): (0, 0) if p.is_dir() else (stat.st_size, stat.st_mtime_ns) for p, stat in found.items()}


# ---------------------------------------------------------------- ways to break it

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


def first(key: str, new: Any) -> Break:
    """Of the first annotation, of an image that is chosen."""
    return value(TRAIN_JSON, f"annotations.0.{key}", new)


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


NINE_TIMES = [(b, ", ".join(9 * [f"*{a}"])) for a, b in pairwise("abcdefghi")]  # nine anchors deep
BOMB = "\n".join(["a: &a [x]", *(f"{name}: &{name} [{links}]" for name, links in NINE_TIMES)])
MERGES = "\n".join(["a: &a {x: 1, y: 2}", *(f"{name}: &{name} {{<<: [{links}]}}" for name, links in NINE_TIMES)])
NAN, INF = float("nan"), float("inf")
RLE = {"size": [23, 17], "counts": [5]}
OTHER_ROWS = "run the stage that writes it again"
IN_PARAMS = [  # what is broken, what the line says
    (gone("params.yaml"), "params.yaml: no such file; run the stage in the folder of a profile"),
    (folder("params.yaml"), "params.yaml: Is a directory"),
    (text("params.yaml", ""), "the file is None: it must be a mapping"),
    (text("params.yaml", "- 1\n- 2\n"), "the file is [1, 2]: it must be a mapping"),
    (text("params.yaml", bytes(range(256))), "params.yaml: not valid YAML"),
    (text("params.yaml", "\ufeffseed: 0".encode("utf-16")), "params.yaml: not valid YAML"),
    (line("seed2:\n\t- 1"), "params.yaml: not valid YAML ... cannot start any token ... line 7"),
    (text("params.yaml", "a: ["), "params.yaml: not valid YAML ... line 1"),
    (text("params.yaml", "a: 1\n---\nb: 2\n"), "params.yaml: not valid YAML ... single document"),
    (line("x: !!python/object/apply:os.system ['mkdir executed']"), "not valid YAML ... python/object/apply:os.system"),
    (line("x: !!python/object/new:os.mkdir ['executed']"), "not valid YAML ... python/object/new:os.mkdir"),
    (line("x: !!python/name:os.system"), "not valid YAML ... python/name:os.system"),
    (line(BOMB), "unknown key a: ... choose from root"),
    (line(MERGES), "over 1000 keys in a mapping ... line "),
    (line("x: &x [*x]"), "unknown key x: "),
    (text("params.yaml", "a: " + 10_000 * "["), "params.yaml: not valid YAML ... recursion"),
    (line("x: " + 5000 * "1"), "params.yaml: not valid YAML ... digits"),
    (line("x: 2001-99-99"), "params.yaml: not valid YAML ... month"),
    (line("seed: 1"), "not valid YAML ... the key seed twice ... line 7"),
    (text("params.yaml", "prepare: {seed: 0, size: 64, seed: 1}"), "the key seed twice ... line 1, column 30"),
    (lacks("params.yaml", "seed"), "params.yaml: seed is missing; add it"),
    (params("sede", 1), "unknown key sede: 1; did you mean seed"),
    (params("codecs.elic.famly", []), "unknown key codecs.elic.famly: ... did you mean family"),
    (params("seed", "zero"), "seed is 'zero': it must be a whole number"),
    (params("seed", True), "seed is True: it must be a whole number"),
    (params("seed", 2**70), "seed is 1180591620717411303424: ... at most"),
    (params("seed", -1), "seed is -1: ... at least 0"),
    (params("models.small.lr", NAN), "models.small.lr is nan: it must be a number above 0"),
    (params("models.small.lr", 10**400), "models.small.lr is 1000 ... : it must be a number above 0"),
    (params("models.small.batch", [8]), "models.small.batch is [8]: it must be a whole number"),
    (params("models.small.image_size.max", 10**6), "models.small.image_size.max is 1000000: ... at most 16384"),
    (params("lambdas.q2", INF), "lambdas.q2 is inf"),
    (params("lambdas.q2", "1e-3"), "lambdas.q2 is '1e-3': ... an exponent needs a point"),
    (params("models", {"../up": {}}), "models.../up is ... letters, digits"),
    (params("prepare.coco_root", "nowhere"), "nowhere: no such folder; prepare.coco_root must hold"),
    (params("prepare.coco_root", "image.png"), "image.png: no such folder; prepare.coco_root must hold"),
    (params("prepare.images.train", 9), "instances_train2017.json: has 3 images, but prepare.images wants train: 9"),
]
IN_ANNOTATIONS = [
    (gone(TRAIN_JSON), "instances_train2017.json: no such file; prepare.coco_root must hold"),
    (gone(PERSONS_JSON), "person_keypoints_train2017.json: no such file"),
    (folder(TRAIN_JSON), "instances_train2017.json: no such file"),
    (cut(TRAIN_JSON), "instances_train2017.json: not valid JSON ... line 1"),
    (text(TRAIN_JSON, ""), "instances_train2017.json: not valid JSON"),
    (text(TRAIN_JSON, b"\x93NUMPY\xff"), "instances_train2017.json: not valid JSON"),
    (text(TRAIN_JSON, 100_000 * "["), "instances_train2017.json: not valid JSON ... recursion"),
    (text(TRAIN_JSON, f'{{"images": {5000 * "1"}}}'), "instances_train2017.json: not valid JSON ... digits"),
    (text(TRAIN_JSON, "[]"), "instances_train2017.json: images is missing or not a list of objects"),
    (value(TRAIN_JSON, "categories", []), "category_id is 1: it is not in categories"),
    (lacks(TRAIN_JSON, "annotations.0.bbox"), "id 10: bbox is missing"),
    (first("bbox", [NAN, 1, 2, 3]), "annotations, id 10: bbox is [nan, 1, 2, 3]: ... finite"),
    (first("bbox", [1, 2, 3]), "annotations, id 10: bbox is [1, 2, 3]: it must be [x, y, width, height"),
    (first("bbox", [1, 2, -3, 4]), "id 10: bbox is [1, 2, -3, 4]"),
    (first("bbox", [1, 2, 3, 1e300]), "id 10: bbox is [1, 2, 3, 1e+300]: ... at most 32768"),
    (first("bbox", [1, 2, 3, 10**400]), "id 10: bbox is [1, 2, 3, 1000"),
    (first("bbox", "1 2 3 4"), "id 10: bbox is '1 2 3 4'"),
    (first("area", INF), "id 10: area is inf"),
    (first("iscrowd", 2), "id 10: iscrowd is 2: it must be 0 or 1"),
    (first("id", 11), "annotations, id 11: id is 11: another item has it too"),
    (first("id", "10"), "annotations, id 10: id is '10': it must be a whole number"),
    (first("id", 2**63), "id is 9223372036854775808: ... at most"),
    (first("image_id", 99), "id 10: image_id is 99: it is not in images"),
    (first("category_id", 5), "id 10: category_id is 5: it is not in categories"),
    (first("category_id", [1]), "id 10: category_id is [1]: it must be a whole number"),
    (value(TRAIN_JSON, "categories.0.id", 10**9), "id is 1000000000: ... at most 9999"),
    (first("segmentation", RLE), "segmentation is ... run-length code of size [23, 17]"),
    (first("segmentation", RLE | {"size": [9, 9], "counts": [81]}), "run-length code of size [23, 17]"),
    (first("segmentation", RLE | {"counts": "~" * 99}), "segmentation is ... run-length code"),
    (first("segmentation", RLE | {"counts": [-1, 392]}), "segmentation is ... run-length code"),
    (first("segmentation", [[1, 2, 3, 4]]), "segmentation is ... at least 3 points"),
    (first("segmentation", [[1, 2, 3, 4, 5, NAN]]), "segmentation is ... nan ... finite"),
    (first("segmentation", [[0, 0, 1e9, 0, 0, 1e9]]), "segmentation is ... 1000000000 ... at most 32768"),
    (
        value(PERSONS_JSON, "annotations.0.keypoints", [1, 2, 2]),
        "keypoints is [1, 2, 2]: its category has 2: give 6 numbers",
    ),
    (value(PERSONS_JSON, "annotations.0.keypoints", [1, 2, 2, 1, 2, 3]), "keypoints is ... v in 0, 1, 2"),
    (value(PERSONS_JSON, "annotations.0.num_keypoints", -1), "num_keypoints is -1"),
    (value(PERSONS_JSON, "categories.0.oks_sigmas", [0, 1]), "oks_sigmas is [0, 1]"),
    (image("width", 10**9), "images, id 1: width is 1000000000: ... at most 16384"),
    (image("height", "23"), "images, id 1: height is '23'"),
    (image("id", 2), "images, id 2: id is 2: another item has it too"),
]
IN_IMAGES = [
    (gone(FIRST), "0001.png: no such image, but ... instances_train2017.json lists it; add the file"),
    (text(FIRST, b""), "0001.png: cannot be decoded ... give a whole picture file"),
    (cut(FIRST), "0001.png: cannot be decoded"),
    (truncated_jpeg, "0001.jpg: cannot be decoded"),
    (also(text(FIRST_JPG, "no picture"), image("file_name", "0001.jpg")), "0001.jpg: cannot be decoded"),
    (text(FIRST, png(30000, 20000)), "0001.png: cannot be decoded ... decompression bomb"),
    (text(FIRST, png(9000, 9000)), "0001.png: is 9000 x 9000 pixels, but its annotation file says 17 x 23"),
    (text(FIRST, png(17, 23)), "0001.png: cannot be decoded"),
    (text(FIRST, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 17 23\n(executed) (w) file"), "0001.png: cannot be dec"),
    (folder(FIRST), "0001.png: no such image"),
    (image("file_name", "../val2017/0005.png"), "file_name is '../val2017/0005.png': it must lie in"),
    (image("file_name", "/etc/hostname"), "file_name is '/etc/hostname': it must lie in"),
    (image("file_name", "0001.png\0"), "file_name is '0001.png\\x00': it must be a text that can be printed"),
    (image("file_name", "0\ud800"), "file_name is '0\\ud800': it must be a text that can be printed"),
    (image("file_name", 9 * "0 long name"), "0 long name: no such image"),
    (image("file_name", 99 * "0 long name"), "0 long name: File name too long"),
    (link(FIRST, "/etc/hostname"), "file_name is '0001.png': it must lie in"),
    (link(FIRST, "../../image.png"), "file_name is '0001.png': it must lie in"),
    (link(FIRST, "0001.png"), "0001.png: no such image"),
    (
        link(FIRST, "0002.png"),
        "0001.png: is 18 x 22 pixels, but its annotation file says 17 x 23",
    ),
]
IN_WEIGHTS = [
    (gone(WEIGHTS), "weights/small.pt: weights are missing"),
    (folder(WEIGHTS), "weights/small.pt: weights are missing"),
    (text(WEIGHTS, b""), "weights/small.pt: is no weights file of this project"),
    (text(WEIGHTS, "weights"), "weights/small.pt: is no weights file of this project"),
    (cut(WEIGHTS), "weights/small.pt: is no weights file of this project"),
    (flipped, "weights/small.pt: ... data/ ... is damaged (wrong CRC); copy the file again"),
    (inflated, "weights/small.pt: claims to hold more bytes than it has"),
    (saved(lambda c: {"state": c["state"], "evil": Evil()}), "weights/small.pt: is no weights file of this project"),
    (saved(lambda c: Evil()), "weights/small.pt: is no weights file of this project"),
    (text(WEIGHTS, b"cos\nmkdir\n(S'executed'\ntR."), "weights/small.pt: is no weights file of this project"),
    (saved(lambda c: c["state"]), "weights/small.pt: is no weights file of this project"),
    (saved(lambda c: c | {"state": [1]}), "weights/small.pt: is no weights file of this project"),
    (
        saved(lambda c: {"state": dict(list(c["state"].items())[1:])}),
        "weights/small.pt: has no weights for layer 'backbone.body.conv1.weight'",
    ),
    (saved(lambda c: {"state": c["state"] | {"more": torch.ones(1)}}), "weights/small.pt: layer 'more' is unknown"),
    (saved(lambda c: {"state": c["state"] | {"rpn": torch.tensor(NAN)}}), "layer 'rpn' holds ... not finite"),
    (saved(lambda c: c, "data/codecs/small/elic.pt", WEIGHTS), "weights/small.pt: ... another network"),
    (pth("a-258fb6c6.pth"), "a-258fb6c6.pth: its SHA-256 begins with ... , not as its name says"),
    (pth("a.pth", gone("a.pth")), "a.pth: weights are missing"),
    (pth("a.pth", text("a.pth", "weights")), "a.pth: holds no state dict of tensors"),
    (pth("a.pth", saved(lambda state: [1], "a.pth")), "a.pth: holds no state dict of tensors"),
    (params("models.small.weights", "COCO_V1"), "models.small.weights is 'COCO_V1': torchvision has no such weights"),
    (
        params("models.small.weights", "no\0file.pt"),
        "models.small.weights is 'no\\x00file.pt': it must be",
    ),
]
IN_SPLITS = [
    (gone(SPLITS), "splits.json: No such file or directory; give another path"),
    (cut(SPLITS), "splits.json: not valid JSON"),
    (text(SPLITS, "[]"), "splits.json: the file is ... it must be a mapping"),
    (lacks(SPLITS, "train"), "splits.json: train is missing"),
    (lacks(SPLITS, "train.images"), "splits.json: train.images is missing"),
    (value(SPLITS, "train.image_ids", [1, 1]), "train.image_ids is [1, 1]: ... none twice"),
    (value(SPLITS, "train.image_ids", [1, NAN]), "train.image_ids is [1, nan]"),
    (value(SPLITS, "train.image_ids", [[1]]), "train.image_ids is [[1]]"),
    (
        value(SPLITS, "train.file_names", ["0001.png"]),
        "splits.json: train has 3 image_ids, 1 file_names; run prepare again",
    ),
    (value(SPLITS, "train.image_ids", [1, 2, 99]), "has no id 99, which splits.json lists"),
    (value(SPLITS, "train.person_keypoints", None), "splits.json has no person_keypoints"),
    (gone(TRAIN_JSON), "instances_train2017.json: no such file"),
    (lacks(TRAIN_JSON, "annotations"), "train2017.json: annotations is missing"),
    (lacks(TRAIN_JSON, "annotations.0.bbox"), "id 10: bbox is missing"),
]
IN_TABLES = [
    (gone(f"{CODED}/q2.csv"), f"{CODED}/q2.csv: No such file or directory; give another path"),
    (folder(f"{CODED}/q2.csv"), f"{CODED}/q2.csv: Is a directory"),
    (text(f"{CODED}/q2.csv", ""), f"{CODED}/q2.csv: not a CSV table ... {OTHER_ROWS}"),
    (text(f"{CODED}/q2.csv", bytes(range(256))), f"{CODED}/q2.csv: not a CSV table"),
    (text(f"{CODED}/q2.csv", "\0" * 99), f"{CODED}/q2.csv has no column 'split'"),
    (text(f"{CODED}/q2.csv", "a,b\n1,2,3\n1,2,3,4\n"), f"{CODED}/q2.csv: not a CSV table"),
    (without(f"{CODED}/q2.csv", "bits"), f"{CODED}/q2.csv has no column 'bits'; {OTHER_ROWS}"),
    (cell(f"{CODED}/q2.csv", "bits", "many"), f"{CODED}/q2.csv: line 2: bits is 'many', no finite number"),
    (cell(f"{CODED}/q2.csv", "bits", "inf", 12), f"{CODED}/q2.csv: line 14: bits is 'inf', no finite number"),
    (cell(f"{CODED}/q2.csv", "bits", "nan", 12), f"{CODED}/q2.csv: line 14: bits is 'nan', no finite number"),
    (cell(f"{CODED}/q2.csv", "bits", ""), f"{CODED}/q2.csv: column 'bits' holds values that are not finite"),
    (cell(f"{CODED}/q2.csv", "bits", "0"), f"{CODED}/q2.csv: split 'test' has bits or pixels that are not > 0"),
    (cell(f"{CODED}/q2.csv", "bits", "-8"), f"{CODED}/q2.csv: split 'test' has bits or pixels that are not > 0"),
    (cell(f"{CODED}/q2.csv", "scale", "9"), f"{CODED}/q2.csv: line 2: scale is '9', no 0 or 1 or 2 or 3 or pool"),
    (cell(f"{CODED}/q2.csv", "image_id", "five"), f"{CODED}/q2.csv: line 2: image_id is 'five'"),
    (table(f"{CODED}/q2.csv", lambda t: t[:0]), f"{CODED}/q2.csv has no rows of {{'split': 'test'"),
    (table(f"{CODED}/q2.csv", lambda t: pd.concat([t, t[:1]])), f"{CODED}/q2.csv: image, scale (5, '0') is there twi"),
    (table(f"{CODED}/q2.csv", lambda t: t[1:]), f"{CODED}/q2.csv: image, scale (5, '0') is missing"),
    (without(f"{LOSSES}/q1.csv", "loss_skipped"), f"{LOSSES}/q1.csv has no column 'loss_skipped'"),
    (cell(f"{LOSSES}/q1.csv", "drop", "0,1"), f"{LOSSES}/q1.csv: line 2: drop is '0,1'"),
    (table(UNCODED, lambda t: t.assign(image_id="9")), f"{UNCODED}: image, scale"),
    (gone(PREDICTED), f"{PREDICTED}: No such file"),
    (cell(PREDICTED, "weight", "-1"), f"{PREDICTED}: column 'weight' holds -1.0, below 0; run train_mfip again"),
    (cell(PREDICTED, "sensitivity", ""), f"{PREDICTED}: column 'sensitivity' holds values that are not finite"),
    (gone(FITTED), f"{FITTED}: No such file"),
    (text(FITTED, "{"), f"{FITTED}: not valid JSON"),
    (text(FITTED, "[1]"), f"{FITTED}: the file is [1]: it must be a mapping"),
    (lacks(FITTED, "power"), f"{FITTED}: power is missing; ... run fit_loss_rate again"),
    (lacks(FITTED, "power.pool"), f"{FITTED}: power.pool is missing"),
    (value(FITTED, "power.0.beta", "low"), f"{FITTED}: power.0.beta is 'low'"),
    (value(FITTED, "rate.1.slope", [NAN, 1]), f"{FITTED}: rate.1.slope is [nan, 1]"),
    (value(FITTED, "mean.2.loss", [1]), f"{FITTED}: mean.2.loss is [1]: ... 2 finite"),
    (params("lambdas.q3", 0.01), "q3.csv: No such file or directory"),
]
IN_REPORTS = [
    (gone(POINTS), f"{POINTS}: No such file"),
    (without(POINTS, "bpp"), f"{POINTS} has no column 'bpp'"),
    (cell(POINTS, "accuracy", "high", 2), f"{POINTS}: line 4: accuracy is 'high', no finite number"),
    (table(POINTS, lambda t: t[t["method"] != "uniform"]), f"{POINTS} has no rows of 'uniform', the anchor"),
    (table(POINTS, lambda t: t.drop(index=2)), "points of 'uniform' are not 0, 1, 2"),
    (cell(POINTS.replace("points", "bootstrap"), "resample", "7"), "bootstrap.csv: not every method, point has"),
    (text(f"{CODED}/q2.csv", "split,scale\n"), f"{CODED}/q2.csv has no column "),
    (table(f"{CODED}/q1.csv", lambda t: t[t["scale"] != "pool"]), f"{CODED}/q1.csv: split 'fit' lacks a scale"),
    (without(LOSS_CURVE, "loss"), f"{LOSS_CURVE} has no column 'loss'"),
    (gone(LOSS_CURVE), f"{LOSS_CURVE}: No such file"),
    (lacks(FITTED, "rivals"), f"{FITTED}: rivals is missing"),
    (
        lacks(MFIP_ERRORS, "held_out.constant"),
        f"{MFIP_ERRORS}: held_out.constant is mis",
    ),
    (value(MFIP_ERRORS, "flags", "constant"), f"{MFIP_ERRORS}: flags is 'constant': it must be a l"),
]
IN_BITSTREAMS = [
    (gone("image.mfb"), "image.mfb: No such file"),
    (folder("image.mfb"), "image.mfb: Is a directory"),
    (text("image.mfb", b""), "image.mfb: ... no feature bitstream: starts with b'', ... give a .mfb file"),
    (text("image.mfb", b"MFB"), "image.mfb: ... cut off after 3 bytes; copy it again"),
    (text("image.mfb", "no bitstream"), "image.mfb: ... no feature bitstream: starts with b'no '"),
    (cut("image.mfb", 0.9), "image.mfb: ... damaged or cut off (wrong CRC); copy it again"),
    (bits(lambda data: data.__setitem__(3, 9)), "image.mfb: ... version 9, known is 2; code the image again"),
    (bits(lambda data: data.__setitem__(40, data[40] ^ 1)), "image.mfb: ... wrong CRC"),
    (
        bits(lambda data: data.__setitem__(4, data[4] ^ 1), valid=True),
        "image.mfb: ... coded with model ... , this model is",
    ),
    (
        bits(lambda data: data.__setitem__(8, data[8] ^ 1), valid=True),
        "image.mfb: ... coded with codec ... , this codec is",
    ),
    (bits(lambda data: data.__setitem__(20, 255), valid=True), "image.mfb: ... sends scales 11111111"),
    (bits(lambda data: data.__setitem__(slice(12, 16), b"\0" * 4), valid=True), "image.mfb: ... size 0 x 0 px"),
    (
        bits(lambda data: data.__setitem__(slice(16, 20), b"\0\x40\0\x40"), valid=True),
        "image.mfb: ... size 16384 x 16384 px",
    ),
    (gone(MODEL), f"{MODEL}: no such file; make it with `dvc repro train_model@small`"),
    (gone("dvc.yaml"), "dvc.yaml: no such file"),
    (text("dvc.yaml", "a: ["), "dvc.yaml: not valid YAML"),
]
IN_FEATURES = [  # read by `compress`
    (gone(FEATURES), f"{FEATURES}: is no folder of features (index.csv is missing); run `extract` again"),
    (gone(INDEX), f"{FEATURES}: is no folder of features (index.csv is missing)"),
    (text(INDEX, ""), f"{INDEX}: not a CSV table"),
    (without(INDEX, "padded_width"), f"{INDEX} has no column 'padded_width'"),
    (table(INDEX, lambda t: t.assign(image_id="five")), f"{INDEX}: line 2: image_id is 'five', no finite number"),
    (table(INDEX, lambda t: t[t["split"] != "fit"]), f"{FEATURES}: has no split 'fit'; run `extract` again"),
    (gone(SHARD), f"{SHARD}: cannot be read as HDF5 ... No such file ... run `extract` again"),
    (text(SHARD, "features"), f"{SHARD}: cannot be read as HDF5"),
    (cut(SHARD), f"{SHARD}: cannot be read as HDF5"),
    (cut(SHARD, 0.99), f"{SHARD}: cannot be read as HDF5"),
    (damaged(SHARD, "7/0"), f"{SHARD}: cannot be read as HDF5 ... run `extract` again"),
    (other(SHARD, f"{FEATURES}/test-00000.h5"), f"{SHARD}: cannot be read as HDF5 ... not found"),
    (saved(lambda c: c | {"channels": 7}, CODEC), f"{CODEC}: made for pyramids of 7 channels, {FEATURES} has 32"),
]
IN_CODED = [  # read by `measure`
    (gone(f"{REAL}/q1"), f"{RECORDS}: cannot be read as HDF5 ... No such file ... run `compress` again"),
    (gone(f"{REAL}/q2.csv"), f"{REAL}/q2.csv: No such file"),
    (text(RECORDS, ""), f"{RECORDS}: cannot be read as HDF5"),
    (cut(RECORDS, 0.9), f"{RECORDS}: cannot be read as HDF5"),
    (damaged(RECORDS, "data"), f"{RECORDS}: cannot be read as HDF5 ... run `compress` again"),
    (other(RECORDS, f"{REAL}/q1/test-00000.h5"), f"{RECORDS}: holds other images than {FEATURES}"),
    (
        table(f"{REAL}/q1.csv", lambda t: t.assign(mse_feature=0.5)),
        f"{REAL}/q1: image ... decodes to an MSE of ... run `compress` again",
    ),
    (table(f"{REAL}/q1.csv", lambda t: t[5:]), f"{REAL}/q1.csv: lists other images than {FEATURES}"),
]
IN_ENVIRONMENT = [  # of a stage with shards
    (variable("WORKERS", "many"), "WORKERS is 'many': it must be a whole number of at least 0"),
    (variable("WORKERS", "-2"), "WORKERS is '-2': it must be a whole number of at least 0"),
    (variable("WORKERS", ""), "WORKERS is '': it must be a whole number of at least 0"),
    (full_disk, "GB free, ... GB are needed; free some space"),
]
OPTIONS = [  # command, what the line says
    ("prepare", "usage: python -m stages.prepare out"),
    ("prepare --help", "usage: python -m stages.prepare out"),
    ("allocate one two", "usage: python -m stages.allocate coded losses uncoded loss_rate importance task out"),
    (TRAIN.replace(" small", " large"), "'large' is not in params.yaml: models; choose from small"),
    (EXTRACT.replace(" small ", " large "), "'large' is not in params.yaml: models; choose from small"),
    ("train_codec f small vvc data/new.pt reports/new", "'vvc' is not in params.yaml: codecs; choose from elic"),
    ("compress f c q9 data/new.h5 data/new.csv", "'q9' is not in params.yaml: lambdas; choose from q1, q2"),
    (f"train_mfip f {MODEL} c l u large elic data/new", "'large' is not in params.yaml: models"),
    ("bound s w f p c c l u a depth-elic data/new", "'depth-elic' is not in params.yaml: cells; choose from detection"),
    ("ablate s w f p c c l u r i depth-elic data/new", "'depth-elic' is not in params.yaml: cells"),
    (FIT.replace("detection", "depth"), f"{LOSSES}/q1.csv has no rows of ... 'task': 'depth'"),
    (ALLOCATE.replace(" detection ", " depth "), f"{LOSSES}/q1.csv has no rows of ... 'task': 'depth'"),
    (ALLOCATE.replace(CODED, "data/nowhere"), "data/nowhere/q1.csv: No such file"),
    (ALLOCATE.replace("data/new", "image.png/new"), "image.png/new.csv: cannot be written in ... image.png"),
    (ALLOCATE.replace("data/new", "/proc/new"), "/proc/new.csv: cannot be written in /proc"),
    (ALLOCATE.replace("data/new.csv", PREDICTED), f"{PREDICTED}: writing it would replace {PREDICTED}"),
    (FIT.replace("data/new.json", "data"), "data: writing it would replace "),
    (REPORT.replace("reports", "image"), "image/codecs/small/elic/loss.csv: No such file"),
    (REPORT.replace("reports", "dvc.yaml"), "dvc.yaml/codecs/small/elic/loss.csv: Not a directory"),
    ("prepare ..", "..: writing it would replace "),
    ("prepare .", ".: writing it would replace "),
    ("prepare /", "/: writing it would replace "),
    ("prepare weights/../../profile", "profile: writing it would replace "),
    ("prepare coco", "prepare.coco_root coco lies in coco, which is replaced; move the images elsewhere"),
    (f"{ENCODE} --phi 2", "--phi is 2: params.yaml has 2 lambdas; choose 0 to 1"),
    (f"{ENCODE} --phi -1", "--phi is -1: ... choose 0 to 1"),
    (f"{ENCODE} --phi nan", "stages.encode: argument --phi: invalid int value: 'nan'; --help"),
    (f"{ENCODE} --bpp 0", "--bpp is 0.0: it must be a number above 0"),
    (f"{ENCODE} --bpp -1", "--bpp is -1.0: it must be a number above 0"),
    (f"{ENCODE} --bpp nan", "--bpp is nan: it must be a number above 0"),
    (f"{ENCODE} --lambda-prime inf", "--lambda-prime is inf: it must be a number above 0"),
    (f"{ENCODE} --bpp 1 --phi 1", "not allowed with argument --bpp"),
    (f"{ENCODE} --ppb 1", "unrecognized arguments: --ppb 1"),
    ("encode image.png --cell detection-elic", "the following arguments are required: -o/--out"),
    (ENCODE.replace("detection-elic", "x"), "'x' is not in params.yaml: cells; choose from detection-elic"),
    (ENCODE.replace("image.png", "absent.png"), "absent.png: cannot be decoded ... No such file"),
    (ENCODE.replace("image.png", "coco"), "coco: cannot be decoded ... Is a directory"),
    (ENCODE.replace("image.png", "params.yaml"), "params.yaml: cannot be decoded"),
    (ENCODE.replace("new.mfb", "image.png"), "image.png: writing it would replace image.png"),
    (ENCODE.replace("new.mfb", "coco"), "coco: is a folder, but a file is to be written"),
    (ENCODE.replace("new.mfb", "/proc/new.mfb"), "/proc/new.mfb: cannot be written in /proc"),
    (f"{DECODE} --image-id one", "argument --image-id: invalid int value: 'one'"),
    (f"{DECODE} --picture new.png", "--picture and --image belong together"),
    (f"{DECODE} --picture new.png --image absent.png", "absent.png: cannot be decoded"),
    (f"{DECODE} --picture new.png --image {FIRST}", "0001.png: has not the size of the coded image, 50 x 40 px"),
    (f"{DECODE} --picture coco --image image.png", "coco: is a folder, but a file is to be written"),
    (f"{DECODE} --picture image.png --image image.png", "image.png: writing it would replace image.png"),
]
BAD = [
    *((PREPARE, *row) for row in IN_PARAMS + IN_ANNOTATIONS + IN_IMAGES),
    *((TRAIN, *row) for row in IN_WEIGHTS + IN_SPLITS),
    *((COMPRESS, *row) for row in IN_FEATURES + IN_ENVIRONMENT),
    *((MEASURE, *row) for row in IN_CODED),
    (MEASURE, without(UNCODED, "utility"), "uncoded.csv has no column 'utility'; run the stage"),
    (MEASURE, without(f"{REAL}/q2.csv", "mse_feature"), "q2.csv has no column 'mse_feature'"),
    (COMPRESS, saved(lambda c: c | {"config": {"codec": "vvc"}}, CODEC), "elic.pt: describes no network of this"),
    (COMPRESS, saved(lambda c: c | {"packing": {"tiles": 3}}, CODEC), "elic.pt: describes no network of this"),
    (EXTRACT, saved(lambda c: c | {"num_classes": "many"}, MODEL), "small.pt: describes no network of this"),
    (MEASURE, saved(lambda c: c | {"channels": -1}, PREDICTION), f"{PREDICTION}: describes no network"),
    *(
        (EXTRACT, *row)
        for row in ((gone(FIRST), "0001.png: cannot be decoded"), (cut(FIRST), "0001.png: cannot be dec"))
    ),
    (
        EXTRACT,
        saved(lambda c: c, "data/codecs/small/elic.pt", MODEL),
        "small.pt: has no 'num_classes'; ... another network",
    ),
    *((ALLOCATE, *row) for row in IN_TABLES),
    *((REPORT, *row) for row in IN_REPORTS),
    *((DECODE, *row) for row in IN_BITSTREAMS),
    (ENCODE, text("image.png", png(20000, 300)), "image.png: is 20000 x 300 px, the long side must be at most 16384"),
    (ENCODE, text("image.png", png(30000, 20000)), "image.png: cannot be decoded ... decompression bomb"),
    (ENCODE, lacks(FITTED, "rate"), f"{FITTED}: rate is missing"),
    (ENCODE, saved(lambda c: c, MODEL, "data/mfip/small/elic/detection.pt"), "detection.pt: has no 'feature_channels'"),
    (ENCODE, text(PREDICTION, "weights"), f"{PREDICTION}: is no weights file"),
    (FIT, also(folder("data/new.json")), "data/new.json: is a folder, but a file is to be written"),
    (PREPARE, text("data/new", "mine"), "data/new: is a file, but a folder is to be written"),
    *((command, nothing, says) for command, says in OPTIONS),
]


@pytest.mark.parametrize(("command", "break_", "says"), BAD, ids=[f"{row[0].split()[0]}-{row[2]}" for row in BAD])
def test_bad_input_is_one_line_and_writes_nothing(
    command: str, break_: Break, says: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capfd, recwarn
) -> None:
    break_()
    before = listing(copy.parent)
    code = run(command, monkeypatch)
    complaint = capfd.readouterr().err
    assert code == 2, complaint
    assert not [found for found in recwarn if "sys.modules" not in str(found.message)]  # runpy's own
    assert complaint.count("\n") == 1 and len(complaint) < 1500, complaint
    assert re.search(".*".join(map(re.escape, says.split(" ... "))), complaint), complaint
    assert listing(copy.parent) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_profile_unbroken_is_accepted(
    command: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    before = listing(copy)
    assert run(command, monkeypatch) == 0, capfd.readouterr().err
    assert set(listing(copy)) > set(before) and not [name for name in listing(copy) if ".tmp-" in name]


def test_a_bug_keeps_its_traceback(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lib.loss_rate.fit_scales", lambda *_: {}["power"])
    with pytest.raises(KeyError, match="power"):
        run(FIT, monkeypatch)
    assert not Path("data/new.json").exists()
