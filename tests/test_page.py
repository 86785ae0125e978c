"""The page of the results: what is in it, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from pytest import approx
from reported import CELLS, RATES, TEST, ledger, write_profile

from stages import report
from stages.lib import figures, page
from stages.lib.files import read_csv
from stages.lib.params import SCALES

ROOT = Path(__file__).parents[1]
HOSTILE = "</script><img src=x onerror=\"errors.push('script')\">"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A chart for each task, cell, (quantity, task), (scale, model), (scale, quantity) and codec; bars of an example.
CHARTS = 2 + 2 + 2 * 2 + 5 * 2 + 5 * 2 + 1 + 3
STUDIED = 4 + 4  # of object sizes, of additivity
BENCHMARK = {
    "machine": {"processor": "Abacus", "cores": 2},
    "cases": [
        {"codec": "elic", "size": "default", "device": "cpu", "threads": 1, "planes": 20, "peak_mib": 500.2}
        | {"seconds": {"encode": 0.5, "decode": 0.25, "network": 0.1}, "of_limit": 0.9},
        {"codec": "elic", "size": "coco", "device": "cuda", "note": "not measured"},
    ],
    "online": [
        {
            "cell": "detection-elic",
            "device": "cpu",
            "sender": {
                "seconds": {
                    "uniform": {"backbone": 0.1, "coding": 0.7, "writing": 0.2},
                    "adaptive": {"backbone": 0.1, "precoding": 0.6, "MFIP": 0.3, "allocation": 0.4, "coding": 0.2},
                },
                "peak_mib": 711.4,
            },
            "receiver": {"seconds": dict.fromkeys(("uniform", "adaptive"), {"decoding": 0.5, "heads": 0.25})}
            | {"peak_mib": 645.2},
        },
        {"cell": "detection-tcm", "device": "cpu", "note": "does not fit in memory"},
    ],
    "growth": {
        "times": [1, 2, 4],
        "before_mib": 412.3,
        "stages": [
            {"stage": "measure@small-hevc", "items": [32, 64, 128], "peak_mib": [600, 610, 630]}
            | {"seconds": [4, 7, 14.5], "cpu_seconds": [3, 5, 10.2]}
        ],
    },
}


def additivity_table() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    additive = rng.gamma(2, 1, 240)
    columns = {
        "image_id": np.repeat(np.arange(24), 10),
        "kind": np.tile(["any", "near", "skipping", "any", "near"], 48),
    }
    losses = {"joint": 0.9 * additive + rng.normal(0, 0.1, 240), "mirrored": additive, "additive": additive}
    return pd.DataFrame(columns | {"bits": rng.integers(1000, 9000, 240)} | losses)


def size_rows() -> list[dict[str, Any]]:
    names = [("bd_rate", name) for name in ("static", "mfiba")]
    names += [(quantity, s) for quantity in ("weight", "sensitivity", "measured_sensitivity") for s in SCALES]
    interval = {"value": 0.5, "ci_low": 0.2, "ci_high": 0.7}
    return [
        {"size": size, "quantity": quantity, "name": name} | interval
        for size in ("small", "medium", "large")
        for quantity, name in names
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a profile that was reported, and the content of its page."""
    folder = write_profile(tmp_path_factory.mktemp("page") / "profile")
    (folder / "reports/benchmark.json").write_text(json.dumps(BENCHMARK))
    contents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write = page.document
        patch.setattr(page, "document", lambda content: contents.append(content) or write(content))
        with pytest.warns(UserWarning, match="doubtful"):
            report.main(Path("data"), Path("reports"))
    return folder, contents[0]


