"""python -m stages.report on small made-up tables."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from pytest import approx
from reported import CELLS, PARAMS, RATES, ROOT, ledger, write_profile

from stages import report
from stages.lib import comparing, figures, references
from stages.lib.bd_rate import Curve, bd_rate
from stages.lib.files import read_csv, read_json, write_csv
from stages.lib.schema import InputError


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, reported from the command line."""
    folder = write_profile(tmp_path_factory.mktemp("report") / "profile")
    result = run(folder)
    assert result.returncode == 0, result.stderr
    doubts = [line for line in result.stderr.splitlines() if "doubtful" in line]
    assert any(
        line.startswith("Warning: BD-rate of oracle against uniform, segmentation, elic is doubtful: ")
        for line in doubts
    )
    assert len(doubts) == len(result.stderr.splitlines())
    return folder


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.report", "data", "reports"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_tables_keep_their_contract(profile: Path) -> None:
    points, bd = read_csv(profile / "reports/rd_points.csv"), read_csv(profile / "reports/bd_rate.csv")
    assert ",".join(points) == "task,codec,method,point,n_images,bits_per_image,bpp,accuracy,accuracy_name,split"
    assert ",".join(bd) == (
        "task,codec,method,anchor,bd_rate_pchip,bd_rate_akima,ci_low,ci_high,overlap,n_points,flags"
    )
    paired = (profile / "reports/paired.csv").read_text().splitlines()
    assert paired[0] == "task,codec,method,other,difference,ci_low,ci_high"
    assert len(paired) == 1 + len(CELLS) * (len(RATES) - 2)
    high, direct = read_csv(profile / "reports/high_bd_rate.csv"), read_csv(profile / "reports/direct.csv")
    assert list(high) == list(direct) == list(bd) and high["method"].tolist() == bd["method"].tolist()
    assert direct[["method", "anchor"]].to_numpy().tolist() == [["mfiba", "static"], ["mfiba", "oracle"]] * len(CELLS)
    for task in CELLS:
        assert list(bd.loc[bd["task"] == task, "method"]) == [method for method in RATES if method != "uniform"]
        read = read_csv(profile / f"data/evaluations/small/elic/{task}/points.csv")
        pd.testing.assert_frame_equal(points[points["task"] == task].reset_index(drop=True), read)
    assert set(bd["anchor"]) == {"uniform"}


def test_bd_rates_follow_from_the_points(profile: Path) -> None:
    points, bd = read_csv(profile / "reports/rd_points.csv"), read_csv(profile / "reports/bd_rate.csv")
    curves = {
        key: Curve(rows["bits_per_image"].to_numpy(), rows["accuracy"].to_numpy())
        for key, rows in points.groupby(["task", "method"])
    }
    for row in bd.itertuples():
        found = bd_rate(curves[row.task, "uniform"], curves[row.task, row.method])
        assert row.bd_rate_pchip == approx(found.pchip, nan_ok=True)
        assert row.bd_rate_akima == approx(found.akima, nan_ok=True)
        assert (row.overlap, row.n_points) == (found.overlap, found.n_points)


def test_a_fifth_fewer_bits_are_minus_20_percent(profile: Path) -> None:
    bd = read_csv(profile / "reports/bd_rate.csv").set_index(["task", "method"])
    row = bd.loc["detection", "static"]
    # Paired: the resamples scatter by 3 % in bits and accuracy, the method and the anchor alike.
    assert [row[name] for name in ("bd_rate_pchip", "bd_rate_akima", "ci_low", "ci_high")] == approx([-20] * 4)
    assert row["overlap"] == 1 and row["n_points"] == 6 and pd.isna(row["flags"])
    mfiba = bd.loc["detection", "mfiba"]
    assert mfiba["ci_low"] < mfiba["bd_rate_pchip"] < mfiba["ci_high"]
    assert mfiba["flags"] == "dropped:6" and mfiba["n_points"] == 7


def test_high_accuracies_and_direct_comparisons(profile: Path) -> None:
    high = read_csv(profile / "reports/high_bd_rate.csv").set_index(["task", "method"])
    # All resamples of static and uniform are alike, and a fifth fewer bits are a fifth at every accuracy.
    assert high.loc["detection", "static"][["bd_rate_pchip", "ci_low", "ci_high"]].tolist() == approx([-20] * 3)
    direct = read_csv(profile / "reports/direct.csv").set_index(["task", "anchor"]).loc["detection"]
    for anchor, low, high_end in (("static", -20, -5), ("oracle", 30, 50)):
        row = direct.loc[anchor]
        assert low < row["ci_low"] < row["bd_rate_pchip"] < row["ci_high"] < high_end
    text = (profile / "reports/tables/bd_rate.md").read_text()
    assert re.search(r"\| mfiba against oracle \* +\| +\d", text)
    assert "elic, where at least 90% of the uncoded accuracy is kept" in text
    assert "without point 6 of mfiba, not monotone" in text


