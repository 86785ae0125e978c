"""Points and resamples of the cells -> BD-rates, metrics, and the tables of the results in Markdown and LaTeX.

The LaTeX needs the package booktabs only.
"""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from stages.lib.bd_rate import (
    GOOD_OVERLAP,
    GOOD_POINTS,
    Curve,
    bd_rate,
    bd_rates_of_resamples,
    interval_of,
)
from stages.lib.params import SCALES, TASKS, InputError

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
HEROES = ("mfiba", "mfiba_skip")  # they are compared with every other method
NOT_AVAILABLE = "n/a"
RATE_ACCURACY = ["bits_per_image", "accuracy"]
RESAMPLES_FAILED = "resamples_failed"
NO_BD_RATE = "no BD-rate: "
REASONS = {  # flag -> what its footnote says
    "dropped": "without point {detail}, not monotone",
    "anchor_dropped": f"without point {{detail}} of {ANCHOR}, not monotone",
    f"points<{GOOD_POINTS}": f"fewer than {GOOD_POINTS} points on one of the curves",
    f"overlap<{GOOD_OVERLAP}": f"the curves share only {{overlap:.0%}} of the accuracies of {ANCHOR}",
    "too few points": f"{NO_BD_RATE}fewer than two points of rising accuracy on one of the curves",
    "no overlap": f"{NO_BD_RATE}the curves share no accuracy",
    RESAMPLES_FAILED: "{detail} of the resamples gave no BD-rate",
}


class Table(NamedTuple):
    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str]  # below the table; cells refer to the n-th as (n)
    texts: int = 1  # the first columns, which hold text


def resampled(resamples: pd.DataFrame, method: str) -> tuple[np.ndarray, np.ndarray]:
    """bootstrap.csv of one cell -> bits per image [B, P] and accuracy [B, P] of one method, both in rising order."""
    rows = resamples[resamples["method"] == method]
    bits, accuracy = (rows.pivot(index="resample", columns="point", values=v) for v in ("bits_per_image", "accuracy"))
    return bits.to_numpy(float), accuracy.to_numpy(float)


class Compared(NamedTuple):
    """Every method of one cell against the anchor."""

    bd: pd.DataFrame  # rows of bd_rate.csv
    deltas: dict[str, np.ndarray]  # method -> BD-rate of each resample, NaN where there is none


def compare(points: pd.DataFrame, resamples: pd.DataFrame, anchor_name: str = ANCHOR) -> Compared:
    """points.csv and bootstrap.csv of one cell -> BD-rates of every method against the anchor.

    Resample r of the method and of the anchor have the same images, so their noise cancels in the interval.
    """
    curves = {
        method: Curve(rows["bits_per_image"].to_numpy(), rows["accuracy"].to_numpy())
        for method, rows in points.sort_values("point", kind="stable").groupby("method", sort=False)
    }
    anchor, anchor_resamples = curves[anchor_name], resampled(resamples, anchor_name)
    task, codec = points[["task", "codec"]].iloc[0]
    rows, deltas = [], {}
    for method in points["method"].unique():
        if method in (anchor_name, UNCODED):
            continue
        found = bd_rate(anchor, curves[method])
        deltas[method] = bd_rates_of_resamples(*anchor_resamples, *resampled(resamples, method))
        low, high, failed = interval_of(deltas[method])
        flags = found.flags + ([f"{RESAMPLES_FAILED}:{failed:.0%}"] if failed else [])
        if flags:
            warnings.warn(f"BD-rate of {method}, {task}, {codec} is doubtful: {'; '.join(flags)}", stacklevel=2)
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
    coded = points.loc[points["method"] != UNCODED, ["method", "point"]]
    wanted = coded.merge(pd.Series(resamples["resample"].unique(), name="resample"), how="cross")
    there = resamples.loc[resamples["method"] != UNCODED, list(wanted)]
    odd = pd.MultiIndex.from_frame(wanted).symmetric_difference(pd.MultiIndex.from_frame(there))
    if len(odd) or len(wanted) != len(there):
        named = f", first {odd[0]}" if len(odd) else ""
        raise InputError(f"{folder}/bootstrap.csv: not every method, point has each resample once{named}; {remedy}")


def check_grid(frame: pd.DataFrame, rows: list[str], columns: list[str], file: Path) -> None:
    """Raises InputError that names the file where not each of its `rows` has each of its `columns` once."""
    counts = pd.crosstab(*([frame[name] for name in names] for names in (rows, columns)))
    if not (counts == 1).all(axis=None):
        raise InputError(f"{file}: not every {', '.join(rows)} has every {', '.join(columns)} once; run ablate again")


