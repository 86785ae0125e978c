"""Points and resamples of the cells -> BD-rates against the anchor, their differences, and metrics."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from stages.lib.bd_rate import INTERVAL_PERCENTILES, Curve, bd_rate, bd_rates_of_resamples, interval_of
from stages.lib.params import SCALES
from stages.lib.schema import InputError

ANCHOR, UNCODED = "uniform", "none"
CODEC_ANCHOR = "hevc"
# They need the labels of the images that are evaluated.
LABEL_AWARE = ("upstream_measured", "oracle", "oracle_skip", "oracle_joint", "oracle_skip_joint", "oracle_mirrored")
BD_RATE = [
    "task",
    "codec",
    "method",
    "anchor",
    "bd_rate_pchip",
    "bd_rate_akima",
    "ci_low",
    "ci_high",
    "overlap",
    "n_points",
    "flags",
]
FIXED = {  # hero -> the best fixed vector of the same qualities
    "mfiba": "static",
    "mfiba_pseudo": "static",
    "mfiba_skip": "static_skip",
    "mfiba_pseudo_skip": "static_skip",
}
HEROES = tuple(FIXED)  # they are compared with every other method
HEADLINE = (*HEROES, *dict.fromkeys(FIXED.values()))  # and with these above all
ADDITIVE = {"static": "oracle", "static_skip": "oracle_skip"}  # fixed vector -> the additive bound of its qualities
HIGH = 0.9  # of the uncoded accuracy: what most users would not go below
RESAMPLES_FAILED = "resamples_failed"


def resampled(resamples: pd.DataFrame, method: str) -> tuple[np.ndarray, np.ndarray]:
    """bootstrap.csv of one cell -> bits per image [B, P] and accuracy [B, P] of one method, both in rising order."""
    rows = resamples[resamples["method"] == method]
    bits, accuracy = (rows.pivot(index="resample", columns="point", values=v) for v in ("bits_per_image", "accuracy"))
    return bits.to_numpy(float), accuracy.to_numpy(float)


def band(resamples: pd.DataFrame, points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """bootstrap.csv of one cell, rows of points.csv of one method -> ends of the interval of each row's accuracy."""
    drawn = resampled(resamples, points["method"].iloc[0])[1]
    low, high = np.nanpercentile(drawn, INTERVAL_PERCENTILES, axis=0)
    return low[points["point"]], high[points["point"]]


class Compared(NamedTuple):
    """Every method of one cell against the anchor."""

    bd: pd.DataFrame  # rows of bd_rate.csv
    deltas: dict[str, np.ndarray]  # method -> BD-rate of each resample, NaN where there is none


def compare(points: pd.DataFrame, resamples: pd.DataFrame, anchor_name: str = ANCHOR, share: float = 0) -> Compared:
    """points.csv and bootstrap.csv of one cell -> BD-rates of every method against the anchor.

    Resample r of the method and of the anchor have the same images, so their noise cancels in the interval.
    share: only accuracies of at least this share of the uncoded one count, in a resample of that of its images.
    """
    curves = {
        method: Curve(rows["bits_per_image"].to_numpy(), rows["accuracy"].to_numpy())
        for method, rows in points.sort_values("point", kind="stable").groupby("method", sort=False)
    }
    anchor, anchor_resamples = curves[anchor_name], resampled(resamples, anchor_name)
    least, least_of_resamples = -np.inf, None
    if share:
        least = share * curves[UNCODED].accuracy.item()
        least_of_resamples = share * resampled(resamples, UNCODED)[1][:, 0]
    task, codec = points[["task", "codec"]].iloc[0]
    rows, deltas = [], {}
    for method in points["method"].unique():
        if method in (anchor_name, UNCODED):
            continue
        found = bd_rate(anchor, curves[method], least)
        deltas[method] = bd_rates_of_resamples(*anchor_resamples, *resampled(resamples, method), least_of_resamples)
        low, high, failed = interval_of(deltas[method])
        flags = found.flags + ([f"{RESAMPLES_FAILED}:{failed:.0%}"] if failed else [])
        if flags:
            from_on = f" from {share:.0%} of the uncoded accuracy on" if share else ""
            named = f"{method} against {anchor_name}{from_on}, {task}, {codec}"
            warnings.warn(f"BD-rate of {named} is doubtful: {'; '.join(flags)}", stacklevel=2)
        rows.append(
            {
                "task": task,
                "codec": codec,
                "method": method,
                "anchor": anchor_name,
                "bd_rate_pchip": found.pchip,
                "bd_rate_akima": found.akima,
                "ci_low": low,
                "ci_high": high,
                "overlap": found.overlap,
                "n_points": found.n_points,
                "flags": "; ".join(flags),
            }
        )
    return Compared(pd.DataFrame(rows, columns=BD_RATE), deltas)


