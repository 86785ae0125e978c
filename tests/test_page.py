"""What is in the page of the results. What a browser makes of it: test_page_in_browser.py."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reported
from pytest import approx
from reported import BENCHMARK, CELLS, HOSTILE, RATES, ROOT, TEST, additivity_table, ledger

from stages import report
from stages.lib import figures, page
from stages.lib.files import read_csv

made, content = reported.made, reported.content  # fixtures


def data_of(document: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', document)[1])


def test_the_report_writes_the_page(made: tuple[Path, dict[str, Any]]) -> None:
    folder, content = made
    text = (folder / "reports/index.html").read_text()
    assert text == page.document(content) and len(data_of(text)["cells"]) == len(CELLS)


def test_nothing_is_loaded_from_elsewhere(content: dict[str, Any]) -> None:
    document = page.document(content)
    assert set(re.findall(r"https?://[^\"'\s]*", document)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert "default-src 'none'" in document and '<link rel="icon" href="data:,' in document
    for address in re.findall(r'(?:src|href)="([^"]*)"', document):
        assert address.startswith(("#", "data:", "tables/", "figures/"))


def test_texts_and_numbers_come_back_as_they_were(content: dict[str, Any]) -> None:
    document = page.document(
        content | {"new": [HOSTILE, "<!-- \u2028 &lt;", 0.123456789, np.nan, np.float64(12), True]}
    )
    assert data_of(document)["new"] == [HOSTILE, "<!-- \u2028 &lt;", 0.12346, None, 12, True]
    assert document.count("</script>") == page.document(content).count("</script>")


def test_a_curve_has_the_points_and_the_interval_of_its_resamples(made: tuple[Path, dict[str, Any]]) -> None:
    folder, content = made
    cell = content["cells"][0]
    evaluated = folder / "data/evaluations/small/elic/detection"
    points, resamples = read_csv(evaluated / "points.csv"), read_csv(evaluated / "bootstrap.csv")
    assert list(cell["curves"]) == list(RATES) and cell["uncoded"] == approx(0.71)
    for method, curve in cell["curves"].items():
        of_method = points[points["method"] == method]
        assert [curve["bits"], curve["accuracy"]] == [of_method[n].tolist() for n in ("bits_per_image", "accuracy")]
        drawn = resamples[(resamples["method"] == method) & (resamples["point"] == 2)]["accuracy"]
        assert [curve["low"][2], curve["high"][2]] == approx(np.percentile(drawn, [2.5, 97.5]).tolist())
    found = {saving["method"]: saving for saving in cell["savings"]}
    assert [found["static"][name] for name in ("value", "low", "high")] == approx([-20] * 3)
    assert [saving["method"] for saving in cell["high"]] == list(found)
    assert found["static"]["doubt"] == "" and found["mfiba"]["doubt"] == "without point 6 of mfiba, not monotone."


def test_methods_have_the_colours_of_the_static_figures(content: dict[str, Any]) -> None:
    for name, look in content["methods"].items():
        colour, marker = figures.METHODS.get(name, figures.OTHER_METHOD)
        assert look["marker"] == marker
        assert look["colour"] == ("var(--ink)" if colour == figures.BLACK else colour)
    assert set(content["methods"]) > set(RATES)


def test_every_marker_of_the_figures_can_be_drawn() -> None:
    markers = {marker for _, marker in (*figures.METHODS.values(), figures.OTHER_METHOD)}
    table = re.search(r"const MARKERS = \{(.*?)\};", (page.SOURCES / "charts.js").read_text(), re.DOTALL)[1]
    assert markers <= set(re.findall(r'^  "?(.)"?: "M', table, re.MULTILINE))


def test_importance_is_of_images_with_objects_and_a_perfect_prediction_has_r2_1() -> None:
    rng = np.random.default_rng(0)
    found, labelled = rng.uniform(size=(450, 5)), np.arange(450) < 420
    found[~labelled] = np.nan
    perfect = page._importance(np.nan_to_num(found), found, labelled, {})
    assert perfect["r2"] == approx(np.ones(5)) and np.isfinite(perfect["pairs"]["measured"]).all()
    assert perfect["means"]["measured"]["mean"] == approx(found[:420].mean(0))
    assert len(perfect["pairs"]["predicted"]) <= page.MOST_IMAGES
    constant = page._importance(np.tile(found[:420].mean(0), (450, 1)), found, labelled, {})
    assert constant["r2"] == approx(np.zeros(5), abs=1e-12)


def test_the_parts_of_the_ledger_are_the_bits_of_an_image_of_test(content: dict[str, Any]) -> None:
    parts = content["ledgers"]["small, elic"]
    lines = ledger(3)
    of_test = lines[lines["split"] == "test"]
    assert np.sum(parts[3]) == approx(of_test["bits"].sum() / len(TEST))
    assert parts[3][0].tolist() == approx(of_test.loc[of_test["scale"] == "0", page.LEDGER].mean().mul(8).tolist())


def test_no_choice_is_lost_between_the_squares() -> None:
    table = additivity_table()
    parts = page.additivity(table)
    assert [part["name"] for part in parts][-1] == "some scales not sent"
    assert sum(count for part in parts for *_, count in part["squares"]) == len(table)
    assert all(part["slope"] == approx(0.9, abs=0.1) and len(part["tenths"]) == 10 for part in parts)


def test_provenance_holds_what_the_page_was_made_from_and_neither_date_nor_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/coded/q1.csv", "data/models/small.pt"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    stages = "{compress: {outs: [%s, %s]}, train: {outs: [%s]}, prepare: {deps: []}}"
    outs = (f"{{path: data/{name}, md5: {name[-4]}}}" for name in ("coded/q1.csv", "coded/gone.csv", "models/small.pt"))
    Path("dvc.lock").write_text(f"stages: {stages % tuple(outs)}")
    found = page.provenance({"seed": 5}, Path("dvc.lock"), [Path("data/coded")])
    assert found["hashes"] == {"data/coded/q1.csv": "."} and "seed: 5" in found["params"]
    assert set(found) == {"params", "versions", "machine", "hashes"} and found["versions"]["numpy"] == np.__version__
    assert page.provenance({}, Path("no.lock"), [])["hashes"] == {}


def test_the_reports_inputs_are_its_dependencies() -> None:
    stage = (ROOT / "dvc.yaml").read_text().split("\n  report:")[1].split("outs:")[0]
    for name in report.INPUTS:
        assert f"- data/{name}\n" in stage
    assert "- reports/codecs\n" in stage


def test_costs_are_those_of_the_benchmark_and_null_where_an_older_one_has_none(tmp_path: Path) -> None:
    assert page.costs(tmp_path / "benchmark.json") is None
    (tmp_path / "benchmark.json").write_text(json.dumps(BENCHMARK))
    found = page.costs(tmp_path / "benchmark.json")
    assert found["machine"] == "Abacus" and found["codecs"][1] == BENCHMARK["cases"][1]
    assert found["codecs"][0]["seconds"]["encode"] == 0.5 and "of_limit" not in found["codecs"][0]
    assert [found[name] for name in ("online", "growth")] == [BENCHMARK[name] for name in ("online", "growth")]
    older = {name: BENCHMARK[name] for name in ("machine", "cases")}
    (tmp_path / "benchmark.json").write_text(json.dumps(older))
    assert page.costs(tmp_path / "benchmark.json") == found | {"online": None, "growth": None}


@pytest.mark.parametrize("folder", [ROOT / "reports", ROOT / "profiles/study/reports"], ids=["default", "study"])
def test_a_committed_page_is_below_5_mb(folder: Path) -> None:
    if not (folder / "index.html").is_file():
        pytest.skip("not in git")
    assert (folder / "index.html").stat().st_size < 5e6