def metrics(points: pd.DataFrame, bd: pd.DataFrame) -> dict:
    """rd_points and bd_rate -> {task: {codec: {uncoded_accuracy, ..., <method>: {bd_rate, ci_low, ci_high}}}}."""
    out: dict = {}
    for (task, codec), rows in points.groupby(["task", "codec"], sort=False):
        found = {name: _or_null(value) for name, value in _uncoded(rows)._asdict().items()}
        for row in bd[(bd["task"] == task) & (bd["codec"] == codec)].itertuples():
            numbers = {"bd_rate": row.bd_rate_pchip, "ci_low": row.ci_low, "ci_high": row.ci_high}
            found[row.method] = {name: _or_null(value) for name, value in numbers.items()}
        out.setdefault(task, {})[codec] = found
    return out


def bd_rate_tables(
    points: pd.DataFrame,
    bd: pd.DataFrame,
    paired_bd: pd.DataFrame,
    codec_bd: pd.DataFrame,
    fits: dict[tuple[str, str], dict],
    mfip: dict[tuple[str, str], dict],
    paper: dict[tuple[str, str], float],
) -> list[Table]:
    """Tables of report, and of each (task, codec) `fit_scales` and the errors of MFIP -> the main results.

    paper: (task, codec) -> the paper's BD-rate, where it can be compared.
    """
    return [
        *(_bd_rate_table(codec, rows, paper) for codec, rows in bd.groupby("codec", sort=False)),
        *(
            _paired_table(codec, hero, rows)
            for (codec, hero), rows in paired_bd.groupby(["codec", "method"], sort=False)
        ),
        *([_codec_table(codec_bd)] if len(codec_bd) else []),
        _context_table(points),
        _fit_table(fits),
        _rivals_table(fits),
        _bits_table(fits),
        _mfip_table(mfip),
        _sensitivity_table(mfip),
    ]


def rd_points_tables(points: pd.DataFrame, authors: dict[tuple[str, str], pd.DataFrame]) -> list[Table]:
    """rd_points -> one table for each task and codec: a row per method, a column per operating point.

    authors: (task, codec) -> lmbda, bits_per_image, accuracy of the points that the paper's authors publish.
    """
    tables = []
    for (task, codec), rows in points.groupby(["task", "codec"], sort=False):
        coded, uncoded = rows[rows["method"] != UNCODED], rows[rows["method"] == UNCODED].iloc[0]
        cells = {
            (r.method, r.point): f"{number(r.accuracy, '.3f')} @ {r.bits_per_image:,.0f}" for r in coded.itertuples()
        }
        numbers = sorted(coded["point"].unique())
        tables.append(
            Table(
                f"{uncoded['accuracy_name']} @ bits per image: {task}, {codec}, {uncoded['n_images']} images of "
                f"{uncoded['split']}",
                ["method", *(f"point {n}" for n in numbers)],
                [[_named(m), *(cells.get((m, n), "") for n in numbers)] for m in coded["method"].unique()],
                [f"Uncoded: {number(uncoded['accuracy'], '.3f')}. {label_aware_note()}"],
            )
        )
    return tables + [_authors_table(*key, theirs) for key, theirs in authors.items()]


