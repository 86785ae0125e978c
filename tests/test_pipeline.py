"""The real dvc.yaml, run end to end on the smallest profile, and what DVC knows about it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from stages.lib import measuring  # noqa: F401  its imports are made before stages are forked
from stages.lib.planning import Sample, planned, run_sample, sampled

ROOT = Path(__file__).parents[1]
CONTRACT = {
    "rd_points": "task,codec,method,point,n_images,bits_per_image,bpp,accuracy,accuracy_name,split",
    "bd_rate": "task,codec,method,anchor,bd_rate_pchip,bd_rate_akima,ci_low,ci_high,overlap,n_points,flags",
    "paired": "task,codec,method,other,difference,ci_low,ci_high",
    "ablation": "task,codec,part,method,description,sees_labels,anchor,bd_rate_pchip,bd_rate_akima,ci_low,ci_high,"
    "overlap,n_points,flags,reference,difference,difference_low,difference_high",
}
TASKS = {"detection", "segmentation", "keypoints"}
METHODS = {"none", "uniform", "static", "upstream_predicted", "mfiba_closed_form", "mfiba", "static_skip", "mfiba_skip"}
METHODS |= {"mfiba_pseudo", "mfiba_pseudo_skip"}
METHODS |= {"upstream_measured", "oracle", "oracle_skip"}  # they need the labels

# `dvc repro` of a profile, and its stages without DVC: each a fork of one process, whose imports are made once.
REPRO = """
import os, sys
from functools import partial
from pathlib import Path
from dvc.cli import main
from dvc.stage import run
from stages.lib import measuring
from stages.lib.planning import become, forked

def fork(executable, cmd, cwd, **_):
    status, _ = forked(partial(become, cmd, Path(cwd)), log)
    if status:
        raise run.StageCmdFailedError(cmd + log.read_text(), status)

log, run._run = Path("log").resolve(), fork
os.chdir(sys.argv[1])
sys.exit(main(["repro"]))
"""
AGAIN = """
import sys, yaml
from pathlib import Path
from stages.lib import measuring
from stages.lib.planning import run_stages
params, dvc_yaml, folder = map(Path, sys.argv[1:])
run_stages(yaml.safe_load(params.read_text()), dvc_yaml, folder)
"""


def dvc(folder: Path, *words: str) -> str:
    return python(folder, "-m", "dvc", *words)


def python(folder: Path, *words: str) -> str:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def project(folder: Path) -> Path:
    """A copy of what the pipeline needs, outside the repository; returns its smoke profile."""
    for name in ("stages", "profiles/smoke", "data/pretrained"):
        ignored = shutil.ignore_patterns("__pycache__", "data", "reports", "dvc.lock")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=None if "data" in name else ignored)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    dvc(folder, "init", "--no-scm", "-q")
    return folder / "profiles" / "smoke"


def params_of(profile: Path) -> dict[str, Any]:
    """Of a profile, for any other folder."""
    text = (profile / "params.yaml").read_text()
    return yaml.safe_load(text.replace("../..", str(ROOT)))


def contents(path: Path) -> dict[str, bytes]:
    return files(path) if path.is_dir() else {path.name: path.read_bytes()}


def change(profile: Path, old: str, new: str) -> None:
    text = (profile / "params.yaml").read_text()
    assert old in text
    (profile / "params.yaml").write_text(text.replace(old, new))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stages_to_run(profile: Path) -> set[str]:
    lines = dvc(profile, "repro", "--dry").splitlines()
    return {line.split("'")[1] for line in lines if line.startswith("Running stage")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dvc repro`, whose stages are forks: a process that imports torch for a few images takes longer than they do."""
    folder = tmp_path_factory.mktemp("smoke")
    profile = project(folder)
    python(folder, "-c", REPRO, str(profile))
    return profile


def test_the_smallest_profile_ends_with_the_contract_tables(smoke: Path) -> None:
    for name, columns in CONTRACT.items():
        assert (smoke / "reports" / f"{name}.csv").read_text().splitlines()[0] == columns
    points = pd.read_csv(smoke / "reports/rd_points.csv", keep_default_na=False)
    assert set(points["task"]) == TASKS
    assert set(points["method"]) == METHODS
    assert (points["split"] == "test").all()
    assert points["accuracy"].astype(float).between(0, 1).all()
    uniform = points[(points["method"] == "uniform") & (points["task"] == "detection")]
    assert uniform["bits_per_image"].is_monotonic_increasing
    for figure in ("rd_detection_elic.svg", "rd_detection_elic.png"):
        assert (smoke / "reports/figures" / figure).stat().st_size > 5000


def test_bits_of_uniform_are_the_bytes_in_the_files(smoke: Path) -> None:
    import h5py

    from stages.lib.bitstream import FRAME_BYTES

    params = yaml.safe_load((smoke / "params.yaml").read_text())
    points = pd.read_csv(smoke / "reports/rd_points.csv", keep_default_na=False)
    uniform = points[(points["method"] == "uniform") & (points["task"] == "detection")].set_index("point")
    for point, quality in enumerate(params["lambdas"]):
        with h5py.File(smoke / f"data/coded/small/elic/{quality}/test-00000.h5") as file:
            images = len(file["image_ids"])
            stored = 8 * (len(file["data"]) / images + FRAME_BYTES)
        assert uniform.loc[point, "bits_per_image"] == pytest.approx(stored, rel=1e-12)


