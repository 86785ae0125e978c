"""Results of a profile -> one HTML page that needs no other file: the numbers as JSON, the charts drawn by scripts.

    tables, fits, ledgers, examples --cell, ledger, ...--> content --document--> index.html

The same results give the same bytes: nothing here knows the time, a path of this machine or the revision of the code.
"""

import base64
import json
import platform
import sys
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from stages.lib.ablation import measured
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.bound_tables import describe, parts_of, tenths
from stages.lib.comparing import ANCHOR, HIGH, LABEL_AWARE, UNCODED
from stages.lib.figures import BLACK, BLUE, GREEN, GREY, METHODS, ORANGE, OTHER_METHOD, PURPLE, SHADES, SKY, VERMILION
from stages.lib.files import read_json
from stages.lib.loss_rate import importance_labels
from stages.lib.params import PACKAGES, SCALES
from stages.lib.results import FIXED, LEDGER, Cell, Results, band
from stages.lib.tables import bd_cell

SOURCES = Path(__file__).parent / "page"
SCRIPTS = ("charts.js", "examples.js", "models.js", "page.js")
DIGITS = 5  # significant ones, of every number in the page
MOST_IMAGES = 200  # in a scatter of images; the numbers beside it are of all
BINS = 24  # of a two-dimensional histogram, along each side
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # that torch looks for, where a virtual machine shows them
INK = "var(--ink)"  # of the page's text: black on paper, nearly white at night


def document(content: dict[str, Any]) -> str:
    """Content -> the page. Texts of the content reach it as JSON only, and its scripts make text nodes of them."""
    texts = json.dumps(_compact(content), separators=(",", ":"), allow_nan=False)
    parts = {
        **{f"/* {name} */": _source(name) for name in ("page.css", *SCRIPTS)},
        # In a script element only "<" can end the data or begin a comment.
        "{data}": texts.replace("<", "\\u003c"),
    }
    page = _source("page.html")
    for mark, part in parts.items():
        before, after = page.split(mark)
        page = before + part + after
    return page


def common(methods: list[str], qualities: list[str]) -> dict[str, Any]:
    """What all parts of the page share: names, and the colours of the static figures."""
    look = {name: METHODS.get(name, OTHER_METHOD) for name in methods}
    colours = {BLACK: INK}  # black cannot be seen at night
    return {
        "methods": {
            name: {"colour": colours.get(colour, colour), "marker": marker, "sees_labels": name in LABEL_AWARE}
            for name, (colour, marker) in look.items()
        },
        "anchor": ANCHOR,
        "high": HIGH,
        "heroes": {hero: fixed for hero, fixed in FIXED.items() if hero in methods},
        "scales": SCALES,
        "qualities": qualities,
        "colours": {"measured": INK, "label": BLUE, "predicted": ORANGE, "fit": VERMILION, "muted": GREY},
        # of the size of objects: as far from the paper as in the static figures, at night too
        "shades": [f"color-mix(in srgb, {INK} {_darkness(shade):.0%}, var(--paper))" for shade in SHADES],
        "palette": [SKY, ORANGE, GREEN, PURPLE, VERMILION, BLUE],  # of categories, and of the parts of a record
        "frame_bits": 8 * FRAME_BYTES,
    }


def _darkness(grey: str) -> float:
    """#000000 -> 1, #FFFFFF -> 0."""
    return 1 - int(grey[1:3], 16) / 255


def cell(known: Cell, results: Results, references: dict[str, float]) -> dict[str, Any]:
    """One task and codec, and its results. references: name -> BD-rate that others report, of comparable data."""
    points, fit, test, predicted = known.points, known.fit, known.test, known.predicted
    uncoded = points[points["method"] == UNCODED].iloc[0]
    about = ["task", "codec", "accuracy_name", "n_images", "split"]
    return {
        **uncoded[about].to_dict(),
        "uncoded": uncoded["accuracy"],
        "curves": {
            method: _curve(rows.sort_values("bits_per_image", kind="stable"), known.resamples)
            for method, rows in points[points["method"] != UNCODED].groupby("method", sort=False)
        },
        "savings": [_saving(row) for _, row in results.bd.iterrows()],
        "high": [_saving(row) for _, row in results.high.iterrows()],
        "references": references,
        "scales": {scale: _scale(fit, scale, known.pixels[scale]) for scale in SCALES},
        "n_fit": fit["n_labelled"],
        "importance": {
            "weight": _importance(predicted.weights, importance_labels(test.drop), test.labelled, fit["label"]),
            "sensitivity": _importance(predicted.sensitivity, measured(test, fit), test.labelled, {}),
        },
    }


def _curve(rows: pd.DataFrame, resamples: pd.DataFrame) -> dict[str, list]:
    """Points of one method in rising bits -> columns; low, high: the ends of the accuracy's bootstrap interval."""
    low, high = band(resamples, rows)
    named = {"bits": "bits_per_image", "bpp": "bpp", "accuracy": "accuracy", "point": "point"}
    columns = {name: rows[column].tolist() for name, column in named.items()}
    return columns | {"low": low, "high": high}


def _saving(row: pd.Series) -> dict[str, Any]:
    notes: dict[str, int] = {}
    bd_cell(row.fillna({"flags": ""}), notes)
    names = {"value": "bd_rate_pchip", "low": "ci_low", "high": "ci_high"}
    # As the tables round: rounded twice, to DIGITS and where it is shown, a number could be another there.
    numbers = {name: float(f"{row[column]:.1f}") for name, column in names.items()}
    return {"method": row["method"], **numbers, "doubt": " ".join(notes)}