def markdown(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        grid = tabulate(table.rows, table.headers, "pipe", disable_numparse=True, colalign=_align(table))
        blocks += [f"**{table.title}**", grid, *table.notes]
    return "\n\n".join(blocks) + "\n"


def latex(tables: list[Table], label: str) -> str:
    """Floats of full text width, labelled tab:<label>-1, -2, ..."""
    blocks = []
    for number, table in enumerate(tables, 1):
        grid = tabulate(table.rows, table.headers, "latex_booktabs", disable_numparse=True, colalign=_align(table))
        blocks.append(
            "\n".join(
                [
                    r"\begin{table*}",
                    r"\centering",
                    rf"\caption{{{_tex(table.title)}}}",
                    rf"\label{{tab:{label}-{number}}}",
                    r"\footnotesize",
                    r"\setlength{\tabcolsep}{3pt}",
                    _minus(grid),
                    *(rf"\par\smallskip {_tex(note)}" for note in table.notes),
                    r"\end{table*}",
                ]
            )
        )
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(blocks) + "\n"


class _Uncoded(NamedTuple):
    uncoded_accuracy: float
    n_images: int
    uniform_bits_per_image_low: float
    uniform_bits_per_image_high: float
    uniform_share_of_uncoded_low: float  # accuracy / uncoded accuracy at the point of the fewest bits
    uniform_share_of_uncoded_high: float


def _uncoded(rows: pd.DataFrame) -> _Uncoded:
    uncoded = rows[rows["method"] == UNCODED].iloc[0]
    anchor = rows[rows["method"] == ANCHOR].sort_values("bits_per_image", kind="stable")
    share = anchor["accuracy"] / uncoded["accuracy"] if uncoded["accuracy"] > 0 else anchor["accuracy"] * np.nan
    ends = [0, -1]
    return _Uncoded(
        float(uncoded["accuracy"]),
        int(uncoded["n_images"]),
        *map(float, anchor["bits_per_image"].iloc[ends]),
        *map(float, share.iloc[ends]),
    )


def _bd_rate_table(codec: str, bd: pd.DataFrame, paper: dict[tuple[str, str], float]) -> Table:
    title = f"BD-rate against {ANCHOR}, codec {codec}: percent of the bits at equal accuracy, negative is a saving"
    table = comparison(title, bd, label_aware_note())
    theirs = [f"{paper[task, codec]:.1f}" if (task, codec) in paper else "" for task in table.headers[1:]]
    if any(theirs):
        table.rows.append(["MFIBA, paper", *theirs])
        table.notes.append("MFIBA, paper: arXiv 2503.19278, abstract; the authors' own codecs, and no interval.")
    return table


def _authors_table(task: str, codec: str, points: pd.DataFrame) -> Table:
    return Table(
        f"Points that the paper's authors publish: {task}, {codec}, first 2,000 images of val2017",
        ["lambda of their allocation", "bits per image", "accuracy"],
        [[f"{p.lmbda:.0f}", f"{p.bits_per_image:,.0f}", f"{p.accuracy:.3f}"] for p in points.itertuples()],
        [
            "From the files of github.com/SYSU-Video/MFIBA. Their weights are measured and tuned on these very images, "
            "and their bits leave out ranges of values and headers."
        ],
    )


def _codec_table(codec_bd: pd.DataFrame) -> Table:
    title = f"BD-rate of the codecs against {CODEC_ANCHOR}, all with {ANCHOR}: percent of the bits at equal accuracy"
    return comparison(title, codec_bd.rename(columns={"codec": "method"}), "")


def comparison(title: str, bd: pd.DataFrame, note: str) -> Table:
    tasks = [task for task in TASKS if task in set(bd["task"])]
    notes: dict[str, int] = {}  # note -> its number
    rows = []
    for method in bd["method"].unique():
        cells = []
        for task in tasks:
            found = bd[(bd["method"] == method) & (bd["task"] == task)]
            cells.append(bd_cell(found.iloc[0], notes) if len(found) else "")
        rows.append([_named(method), *cells])
    doubtful = [f"({number}) Doubtful: {note}" for note, number in notes.items()]
    about = "In brackets the 95 % interval of a bootstrap over the images, method and anchor resampled together."
    return Table(title, ["method", *tasks], rows, [*doubtful, f"{about} {note}".strip()])


def bd_cell(row: pd.Series, notes: dict[str, int]) -> str:
    reasons = []
    for flag in filter(None, row["flags"].split("; ")):
        name, _, detail = flag.partition(":")
        reasons.append(REASONS[name].format(detail=detail.replace(" ", ", "), overlap=row["overlap"]))
    available = not np.isnan(row["bd_rate_pchip"])
    if not available:
        reasons = [reason for reason in reasons if reason.startswith(NO_BD_RATE)]  # the others follow from it
    mark = ""
    if reasons:
        at = notes.setdefault("; ".join(reasons) + ".", len(notes) + 1)
        mark = f" ({at})"
    if not available:
        return NOT_AVAILABLE + mark
    return bracketed(row["bd_rate_pchip"], row["ci_low"], row["ci_high"]) + mark


def _context_table(points: pd.DataFrame) -> Table:
    rows = []
    for (task, codec), of_cell in points.groupby(["task", "codec"], sort=False):
        found = _uncoded(of_cell)
        rows.append(
            [
                f"{task}, {codec}",
                of_cell["accuracy_name"].iloc[0],
                number(found.uncoded_accuracy, ".3f"),
                str(found.n_images),
                f"{found.uniform_bits_per_image_low:,.0f} to {found.uniform_bits_per_image_high:,.0f}",
                f"{number(found.uniform_share_of_uncoded_low, '.0%')} to "
                f"{number(found.uniform_share_of_uncoded_high, '.0%')}",
            ]
        )
    headers = ["", "accuracy", "uncoded", "images", f"bits per image, {ANCHOR}", f"share of uncoded, {ANCHOR}"]
    return Table(
        f"The range that the comparison covers, from the lowest to the highest quality of {ANCHOR}", headers, rows, []
    )


def _paired_table(codec: str, hero: str, paired_bd: pd.DataFrame) -> Table:
    tasks = [task for task in TASKS if task in set(paired_bd["task"])]
    rows = []
    for other in paired_bd["other"].unique():
        found = paired_bd[paired_bd["other"] == other].set_index("task")
        numbers = [[found.loc[task, name] for name in ("difference", "ci_low", "ci_high")] for task in tasks]
        rows.append([_named(other), *(bracketed(*of_task) for of_task in numbers)])
    title = f"BD-rate of {hero} minus that of the others, codec {codec}: percentage points, negative: {hero} saves more"
    note = "In brackets the 95 % interval of the difference, both resampled with the same images."
    return Table(title, [f"{hero} against", *tasks], rows, [f"{note} {label_aware_note()}"])


def _fit_table(fits: dict[tuple[str, str], dict]) -> Table:
    rows = [
        [f"{task}, {codec}", *(_fit_cell(fit["power"][scale]) for scale in SCALES)]
        for (task, codec), fit in fits.items()
    ]
    title = "Power law behind mfiba_closed_form: held-out r2 of the drop on fit, for each scale"
    return Table(title, ["", *SCALES], rows, ["An r2 below 0 predicts held-out drops worse than their mean does."])


def _fit_cell(power: dict) -> str:
    return " ".join([_share(power["r2"]), *power["flags"]])


def _rivals_table(fits: dict[tuple[str, str], dict]) -> Table:
    names = list(next(iter(fits.values()))["rivals"][SCALES[0]])
    rows = [
        [f"{task}, {codec}", scale, *(_share(fit["rivals"][scale][name]) for name in names)]
        for (task, codec), fit in fits.items()
        for scale in SCALES[:3]
    ]
    note = "quality_sensitivity is told each image's measured sensitivity: what a perfect predictor of it could reach."
    return Table("Models of the smooth loss: held-out r2 on fit", ["", "scale", *names], rows, [note])


def _bits_table(fits: dict[tuple[str, str], dict]) -> Table:
    rows = [
        [f"{task}, {codec}", *(f"{np.mean(fit['rate'][scale]['error']):.1%}" for scale in SCALES)]
        + [_share(fit["rate_phi"]["0"]["r2"])]
        for (task, codec), fit in fits.items()
    ]
    title = "Bits of a quality predicted from one precoding: mean error on held-out images of fit, for each scale"
    return Table(title, ["", *SCALES, "r2 of the linear model, scale 0"], rows, [])


def _sensitivity_table(mfip: dict[tuple[str, str], dict]) -> Table:
    rows = [
        [f"{task}, {codec}", *(_share(found["sensitivity"][scale]["r2"]) for scale in SCALES)]
        for (task, codec), found in mfip.items()
    ]
    title = "MFIP: held-out r2 of the predicted sensitivities on fit, for each scale"
    note = (
        "5-fold cross-validation, by which the ridge was chosen too. About 0: none was better than the mean, which "
        "then stands for all images."
    )
    return Table(title, ["", *SCALES], rows, [note])


def _share(value: float | None) -> str:
    return number(np.nan if value is None else value, ".2f")


def _mfip_table(mfip: dict[tuple[str, str], dict]) -> Table:
    rows = []
    for (task, codec), found in mfip.items():
        held_out = found["held_out"]
        errors = (held_out[who][error] for error in ("kl", "mae") for who in ("network", "constant"))
        rows.append([f"{task}, {codec}", *(f"{value:.4f}" for value in errors), " ".join(found["flags"])])
    headers = ["", "KL, network", "KL, constant", "MAE, network", "MAE, constant", "flags"]
    note = "5-fold cross-validation. Flag constant: the network was not better, MFIP is the constant mean weight."
    return Table("MFIP: error of the predicted weights on held-out images of fit", headers, rows, [note])


def _named(method: str) -> str:
    return f"{method} *" if method in LABEL_AWARE else method


def label_aware_note() -> str:
    return "* uses the labels of the evaluated images: no sender can do that."


def bracketed(*numbers: float) -> str:
    """Value, low and high end of its interval."""
    return "{} [{}, {}]".format(*(number(value, ".1f") for value in numbers))


def number(value: float, spec: str) -> str:
    return NOT_AVAILABLE if np.isnan(value) else format(value, spec)


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value


def _align(table: Table) -> list[str]:
    return ["left"] * table.texts + ["right"] * (len(table.headers) - table.texts)


def _tex(text: str) -> str:
    return _minus(re.sub(r"[&%$#_{}]", r"\\\g<0>", text))


def _minus(tex: str) -> str:
    """A minus sign, which is longer than a hyphen."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", tex)
