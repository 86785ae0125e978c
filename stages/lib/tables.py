"""BD-rates, points and errors of the models -> the tables of the results in Markdown and LaTeX.

The LaTeX needs the package booktabs only.
"""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from stages.lib.bd_rate import GOOD_OVERLAP, GOOD_POINTS
from stages.lib.comparing import ANCHOR, CODEC_ANCHOR, HIGH, LABEL_AWARE, RESAMPLES_FAILED, UNCODED, context_of
from stages.lib.params import SCALES, TASKS
from stages.lib.results import Cells, Results

NOT_AVAILABLE = "n/a"
NO_BD_RATE = "no BD-rate: "
REASONS = {  # flag -> what its footnote says
    "dropped": "without {points} of {method}, not monotone",
    "anchor_dropped": "without {points} of {anchor}, not monotone",
    f"points<{GOOD_POINTS}": f"fewer than {GOOD_POINTS} points on one of the curves",
    f"overlap<{GOOD_OVERLAP}": "the curves share only {overlap:.1%} of the accuracies of {anchor}",
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


def bd_rate_tables(results: Results, cells: Cells, paper: dict[tuple[str, str], float]) -> list[Table]:
    """The main results. paper: (task, codec) -> the paper's BD-rate, where it can be compared."""
    fits, mfip = ({key: getattr(cell, name) for key, cell in cells.items()} for name in ("fit", "mfip"))
    return [
        *(_bd_rate_table(codec, rows, paper) for codec, rows in results.bd.groupby("codec", sort=False)),
        *(_high_table(codec, rows) for codec, rows in results.high.groupby("codec", sort=False)),
        *(
            _paired_table(codec, hero, rows)
            for (codec, hero), rows in results.paired.groupby(["codec", "method"], sort=False)
        ),
        *(_direct_table(codec, rows) for codec, rows in results.direct.groupby("codec", sort=False)),
        *([_codec_table(results.codecs)] if len(results.codecs) else []),
        *([_feature_table(results.features)] if len(results.features) else []),
        _context_table(results.points),
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


def _bd_rate_table(codec: str, bd: pd.DataFrame, paper: dict[tuple[str, str], float]) -> Table:
    title = f"BD-rate against {ANCHOR}, codec {codec}: percent of the bits at equal accuracy, negative is a saving"
    table = comparison(title, bd, label_aware_note())
    theirs = [f"{paper[task, codec]:.1f}" if (task, codec) in paper else "" for task in table.headers[1:]]
    if any(theirs):
        table.rows.append(["MFIBA, paper", *theirs])
        table.notes.append("MFIBA, paper: arXiv 2503.19278, abstract; the authors' own codecs, and no interval.")
    return table


def _high_table(codec: str, high_bd: pd.DataFrame) -> Table:
    title = (
        f"The same, codec {codec}, where at least {HIGH:.0%} of the uncoded accuracy is kept: "
        f"BD-rate against {ANCHOR}, percent"
    )
    return comparison(title, high_bd, f"A resample's accuracies count from {HIGH:.0%} of its own uncoded one on.")


def _direct_table(codec: str, direct_bd: pd.DataFrame) -> Table:
    title = f"BD-rate of one method with another as the anchor, codec {codec}: percent of the other's bits"
    names = direct_bd["method"] + " against " + direct_bd["anchor"].map(_named)
    return comparison(title, direct_bd, label_aware_note(), names)


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


def _feature_table(feature_bd: pd.DataFrame) -> Table:
    """Rows of codec_feature_bd_rate.csv -> a row for each codec, a column for each scale."""
    notes: dict[str, int] = {}
    rows = []
    for (model, codec), found in feature_bd.groupby(["model", "codec"], sort=False):
        by_scale = found.assign(method=codec).set_index("scale").loc[list(SCALES)]
        cells = [marked(f"{row['bd_rate_pchip']:.1f}", row, notes) for _, row in by_scale.iterrows()]
        rows.append([f"{codec}, features of {model}", *cells])
    title = f"BD-rate of the codecs against {CODEC_ANCHOR} in PSNR of the features of fit, scale by scale: percent"
    return Table(title, ["codec", *(f"scale {scale}" for scale in SCALES)], rows, doubts(notes))


def comparison(title: str, bd: pd.DataFrame, note: str, names: pd.Series | None = None) -> Table:
    """Rows like those of bd_rate.csv -> a row for each method, or for each of `names`, a column for each task."""
    tasks = [task for task in TASKS if task in set(bd["task"])]
    names = bd["method"].map(_named) if names is None else names
    notes: dict[str, int] = {}  # note -> its number
    rows = []
    for name in names.unique():
        of_name = bd[names == name]
        found = (of_name[of_name["task"] == task] for task in tasks)
        rows.append([name, *(bd_cell(of_task.iloc[0], notes) if len(of_task) else "" for of_task in found)])
    about = "In brackets the 95 % interval of a bootstrap over the images, method and anchor resampled together."
    return Table(title, ["method", *tasks], rows, [*doubts(notes), f"{about} {note}".strip()])


def doubts(notes: dict[str, int]) -> list[str]:
    """Reason -> its number, as `bd_cell` collects them -> notes of a table."""
    return [f"({number}) Doubtful: {reason}" for reason, number in notes.items()]


def bd_cell(row: pd.Series, notes: dict[str, int]) -> str:
    """A row like those of bd_rate.csv -> BD-rate with its interval; why it is doubtful joins `notes`."""
    return marked(bracketed(row["bd_rate_pchip"], row["ci_low"], row["ci_high"]), row, notes)


def marked(text: str, row: pd.Series, notes: dict[str, int]) -> str:
    """The text, or n/a where there is no BD-rate, with the number of the note that says why it is doubtful."""
    reasons = []
    for flag in filter(None, row["flags"].split("; ")):
        name, _, detail = flag.partition(":")
        points = f"point{'s' if ' ' in detail else ''} {detail.replace(' ', ', ')}"
        known = {"detail": detail, "points": points, **row[["overlap", "method", "anchor"]]}
        reasons.append(REASONS[name].format(**known))
    available = not np.isnan(row["bd_rate_pchip"])
    if not available:
        reasons = [reason for reason in reasons if reason.startswith(NO_BD_RATE)]  # the others follow from it
    mark = ""
    if reasons:
        at = notes.setdefault("; ".join(reasons) + ".", len(notes) + 1)
        mark = f" ({at})"
    return (text if available else NOT_AVAILABLE) + mark


def _context_table(points: pd.DataFrame) -> Table:
    rows = []
    for (task, codec), of_cell in points.groupby(["task", "codec"], sort=False):
        found = context_of(of_cell)
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
    tasks: dict[tuple[str, ...], list[str]] = {}  # those that one model serves have the same bits
    for (task, codec), fit in fits.items():
        errors = (f"{np.mean(fit['rate'][scale]['error']):.1%}" for scale in SCALES)
        tasks.setdefault((codec, *errors, _share(fit["rate_phi"]["0"]["r2"])), []).append(task)
    rows = [[f"{', '.join(of_row)}, {codec}", *cells] for (codec, *cells), of_row in tasks.items()]
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
    note = (
        "5-fold cross-validation. Flag constant: the network was not better than the mean weight by two standard "
        "errors, so MFIP is that constant."
    )
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


def _align(table: Table) -> list[str]:
    return ["left"] * table.texts + ["right"] * (len(table.headers) - table.texts)


def _tex(text: str) -> str:
    return _minus(re.sub(r"[&%$#_{}]", r"\\\g<0>", text))


def _minus(tex: str) -> str:
    """A minus sign, which is longer than a hyphen."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", tex)
