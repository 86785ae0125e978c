"""What the stages before the report wrote -> `Cell`s and studies, and `Results`: all that compares them."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from stages.lib import comparing
from stages.lib.allocation import Importance, read_importance
from stages.lib.bd_rate import INTERVAL_PERCENTILES
from stages.lib.files import read_csv, read_json, write_csv, write_json
from stages.lib.loss_rate import Curves, read_curves, read_fit
from stages.lib.params import SCALES
from stages.lib.schema import FLAGS, NUMBER, NUMBER_OR_NULL, Check, Having, InputError, is_whole

RD_POINTS = [
    "task",
    "codec",
    "method",
    "point",
    "n_images",
    "bits_per_image",
    "bpp",
    "accuracy",
    "accuracy_name",
    "split",
]
RESAMPLES = ["method", "point", "resample", "bits_per_image", "accuracy"]
LEDGER = ["bytes_latent", "bytes_hyper", "bytes_header", "bytes_range"]  # columns that add up to a record
ADDITIVITY = ["image_id", "kind", "bits", "joint", "mirrored", "additive"]
ENUMERATION = ["image_id", "lambda_prime", "additive", "descent", "optimum"]
ABLATION = {  # file of `ablate` -> its columns
    "points": RD_POINTS,
    "bootstrap": RESAMPLES,
    "rows": ["part", "method", "description", "sees_labels", "reference"],
    "sizes": ["size", "n_images", "area_low", "area_high", "quantity", "name", "value", "ci_low", "ci_high"],
    "rate_control": ["method", "bits", "asked", "reached", "error"],
}
ERRORS = Having({"kl": NUMBER, "mae": NUMBER})
MFIP = Having(  # errors of `train_mfip`
    {
        "held_out": Having({"network": ERRORS, "constant": ERRORS}),
        "sensitivity": dict.fromkeys(SCALES, Having({"r2": NUMBER_OR_NULL})),
        "flags": FLAGS,
    }
)
EXAMPLES = Having(  # of `illustrate`
    {
        "examples": Check(
            lambda value: (
                isinstance(value, list) and all(isinstance(e, dict) and is_whole(e.get("image_id")) for e in value)
            ),
            "a list of objects, each with an image_id",
        )
    }
)


# Hero -> the best fixed vector of the same qualities.
FIXED = dict(zip(comparing.HEROES, comparing.HEADLINE[len(comparing.HEROES) :], strict=True))


class Cell(NamedTuple):
    """What the stages before know of one task, model and codec."""

    points: pd.DataFrame  # RD_POINTS
    resamples: pd.DataFrame  # RESAMPLES
    fit: dict  # of `fit_scales`
    weights: pd.DataFrame  # split, image_id, scale, weight, sensitivity: predicted
    mfip: dict  # numbers of `train_mfip`
    pixels: dict[str, float]  # mean over fit of the plane's pixels of each scale
    test: Curves
    predicted: Importance  # of the images of `test`
    examples: dict  # of `illustrate`


Cells = dict[tuple[str, str], Cell]  # by task and codec


class Study(NamedTuple):
    """What `bound` wrote of one cell; points and resamples as of `evaluate`."""

    points: pd.DataFrame
    resamples: pd.DataFrame
    mirrored_points: pd.DataFrame
    mirrored_resamples: pd.DataFrame
    additivity: pd.DataFrame
    enumeration: pd.DataFrame


class Results(NamedTuple):
    """Tables of reports/: operating points, and BD-rates in percent (see `comparing`)."""

    points: pd.DataFrame  # rd_points.csv
    bd: pd.DataFrame  # bd_rate.csv: every method against the anchor
    high: pd.DataFrame  # high_bd_rate.csv: the same at high accuracies
    paired: pd.DataFrame  # paired.csv: differences between the methods
    direct: pd.DataFrame  # direct.csv: one method against another
    codecs: pd.DataFrame  # codec_bd_rate.csv: codecs against each other, in accuracy
    features: pd.DataFrame  # codec_feature_bd_rate.csv: the same in PSNR of the features

    def of(self, task: str, codec: str) -> "Results":
        """The rows of one cell; `features`, which are of no task, as they are."""
        of_cells = {name: table for name, table in self._asdict().items() if name != "features"}
        return self._replace(
            **{name: table[(table["task"] == task) & (table["codec"] == codec)] for name, table in of_cells.items()}
        )


def compare_cells(cells: Cells, curves: dict[tuple[str, str], pd.DataFrame]) -> Results:
    """curves: `rate_distortion` of each (model, codec)."""
    whole = [comparing.compare(cell.points, cell.resamples) for cell in cells.values()]
    high = [comparing.compare(cell.points, cell.resamples, share=comparing.HIGH).bd for cell in cells.values()]
    points = _stacked(cell.points for cell in cells.values())
    return Results(
        points,
        _stacked(found.bd for found in whole),
        _stacked(high),
        _stacked(map(comparing.paired, whole)),
        _stacked(comparing.direct(cell.points, cell.resamples) for cell in cells.values()),
        comparing.codec_bd_rates(points, {key: cell.resamples for key, cell in cells.items()}),
        comparing.feature_bd_rates(curves),
    )


def band(resamples: pd.DataFrame, points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """bootstrap.csv of one cell, rows of points.csv of one method -> ends of the interval of each row's accuracy."""
    drawn = comparing.resampled(resamples, points["method"].iloc[0])[1]
    low, high = np.nanpercentile(drawn, INTERVAL_PERCENTILES, axis=0)
    return low[points["point"]], high[points["point"]]


