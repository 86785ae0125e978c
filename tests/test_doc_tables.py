"""The tables of README.md and docs/, and what their text says of them, are those of the reports.

python -m tests.test_doc_tables   writes what is between `<!-- table: NAME -->` and `<!-- end -->` again, from reports/
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import PchipInterpolator

from stages.lib.bd_rate import pareto
from stages.lib.comparing import LABEL_AWARE
from stages.lib.tables import bracketed

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS = "none one two three four five six seven eight nine".split()  # of counts in the text
WRITE_AGAIN = "`python -m tests.test_doc_tables` writes the tables again; then see to the text around them"
TASKS = ["detection", "segmentation", "keypoints"]
SHOWN = {  # methods of the tables of results, and what they are
    "mfiba_skip": "predicted sensitivities, one precoding; may skip a scale",
    "static_skip": "fixed qualities, the best on `fit` if losses add up; may skip a scale",
    "mfiba": "predicted sensitivities, one precoding",
    "static": "fixed qualities, the best on `fit` if losses add up",
    "mfiba_closed_form": "the paper's closed form, predicted weights",
    "upstream_predicted": "the authors' algorithm, predicted weights",
    "upstream_measured": "the authors' algorithm, measured weights",
    "oracle": "measured losses of the image",
    "oracle_skip": "the same; may skip a scale",
}
PAIRS = {
    "mfiba_skip": ("static_skip", "mfiba", "oracle_skip"),
    "mfiba": ("static", "upstream_measured", "oracle"),
}
DRAWS = {  # of all images -> results
    "default profile": "reports",
    "study": "profiles/study/reports",
    "`prepare.seed: 2`": "reports/draws/seed2",
}
Rows = list[list[str]]  # cells; the first row is the header


def read(path: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / path, dtype={"scale": str}, keep_default_na=False, na_values=[""])


def cell(row: pd.Series) -> str:
    return bracketed(row["bd_rate_pchip"], row["ci_low"], row["ci_high"]) + ("" if pd.isna(row["flags"]) else " †")


def named(method: str, sees_labels: bool) -> str:
    return f"`{method}`" + (r" \*" if sees_labels else "")


def of_method(found: pd.DataFrame, method: str) -> list[str]:
    """Rows like those of bd_rate.csv, of one codec -> a cell for each task."""
    rows = found[found["method"] == method].set_index("task")
    return [cell(rows.loc[task]) for task in TASKS]


def uncoded(codec: str) -> list[str]:
    points = read("reports/rd_points.csv")
    found = points[(points["method"] == "none") & (points["codec"] == codec)].set_index("task")
    return [f"{found.loc[task, 'accuracy_name']} {found.loc[task, 'accuracy']:.3f}" for task in TASKS]


def results() -> Rows:
    bd = read("reports/bd_rate.csv").query("codec == 'elic'")
    table = [["method", "qualities are chosen by", *TASKS]]
    table += [[named(m, m in LABEL_AWARE), what, *of_method(bd, m)] for m, what in SHOWN.items()]
    return [*table, ["uncoded", "", *uncoded("elic")]]


def methods() -> Rows:
    bd = read("reports/bd_rate.csv")
    table = [["method", "codec", *TASKS]]
    for method in SHOWN:
        for codec, found in bd.groupby("codec", sort=False):
            table.append([named(method, method in LABEL_AWARE), codec, *of_method(found, method)])
    return [*table, ["uncoded", "", *uncoded(codec)]]


def paired() -> Rows:
    found = read("reports/paired.csv").set_index(["method", "other", "codec", "task"])
    table = [["difference", "codec", *TASKS]]
    for method, others in PAIRS.items():
        for other, codec in itertools.product(others, found.index.unique("codec")):
            rows = [found.loc[(method, other, codec, task)] for task in TASKS]
            table.append([f"`{method}` minus {named(other, other in LABEL_AWARE)}", codec])
            table[-1] += [bracketed(row["difference"], row["ci_low"], row["ci_high"]) for row in rows]
    return table


def high_rates() -> Rows:
    bd = read("reports/high_bd_rate.csv")
    table = [["method", "codec", *TASKS]]
    for method in ("mfiba_skip", "static_skip", "mfiba", "static"):
        for codec, found in bd.groupby("codec", sort=False):
            table.append([f"`{method}`", codec, *of_method(found, method)])
    return table


def direct() -> Rows:
    bd = read("reports/direct.csv")
    table = [["bits, in percent", "codec", *TASKS]]
    for (method, anchor), found in bd.groupby(["method", "anchor"], sort=False):
        for codec, of_codec in found.groupby("codec", sort=False):
            table.append([f"`{method}` against {named(anchor, anchor in LABEL_AWARE)}", codec])
            table[-1] += of_method(of_codec, method)
    return table


def draws() -> Rows:
    table = [["percent, points", "codec", *DRAWS]]
    for method, other in (("mfiba", None), ("mfiba_skip", None), ("mfiba", "static"), ("mfiba_skip", "static_skip")):
        for codec in read("reports/bd_rate.csv")["codec"].unique():
            table.append([f"`{method}`" + (f" minus `{other}`" if other else ""), codec])
            for reports in DRAWS.values():
                found = read(f"{reports}/{'paired' if other else 'bd_rate'}.csv")
                found = found[(found["method"] == method) & (found["codec"] == codec)]
                found = (found[found["other"] == other] if other else found).set_index("task")
                values = found["difference" if other else "bd_rate_pchip"]
                table[-1].append(" / ".join(f"{values[task]:.1f}" for task in TASKS if task in values))
    return table


def codecs() -> Rows:
    found = read("reports/codec_bd_rate.csv").set_index(["codec", "task"])
    table = [["against `hevc`", *TASKS]]
    return table + [[f"`{c}`", *(cell(found.loc[(c, task)]) for task in TASKS)] for c in found.index.unique("codec")]


def codec_features() -> Rows:
    found = read("reports/codec_feature_bd_rate.csv").set_index(["codec", "scale"])
    scales = list(found.index.unique("scale"))
    table = [["against `hevc`", *(f"scale {scale}" for scale in scales)]]
    for codec in found.index.unique("codec"):
        rows = [found.loc[(codec, scale)] for scale in scales]
        table.append([f"`{codec}`"])
        table[-1] += [f"{row['bd_rate_pchip']:.1f}" + ("" if pd.isna(row["flags"]) else " †") for row in rows]
    return table


def ablation() -> Rows:
    found = read("profiles/study/reports/ablation.csv")
    table = [["variant", "what it is", *TASKS]]
    for part, of_part in found.groupby("part", sort=False):
        table.append([f"**{part}**", "", *([""] * len(TASKS))])
        for row in of_part.drop_duplicates("method").itertuples():
            table.append([named(row.method, row.sees_labels), row.description, *of_method(of_part, row.method)])
    return table


def speed() -> Rows:
    cases = [case for case in benchmark("cases") if case["size"] == "default" and "note" not in case]
    found = {
        "compress, to network + entropy coder alone": lambda case: case["of_limit"],
        "compress and reconstruct, to compress + decompress of a plain loop": lambda case: case["times_plain"],
        "entropy coding, to compressai's, string by string": lambda case: case["entropy_coding_by_plane"]["ratio"][
            "both"
        ],
        "the same, all numbers as one string": lambda case: case["entropy_coding"]["ratio"]["both"],
        "entropy coding on all cores, to as many times one": lambda case: case["all_cores"]["of_linear"],
    }
    table = [["times", *(f"`{case['codec']}`" for case in cases)]]
    return table + [[name, *(f"{value(case):.2f}" for case in cases)] for name, value in found.items()]


def benchmark(section: str) -> Any:
    return json.loads((ROOT / "reports/benchmark.json").read_text())[section]


def one_image() -> Rows:
    steps = ("backbone", "precoding", "MFIP", "allocation", "coding")
    table = [["cell", "qualities", *steps, "sender", "decoding", "heads"]]
    for case in benchmark("online"):
        for way, sent in case["sender"]["seconds"].items():
            got = case["receiver"]["seconds"][way]
            shown = [*(sent.get(step) for step in steps), sum(sent.values()), got["decoding"], got["heads"]]
            table.append([f"`{case['cell']}`", way, *("" if value is None else f"{value:.3f}" for value in shown)])
    return table


def measuring() -> Rows:
    table = [["detector", "images", "`measure`", "plain loop", "times as fast", "equal results"]]
    for case in benchmark("measuring"):
        if "note" not in case:
            ours, plain = case["seconds"]["ours"], case["seconds"]["plain"]
            table.append([f"`{case['detector']}`", str(case["images"]), f"{ours:.1f} s", f"{plain:.1f} s"])
            table[-1] += [f"{case['times_plain']:.1f}", f"{case['equal']:.2%}"]
    return table


def growth() -> Rows:
    few, *_, many = benchmark("growth")["times"]
    table = [["stage", "images", "CPU seconds", f"{many} x to {few} x", "peak, MiB", f"{many} x to {few} x"]]
    for stage in benchmark("growth")["stages"]:
        table.append([f"`{stage['stage']}`", ", ".join(f"{value:.0f}" for value in stage["items"])])
        for name, digits in (("cpu_seconds", 1), ("peak_mib", 0)):
            table[-1] += [", ".join(f"{value:.{digits}f}" for value in stage[name]), f"{stage['ratio'][name]:.2f}"]
    return table


def metrics() -> Rows:
    """Some rows and columns of what `dvc metrics show --md reports/metrics` prints."""
    methods = ("mfiba", "mfiba_skip", "static", "static_skip")
    table = [["Path", *(f"{method}.bd_rate" for method in methods), "uncoded_accuracy"]]
    for path in sorted(ROOT.glob("reports/metrics/*_elic.json")):
        found = json.loads(path.read_text())
        values = [*(found[method]["bd_rate"] for method in methods), found["uncoded_accuracy"]]
        table.append([path.relative_to(ROOT).as_posix(), *(str(round(value, 5)) for value in values)])
    return table


TABLES = {  # name -> its rows, and how many of its columns hold text
    "results": (results, 2),
    "methods": (methods, 2),
    "paired": (paired, 2),
    "high_rates": (high_rates, 2),
    "direct": (direct, 2),
    "draws": (draws, 2),
    "codecs": (codecs, 1),
    "codec_features": (codec_features, 1),
    "ablation": (ablation, 2),
    "speed": (speed, 1),
    "one_image": (one_image, 2),
    "measuring": (measuring, 1),
    "growth": (growth, 1),
    "metrics": (metrics, 1),
}
SLOT = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
SLOTS = [(path, match[1]) for path in DOCUMENTS for match in SLOT.finditer(path.read_text(encoding="utf-8"))]


def markdown(name: str) -> str:
    table, texts = TABLES[name]
    head, *rows = table()
    rule = [":--"] * texts + ["--:"] * (len(head) - texts)
    return "".join(f"| {' | '.join(row)} |\n".replace("|  ", "| ") for row in (head, rule, *rows))


def write_tables() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        slots = SLOT.sub(lambda m: f"<!-- table: {m[1]} -->\n{markdown(m[1])}<!-- end -->", text)
        path.write_text(slots, encoding="utf-8")


@pytest.mark.parametrize(("path", "name"), SLOTS, ids=[f"{path.name}-{name}" for path, name in SLOTS])
def test_a_table_has_the_numbers_of_the_reports(path: Path, name: str) -> None:
    shown = next(match[2] for match in SLOT.finditer(path.read_text(encoding="utf-8")) if match[1] == name)
    wanted = markdown(name)
    for line, right in itertools.zip_longest(shown.splitlines(), wanted.splitlines(), fillvalue=""):
        cells = itertools.zip_longest(line.split(" | "), right.split(" | "), fillvalue="")
        for number, (is_there, should) in enumerate(cells):
            assert is_there == should, f"{path.name}, {name}, row {line[:40]!r}, column {number + 1}; {WRITE_AGAIN}"


CLAIMS = [  # text with two whole numbers -> table of differences, or of BD-rates, and the rows it is about
    (r"`?mfiba_skip`? saves (\d+) to (\d+) % in every cell", "bd_rate", {"method": "mfiba_skip"}),
    (r"saves (\d+) to (\d+) % of the bits of one quality for all scales, at", "bd_rate", {"method": "mfiba_skip"}),
    (r"which sends all scales, (\d+) to (\d+) %", "bd_rate", {"method": "mfiba"}),
    (r"takes (\d+) to (\d+)\s+points\s+more\s+off\s+the\s+bits", "paired", {"method": "mfiba_skip", "other": "mfiba"}),
    (r"brings (\d+) to (\d+) points more with skipping", "paired", {"method": "mfiba_skip", "other": "static_skip"}),
    (r"more with skipping, (\d+) to (\d+) without", "paired", {"method": "mfiba", "other": "static"}),
]


def delta(points: pd.DataFrame, method: str, other: str, least: float = 0.0) -> float:
    """BD-rate of `method` against `other`, percent: pchip over the accuracies of at least `least` that both reach."""
    curves = []
    for name in (method, other):
        bits, accuracy = points.loc[points["method"] == name, ["bits_per_image", "accuracy"]].to_numpy().T
        kept = pareto(bits, accuracy)
        curves.append(PchipInterpolator(accuracy[kept], np.log10(bits[kept])))
    low, high = max(least, *(curve.x[0] for curve in curves)), min(curve.x[-1] for curve in curves)
    of_method, of_other = (curve.integrate(low, high) / (high - low) for curve in curves)
    return 100 * (10 ** (of_method - of_other) - 1)


@pytest.mark.parametrize("reports", ["reports", "profiles/study/reports"])
def test_committed_bd_rates_follow_from_the_committed_points(reports: str) -> None:
    points = dict(list(read(f"{reports}/rd_points.csv").groupby(["task", "codec"])))
    for table, share in (("bd_rate", 0.0), ("high_bd_rate", 0.9), ("direct", 0.0)):
        rows = read(f"{reports}/{table}.csv")
        assert len(rows)
        for row in rows.itertuples():
            cell = points[row.task, row.codec]
            (whole,) = cell.loc[cell["method"] == "none", "accuracy"]
            assert row.bd_rate_pchip == pytest.approx(delta(cell, row.method, row.anchor, share * whole), abs=1e-6)


def least_and_most(rows: pd.DataFrame) -> tuple[int, int]:
    """Of the savings."""
    return round(-rows["bd_rate_pchip"].max()), round(-rows["bd_rate_pchip"].min())


def test_claims_about_high_rates_and_direct_comparisons_are_those_of_the_tables() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    high, bits = read("reports/high_bd_rate.csv"), read("reports/direct.csv")
    hero, sending_all = (high[high["method"] == method] for method in ("mfiba_skip", "mfiba"))
    of_skipping, of_sending = (rows.set_index(["task", "codec"])[["bd_rate_pchip"]] for rows in (hero, sending_all))
    for claim, found in (
        ("{} to {} % (boxes, masks)", least_and_most(hero[hero["task"] != "keypoints"])),
        ("{} to {} % (keypoints) where at least 90 %", least_and_most(hero[hero["task"] == "keypoints"])),
        ("{} to {} where 90 % of the accuracy is kept", least_and_most(of_skipping - of_sending)),
        ("another {} to {} % off its bits", least_and_most(bits[bits["anchor"] == "static_skip"])),
        ("needs {} to {} % and", least_and_most(bits[bits["anchor"] == "static_skip"])),
        ("% and {} to {} % less bits than the fixed vector", least_and_most(bits[bits["anchor"] == "static"])),
    ):
        assert claim.format(*found) in text, claim.format(*found)


def test_claims_about_other_draws_are_those_of_their_tables() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    keys = ["method", "codec", "task"]
    first, *others = (read(f"{reports}/bd_rate.csv").set_index(keys) for reports in DRAWS.values())
    counts = []
    for found in others:
        both = first.join(found["bd_rate_pchip"], on=keys, rsuffix="_there", how="inner").loc[["mfiba", "mfiba_skip"]]
        inside = both["bd_rate_pchip_there"].between(both["ci_low"], both["ci_high"])
        counts += [inside.sum(), len(inside)]
    claim = "of the study {} of {} lie inside the interval of the default profile, of the third draw {} of {}"
    assert claim.format(*counts) in text, claim.format(*counts)
    pairs = [read(f"{reports}/paired.csv").set_index(["method", "other"]).sort_index() for reports in DRAWS.values()]
    heroes = pd.concat(
        [found.loc[pair] for found in pairs for pair in (("mfiba", "static"), ("mfiba_skip", "static_skip"))]
    )
    claim = "In {} of {} cells a difference to the fixed vector has its interval below 0"
    assert claim.format((heroes["ci_high"] < 0).sum(), len(heroes)) in text, claim


def test_claims_about_the_learned_weights_are_those_of_their_table() -> None:
    report = (ROOT / "reports/tables/bd_rate.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\*\*MFIP: error of the predicted weights.*\n\n((?:\|.*\n)+)", report, re.MULTILINE)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    found = pd.DataFrame(rows, columns=head)
    kept = found[found["flags"].str.contains("constant")]
    better = kept["KL, network"].astype(float) < kept["KL, constant"].astype(float)
    assert set(kept[""]) == {row for row in found[""] if not row.startswith("keypoints")}
    counts = [WORDS[n] for n in (len(kept), len(found), better.sum(), len(kept))]
    for name, claim in (
        ("README.md", "in {} of {} cells (task and codec) not better, held out, than their mean by two standard errors"),
        ("docs/results.md", "In {} of {} cells, all of detection and segmentation, the learned weights were not better"),
        ("docs/results.md", "than their mean by two standard errors (in {2} of the {3} better by less)"),
    ):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        assert claim.format(*counts) in text, claim.format(*counts)


@pytest.mark.parametrize(("claim", "table", "rows"), CLAIMS, ids=[claim for claim, *_ in CLAIMS])
def test_a_claim_covers_the_numbers_of_the_reports(claim: str, table: str, rows: dict[str, str]) -> None:
    found = read(f"reports/{table}.csv")
    for column, value in rows.items():
        found = found[found[column] == value]
    savings = -found["bd_rate_pchip" if table == "bd_rate" else "difference"]
    places = [(path, m) for path in DOCUMENTS for m in re.finditer(claim, path.read_text(encoding="utf-8"))]
    assert places, f"no document claims: {claim}"
    for path, said in places:
        assert (int(said[1]), int(said[2])) == (round(savings.min()), round(savings.max())), f"{path.name}: {said[0]}"


if __name__ == "__main__":
    write_tables()
