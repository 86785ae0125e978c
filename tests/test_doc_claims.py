"""What the text of README.md and docs/ says of numbers is what the tables of the reports say."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import PchipInterpolator
from test_doc_tables import DOCUMENTS, DRAWS, ROOT, SPEED, benchmark, read, speed_cases, within

from stages.lib.bd_rate import pareto
from stages.lib.benchmark_tables import MEASURING_GOAL, PEAK_GOAL

WORDS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]  # of counts in the text
CLAIMS = [  # text with two whole numbers -> table of differences, or of BD-rates, and the rows it is about
    (r"`?mfiba_skip`? saves (\d+) to (\d+) % in every cell", "bd_rate", {"method": "mfiba_skip"}),
    (r"saves (\d+) to (\d+) % of the bits of one quality for all scales, at", "bd_rate", {"method": "mfiba_skip"}),
    (r"which sends all scales, (\d+) to (\d+) %", "bd_rate", {"method": "mfiba"}),
    (r"takes (\d+) to (\d+)\s+points\s+more\s+off\s+the\s+bits", "paired", {"method": "mfiba_skip", "other": "mfiba"}),
    (r"brings (\d+) to (\d+) points more with skipping", "paired", {"method": "mfiba_skip", "other": "static_skip"}),
    (r"more with skipping, (\d+) to (\d+) without", "paired", {"method": "mfiba", "other": "static"}),
    (r"`mfiba_pseudo_skip` saves (\d+) to (\d+) %", "bd_rate", {"method": "mfiba_pseudo_skip"}),
    (r"(\d+) to (\d+) points more than `mfiba_skip`", "paired", {"method": "mfiba_pseudo_skip", "other": "mfiba_skip"}),
    (r"(\d+) to\s+(\d+) points ahead of `static_", "paired", {"method": "mfiba_pseudo_skip", "other": "static_skip"}),
    (r"(\d+) to (\d+) ahead of `static`", "paired", {"method": "mfiba_pseudo", "other": "static"}),
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
    against = {pair: rows for pair, rows in bits.groupby(["method", "anchor"])}
    of_skipping, of_sending = (rows.set_index(["task", "codec"])[["bd_rate_pchip"]] for rows in (hero, sending_all))
    for claim, found in (
        ("{} to {} % (boxes, masks)", least_and_most(hero[hero["task"] != "keypoints"])),
        ("{} to {} % (keypoints) where at least 90 %", least_and_most(hero[hero["task"] == "keypoints"])),
        ("{} to {} where 90 % of the accuracy is kept", least_and_most(of_skipping - of_sending)),
        ("another {} to {} % off its bits", least_and_most(against["mfiba_skip", "static_skip"])),
        ("{} to {} % where the sender", least_and_most(against["mfiba_pseudo_skip", "static_skip"])),
        ("needs {} to {} % and", least_and_most(against["mfiba_skip", "static_skip"])),
        ("% and {} to {} % less bits than the fixed vector", least_and_most(against["mfiba", "static"])),
    ):
        assert claim.format(*found) in text, claim.format(*found)


def test_claims_about_other_draws_are_those_of_their_tables() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    keys = ["method", "codec", "task"]
    first, *others = (read(f"{reports}/bd_rate.csv").set_index(keys) for reports in DRAWS.values())
    pairs = [read(f"{reports}/paired.csv").set_index(["method", "other"]).sort_index() for reports in DRAWS.values()]
    for of_draws, of_differences, label in (
        (
            "of the study {} of {} lie inside the interval of the default profile, of the third draw {} of {}",
            "In {} of {} cells a difference to the fixed vector has its interval below 0",
            "",
        ),
        ("With pseudo-labels it is {} of {} and {} of {}", "With pseudo-labels it is {} of {};", "_pseudo"),
    ):
        heroes, counts = [f"mfiba{label}", f"mfiba{label}_skip"], []
        for found in others:
            both = first.join(found["bd_rate_pchip"], on=keys, rsuffix="_there", how="inner").loc[heroes]
            inside = both["bd_rate_pchip_there"].between(both["ci_low"], both["ci_high"])
            counts += [inside.sum(), len(inside)]
        assert of_draws.format(*counts) in text, of_draws.format(*counts)
        against = zip(heroes, ("static", "static_skip"), strict=True)
        rows = pd.concat([found.loc[pair] for pair in against for found in pairs])
        claim = of_differences.format((rows["ci_high"] < 0).sum(), len(rows))
        assert claim in text, claim


def test_claims_about_the_learned_weights_are_those_of_their_table() -> None:
    report = (ROOT / "reports/tables/bd_rate.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\*\*MFIP: error of the predicted weights.*\n\n((?:\|.*\n)+)", report, re.MULTILINE)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    found = pd.DataFrame(rows, columns=head)
    kept = found[found["flags"].str.contains("constant")]
    better = kept["KL, network"].astype(float) < kept["KL, constant"].astype(float)
    assert set(kept[""]) == {row for row in found[""] if not row.startswith("keypoints")}
    counts = [WORDS[n] for n in (len(kept), len(found), better.sum(), len(kept))]
    by = "not better, held out, than their mean by two standard errors"
    for name, claim in (
        ("README.md", f"in {{}} of {{}} cells (task and codec) {by}"),
        ("docs/results.md", f"In {{}} of {{}} cells, all of detection and segmentation, the learned weights were {by}"),
        ("docs/results.md", f"{by} (in {{2}} of the {{3}} better by less)"),
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


def missed() -> list[str]:
    """Goals of the codecs and of measuring that the benchmark did not reach, as the text lists them."""
    found = []
    for name, goal, keys in SPEED.values():
        behind = [case["codec"] for case in speed_cases() if goal and within(case, keys) < goal]
        found += [f"{name} ({', '.join(behind)})"] if behind else []
    times = [case["times_plain"]["alike"] for case in benchmark("measuring") if "note" not in case]
    return found + (["measuring"] if any(value < MEASURING_GOAL for value in times) else [])


def test_the_text_names_every_stage_that_grows_beyond_its_goal() -> None:
    text = " ".join((ROOT / "docs/scaling.md").read_text(encoding="utf-8").split())
    few, *_, many = benchmark("growth")["times"]
    ratios = {stage["stage"]: stage["ratio"] for stage in benchmark("growth")["stages"]}
    beyond = [
        name for name, found in ratios.items() if found["cpu_seconds"] > many / few or found["peak_mib"] > PEAK_GOAL
    ]
    assert f"missed by {' and '.join(f'`{name}`' for name in beyond) or 'none'}" in text


def test_the_text_names_every_goal_of_speed_that_was_missed() -> None:
    text = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    assert f"**Missed: {'; '.join(missed()) or 'none'}.**" in text
    (took,) = (case["seconds"] for case in speed_cases() if case["codec"] == "tcm")
    reachable = (took["plain_compress"] + took["plain_decompress"]) / (took["network"] + took["coder"])
    assert f"its network and coder alone are {reachable:.2f} times as fast" in text


def test_what_a_sender_takes_is_as_measured() -> None:
    taken = [{way: sum(s.values()) for way, s in case["sender"]["seconds"].items()} for case in benchmark("online")]
    times = [of["mfiba_skip, price given"] / of["uniform"] for of in taken]
    claim = f"{min(times):.2f} to {max(times):.2f} times"
    for name in ("README.md", "docs/results.md"):
        assert claim in " ".join((ROOT / name).read_text(encoding="utf-8").split()), claim
