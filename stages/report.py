"""Points, resamples and models of every cell -> rd_points.csv, bd_rate.csv, metrics, tables, figures and the page."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from stages.lib import ablation_tables, bound_tables, comparing, figures, page, tables
from stages.lib.allocation import Importance, read_importance
from stages.lib.command import entry
from stages.lib.files import atomic, read_csv, read_json, write_csv, write_json
from stages.lib.loss_rate import Curves, read_curves, read_fit
from stages.lib.params import SCALES, load_params
from stages.lib.references import reported
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
ADDITIVITY = ["image_id", "kind", "bits", "joint", "mirrored", "additive"]
ENUMERATION = ["image_id", "lambda_prime", "additive", "descent", "optimum"]
# What the page is made from, under `data`; with reports/codecs the dependencies of this stage.
INPUTS = ("coded", "evaluations", "illustrations", "loss_rate", "losses", "mfip")

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


def main(data: Path, reports: Path) -> None:
    params = load_params()
    qualities = list(params["lambdas"])
    cells = {
        (cell["task"], cell["codec"]): read_cell(data, cell["model"], cell["codec"], cell["task"], qualities)
        for cell in params["cells"].values()
    }
    points = pd.concat([cell.points for cell in cells.values()], ignore_index=True)
    coders = sorted({(cell["model"], cell["codec"]) for cell in params["cells"].values()})
    ledgers = {coder: read_ledgers(data.joinpath("coded", *coder), qualities) for coder in coders}
    curves = {coder: comparing.rate_distortion(lines) for coder, lines in ledgers.items()}
    bounds = {
        (cell["task"], cell["codec"]): read_bound(data / "evaluations/studies" / name / "bound")
        for name, cell in params["studies"].items()
    }
    ablated = {name: read_ablation(data / "evaluations/studies" / name / "ablation") for name in params["studies"]}
    losses = {key: _read(reports.joinpath("codecs", *key, "loss.csv"), ["step", "loss"]) for key in coders}

    compared = [comparing.compare(cell.points, cell.resamples) for cell in cells.values()]
    bd = pd.concat([found.bd for found in compared], ignore_index=True)
    high = [comparing.compare(cell.points, cell.resamples, share=comparing.HIGH).bd for cell in cells.values()]
    direct = [comparing.direct(cell.points, cell.resamples) for cell in cells.values()]
    high_bd, direct_bd = pd.concat(high, ignore_index=True), pd.concat(direct, ignore_index=True)
    paired_bd = pd.concat([comparing.paired(found) for found in compared], ignore_index=True)
    codec_bd = comparing.codec_bd_rates(points, {key: cell.resamples for key, cell in cells.items()})
    write_csv(reports / "rd_points.csv", points)
    write_csv(reports / "bd_rate.csv", bd)
    write_csv(reports / "high_bd_rate.csv", high_bd)
    write_csv(reports / "paired.csv", paired_bd)
    write_csv(reports / "direct.csv", direct_bd)
    write_csv(reports / "codec_bd_rate.csv", codec_bd)
    write_csv(reports / "codec_feature_bd_rate.csv", comparing.feature_bd_rates(curves))
    for (task, codec), numbers in comparing.metrics(points, bd).items():
        write_json(reports / "metrics" / f"{task}_{codec}.json", numbers)
    taken_apart = [
        ablation_tables.ablation(study["points"], study["bootstrap"], study["rows"]) for study in ablated.values()
    ]
    ablations = pd.concat(taken_apart or [pd.DataFrame(columns=ablation_tables.ABLATION)])
    write_csv(reports / "ablation.csv", ablations)
    sizes, rates = ({name: study[table] for name, study in ablated.items()} for table in ("sizes", "rate_control"))
    fits, mfip = ({key: getattr(cell, name) for key, cell in cells.items()} for name in ("fit", "mfip"))
    theirs = reported(params)
    for name, found in (
        ("rd_points", tables.rd_points_tables(points, theirs.points)),
        (
            "bd_rate",
            tables.bd_rate_tables(points, bd, high_bd, paired_bd, direct_bd, codec_bd, fits, mfip, theirs.bd_rate),
        ),
        ("bound", bound_tables.bound_tables(bounds)),
        ("ablation", ablation_tables.ablation_tables(ablations, sizes, rates)),
    ):
        if found:  # without studies there is no bound and no ablation
            write_text(reports / "tables" / f"{name}.md", tables.markdown(found))
            write_text(reports / "tables" / f"{name}.tex", tables.latex(found, name.replace("_", "-")))
    draw(cells, curves, losses, sizes, theirs.points, reports / "figures")
    for (task, codec), study in bounds.items():
        parts = bound_tables.parts_of(study.additivity)
        figures.additivity_figure(reports / "figures" / f"additivity_{task}_{codec}", task, codec, parts)
    content = page.common(list(points["method"].unique()), qualities) | {
        "cells": [
            page.cell(
                *cell[:2], whole.bd, above, against, cell.fit, cell.pixels, cell.test, cell.predicted, theirs.of(*key)
            )
            for (key, cell), whole, above, against in zip(cells.items(), compared, high, direct, strict=True)
        ],
        "ledgers": {f"{model}, {codec}": page.ledger(lines) for (model, codec), lines in ledgers.items()},
        "sizes": {study: table.to_dict("records") for study, table in sizes.items()},
        "additivity": {
            f"{task}, {codec}": page.additivity(study.additivity) for (task, codec), study in bounds.items()
        },
        "examples": [cell.examples for cell in cells.values()],
        "pictures": read_pictures(data / "illustrations", params["cells"].values(), cells),
        "costs": page.costs(reports / "benchmark.json"),
        "provenance": page.provenance(
            params, Path("dvc.lock"), [*(data / name for name in INPUTS), reports / "codecs"]
        ),
    }
    write_text(reports / "index.html", page.document(content))


def read_cell(data: Path, model: str, codec: str, task: str, qualities: list[str]) -> Cell:
    place = Path(model) / codec
    folder = data / "evaluations" / place / task
    points, resamples = _read(folder / "points.csv", RD_POINTS), _read(folder / "bootstrap.csv", RESAMPLES)
    comparing.check_cell(points, resamples, str(folder))
    ledger = data / "coded" / place / f"{qualities[0]}.csv"  # planes have the same pixels at every quality
    coded = _read(ledger, ["split", "scale", "pixels"])
    pixels = coded[coded["split"] == "fit"].groupby("scale")["pixels"].mean()
    if set(pixels.index) != set(SCALES):
        raise InputError(f"{ledger}: split 'fit' lacks a scale; run compress again")
    fit = read_fit(data / "loss_rate" / place / f"{task}.json", len(qualities))
    importance = data / "mfip" / place / f"{task}.csv"
    weights = _read(importance, ["split", "image_id", "scale", "weight", "sensitivity"])
    mfip = read_json(data / "mfip" / place / f"{task}.json", MFIP)
    losses = data / "losses" / place, data / "losses" / model / "uncoded.csv"
    test = read_curves(data / "coded" / place, *losses, qualities, task, "test")
    predicted = read_importance(importance, "test", test.image_ids)
    examples = read_json(data / "illustrations" / place / f"{task}.json", EXAMPLES)
    return Cell(points, resamples, fit, weights, mfip, pixels.reindex(SCALES).to_dict(), test, predicted, examples)


def read_ledgers(folder: Path, qualities: list[str]) -> list[pd.DataFrame]:
    columns = ["split", "scale", "bits", "mse_feature", *page.LEDGER]
    return [_read(folder / f"{quality}.csv", columns) for quality in qualities]


def read_pictures(folder: Path, places: Iterable[dict[str, str]], cells: dict[tuple[str, str], Cell]) -> dict[int, str]:
    """Image id -> the picture of each example of the cells."""
    return {
        example["image_id"]: page.picture(folder / place["model"] / place["codec"] / f"{example['image_id']}.webp")
        for place in places
        for example in cells[place["task"], place["codec"]].examples["examples"]
    }


def read_bound(folder: Path) -> bound_tables.Study:
    """What `bound` wrote of one cell."""
    points, bootstrap, points_mirrored, bootstrap_mirrored = (
        _read(place / f"{name}.csv", columns)
        for place in (folder, folder / "mirrored")
        for name, columns in (("points", RD_POINTS), ("bootstrap", RESAMPLES))
    )
    comparing.check_cell(points, bootstrap, str(folder))
    comparing.check_cell(points_mirrored, bootstrap_mirrored, str(folder / "mirrored"))
    additivity, enumeration = (
        _read(folder / f"{name}.csv", columns)
        for name, columns in (("additivity", ADDITIVITY), ("enumeration", ENUMERATION))
    )
    return bound_tables.Study(points, bootstrap, points_mirrored, bootstrap_mirrored, additivity, enumeration)


def read_ablation(folder: Path) -> dict[str, pd.DataFrame]:
    """What `ablate` wrote of one cell: the tables of ABLATION."""
    study = {name: _read(folder / f"{name}.csv", columns) for name, columns in ABLATION.items()}
    comparing.check_cell(study["points"], study["bootstrap"], str(folder))
    if unknown := {*study["rows"]["method"], *study["rows"]["reference"]} - {*study["points"]["method"]}:
        raise InputError(f"{folder}/rows.csv: {min(unknown)!r} is no method of points.csv; run ablate again")
    comparing.check_grid(study["sizes"], ["size"], ["quantity", "name"], folder / "sizes.csv")
    comparing.check_grid(study["rate_control"], ["asked"], ["method", "bits"], folder / "rate_control.csv")
    return study


def draw(
    cells: dict[tuple[str, str], Cell],
    curves: dict[tuple[str, str], pd.DataFrame],
    losses: dict[tuple[str, str], pd.DataFrame],
    sizes: dict[str, pd.DataFrame],
    authors: dict[tuple[str, str], pd.DataFrame],
    folder: Path,
) -> None:
    figures.method_figure(folder / "method")
    for (task, codec), cell in cells.items():
        theirs = authors.get((task, codec))
        figures.rd_figure(folder / f"rd_{task}_{codec}", cell.points, cell.resamples, theirs)
        figures.loss_rate_figure(folder / f"loss_rate_{task}_{codec}", task, codec, cell.fit, cell.pixels)
        figures.importance_figure(folder / f"importance_{task}_{codec}", task, codec, cell.fit, cell.weights)
    for (model, codec), loss in losses.items():
        shown = {name: curves[model, name] for name in (codec, comparing.CODEC_ANCHOR) if (model, name) in curves}
        figures.codec_figure(folder / f"codec_{model}_{codec}", model, codec, shown, loss)

    for study, table in sizes.items():
        figures.size_figure(folder / f"sizes_{study}", study, table)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    return read_csv(path, columns)[columns]


if __name__ == "__main__":
    entry(main)
