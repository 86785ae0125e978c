"""What `ablate` found in each cell -> the tables of the ablation, of object sizes and of rate control."""

from collections.abc import Iterable

import pandas as pd

from stages.lib.comparing import ANCHOR, BD_RATE, compare, paired
from stages.lib.tables import Table, bd_cell, bracketed, doubts, label_aware_note, number

ABLATION = [
    "task",
    "codec",
    "part",
    "method",
    "description",
    "sees_labels",
    *BD_RATE[3:],
    "reference",
    "difference",
    "difference_low",
    "difference_high",
]


def ablations(studies: Iterable[dict[str, pd.DataFrame]]) -> pd.DataFrame:
    """The tables of each study, see `results.read_ablation` -> ablation.csv."""
    found = [ablation(study["points"], study["bootstrap"], study["rows"]) for study in studies]
    return pd.concat(found or [pd.DataFrame(columns=ABLATION)])


def ablation(points: pd.DataFrame, resamples: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """points.csv, bootstrap.csv and rows.csv of one study -> its rows of ablation.csv.

    Each variant's BD-rate as in `compare`, and that of its reference minus it, with interval, as in `paired`.
    """
    names = {"method": "reference", "other": "method", "ci_low": "difference_low", "ci_high": "difference_high"}
    compared = compare(points, resamples)
    against = paired(compared, rows["reference"].unique()).rename(columns=names).drop(columns=["task", "codec"])
    found = rows.merge(compared.bd, on="method")
    return found.merge(against, how="left", on=["method", "reference"])[ABLATION]


def ablation_tables(
    ablations: pd.DataFrame, sizes: dict[str, pd.DataFrame], rates: dict[str, pd.DataFrame]
) -> list[Table]:
    """ablation.csv, and of each study sizes.csv and rate_control.csv -> what each part of the method buys."""
    return [
        *(
            _ablation_table(task, codec, rows)
            for (task, codec), rows in ablations.groupby(["task", "codec"], sort=False)
        ),
        *(
            _sizes_table(study, quantity, rows)
            for study, table in sizes.items()
            for quantity, rows in table.groupby("quantity", sort=False)
        ),
        *(_rate_control_table(study, table) for study, table in rates.items()),
    ]


def _ablation_table(task: str, codec: str, ablations: pd.DataFrame) -> Table:
    rows, notes = [], dict[str, int]()
    for part, of_part in ablations.groupby("part", sort=False):
        rows.append([f"{part}:", "", "", ""])
        for _, row in of_part.iterrows():
            name = f"{row['method']} *" if row["sees_labels"] else row["method"]
            difference = bracketed(*row[["difference", "difference_low", "difference_high"]])
            itself = row["method"] == row["reference"]
            rows.append([name, row["description"], bd_cell(row, notes), "" if itself else difference])
    title = (
        f"What each part buys, {task}, {codec}: BD-rate against {ANCHOR} in percent, and that of the method minus it"
    )
    usual = ablations["reference"].mode()[0]
    others = ablations[ablations["reference"] != usual].groupby("reference")["method"]
    about = [
        "In brackets 95 % intervals of a bootstrap over the images; all rows are resampled with the same ones.",
        "; ".join([f"The method is {usual}", *(f"for {', '.join(names)} {name}" for name, names in others)]) + ".",
        label_aware_note(),
    ]
    headers = ["variant", "what it is", "BD-rate", "method minus it"]
    return Table(title, headers, rows, [*doubts(notes), " ".join(about)], texts=2)


SIZE_TITLES = {  # quantity of sizes.csv -> title
    "bd_rate": f"BD-rate against {ANCHOR} on these images alone, percent",
    "weight": "mean measured weight of the scales",
    "sensitivity": "mean predicted sensitivity of the scales",
    "measured_sensitivity": "mean measured sensitivity of the scales",
}


def _sizes_table(study: str, quantity: str, rows: pd.DataFrame) -> Table:
    names = list(rows["name"].unique())
    lines = []
    for size, of_size in rows.groupby("size", sort=False):
        first = of_size.iloc[0]
        areas = f"{first['area_low']:.1%} to {first['area_high']:.1%}"
        by_name = of_size.set_index("name")[["value", "ci_low", "ci_high"]].reindex(names)
        cells = [
            bracketed(*numbers) if quantity == "bd_rate" else number(numbers[0], ".2f")
            for numbers in by_name.to_numpy()
        ]
        lines.append([size, str(first["n_images"]), areas, *cells])
    title = f"Images by the size of their objects, {study}: {SIZE_TITLES[quantity]}"
    note = "Terciles of the images by the median area of their objects, as a share of the image."
    return Table(title, ["objects", "images", "median area", *names], lines, [note])


def _rate_control_table(study: str, rates: pd.DataFrame) -> Table:
    columns = list(dict.fromkeys(zip(rates["method"], rates["bits"], strict=True)))
    found = {(r.asked, r.method, r.bits): f"{r.reached:,.0f} ({r.error:+.1%})" for r in rates.itertuples()}
    rows = [[f"{asked:,.0f}", *(found[asked, *column] for column in columns)] for asked in rates["asked"].unique()]
    title = f"Rate control, {study}: asked mean bits per image, and those reached with one price of a bit for all"
    note = "The price is found on the bits predicted from one precoding, all that a sender knows, or on the real ones."
    return Table(title, ["asked", *(f"{method}, {bits} bits" for method, bits in columns)], rows, [note])
