"""Whatever is wrong with an input: one line that says what and where, exit code 2, and nothing is written.

A row of BAD: a command, what is broken in a profile that it would accept, and what the line must say, " ... " standing
for anything. Commands run in this process, as `python -m stages.<name>` runs them.
"""

import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from broken import (
    CODEC,
    CODED,
    FEATURES,
    FIRST,
    FITTED,
    LOSS_CURVE,
    LOSSES,
    MFIP_ERRORS,
    MODEL,
    POINTS,
    PREDICTED,
    PREDICTION,
    REAL,
    SPLITS,
    UNCODED,
    WEIGHTS,
    Break,
    also,
    cut,
    deep,
    folder,
    gone,
    lacks,
    link,
    nothing,
    png,
    saved,
    table,
    text,
    without,
)
from broken_inputs import IN_ANNOTATIONS, IN_ENVIRONMENT, IN_IMAGES, IN_PARAMS, IN_WEIGHTS
from broken_results import IN_BITSTREAMS, IN_CODED, IN_FEATURES, IN_REPORTS, IN_SPLITS, IN_TABLES
from conftest import write_folder
from PIL import Image

from stages.lib import mfip, prediction, results
from stages.lib.coding import FeatureCodec, build_codec, save_codec
from stages.lib.command import check_output
from stages.lib.files import read_csv, write_csv, write_json
from stages.lib.models import build, save_model
from stages.lib.params import SCALES, TASKS
from stages.lib.planes import Packing
from stages.lib.schema import InputError

ROOT = Path(__file__).parents[1]
LOST = ("drop", "loss", "loss_skipped", "pseudo_loss", "pseudo_loss_skipped")
PREPARE = "prepare data/new"
TRAIN = f"train_model {SPLITS} small data/new.pt"
EXTRACT = f"extract {SPLITS} {MODEL} small data/new"
COMPRESS = f"compress {FEATURES} {CODEC} q1 data/new data/new.csv"
MEASURE = f"measure {SPLITS} {MODEL} {FEATURES} {PREDICTION} {REAL}/uncoded.csv {CODEC} {REAL} small data/new"
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
    drawn = dict(zip(LOST, rng.uniform(0.1, 1, (len(LOST), len(rows))), strict=True))
    for q in (1, 2):
        ledger = {"pixels": 64, "bits": q * rng.integers(500, 999, len(rows)), "mse": 0.1 / q, "mse_feature": 0.2 / q}
        ledger |= {"bytes_latent": 40, "bytes_hyper": 9, "bytes_header": 3, "bytes_range": 4, "estimated_bits": 400.0}
        write_csv(Path(f"{CODED}/q{q}.csv"), rows.assign(**ledger))
        lost = {name: values / q for name, values in drawn.items()}
        write_csv(Path(f"{LOSSES}/q{q}.csv"), rows.assign(task="detection", clean=0.5, **lost))
    write_csv(Path(UNCODED), rows.assign(task="detection", clean=0.5, loss_skipped=2.0, pseudo_loss_skipped=2.0))
    write_csv(Path(PREDICTED), rows.assign(weight=0.2, sensitivity=1.0))
    errors = {"kl": 0.1, "mae": 0.1}
    sensitivity = {scale: {"r2": None} for scale in SCALES}
    held_out = {"network": errors, "constant": errors}
    write_json(Path(MFIP_ERRORS), {"held_out": held_out, "sensitivity": sensitivity, "flags": ["constant"]})
    points = [("none", 0), *((method, point) for method in ("uniform", "mfiba") for point in range(3))]
    rates = {"bits_per_image": [0, 1e3, 2e3, 4e3, 8e2, 2e3, 4e3], "accuracy": [0.6, 0.2, 0.4, 0.5, 0.2, 0.4, 0.5]}
    table = pd.DataFrame(points, columns=["method", "point"]).assign(bpp=1.0, n_images=2, **rates)
    table = table.assign(task="detection", codec="elic", accuracy_name="box AP", split="test")
    write_csv(Path(POINTS), table[results.RD_POINTS])
    resamples = pd.concat([table.assign(resample=r) for r in range(3)])
    write_csv(Path(POINTS).with_name("bootstrap.csv"), resamples[results.RESAMPLES])
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
        rows = read_csv(Path(f"{REAL}/q1.csv"))[["split", "image_id", "scale"]]
        lost = {"clean": 0.5, "loss_skipped": 2.0, "pseudo_loss_skipped": 2.0}
        of_tasks = [rows.assign(task=task, **lost) for task in TASKS]
        write_csv(Path(f"{REAL}/uncoded.csv"), pd.concat(of_tasks))
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


# ---------------------------------------------------------------- commands that are wrong, or read what is broken


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
    (f"{ENCODE} --phi 1.01", "--phi is 1.01: ... choose 0 to 1"),
    (f"{ENCODE} --phi high", "argument --phi: invalid float value: 'high'; --help"),
    (f"{ENCODE} --phi -1", "--phi is -1: ... choose 0 to 1"),
    (f"{ENCODE} --phi nan", "--phi is nan: ... choose 0 to 1"),
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
    (
        MEASURE,
        without(f"{REAL}/uncoded.csv", "pseudo_loss_skipped"),
        "uncoded.csv has no column 'pseudo_loss_skipped'; run the stage",
    ),
    (
        MEASURE,
        table(f"{REAL}/uncoded.csv", lambda t: t[t["task"] != "keypoints"]),
        "losses of uncoded features lack image ... keypoints; run `measure_uncoded` again",
    ),
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
    (ENCODE, deep("image.png"), "image.png: its values have more than 8 bits"),
    (
        ENCODE.replace("image.png", "seen.png").replace("new.mfb", "image.png"),
        link("seen.png", "image.png"),
        "image.png: writing it would replace seen.png",
    ),
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


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # as a device is, but no loss
    with pytest.raises(InputError, match="pipe: is neither a file nor a folder"):
        check_output(tmp_path / "pipe", False, [])


def test_a_bug_keeps_its_traceback(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lib.loss_rate.fit_scales", lambda *_: {}["power"])
    with pytest.raises(KeyError, match="power"):
        run(FIT, monkeypatch)
    assert not Path("data/new.json").exists()
