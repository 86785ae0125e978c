"""What a browser makes of the page of the results. Needs Chromium, else it is skipped."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import reported
from reported import CELLS, HOSTILE, additivity_table, size_rows

from stages.lib import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A chart for each task, cell, (quantity, task), (scale, model), (scale, quantity) and codec; bars of an example.
CHARTS = 2 + 2 + 2 * 2 + 5 * 2 + 5 * 2 + 1 + 3
STUDIED = 4 + 4  # of object sizes, of additivity
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


made, content = reported.made, reported.content  # fixtures


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
        r"mfiba: (−\S+) to \1 % bits against uniform \(static −20.0 to −20.0 %\), in 1 of 2 cells; "
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
    text = "".join((folder / f"reports/tables/{name}.md").read_text() for name in ("bd_rate", "rd_points"))
    titles, notes = re.findall(r"^\*\*(.*)\*\*$", text, re.M), re.findall(r"^(?!\||\*\*).+", text, re.M)
    assert titles == [table[0] for table in seen["tables"]] == [table["title"] for table in content["tables"]]
    shown = "\n".join(line for table in seen["tables"] for line in table)
    assert all(note in shown for note in notes)
    rows = ["|".join(cell.strip() for cell in row[1:-1].split("|")) for row in re.findall(r"^\|(?!:).*", text, re.M)]
    assert len(rows) > 50 and all(row in shown for row in rows) and len(notes) > 5


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