def paired(compared: Compared, heroes: Iterable[str] = HEROES) -> pd.DataFrame:
    """`compare` of one cell -> BD-rate of each of the heroes minus that of every other method, one row each.

    Percentage points, negative: the hero saves more. Both BD-rates of a resample come from the same images; the
    interval is that of their difference, NaN where more than half of the resamples have none. Columns task, codec,
    method, other, difference, ci_low, ci_high.
    """
    found, rows = compared.bd.set_index("method"), []
    for hero in [method for method in heroes if method in compared.deltas]:
        for other, deltas in compared.deltas.items():
            if other != hero:
                low, high, _ = interval_of(compared.deltas[hero] - deltas)
                key = (*found.loc[hero, ["task", "codec"]], hero, other)
                rows.append((*key, found["bd_rate_pchip"][hero] - found["bd_rate_pchip"][other], low, high))
    return pd.DataFrame(rows, columns=["task", "codec", "method", "other", "difference", "ci_low", "ci_high"])


def direct(points: pd.DataFrame, resamples: pd.DataFrame) -> pd.DataFrame:
    """points.csv and bootstrap.csv of one cell -> each hero with its fixed vector, and with its bound, as the anchor.

    Rows as in bd_rate.csv; percent of the other's bits, over the accuracies that these two reach, which is not the
    difference of their BD-rates against a third.
    """
    found = [pd.DataFrame(columns=BD_RATE)]
    for hero, fixed in FIXED.items():
        for anchor in (fixed, ADDITIVE[fixed]):
            if {anchor, hero} <= set(points["method"]):
                part = points[points["method"].isin([anchor, hero])]
                found.append(compare(part, resamples, anchor).bd)
    return pd.concat([frame for frame in found if len(frame)] or found, ignore_index=True)


