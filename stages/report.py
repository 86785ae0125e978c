"""Points, resamples and models of every cell -> rd_points.csv, bd_rate.csv, metrics, tables, figures and the page."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from stages.lib import ablation_tables, bound_tables, comparing, figures, page, results, tables
from stages.lib.command import entry
from stages.lib.files import write_csv, write_text
from stages.lib.params import load_params
from stages.lib.references import reported

# What the page is made from, under `data`; with reports/codecs the dependencies of this stage.
INPUTS = ("coded", "evaluations", "illustrations", "loss_rate", "losses", "mfip")


def main(data: Path, reports: Path) -> None:
    params = load_params()
    qualities = list(params["lambdas"])
    cells = {
        (cell["task"], cell["codec"]): results.read_cell(data, cell["model"], cell["codec"], cell["task"], qualities)
        for cell in params["cells"].values()
    }
    coders = sorted({(cell["model"], cell["codec"]) for cell in params["cells"].values()})
    ledgers = {coder: results.read_ledgers(data.joinpath("coded", *coder), qualities) for coder in coders}
    curves = {coder: comparing.rate_distortion(lines) for coder, lines in ledgers.items()}
    losses = {
        coder: results.read_table(reports.joinpath("codecs", *coder, "loss.csv"), ["step", "loss"]) for coder in coders
    }
    studies = data / "evaluations/studies"
    bounds = {
        (cell["task"], cell["codec"]): results.read_bound(studies / name / "bound")
        for name, cell in params["studies"].items()
    }
    ablated = {name: results.read_ablation(studies / name / "ablation") for name in params["studies"]}
    sizes, rates = ({name: study[table] for name, study in ablated.items()} for table in ("sizes", "rate_control"))
    theirs = reported(params)

    found = results.compare_cells(cells, curves)
    ablations = ablation_tables.ablations(ablated.values())
    results.write(found, reports)
    write_csv(reports / "ablation.csv", ablations)

    made = {
        "bd_rate": tables.bd_rate_tables(found, cells, theirs.bd_rate),
        "rd_points": tables.rd_points_tables(found.points, theirs.points),
        "ablation": ablation_tables.ablation_tables(ablations, sizes, rates),
        "bound": bound_tables.bound_tables(bounds),
    }
    for name, of_name in made.items():
        if of_name:  # without studies there is no bound and no ablation
            write_text(reports / "tables" / f"{name}.md", tables.markdown(of_name))
            write_text(reports / "tables" / f"{name}.tex", tables.latex(of_name, name.replace("_", "-")))
    draw(cells, curves, losses, sizes, bounds, theirs.points, reports / "figures")

    content = page.common(list(found.points["method"].unique()), qualities) | {
        "cells": [page.cell(cell, found.of(*key), theirs.of(*key)) for key, cell in cells.items()],
        "ledgers": {f"{model}, {codec}": page.ledger(lines) for (model, codec), lines in ledgers.items()},
        "sizes": {study: table.to_dict("records") for study, table in sizes.items()},
        "additivity": {
            f"{task}, {codec}": page.additivity(study.additivity) for (task, codec), study in bounds.items()
        },
        "examples": [cell.examples for cell in cells.values()],
        "pictures": read_pictures(data / "illustrations", params["cells"].values(), cells),
        "costs": page.costs(reports / "benchmark.json"),
        "tables": [table._asdict() for of_name in made.values() for table in of_name],
        "provenance": page.provenance(
            params, Path("dvc.lock"), [*(data / name for name in INPUTS), reports / "codecs"]
        ),
    }
    write_text(reports / "index.html", page.document(content))


def read_pictures(folder: Path, places: Iterable[dict[str, str]], cells: results.Cells) -> dict[int, str]:
    """Image id -> the picture of each example of the cells."""
    return {
        example["image_id"]: page.picture(folder / place["model"] / place["codec"] / f"{example['image_id']}.webp")
        for place in places
        for example in cells[place["task"], place["codec"]].examples["examples"]
    }


def draw(
    cells: results.Cells,
    curves: dict[tuple[str, str], pd.DataFrame],
    losses: dict[tuple[str, str], pd.DataFrame],
    sizes: dict[str, pd.DataFrame],
    bounds: dict[tuple[str, str], results.Study],
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
    for name, table in sizes.items():
        figures.size_figure(folder / f"sizes_{name}", name, table)
    for (task, codec), study in bounds.items():
        parts = bound_tables.parts_of(study.additivity)
        figures.additivity_figure(folder / f"additivity_{task}_{codec}", task, codec, parts)


if __name__ == "__main__":
    entry(main)