@pytest.fixture(scope="module")
def content(made: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return made[1]


# ---------------------------------------------------------------- its content


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


# ---------------------------------------------------------------- in a browser

BEFORE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
</script>"""

AFTER = """<script>
{
const all = (selector) => [...document.querySelectorAll(selector)];
const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
const drawn = () => all(".plot svg").filter((root) => root.querySelector("path, rect, line:not(.grid-line)"));
const lines = (name) => all(`#curves g[data-method=${name}]`).length;
const change = (element, name, value) => {
  element[name] = value;
  element.dispatchEvent(new Event(element.type === "range" ? "input" : "change"));
};
const tops = () => all("h2, h3, figure").map((element) => element.getBoundingClientRect().top + scrollY);
const found = {width: innerWidth, scroll: document.documentElement.scrollWidth, charts: all(".plot").length};
found.drawn = drawn().length;
found.paper = getComputedStyle(document.body).backgroundColor;
found.anchor = getComputedStyle(all("#curves g[data-method=uniform] path")[0]).stroke;

const places = [tops()];
const box = all("#curves input[value=mfiba]")[0];
found.lines = [lines("mfiba")];
for (let i = 0; i < 2; i++) {
  box.click();
  found.lines.push(lines("mfiba"));
  places.push(tops());
}
found.others = lines("static");

const chart = all("#curves .plot svg")[0];
chart.focus();
found.tips = [all("#tip")[0].innerText];
for (const key of ["ArrowRight", "ArrowDown"]) {
  press(chart, key);
  places.push(tops());
  found.tips.push(all("#tip")[0].innerText);
}
press(chart, "Escape");
found.hidden = all("#tip")[0].hidden;

const slider = all("#examples input[type=range]")[0];
found.pictures = all("#examples .panels image").length;
found.bits = [0, 5].map((value) => {
  change(slider, "value", value);
  places.push(tops());
  return all("#examples .panels small")[2].textContent;
});
change(all("#ledger input")[0], "value", 0);
places.push(tops());
found.moved = places.filter((place) => String(place) !== String(places[0])).length;
all("#examples .picker button")[1].click();
found.pressed = all("#examples .picker button").map((button) => button.getAttribute("aria-pressed"));
for (const section of ["#examples", "#models"]) change(all(`${section} select`)[0], "selectedIndex", 1);
found.again = drawn().length;
found.text = document.body.innerText;
const cells = (row) => [...row.children].map((cell) => cell.textContent).join("|");
const rows = (section) => all(`${section} tr`).map(cells);
found.costs = rows("#costs");
found.savings = rows("#savings");
found.tables = all("#tables details").map((part) => [
  part.firstChild.textContent,
  ...[...part.querySelectorAll("tr")].map(cells),
  ...[...part.querySelectorAll("p")].map((note) => note.textContent),
]);
const region = (part) => ["tabindex", "role", "aria-label"].map((name) => part.getAttribute(name));
found.regions = all(".scroll").map(region);
found.headline = all("#savings .headline span").map((line) => line.textContent);
found.images = all("img").map((image) => image.getAttribute("src").slice(0, 15));
parent.postMessage(JSON.stringify({...found, errors}), "*");
}
</script>"""

OUTER = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><pre id="found"></pre>
<iframe src="index.html" style="width: %dpx; height: 900px; border: 0"></iframe>
<script>
addEventListener("message", (event) => document.getElementById("found").append(encodeURIComponent(event.data)));
</script>"""  # a window is never as narrow as a phone


@pytest.fixture(scope="module", params=[(1400, "light"), (400, "dark")], ids=["wide", "phone"])
def seen(request: pytest.FixtureRequest, content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a script finds in the page, with studies and a hostile label, after it has used all that can be used."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    width, scheme = request.param
    studies = {
        "sizes": {"detection-elic": size_rows()},
        "additivity": {"detection": page.additivity(additivity_table())},
    }
    renamed = json.loads(json.dumps(content["examples"]).replace('"person"', json.dumps(HOSTILE)))
    document = page.document(content | studies | {"examples": renamed})
    document = document.replace("<head>", f"<head>{BEFORE}").replace("</body>", f"{AFTER}</body>")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "index.html").write_text(document)
    (folder / "outer.html").write_text(OUTER % width)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/user"]
    command += ["--window-size=1500,1000", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", f"file://{folder}/outer.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    result = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert result, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unquote(result[1])) | {"console": console, "asked": width, "scheme": scheme}


def test_every_chart_is_drawn_without_an_error(seen: dict) -> None:
    assert seen["errors"] == [] and seen["console"] == []
    assert seen["charts"] == seen["drawn"] == seen["again"] == CHARTS + STUDIED


def test_the_headline_stands_beside_the_fixed_vector_and_its_interval(seen: dict, content: dict[str, Any]) -> None:
    (headline,) = seen["headline"]
    hero = re.fullmatch(
        r"mfiba: (−\S+) to \1 % \(static −20.0 to −20.0 %\) bits against uniform, in 1 of 2 cells; "
        r"−\S+ to −\S+ % \(static −20.0 to −20.0 %\) where at least 90 % of the uncoded accuracy is kept",
        headline,
    )[1]
    rows = seen["savings"]
    assert len(rows) == 2 * (1 + len(CELLS)) and rows.count("cell|mfiba|static") == 2
    saving = next(saving for saving in content["cells"][0]["savings"] if saving["method"] == "mfiba")
    numbers = [f"{saving[name]:.1f}".replace("-", "−") for name in ("value", "low", "high")]
    assert numbers[0] == hero
    assert "Detection, ELIC|{} [{}, {}] ?|−20.0 [−20.0, −20.0]".format(*numbers) in rows
    assert rows.count("Segmentation, ELIC|n/a [n/a, n/a] ?|n/a [n/a, n/a] ?") == 2


def test_every_table_of_the_report_is_folded_in_the_page(seen: dict, made: tuple[Path, dict[str, Any]]) -> None:
    folder, content = made
    assert [table[0] for table in seen["tables"]] == [table["title"] for table in content["tables"]]
    text = "".join((folder / f"reports/tables/{name}.md").read_text() for name in ("bd_rate", "rd_points"))
    titles, notes = re.findall(r"^\*\*(.*)\*\*$", text, re.M), re.findall(r"^(?![|*]|\* \*).+", text, re.M)
    assert titles == [table[0] for table in seen["tables"]] and len(titles) > 8
    shown = "\n".join(line for table in seen["tables"] for line in table)
    assert all(note in shown for note in notes)
    cells = (re.split(r" *\| *", line.strip("| \n")) for line in re.findall(r"^\|(?!:).*", text, re.M))
    assert all("|".join(row) in shown for row in cells)


def test_a_table_that_scrolls_is_a_region_of_its_own_with_a_name(seen: dict) -> None:
    assert len(seen["regions"]) > len(seen["tables"])
    assert all(tab == "0" and role == "region" and name for tab, role, name in seen["regions"])


def test_a_method_that_is_switched_off_has_no_curve(seen: dict) -> None:
    assert seen["lines"] == [len(CELLS), 0, len(CELLS)] and seen["others"] == len(CELLS)


def test_the_arrow_keys_tell_the_operating_points(seen: dict, content: dict[str, Any]) -> None:
    curve = content["cells"][0]["curves"]["uniform"]
    first, second, other = seen["tips"]
    assert first.startswith("uniform, point 0") and f"{curve['bits'][0]:,.0f} bits per image" in first
    assert second.startswith("uniform, point 1") and f"{curve['accuracy'][1]:.3f} [" in second
    assert other.startswith("static, point") and seen["hidden"]


def test_the_page_fits_its_width_and_nothing_moves_when_it_is_used(seen: dict) -> None:
    assert seen["width"] == seen["asked"] and seen["scroll"] <= seen["width"]
    assert seen["moved"] == 0


def test_the_anchor_can_be_seen_by_day_and_by_night(seen: dict) -> None:
    paper, ink = (sum(map(int, re.findall(r"\d+", seen[name])[:3])) / 3 for name in ("paper", "anchor"))
    assert (paper < 60 and ink > 200) if seen["scheme"] == "dark" else (paper > 200 and ink < 60)


def test_an_example_is_shown_at_each_quality(seen: dict, content: dict[str, Any]) -> None:
    frame = content["frame_bits"]
    assert seen["pictures"] == 4 and seen["pressed"] == ["false", "true"]
    assert seen["bits"] == [f"{frame + 550:,} bits, loss 0.90 objects", f"{frame + 10_550:,} bits, loss 0.15 objects"]


def test_costs_tell_steps_and_stages_beside_plain_coding(seen: dict) -> None:
    rows = seen["costs"]
    for row in (
        "detection-elic, cpu: uniform|0.100||||0.700|0.200|1.000|1.00|0.500|0.250|0.750|711|645",
        "detection-elic, cpu: adaptive|0.100|0.600|0.300|0.400|0.200||1.600|1.60|0.500|0.250|0.750|711|645",
        "detection-tcm, cpu: does not fit in memory",
        "measure@small-hevc|128|14.5|10.2|0.075|630|1.05",
        "elic, default, cpu|1|20|0.500|0.250|500",
    ):
        assert row in rows
    assert len(rows) == 4 + 3 + 2
    assert "on Abacus." in seen["text"] and "Not measured: elic, coco, cuda." in seen["text"]


def test_a_hostile_label_stays_a_text(seen: dict) -> None:
    assert f"{HOSTILE} 0.87" in seen["text"]
    assert set(seen["images"]) == {"data:image/webp"}
