"""dvc.lock and reports/ in git come from exactly this code and these params."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LOCK = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def md5(path: Path) -> str:
    """DVC's hash of a file, or of a folder: that of the JSON list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    ignored = ROOT / "data/pretrained/README.md"  # in .dvcignore
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != ignored)
    listing = [{"md5": md5(p), "relpath": p.relative_to(path).as_posix()} for p in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def in_git(path: str) -> bool:
    return path.startswith(("./stages/", "stages/", "./data/pretrained", "data/pretrained", "reports/"))


@pytest.mark.parametrize("stage", LOCK)
def test_code_and_results_are_those_of_the_recorded_run(stage: str) -> None:
    for entry in LOCK[stage]["deps"] + LOCK[stage].get("outs", []):
        if in_git(entry["path"]):
            assert md5(ROOT / entry["path"]) == entry["md5"], f"{entry['path']} changed since `dvc repro`"


@pytest.mark.parametrize("stage", LOCK)
def test_params_are_those_of_the_recorded_run(stage: str) -> None:
    for key, recorded in LOCK[stage].get("params", {}).get("params.yaml", {}).items():
        value = PARAMS
        for part in key.split("."):
            value = value[part]
        assert value == recorded, f"{key} changed since `dvc repro`"


def test_every_stage_of_the_pipeline_was_run() -> None:
    expected = {"prepare", "report"}
    of_model = ("train_model", "extract", "fit_prediction", "measure_uncoded")
    expected |= {f"{name}@{model}" for name in of_model for model in PARAMS["models"]}
    pairs = [f"{model}-{codec}" for model in PARAMS["models"] for codec in PARAMS["codecs"]]
    expected |= {f"{name}@{pair}" for name in ("train_codec", "measure", "train_mfip", "evaluate") for pair in pairs}
    expected |= {f"compress@{pair}-{quality}" for pair in pairs for quality in PARAMS["lambdas"]}
    expected |= {f"{name}@{cell}" for name in ("fit_loss_rate", "allocate") for cell in PARAMS["cells"]}
    expected |= {f"{name}@{study}" for name in ("bound", "ablate") for study in PARAMS["studies"]}
    assert set(LOCK) == expected
