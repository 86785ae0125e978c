"""Made-up tables of all stages before the report, for `report` to read."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from stages import report
from stages.lib import page, results
from stages.lib.files import write_csv, write_json
from stages.lib.loss_rate import Curves, fit_scales
from stages.lib.params import SCALES

ROOT = Path(__file__).parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
RESAMPLES = 20
UNCODED = {"detection": 0.71, "segmentation": 0.0, "keypoints": 0.55}  # segmentation: a model that finds nothing
CELLS = ("detection", "segmentation")
RATES = {  # method -> bits against uniform at equal accuracy
    "uniform": 1.0,
    "static": 0.8,
    "upstream_predicted": 0.9,
    "mfiba_closed_form": 0.95,
    "mfiba": 0.7,
    "upstream_measured": 0.75,
    "oracle": 0.5,
}
PRECODE = list(PARAMS["lambdas"]).index(PARAMS["mfip"]["precode"])
TEST = list(range(2, 10))  # images
HOSTILE = "</script><img src=x onerror=\"errors.push('script')\">"
PIXELS = dict(zip(SCALES, (65536, 16384, 4096, 1024, 256), strict=True))
BENCHMARK = {
    "machine": {"processor": "Abacus", "cores": 2},
    "cases": [
        {"codec": "elic", "size": "default", "device": "cpu", "threads": 1, "planes": 20, "peak_mib": 500.2}
        | {"seconds": {"encode": 0.5, "decode": 0.25, "network": 0.1}, "of_limit": 0.9},
        {"codec": "elic", "size": "coco", "device": "cuda", "note": "not measured"},
    ],
    "online": [
        {
            "cell": "detection-elic",
            "device": "cpu",
            "sender": {
                "seconds": {
                    "uniform": {"backbone": 0.1, "coding": 0.7, "writing": 0.2},
                    "adaptive": {"backbone": 0.1, "precoding": 0.6, "MFIP": 0.3, "allocation": 0.4, "coding": 0.2},
                },
                "peak_mib": 711.4,
            },
            "receiver": {"seconds": dict.fromkeys(("uniform", "adaptive"), {"decoding": 0.5, "heads": 0.25})}
            | {"peak_mib": 645.2},
        },
        {"cell": "detection-tcm", "device": "cpu", "note": "does not fit in memory"},
    ],
    "growth": {
        "times": [1, 2, 4],
        "before_mib": 412.3,
        "stages": [
            {"stage": "measure@small-hevc", "items": [32, 64, 128], "peak_mib": [600, 610, 630]}
            | {"seconds": [4, 7, 14.5], "cpu_seconds": [3, 5, 10.2]}
        ],
    },
}


def write_evaluation(folder: Path, task: str) -> None:
    rng = np.random.default_rng(len(task))
    points, resamples = [], []

    def row(method: str, point: int, bits: float, accuracy: float) -> dict:
        named = {"task": task, "codec": "elic", "method": method, "point": point, "n_images": 160}
        scores = {"bits_per_image": bits, "bpp": bits / 128**2, "accuracy": accuracy, "accuracy_name": f"{task} AP"}
        return named | scores | {"split": "test"}

    luck = rng.normal(1, 0.03, (RESAMPLES, 1))  # of the images that a resample draws: alike for all methods
    points.append(row("none", 0, 0, UNCODED[task]))
    resamples += [
        dict(zip(results.RESAMPLES, ("none", 0, r, 0, UNCODED[task] * luck[r, 0]), strict=True))
        for r in range(RESAMPLES)
    ]
    for method, factor in RATES.items():
        bits = np.geomspace(5e3, 9e4, 6 if method in ("uniform", "static") else 8)
        accuracy = UNCODED[task] * (1 - 0.55 * (5e3 / bits) ** 0.9)
        if method == "mfiba":
            accuracy[6] *= 0.9  # not monotone
        noise = 0 if method in ("uniform", "static") else rng.normal(0, 0.005, (RESAMPLES, len(bits)))
        drawn = accuracy * (luck + noise)  # [resamples, points]
        points += [row(method, point, factor * b, a) for point, (b, a) in enumerate(zip(bits, accuracy, strict=True))]
        resamples += [
            dict(
                zip(
                    results.RESAMPLES,
                    (method, point, r, factor * bits[point] * luck[r, 0], drawn[r, point]),
                    strict=True,
                )
            )
            for point in range(len(bits))
            for r in range(RESAMPLES)
        ]
    write_csv(folder / "points.csv", pd.DataFrame(points))
    write_csv(folder / "bootstrap.csv", pd.DataFrame(resamples))


def write_models(data: Path, task: str) -> None:
    rng = np.random.default_rng(7)
    n, k = 40, len(PARAMS["lambdas"])
    pixels = np.tile(list(PIXELS.values()), (n, 1)).astype(float)
    rate = np.geomspace(0.15, 3.5, k) * rng.uniform(0.7, 1.3, (n, 5, 1))
    share = rng.dirichlet([4, 3, 3, 2, 1], n)[:, :, None]
    drop = 0.2 * share * rate**-0.8 + rng.normal(0, 0.01, rate.shape)
    drop[:, 4] = rng.normal(0, 0.01, (n, k))  # pool: nothing to model
    loss = 3 * drop
    loss[:, 4] = 0
    skipped = np.concatenate([loss[:, :, :1], loss], 2) + 1
    curves = Curves(
        np.arange(n),
        drop,
        loss,
        skipped,
        np.full(n, 0.5),
        np.round(rate * pixels[:, :, None]),
        pixels,
        rate**-1.0,
        skipped,
    )
    with pytest.warns(UserWarning, match="scale 'pool' is doubtful"):
        write_json(data / "loss_rate/small/elic" / f"{task}.json", fit_scales(curves, PRECODE))
    held_out = {"network": {"kl": 0.21, "mae": 0.12}, "constant": {"kl": 0.22, "mae": 0.13}}
    sensitivity = {scale: {"r2": r2, "ridge": 1.0} for scale, r2 in zip(SCALES, (0.43, 0.3, 0.2, 0, None), strict=True)}
    errors = {"held_out": held_out, "flags": [], "sensitivity": sensitivity}
    write_json(data / "mfip/small/elic" / f"{task}.json", errors)
    weights = rng.dirichlet([5, 4, 3, 3, 1], len(TEST))
    keys = {"split": "test", "image_id": np.repeat(TEST, 5), "scale": np.tile(SCALES, len(TEST))}
    predicted = {"weight": weights.ravel(), "sensitivity": rng.uniform(0.05, 3, weights.size)}
    write_csv(data / "mfip/small/elic" / f"{task}.csv", pd.DataFrame(keys | predicted))


def write_losses(data: Path, tasks: tuple[str, ...]) -> None:
    """Of the images of test, the last of which has no objects."""
    rng = np.random.default_rng(11)
    keys = [(task, "test", i, scale) for task in tasks for i in TEST for scale in SCALES]
    lines = pd.DataFrame(keys, columns=["task", "split", "image_id", "scale"])
    empty = lines["image_id"] == TEST[-1]
    for q, quality in enumerate(PARAMS["lambdas"]):
        loss = rng.gamma(2, 0.1, len(lines)) / 2**q
        loss = np.where(empty, 0, loss)
        measured = {"loss": loss, "loss_skipped": 2 * loss, "pseudo_loss": 0.1, "pseudo_loss_skipped": 0.2}
        accuracies = {"clean": np.where(empty, np.nan, 0.5), "drop": np.where(empty, np.nan, 0.2 * loss)}
        write_csv(data / f"losses/small/elic/{quality}.csv", lines.assign(**accuracies, **measured))
    nothing = {"loss_skipped": np.where(empty, 0, 1.5), "pseudo_loss_skipped": 0.3}
    write_csv(data / "losses/small/uncoded.csv", lines.assign(**nothing))


def write_examples(folder: Path, task: str) -> None:
    """As `illustrate` does: two images, a box, a mask or keypoints in each."""
    shapes = {
        "detection": {"box": [4.0, 5.0, 20.0, 16.0]},
        "segmentation": {"outlines": [[4.0, 5.0, 24.0, 5.0, 14.0, 21.0]]},
        "keypoints": {"points": [[4.0, 5.0], None, [24.0, 21.0]]},
    }
    thing = {"label": "person"} | shapes[task]
    found = [thing | {"score": 0.87}]
    coded = [
        {"phi": [q, q, q, q, -1], "bits": [2000 * q, 400, 90, 60, 0], "loss": 0.9 / (1 + q), "found": found}
        for q in range(len(PARAMS["lambdas"]))
    ]
    known = {"predicted": [0.3, 0.3, 0.2, 0.1, 0.1], "measured": [0.5, 0.2, 0.1, 0.1, 0.1]}
    examples = []
    for image_id, kind, saving in ((TEST[0], "best", -40.0), (TEST[1], "worst", 12.0)):
        about = {"kind": kind, "saving": saving, "image_id": image_id, "width": 40, "height": 30}
        seen = {"truth": [thing], "uncoded": {"found": found}, "uniform": coded, "mfiba": coded}
        examples.append(about | seen | {"weight": known, "sensitivity": known})
        Image.new("RGB", (40, 30), (90, image_id, 30)).save(folder / f"{image_id}.webp")
    skeletons = {"person": [[1, 2], [1, 3]]}
    write_json(folder / f"{task}.json", {"method": "mfiba", "examples": examples, "skeletons": skeletons})


def write_profile(folder: Path, tasks: tuple[str, ...] = CELLS, trained: bool = True, coco: bool = False) -> Path:
    """A profile's folder after every stage but the report. coco: it says that it had the paper's data and model."""
    params = copy.deepcopy(PARAMS) | {"studies": {}}
    if coco:
        params["prepare"] |= {"source": "coco", "coco_root": "../coco"}
        params["models"]["small"] |= {"architecture": "fasterrcnn_resnet50_fpn", "tasks": ["detection"]}
    params["cells"] = {f"{task}-elic": {"task": task, "model": "small", "codec": "elic"} for task in tasks}
    params["codecs"] = {"elic": params["codecs"]["elic"]}
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    data = folder / "data"
    for task in tasks:
        write_evaluation(data / "evaluations/small/elic" / task, task)
        write_models(data, task)
    write_losses(data, tasks)
    illustrations = data / "illustrations/small/elic"
    illustrations.mkdir(parents=True)
    for task in tasks:
        write_examples(illustrations, task)
    for q, quality in enumerate(params["lambdas"]):
        write_csv(data / f"coded/small/elic/{quality}.csv", ledger(q))
    steps = np.arange(100, 1600, 100) if trained else np.array([], int)
    loss = {"step": steps, "loss": 900 / (steps + 60), "bpp_plane": 0.5, "mse": 0.01}
    write_csv(folder / "reports/codecs/small/elic/loss.csv", pd.DataFrame(loss))
    return folder


def ledger(quality: int, rate: float = 1.0) -> pd.DataFrame:
    """Two images of fit and those of test, which have nothing to do with the codec's curve."""
    lines = [
        {
            "split": split,
            "image_id": i,
            "scale": s,
            "pixels": PIXELS[s],
            "bits": rate * PIXELS[s] * 2**quality / 8,
            "mse": 2.0**-quality,
            "mse_feature": (1 + i) * 2.0**-quality if split == "fit" else 1.0,
        }
        for split, ids in (("fit", range(2)), ("test", TEST))
        for i in ids
        for s in SCALES
    ]
    table, parts = pd.DataFrame(lines), {"latent": 5, "hyper": 1, "header": 1, "range": 1}
    return table.assign(**{f"bytes_{part}": table["bits"] * share / 64 for part, share in parts.items()})


