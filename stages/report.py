"""Points, resamples and models of every cell -> rd_points.csv, bd_rate.csv, metrics, tables and figures."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from stages.lib import figures, tables
from stages.lib.files import atomic, read_csv, read_json, write_csv, write_json
from stages.lib.params import SCALES, InputError, entry, load_params

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


STUDY = {  # file of `ablate` -> its columns
    "points": RD_POINTS,
    "bootstrap": RESAMPLES,
    "rows": ["part", "method", "description", "sees_labels", "reference"],
    "sizes": ["size", "n_images", "area_low", "area_high", "quantity", "name", "value", "ci_low", "ci_high"],
    "rate_control": ["method", "bits", "asked", "reached", "error"],
}


class Cell(NamedTuple):
    """What the stages before know of one task, model and codec."""

    points: pd.DataFrame  # RD_POINTS
    resamples: pd.DataFrame  # RESAMPLES
    fit: dict  # of `fit_scales`
    weights: pd.DataFrame  # split, image_id, scale, weight, sensitivity: predicted
    mfip: dict  # numbers of `train_mfip`
    pixels: dict[str, float]  # mean over fit of the plane's pixels of each scale


def main(data: Path, reports: Path) -> None:
    params = load_params()
    quality = next(iter(params["lambdas"]))  # planes have the same pixels at every quality
    cells = {
        (cell["task"], cell["codec"]): read_cell(data, cell["model"], cell["codec"], cell["task"], quality)
        for cell in params["cells"].values()
    }
    points = pd.concat([cell.points for cell in cells.values()], ignore_index=True)
    coders = {
        (model, codec): read_coder(reports / "codecs" / model / codec)
        for model, codec in sorted({(cell["model"], cell["codec"]) for cell in params["cells"].values()})
    }
    bd = pd.concat([tables.bd_rates(cell.points, cell.resamples) for cell in cells.values()], ignore_index=True)
    paired_bd = pd.concat([tables.paired(cell.points, cell.resamples) for cell in cells.values()], ignore_index=True)
    codec_bd = tables.codec_bd_rates(points, {key: cell.resamples for key, cell in cells.items()})
    write_csv(reports / "rd_points.csv", points)
    write_csv(reports / "bd_rate.csv", bd)
    write_csv(reports / "paired.csv", paired_bd)
    write_csv(reports / "codec_bd_rate.csv", codec_bd)
    feature_bd = tables.feature_bd_rates({key: rate_distortion for key, (rate_distortion, _) in coders.items()})
    write_csv(reports / "codec_feature_bd_rate.csv", feature_bd)
    write_json(reports / "metrics.json", tables.metrics(points, bd))
    studies = {name: read_study(data / "evaluations/ablations" / name) for name in params["studies"]}
    taken_apart = [tables.ablation(study["points"], study["bootstrap"], study["rows"]) for study in studies.values()]
    ablations = pd.concat(taken_apart or [pd.DataFrame(columns=tables.ABLATION)])
    write_csv(reports / "ablation.csv", ablations)
    sizes, rates = ({name: study[table] for name, study in studies.items()} for table in ("sizes", "rate_control"))
    fits, mfip = ({key: getattr(cell, name) for key, cell in cells.items()} for name in ("fit", "mfip"))
    for name, found in (
        ("rd_points", tables.rd_points_tables(points)),
        ("bd_rate", tables.bd_rate_tables(points, bd, paired_bd, codec_bd, fits, mfip)),
        ("ablation", tables.ablation_tables(ablations, sizes, rates)),
    ):
        write_text(reports / "tables" / f"{name}.md", tables.markdown(found))
        write_text(reports / "tables" / f"{name}.tex", tables.latex(found, name.replace("_", "-")))
    draw(cells, coders, sizes, reports / "figures")


def read_cell(data: Path, model: str, codec: str, task: str, quality: str) -> Cell:
    place = Path(model) / codec
    folder = data / "evaluations" / place / task
    points, resamples = _read(folder / "points.csv", RD_POINTS), _read(folder / "bootstrap.csv", RESAMPLES)
    tables.check_cell(points, resamples, str(folder))
    coded = _read(data / "coded" / place / f"{quality}.csv", ["split", "scale", "pixels"])
    pixels = coded[coded["split"] == "fit"].groupby("scale")["pixels"].mean()
    if set(pixels.index) != set(SCALES):
        raise InputError(f"{data / 'coded' / place / quality}.csv: split 'fit' lacks a scale; run compress again")
    fit = read_json(data / "loss_rate" / place / f"{task}.json")
    weights = _read(data / "mfip" / place / f"{task}.csv", ["split", "image_id", "scale", "weight", "sensitivity"])
    mfip = read_json(data / "mfip" / place / f"{task}.json")
    return Cell(points, resamples, fit, weights, mfip, pixels.reindex(SCALES).to_dict())


def read_study(folder: Path) -> dict[str, pd.DataFrame]:
    """What `ablate` wrote of one cell: the tables of STUDY."""
    study = {name: _read(folder / f"{name}.csv", columns) for name, columns in STUDY.items()}
    tables.check_cell(study["points"], study["bootstrap"], str(folder))
    return study


def read_coder(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The codec's folder of `train_codec` -> rate_distortion.csv and loss.csv."""
    rate_distortion = _read(folder / "rate_distortion.csv", ["coder", "scale", "bpp_plane", "psnr"])
    return rate_distortion, _read(folder / "loss.csv", ["step", "loss"])


def draw(
    cells: dict[tuple[str, str], Cell],
    coders: dict[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]],
    sizes: dict[str, pd.DataFrame],
    folder: Path,
) -> None:
    figures.method_figure(folder / "method")
    for (task, codec), cell in cells.items():
        figures.rd_figure(folder / f"rd_{task}_{codec}", cell.points, cell.resamples)
        figures.loss_rate_figure(folder / f"loss_rate_{task}_{codec}", task, codec, cell.fit, cell.pixels)
        figures.importance_figure(folder / f"importance_{task}_{codec}", task, codec, cell.fit, cell.weights)
    for (model, codec), (rate_distortion, loss) in coders.items():
        figures.codec_figure(folder / f"codec_{model}_{codec}", model, codec, rate_distortion, loss)

    for study, table in sizes.items():
        figures.size_figure(folder / f"sizes_{study}", study, table)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    frame = read_csv(path)
    missing = [column for column in columns if column not in frame]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; run the stage that writes it again")
    return frame[columns]


if __name__ == "__main__":
    entry(main)
