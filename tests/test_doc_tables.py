"""The tables of README.md and docs/ are those of the reports. What the text says of them: test_doc_claims.py.

python -m tests.test_doc_tables   writes what is between `<!-- table: NAME -->` and `<!-- end -->` again, from reports/,
                                  and reports/benchmark.md and .tex from benchmark.json
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages.lib.benchmark_tables import CODER_GOAL, CORES_GOAL, LIMIT_GOAL, PLAIN_GOALS, benchmark_tables
from stages.lib.comparing import FIXED, LABEL_AWARE
from stages.lib.tables import bracketed, latex
from stages.lib.tables import markdown as tables_as_markdown

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITE_AGAIN = "`python -m tests.test_doc_tables` writes the tables again; then see to the text around them"
TASKS = ["detection", "segmentation", "keypoints"]
SHOWN = {  # methods of the tables of results, and what they are
    "mfiba_pseudo_skip": "its own detections as labels, all qualities tried; may skip a scale",
    "mfiba_skip": "predicted sensitivities, one precoding; may skip a scale",
    "static_skip": "fixed qualities, the best on `fit` if losses add up; may skip a scale",
    "mfiba_pseudo": "its own detections as labels, all qualities tried",
    "mfiba": "predicted sensitivities, one precoding",
    "static": "fixed qualities, the best on `fit` if losses add up",
    "mfiba_closed_form": "the paper's closed form, predicted weights",
    "upstream_predicted": "the authors' algorithm, predicted weights",
    "upstream_measured": "the authors' algorithm, measured weights",
    "oracle": "measured losses of the image",
    "oracle_skip": "the same; may skip a scale",
}
PAIRS = {
    "mfiba_pseudo_skip": ("static_skip", "mfiba_skip", "oracle_skip"),
    "mfiba_skip": ("static_skip", "mfiba", "oracle_skip"),
    "mfiba_pseudo": ("static", "mfiba", "upstream_measured", "oracle"),
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
    for method in ("mfiba_pseudo_skip", "mfiba_skip", "static_skip", "mfiba_pseudo", "mfiba", "static"):
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
    for method, other in [*((hero, None) for hero in FIXED), *FIXED.items()]:
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


SPEED = {  # what -> how it is called in the text; its goal, at least; its place in a case of the benchmark
    "compress, to network + entropy coder alone": ("limit", LIMIT_GOAL, ("of_limit",)),
    "compress and reconstruct, to compress + decompress of a plain loop": (
        "plain loop",
        PLAIN_GOALS["default", "cpu"],
        ("times_plain",),
    ),
    "entropy coding, to compressai's, string by string": (
        "entropy coding by string",
        CODER_GOAL,
        ("entropy_coding_by_plane", "ratio", "both"),
    ),
    "the same, all numbers as one string": (
        "entropy coding as one string",
        CODER_GOAL,
        ("entropy_coding", "ratio", "both"),
    ),
    "entropy coding on all cores, to as many times one": ("all cores", CORES_GOAL, ("all_cores", "of_linear")),
    "the same of a hash: what the machine allows": ("hash", None, ("all_cores", "of_linear_hash")),
}


def speed_cases() -> list[dict[str, Any]]:
    return [case for case in benchmark("cases") if case["size"] == "default" and "note" not in case]


def within(found: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        found = found[key]
    return found


def speed() -> Rows:
    cases = speed_cases()
    table = [["times", "goal", *(f"`{case['codec']}`" for case in cases)]]
    for what, (_, goal, keys) in SPEED.items():
        aim = "near 1" if goal == CORES_GOAL else "" if goal is None else f"{goal}"
        table.append([what, aim, *(f"{within(case, keys):.2f}" for case in cases)])
    return table


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
    ways = {"alike": "the same by `measure`", "ours": "all of `measure`"}
    header = [cell for name in ways.values() for cell in (name, "times as fast")]
    table = [["detector", "images", "plain loop", *header, "equal results"]]
    for case in benchmark("measuring"):
        if "note" not in case:
            table.append([f"`{case['detector']}`", str(case["images"]), f"{case['seconds']['plain']:.1f} s"])
            for way in ways:
                table[-1] += [f"{case['seconds'][way]:.1f} s", f"{case['times_plain'][way]:.2f}"]
            table[-1].append(f"{case['equal']:.2%}")
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
    for path, text in benchmark_files().items():
        path.write_text(text, encoding="utf-8")


def benchmark_files() -> dict[Path, str]:
    tables = benchmark_tables(json.loads((ROOT / "reports/benchmark.json").read_text()))
    texts = {"md": tables_as_markdown(tables), "tex": latex(tables, "benchmark")}
    return {ROOT / f"reports/benchmark.{suffix}": text for suffix, text in texts.items()}


def test_the_tables_of_the_benchmark_are_those_of_its_numbers() -> None:
    for path, text in benchmark_files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}; {WRITE_AGAIN}"


@pytest.mark.parametrize(("path", "name"), SLOTS, ids=[f"{path.name}-{name}" for path, name in SLOTS])
def test_a_table_has_the_numbers_of_the_reports(path: Path, name: str) -> None:
    shown = next(match[2] for match in SLOT.finditer(path.read_text(encoding="utf-8")) if match[1] == name)
    wanted = markdown(name)
    for line, right in itertools.zip_longest(shown.splitlines(), wanted.splitlines(), fillvalue=""):
        cells = itertools.zip_longest(line.split(" | "), right.split(" | "), fillvalue="")
        for number, (is_there, should) in enumerate(cells):
            assert is_there == should, f"{path.name}, {name}, row {line[:40]!r}, column {number + 1}; {WRITE_AGAIN}"


if __name__ == "__main__":
    write_tables()