def write_page(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A profile's folder after all stages and the benchmark, and the content of its page."""
    write_profile(folder)
    (folder / "reports/benchmark.json").write_text(json.dumps(BENCHMARK))
    contents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write = page.document
        patch.setattr(page, "document", lambda content: contents.append(content) or write(content))
        with pytest.warns(UserWarning, match="doubtful"):
            report.main(Path("data"), Path("reports"))
    return folder, contents[0]


def additivity_table() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    additive = rng.gamma(2, 1, 240)
    columns = {
        "image_id": np.repeat(np.arange(24), 10),
        "kind": np.tile(["any", "near", "skipping", "any", "near"], 48),
    }
    losses = {"joint": 0.9 * additive + rng.normal(0, 0.1, 240), "mirrored": additive, "additive": additive}
    return pd.DataFrame(columns | {"bits": rng.integers(1000, 9000, 240)} | losses)


def size_rows() -> list[dict[str, Any]]:
    names = [("bd_rate", name) for name in ("static", "mfiba")]
    names += [(quantity, s) for quantity in ("weight", "sensitivity", "measured_sensitivity") for s in SCALES]
    interval = {"value": 0.5, "ci_low": 0.2, "ci_high": 0.7}
    return [
        {"size": size, "quantity": quantity, "name": name} | interval
        for size in ("small", "medium", "large")
        for quantity, name in names
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """`write_page`, once for the tests of a file."""
    return write_page(tmp_path_factory.mktemp("page") / "profile")


@pytest.fixture(scope="module")
def content(made: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return made[1]