def test_a_paired_difference_is_that_of_the_bd_rates(profile: Path) -> None:
    bd = read_csv(profile / "reports/bd_rate.csv").set_index(["task", "method"])["bd_rate_pchip"]
    paired = read_csv(profile / "reports/paired.csv")
    assert set(paired["method"]) == {"mfiba"}
    assert set(paired["other"]) == set(RATES) - {"uniform", "mfiba"}
    for row in paired.itertuples():
        assert row.difference == approx(bd[row.task, "mfiba"] - bd[row.task, row.other], nan_ok=True)
    found = paired[paired["task"] == "detection"].set_index("other")
    noisy = found.loc["oracle"]
    assert noisy["ci_low"] < noisy["difference"] < noisy["ci_high"] and noisy["difference"] > 15
    assert paired.loc[paired["task"] == "segmentation", ["difference", "ci_low", "ci_high"]].isna().all(axis=None)


def test_a_model_that_finds_nothing_is_reported_as_such(profile: Path) -> None:
    bd = read_csv(profile / "reports/bd_rate.csv")
    rows = bd[bd["task"] == "segmentation"]
    assert rows[["bd_rate_pchip", "bd_rate_akima", "ci_low", "ci_high"]].isna().all(axis=None)
    assert rows["flags"].str.contains("too few points; resamples_failed:100%").all()
    text = (profile / "reports/tables/bd_rate.md").read_text()
    assert len(re.findall(r" n/a \(1\) \|", text)) == 2 * len(rows)  # of bd_rate.csv and high_bd_rate.csv
    assert len(re.findall(r" n/a \(2\) \|", text)) == 2  # of direct.csv, below the doubt of another task
    assert len(re.findall(r" n/a \[n/a, n/a\] \|", text)) == len(rows) - 1  # paired
    assert "(1) Doubtful: no BD-rate: fewer than two points" in text


def test_metrics_hold_the_headline_without_nan(profile: Path) -> None:
    folder = profile / "reports/metrics"
    assert {path.stem for path in folder.iterdir()} == {f"{task}_elic" for task in CELLS}
    metrics = {path.stem: read_json(path) for path in folder.iterdir()}
    assert metrics["detection_elic"]["static"] == approx({"bd_rate": -20, "ci_low": -20, "ci_high": -20})
    assert metrics["detection_elic"]["uncoded_accuracy"] == 0.71
    assert metrics["segmentation_elic"]["mfiba"] == {"bd_rate": None, "ci_low": None, "ci_high": None}
    assert set(metrics["detection_elic"]) <= {"uncoded_accuracy", *comparing.HEADLINE}


def test_markdown_shows_the_result_and_what_weakens_it(profile: Path) -> None:
    text = (profile / "reports/tables/bd_rate.md").read_text()
    assert re.search(r"\| static +\| +-20\.0 \[-20\.0, -20\.0\] \|", text)
    assert ") Doubtful: without point 6 of mfiba, not monotone." in text
    assert "| oracle * " in text and "* uses the labels of the evaluated images" in text
    assert re.search(r"\| static +\| +-9\.\d \[-", text)  # mfiba against it
    assert re.search(r"detection, elic +\| +0\.43 \| +0\.30 \| +0\.20 \| +0\.00 \| +n/a \|", text)
    assert "quality_sensitivity" in text and "Bits of a quality predicted from one precoding" in text
    assert "45% to 96%" in text and "beta_at_bound" in text and "KL, constant" in text
    assert "0.710" in (profile / "reports/tables/rd_points.md").read_text()


def test_the_papers_numbers_stand_only_beside_a_run_of_its_models_on_its_data(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_profile(tmp_path / "coco", ("detection",), coco=True))
    with pytest.warns(UserWarning, match="doubtful"):
        report.main(Path("data"), Path("reports"))
    for folder, there in ((Path("."), True), (profile, False)):
        bd, points = ((folder / f"reports/tables/{name}.md").read_text() for name in ("bd_rate", "rd_points"))
        assert bool(re.search(r"\| MFIBA, paper +\| +-38\.2 \|\n", bd)) == there
        assert ("arXiv 2503.19278" in bd) == there
        assert bool(re.search(r"\| 400 +\| +441,569 \| +0\.309 \|", points)) == there
        svg = (folder / "reports/figures/rd_detection_elic.svg").read_text()
        assert ("the authors' own" in svg) == there