def write(results: Results, reports: Path) -> None:
    """The tables, and a file of metrics for each cell."""
    names = ("rd_points", "bd_rate", "high_bd_rate", "paired", "direct", "codec_bd_rate", "codec_feature_bd_rate")
    for name, table in zip(names, results, strict=True):
        write_csv(reports / f"{name}.csv", table)
    for (task, codec), numbers in comparing.metrics(results.points, results.bd).items():
        write_json(reports / "metrics" / f"{task}_{codec}.json", numbers)


def read_cell(data: Path, model: str, codec: str, task: str, qualities: list[str]) -> Cell:
    place = Path(model) / codec
    folder = data / "evaluations" / place / task
    points, resamples = read_table(folder / "points.csv", RD_POINTS), read_table(folder / "bootstrap.csv", RESAMPLES)
    comparing.check_cell(points, resamples, str(folder))
    ledger = data / "coded" / place / f"{qualities[0]}.csv"  # planes have the same pixels at every quality
    coded = read_table(ledger, ["split", "scale", "pixels"])
    pixels = coded[coded["split"] == "fit"].groupby("scale")["pixels"].mean()
    if set(pixels.index) != set(SCALES):
        raise InputError(f"{ledger}: split 'fit' lacks a scale; run compress again")
    fit = read_fit(data / "loss_rate" / place / f"{task}.json", len(qualities))
    importance = data / "mfip" / place / f"{task}.csv"
    weights = read_table(importance, ["split", "image_id", "scale", "weight", "sensitivity"])
    mfip = read_json(data / "mfip" / place / f"{task}.json", MFIP)
    losses = data / "losses" / place, data / "losses" / model / "uncoded.csv"
    test = read_curves(data / "coded" / place, *losses, qualities, task, "test")
    predicted = read_importance(importance, "test", test.image_ids)
    examples = read_json(data / "illustrations" / place / f"{task}.json", EXAMPLES)
    return Cell(points, resamples, fit, weights, mfip, pixels.reindex(SCALES).to_dict(), test, predicted, examples)


def read_ledgers(folder: Path, qualities: list[str]) -> list[pd.DataFrame]:
    columns = ["split", "scale", "bits", "mse_feature", *LEDGER]
    return [read_table(folder / f"{quality}.csv", columns) for quality in qualities]


def read_bound(folder: Path) -> Study:
    """What `bound` wrote of one cell."""
    points, bootstrap, points_mirrored, bootstrap_mirrored = (
        read_table(place / f"{name}.csv", columns)
        for place in (folder, folder / "mirrored")
        for name, columns in (("points", RD_POINTS), ("bootstrap", RESAMPLES))
    )
    comparing.check_cell(points, bootstrap, str(folder))
    comparing.check_cell(points_mirrored, bootstrap_mirrored, str(folder / "mirrored"))
    additivity, enumeration = (
        read_table(folder / f"{name}.csv", columns)
        for name, columns in (("additivity", ADDITIVITY), ("enumeration", ENUMERATION))
    )
    return Study(points, bootstrap, points_mirrored, bootstrap_mirrored, additivity, enumeration)


def read_ablation(folder: Path) -> dict[str, pd.DataFrame]:
    """What `ablate` wrote of one cell: the tables of ABLATION."""
    study = {name: read_table(folder / f"{name}.csv", columns) for name, columns in ABLATION.items()}
    comparing.check_cell(study["points"], study["bootstrap"], str(folder))
    if unknown := {*study["rows"]["method"], *study["rows"]["reference"]} - {*study["points"]["method"]}:
        raise InputError(f"{folder}/rows.csv: {min(unknown)!r} is no method of points.csv; run ablate again")
    comparing.check_grid(study["sizes"], ["size"], ["quantity", "name"], folder / "sizes.csv")
    comparing.check_grid(study["rate_control"], ["asked"], ["method", "bits"], folder / "rate_control.csv")
    return study


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    return read_csv(path, columns)[columns]


def _stacked(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(tables), ignore_index=True)