def _scale(fit: dict, scale: str, pixels: float) -> dict[str, Any]:
    """The models of one scale and what they were fitted to: means over the images of `fit`."""
    mean, power, line = fit["mean"][scale], fit["power"][scale], fit["rate_phi"][scale]
    return {
        "rate": [bits / pixels for bits in mean["bits"]],
        "drop": mean["drop"],
        "power": {name: power[name] for name in ("alpha", "beta", "r2", "rmse", "flags")}
        | {"weight": fit["label"][scale]["mean"]},
        "rate_phi": line,
        "bits_error": fit["rate"][scale]["error"],
        "rivals": fit["rivals"][scale],
    }


def _importance(predicted: np.ndarray, found: np.ndarray, labelled: np.ndarray, label: dict) -> dict[str, Any]:
    """Predicted and measured [n, 5] of the images of test that have objects, and the labels of fit that were learned.

    {name: {mean, std} per scale}, r2 of the prediction per scale, None where nothing varies; pairs: of some images,
    predicted and measured [m, 5].
    """
    predicted, found = predicted[labelled], found[labelled]
    error, variance = ((found - predicted) ** 2).sum(0), ((found - found.mean(0)) ** 2).sum(0)
    some = slice(None, None, -(-len(found) // MOST_IMAGES) or 1)
    named = {"predicted": predicted, "measured": found}
    means = {name: {"mean": values.mean(0), "std": values.std(0)} for name, values in named.items()}
    if label:
        means = {"label": {part: [label[scale][part] for scale in SCALES] for part in ("mean", "std")}} | means
    return {
        "means": means,
        "r2": 1 - np.divide(error, variance, out=np.full(len(SCALES), np.nan), where=variance > 0),
        "pairs": {name: values[some] for name, values in named.items()},
    }


def ledger(ledgers: list[pd.DataFrame]) -> list[list[list[float]]]:
    """A codec's ledgers, one for each quality -> mean bits of an image of test [K][5 scales][parts of LEDGER]."""
    of_test = [lines[lines["split"] == "test"] for lines in ledgers]
    return [8 * lines.groupby("scale")[LEDGER].mean().loc[list(SCALES)].to_numpy() for lines in of_test]


def additivity(tuples: pd.DataFrame) -> list[dict[str, Any]]:
    """additivity.csv of one study -> for each part how often additive and joint losses come together, and the fit."""
    limits = [np.array([tuples[name].min(), tuples[name].max()]) for name in ("additive", "joint")]
    parts = []
    for name, rows in parts_of(tuples).items():
        counts, *edges = np.histogram2d(rows["additive"], rows["joint"], BINS, limits)
        filled = np.argwhere(counts)
        parts.append(
            {
                "name": name,
                "limits": limits,
                "side": [edge[1] - edge[0] for edge in edges],
                "squares": [[edges[0][i], edges[1][j], counts[i, j]] for i, j in filled],
                "tenths": tenths(rows),
                **describe(rows)._asdict(),
            }
        )
    return parts


def picture(path: Path) -> str:
    """A WebP file -> an address that holds it."""
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def costs(benchmark: Path) -> dict[str, Any] | None:
    """What `benchmark` measured; None where it was not run, and null a part that an older one did not measure.

    No stage makes that file: a time is another number each time. So it is no dependency, which could not be absent.
    """
    if not benchmark.is_file():
        return None
    report = read_json(benchmark)
    wanted = ("codec", "size", "device", "threads", "planes", "seconds", "peak_mib", "note")
    return {
        "machine": report["machine"]["processor"],
        "codecs": [{name: case[name] for name in wanted if name in case} for case in report["cases"]],
        "online": report.get("online"),
        "growth": report.get("growth"),
    }


def provenance(params: dict[str, Any], lock: Path, inputs: list[Path]) -> dict[str, Any]:
    """Where the numbers come from: params, versions, kind of machine, and DVC's hashes of the files under `inputs`.

    Neither a date nor the revision of the code: both change when no number does, and then the page, which DVC hashes,
    would be another one; the page says how git tells the revision that holds it. For the same reason only what the
    report depends on is listed, and no code of other stages: DVC makes the page anew when that changes, and only then.
    """
    return {
        "params": yaml.safe_dump(params, sort_keys=False, default_flow_style=None, width=100),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": _machine(),
        "hashes": _hashes(lock, inputs),
    }


def _machine() -> dict[str, str]:
    """Its kind: what chooses the routines of the networks, which round differently. The number of cores does not."""
    cpu, cards = Path("/proc/cpuinfo"), Path("/proc/driver/nvidia/gpus").glob("*/information")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    processors = [_after_colon(line) for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    gpus = {_after_colon(card.read_text(encoding="utf-8").splitlines()[0]) for card in cards}
    return {
        "system": f"{sys.platform}, {platform.machine()}",
        "processor": processors[0] if processors else platform.machine(),
        "vectors": ", ".join(name for name in VECTORS if name in flags) or "unknown",
        "gpu": ", ".join(sorted(gpus)) or "none",
    }


def _after_colon(line: str) -> str:
    return line.partition(":")[2].strip()


def _hashes(lock: Path, inputs: list[Path]) -> dict[str, str]:
    if not lock.is_file():
        return {}
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].values()
    outs = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
    # The lock also remembers what stages wrote that are gone.
    return {
        path: outs[path]
        for path in sorted(outs)
        if Path(path).exists() and any(Path(path).is_relative_to(folder) for folder in inputs)
    }


def _source(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8").rstrip("\n")


def _compact(value: Any) -> Any:
    """Arrays and tables -> lists, numbers -> DIGITS digits, what is not finite -> null."""
    if isinstance(value, pd.DataFrame):
        value = value.to_numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _compact(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_compact(inner) for inner in value]
    if isinstance(value, float):
        if not isfinite(value):
            return None
        rounded = float(f"{value:.{DIGITS}g}")
        return int(rounded) if rounded.is_integer() else rounded
    return value