def test_of_the_papers_six_numbers_those_of_the_cells_are_reported() -> None:
    coco = yaml.safe_load((ROOT / "profiles/coco/params.yaml").read_text())
    known = references.reported(coco)
    assert known.bd_rate == references.BD_RATE and len(known.bd_rate) == 6
    assert known.points["detection", "elic"]["bits_per_image"].is_monotonic_increasing
    coco["cells"]["detection-elic"]["model"] = "maskrcnn"  # detects, too, but is not the paper's detector
    del coco["cells"]["keypoints-tcm"]
    known = references.reported(coco)
    assert set(known.bd_rate) == set(references.BD_RATE) - {("detection", "elic"), ("keypoints", "tcm")}
    assert known.points == {}
    assert references.reported(PARAMS) == ({}, {})


@pytest.mark.parametrize("name", ["bd_rate", "rd_points"])
def test_latex_is_well_formed(profile: Path, name: str) -> None:
    text = (profile / f"reports/tables/{name}.tex").read_text()
    opened = []
    for command, environment in re.findall(r"\\(begin|end)\{([a-z]+\*?)\}", text):
        if command == "begin":
            opened.append(environment)
        else:
            assert opened.pop() == environment
    assert not opened
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert not re.search(r"[_#^~]", bare) and bare.count("%") == 1  # the comment of the first line
    grids = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n(.*?)\\bottomrule", text, re.DOTALL)
    assert len(grids) == text.count(r"\caption{")
    for columns, body in grids:
        rows = [line for line in body.splitlines() if line != r"\midrule"]
        assert len(rows) > 1
        assert all(line.endswith(r"\\") and line.count("&") - line.count(r"\&") == len(columns) - 1 for line in rows)


def test_every_figure_is_drawn(profile: Path) -> None:
    names = {f"{kind}_{task}_elic" for kind in ("rd", "loss_rate", "importance") for task in CELLS}
    names |= {"method", "codec_small_elic"}
    figures = profile / "reports/figures"
    assert {path.name for path in figures.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name in names:
        svg = ElementTree.parse(figures / f"{name}.svg").getroot()
        assert sum(element.tag.endswith("path") for element in svg.iter()) > 20
        pixels = np.asarray(Image.open(figures / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 500 and pixels.std() > 10


def test_the_same_tables_give_the_same_bytes(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = write_profile(tmp_path / "again")
    monkeypatch.chdir(again)
    with pytest.warns(UserWarning, match="doubtful"):
        report.main(Path("data"), Path("reports"))
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in (folder / "reports").rglob("*") if path.is_file()}
        for folder in (profile, again)
    )
    assert first == second


def test_a_codec_is_drawn_beside_hevc_and_one_that_was_trained_with_its_loss(tmp_path: Path) -> None:
    curves = {codec: comparing.rate_distortion([ledger(q) for q in range(4)]) for codec in ("elic", "hevc")}
    trained, kept = pd.DataFrame({"step": [100, 200], "loss": [3.0, 2.0]}), pd.DataFrame({"step": [], "loss": []})
    texts = []
    for name, loss in (("trained", trained), ("kept", kept)):
        figures.codec_figure(tmp_path / name, "small", "elic", curves, loss)
        texts.append((tmp_path / f"{name}.svg").read_text())
    assert all("<!-- ELIC -->" in text and "<!-- HEVC -->" in text for text in texts)
    assert ["training loss" in text for text in texts] == [True, False]


@pytest.mark.parametrize(
    ("file", "change", "names"),
    [
        ("points", lambda table: table.drop(columns="bpp"), "points.csv has no column 'bpp'"),
        ("points", lambda table: table[table["method"] != "uniform"], "no rows of 'uniform', the anchor"),
        ("points", lambda table: table[table["method"] != "none"], "no rows of 'none'"),
        ("points", lambda table: pd.concat([table, table[-1:]]), "points of 'oracle' are not 0, 1, 2"),
        ("bootstrap", lambda table: table[:-1], "bootstrap.csv: not every method, point has each resample once"),
        ("bootstrap", lambda table: pd.concat([table, table[-1:]]), "bootstrap.csv: not every method, point"),
    ],
)
def test_bad_tables_are_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change: Callable[[pd.DataFrame], pd.DataFrame],
    names: str,
) -> None:
    monkeypatch.chdir(write_profile(tmp_path / "profile", ("detection",)))
    path = Path("data/evaluations/small/elic/detection") / f"{file}.csv"
    write_csv(path, change(read_csv(path)))
    with pytest.raises(InputError, match=re.escape(names)):
        report.main(Path("data"), Path("reports"))
    assert not Path("reports/rd_points.csv").exists()


def test_a_missing_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    folder = write_profile(tmp_path / "profile", ("detection",))
    (folder / "data/loss_rate/small/elic/detection.json").unlink()
    result = run(folder)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "data/loss_rate/small/elic/detection.json" in result.stderr


@pytest.mark.parametrize(
    ("value", "text"), [(1500, "1.5k"), (20_000, "20k"), (2e6, "2M"), (0.05, "0.05"), (300, "300")]
)
def test_ticks_are_plain_numbers(value: float, text: str) -> None:
    assert figures.plain(value) == text