def codec_bd_rates(points: pd.DataFrame, resamples: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """rd_points, and bootstrap.csv of each (task, codec) -> the codecs against HEVC, all at one quality for all scales.

    Columns as in bd_rate.csv, without `method`. No rows for a task that HEVC does not code.
    """
    found = [pd.DataFrame(columns=BD_RATE)]
    of_anchor = points[points["method"] == ANCHOR]
    for task, rows in of_anchor.groupby("task", sort=False):
        codecs = rows["codec"].unique()
        if CODEC_ANCHOR in codecs:
            drawn = [resamples[task, codec].query("method == @ANCHOR").assign(method=codec) for codec in codecs]
            found.append(compare(rows.assign(method=rows["codec"]), pd.concat(drawn), CODEC_ANCHOR).bd)
    table = pd.concat([frame for frame in found if len(frame)] or found)
    return table.assign(codec=table["method"]).drop(columns="method").reset_index(drop=True)


def rate_distortion(ledgers: list[pd.DataFrame]) -> pd.DataFrame:
    """A codec's ledgers, one for each quality -> rows scale, bits, psnr, a point each: means over the images of `fit`.

    PSNR = 10 log10(1 / MSE), of the features of an image. Their peak is not 1, but it is the same for all codecs: it
    would move an image's PSNR alike for all, and no BD-rate. (The range of a plane is not: it depends on the packing.)
    """
    of_fit = [ledger[ledger["split"] == "fit"] for ledger in ledgers]
    points = [lines.assign(psnr=-10 * np.log10(lines["mse_feature"])) for lines in of_fit]
    means = [lines.groupby("scale", as_index=False)[["bits", "psnr"]].mean() for lines in points]
    return pd.concat(means, ignore_index=True)


def feature_bd_rates(curves: dict[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """`rate_distortion` of each (model, codec) -> the codecs against HEVC in PSNR of the features, scale by scale.

    Columns as in bd_rate.csv, without what depends on a task. No rows for a model whose features HEVC does not code.
    """
    rows = []
    for (model, codec), curve in curves.items():
        anchor = curves.get((model, CODEC_ANCHOR))
        if codec == CODEC_ANCHOR or anchor is None:
            continue
        for scale in SCALES:
            ours, theirs = (
                Curve(*part.loc[part["scale"] == scale, ["bits", "psnr"]].to_numpy().T) for part in (curve, anchor)
            )
            found = bd_rate(theirs, ours)
            numbers = found.pchip, found.akima, found.overlap, found.n_points, "; ".join(found.flags)
            rows.append((model, codec, scale, CODEC_ANCHOR, *numbers))
    columns = ["bd_rate_pchip", "bd_rate_akima", "overlap", "n_points", "flags"]
    return pd.DataFrame(rows, columns=["model", "codec", "scale", "anchor", *columns])


def check_cell(points: pd.DataFrame, resamples: pd.DataFrame, folder: str) -> None:
    """Every method's points are 0 .. P-1 and each has all resamples; raises InputError that names the folder."""
    remedy = "run evaluate again"
    for column in ("task", "codec", "n_images", "accuracy_name", "split"):
        if points[column].nunique() != 1:
            raise InputError(f"{folder}/points.csv: not every row has the same {column}; {remedy}")
    for method, rows in points.groupby("method", sort=False):
        if sorted(rows["point"]) != list(range(len(rows))):
            raise InputError(f"{folder}/points.csv: the points of {method!r} are not 0, 1, 2, ..., each once; {remedy}")
    for method, wanted in ((ANCHOR, "the anchor"), (UNCODED, "the uncoded accuracy")):
        if not (points["method"] == method).any():
            raise InputError(f"{folder}/points.csv has no rows of {method!r}, {wanted}; {remedy}")
    resample = pd.Series(resamples["resample"].unique(), name="resample")
    wanted = points[["method", "point"]].merge(resample, how="cross")
    there = resamples[list(wanted)]
    odd = pd.MultiIndex.from_frame(wanted).symmetric_difference(pd.MultiIndex.from_frame(there))
    if len(odd) or len(wanted) != len(there):
        named = f", first {odd[0]}" if len(odd) else ""
        raise InputError(f"{folder}/bootstrap.csv: not every method, point has each resample once{named}; {remedy}")


def check_grid(frame: pd.DataFrame, rows: list[str], columns: list[str], file: Path) -> None:
    """Raises InputError that names the file where not each of its `rows` has each of its `columns` once."""
    counts = pd.crosstab(*([frame[name] for name in names] for names in (rows, columns)))
    if not (counts == 1).all(axis=None):
        raise InputError(f"{file}: not every {', '.join(rows)} has every {', '.join(columns)} once; run ablate again")


def metrics(points: pd.DataFrame, bd: pd.DataFrame) -> dict[tuple[str, str], dict[str, Any]]:
    """rd_points and bd_rate -> (task, codec) -> uncoded_accuracy, and bd_rate, ci_low, ci_high of the HEADLINE methods.

    Few numbers, for `dvc metrics` and `dvc exp`: bd_rate.csv has all of them.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in points[points["method"] == UNCODED].itertuples():
        found[row.task, row.codec] = {"uncoded_accuracy": _or_null(row.accuracy)}
    for row in bd[bd["method"].isin(HEADLINE)].itertuples():
        numbers = {"bd_rate": row.bd_rate_pchip, "ci_low": row.ci_low, "ci_high": row.ci_high}
        found[row.task, row.codec][row.method] = {name: _or_null(value) for name, value in numbers.items()}
    return found


class Context(NamedTuple):
    """The range that the comparison of one cell covers."""

    uncoded_accuracy: float
    n_images: int
    uniform_bits_per_image_low: float
    uniform_bits_per_image_high: float
    uniform_share_of_uncoded_low: float  # accuracy / uncoded accuracy at the point of the fewest bits
    uniform_share_of_uncoded_high: float


def context_of(rows: pd.DataFrame) -> Context:
    uncoded = rows[rows["method"] == UNCODED].iloc[0]
    anchor = rows[rows["method"] == ANCHOR].sort_values("bits_per_image", kind="stable")
    share = anchor["accuracy"] / uncoded["accuracy"] if uncoded["accuracy"] > 0 else anchor["accuracy"] * np.nan
    ends = [0, -1]
    return Context(
        float(uncoded["accuracy"]),
        int(uncoded["n_images"]),
        *map(float, anchor["bits_per_image"].iloc[ends]),
        *map(float, share.iloc[ends]),
    )


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value
