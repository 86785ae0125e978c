"""dvc.yaml knows what each stage is made of."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PLUMBING = {"command", "params", "schema", "files", "progress", "shards"}  # no result of a stage depends on them


def imported(file: Path) -> set[str]:
    """Names of the modules in stages/lib that a file imports, directly or not."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "stages.lib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.lib."):
            names.add(node.module.removeprefix("stages.lib."))
    return names | {inner for name in names for inner in imported(ROOT / f"stages/lib/{name}.py")}


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_behind_a_stage_is_a_dependency(stage: str) -> None:
    listed = {Path(dep).stem for dep in definition(stage)["deps"] if "/stages/lib/" in dep}
    assert listed == imported(ROOT / f"stages/{stage}.py") - PLUMBING


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_of_a_stage_is_its_module_and_every_path_in_it_is_declared(stage: str) -> None:
    words = definition(stage)["cmd"].split()
    assert words[:4] == ["PYTHONPATH=${root}", "python", "-m", f"stages.{stage}"]
    assert f"${{root}}/stages/{stage}.py" in definition(stage)["deps"]


@pytest.mark.parametrize("profile", [path.parent.name for path in ROOT.glob("profiles/*/params.yaml")])
def test_a_profile_has_the_stages_of_its_models_codecs_and_cells(profile: str, tmp_path: Path) -> None:
    folder = tmp_path / "profiles" / profile
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / "profiles" / profile / name, folder, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    listing = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    names = subprocess.run(listing, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    params = yaml.safe_load((folder / "params.yaml").read_text())
    coders = {f"{cell['model']}-{cell['codec']}" for cell in params["cells"].values()}
    expected = {f"compress@{coder}-{quality}" for coder in coders for quality in params["lambdas"]}
    expected |= {f"allocate@{cell}" for cell in params["cells"]} | {f"extract@{model}" for model in params["models"]}
    assert {name for name in names if name.startswith(("compress@", "allocate@", "extract@"))} == expected


@pytest.mark.parametrize("profile", [path.parent for path in ROOT.glob("profiles/*/params.yaml")], ids=lambda p: p.name)
def test_a_profile_has_the_pipeline_as_it_is(profile: Path) -> None:
    """A copy, not a link: in another commit DVC reads a link as a file, and compares no runs."""
    copy = profile / "dvc.yaml"
    assert not copy.is_symlink()
    assert copy.read_text() == (ROOT / "dvc.yaml").read_text(), f"cp dvc.yaml {copy.relative_to(ROOT)}"
