"""The dvc.lock and reports/ in git, of each profile that was run, come from exactly this code and these params."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "profiles/study")
PARAMS, LOCKS = (
    {folder: yaml.safe_load((folder / name).read_text()) for folder in FOLDERS} for name in ("params.yaml", "dvc.lock")
)
STAGES = [
    pytest.param(folder, entry, id=f"{folder.name}-{name}")
    for folder, lock in LOCKS.items()
    for name, entry in lock["stages"].items()
]


def md5(path: Path) -> str:
    """DVC's hash of a file, or of a folder: that of the JSON list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    ignored = ROOT / "data/pretrained/README.md"  # in .dvcignore
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != ignored)
    listing = [{"md5": md5(p), "relpath": p.relative_to(path).as_posix()} for p in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def in_git(path: Path, folder: Path) -> bool:
    return any(path.is_relative_to(part) for part in (ROOT / "stages", ROOT / "data/pretrained", folder / "reports"))


@pytest.mark.parametrize(("folder", "entry"), STAGES)
def test_code_and_results_are_those_of_the_recorded_run(folder: Path, entry: dict) -> None:
    for file in entry["deps"] + entry.get("outs", []):
        path = (folder / file["path"]).resolve()
        if in_git(path, folder):
            assert md5(path) == file["md5"], f"{path} changed since `dvc repro`"


@pytest.mark.parametrize(("folder", "entry"), STAGES)
def test_params_are_those_of_the_recorded_run(folder: Path, entry: dict) -> None:
    for key, recorded in entry.get("params", {}).get("params.yaml", {}).items():
        value = PARAMS[folder]
        for part in key.split("."):
            value = value[part]
        assert value == recorded, f"{key} changed since `dvc repro`"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_stage_of_the_pipeline_was_run(folder: Path) -> None:
    params = PARAMS[folder]
    expected = {"prepare", "report"}
    of_model = ("train_model", "extract", "fit_prediction", "measure_uncoded")
    expected |= {f"{name}@{model}" for name in of_model for model in params["models"]}
    pairs = [f"{model}-{codec}" for model in params["models"] for codec in params["codecs"]]
    of_pair = ("train_codec", "measure", "train_mfip", "evaluate", "illustrate")
    expected |= {f"{name}@{pair}" for name in of_pair for pair in pairs}
    expected |= {f"compress@{pair}-{quality}" for pair in pairs for quality in params["lambdas"]}
    expected |= {f"{name}@{cell}" for name in ("fit_loss_rate", "allocate") for cell in params["cells"]}
    expected |= {f"{name}@{study}" for name in ("bound", "ablate") for study in params["studies"]}
    assert set(LOCKS[folder]["stages"]) == expected