def test_bits_of_uniform_are_those_of_files_that_encode_writes(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.lib.coco import image_path, load_split
    from stages.lib.online import encode, load_cell

    monkeypatch.chdir(smoke)
    points = pd.read_csv("reports/rd_points.csv", keep_default_na=False)
    split = load_split(Path("data/dataset/splits.json"), "test")
    for cell in ("detection-elic", "keypoints-hevc"):
        described = load_cell(cell)
        files = [encode(image_path(split, i), described, phi=1).data for i in split.image_ids]
        rows = points[(points["task"] == described.task) & (points["method"] == "uniform") & (points["point"] == 1)]
        assert rows["bits_per_image"].item() == pytest.approx(8 * sum(map(len, files)) / len(files), rel=1e-12)


def test_a_rerun_starts_no_stage(smoke: Path) -> None:
    assert stages_to_run(smoke) == set()


@pytest.mark.parametrize(
    ("old", "new", "runs", "rests"),
    [
        ("q2: 0.02", "q2: 0.021", {"compress@small-elic-q2"}, {"compress@small-elic-q1", "compress@small-hevc-q1"}),
        ("detection: {points: 5}", "detection: {points: 6}", {"allocate@detection-elic"}, {"allocate@keypoints-hevc"}),
        ("bootstrap: 20", "bootstrap: 21", {"evaluate@small-elic", "report"}, {"allocate@detection-elic"}),
    ],
)
def test_a_changed_number_reruns_what_depends_on_it(
    smoke: Path, old: str, new: str, runs: set[str], rests: set[str]
) -> None:
    change(smoke, old, new)
    try:
        planned = stages_to_run(smoke)
    finally:
        change(smoke, new, old)
    assert runs <= planned
    assert not rests & planned
    # What follows from a rerun is known only once it has run, so a dry run names the first stages only.
    assert not {"prepare", "train_model@small", "extract@small", "train_codec@small-elic"} & planned


def test_a_second_run_from_scratch_gives_the_same_bytes(smoke: Path, tmp_path: Path) -> None:
    """In another folder, one stage after the other as forks of one process, whose imports are made once."""
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(params_of(smoke), sort_keys=False))
    folder = tmp_path / "again"
    folder.mkdir()
    python(ROOT, "-c", AGAIN, str(tmp_path / "wanted.yaml"), str(ROOT / "dvc.yaml"), str(folder))
    first, second = (
        {path: contents(place / path) for path in _hashes((smoke / "dvc.lock").read_text())}
        for place in (smoke, folder)
    )
    pages = [found.pop("reports/index.html") for found in (first, second)]
    assert all(first.values()) and {path for path in first if first[path] != second[path]} == set()
    assert pages[0] != pages[1]  # which tell the params, and so the folders


def test_a_plan_from_a_few_images_tells_the_disk_that_the_run_took(
    smoke: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from stages.lib.params import load_params

    monkeypatch.chdir(smoke)
    params = load_params()
    wanted = ["compress@small-hevc-q1", "compress@small-hevc-q2", "measure@small-hevc"]
    with capsys.disabled():
        few, more = (  # of 16 images of fit, 10 of test
            Sample(sample, run_sample(sample, Path("dvc.yaml"), wanted))
            for sample in (sampled(params, 4), sampled(params, 8))
        )
    found = planned(params, few, more, Sample(few.params, []), start=0).set_index("stage")
    took = {
        "prepare": "data/dataset",
        "extract": "data/features/small",
        "compress": "data/coded/small/hevc",
        "measure_uncoded": "data/losses/small/uncoded.csv",
        "measure": "data/losses/small/hevc",
    }
    for stage, out in took.items():
        files = [path for path in (smoke / out, *(smoke / out).rglob("*")) if path.is_file()]
        assert found.loc[stage, "disk_gb"] * 1e9 == pytest.approx(sum(p.stat().st_size for p in files), rel=0.15), stage


def test_a_killed_stage_leaves_nothing_and_a_rerun_ends_with_the_same_result(smoke: Path) -> None:
    before = (smoke / "dvc.lock").read_text()
    target = "measure@small-elic"
    running = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", "--no-run-cache", target],
        cwd=smoke, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    out = smoke / "data/losses/small/elic"
    while out.exists():  # DVC removes the output just before it starts the stage
        assert running.poll() is None
        time.sleep(0.05)
    time.sleep(3)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    dvc(smoke, "repro", "--no-run-cache")
    assert _hashes(before) == _hashes((smoke / "dvc.lock").read_text())


def test_the_report_needs_neither_features_nor_bitstreams(smoke: Path, tmp_path: Path) -> None:
    """So that a run whose disk is small can remove those of a model whose other stages are done."""
    lock, reports = (smoke / "dvc.lock").read_text(), files(smoke / "reports")
    large = [smoke / "data/features/small", *smoke.glob("data/coded/small/*/q?")]
    assert len(large) == 5
    for n, folder in enumerate(large):
        folder.rename(tmp_path / str(n))
    try:
        dvc(smoke, "repro", "--force", "--single-item", "--no-run-cache", "report")
        after = files(smoke / "reports")
        assert after.keys() == reports.keys()
        # The page tells the hashes of what it was made from.
        assert {name for name, data in after.items() if data != reports[name]} <= {"index.html"}
    finally:
        for n, folder in enumerate(large):
            (tmp_path / str(n)).rename(folder)
        (smoke / "dvc.lock").write_text(lock)
        (smoke / "reports/index.html").write_bytes(reports["index.html"])


def _hashes(lock: str) -> dict[str, str]:
    return {
        out["path"]: out["md5"] for stage in yaml.safe_load(lock)["stages"].values() for out in stage.get("outs", [])
    }
