"""python -m stages.prepare in the folder of a profile."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_pipeline import files

from stages.lib.coco import ground_truth, image_path, load_split
from stages.lib.files import read_json
from stages.lib.params import TASKS

ROOT = Path(__file__).parents[1]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SPLITS = ("train", "fit", "test")
COMMAND = [sys.executable, "-m", "stages.prepare"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def write_profile(folder: Path, images: tuple[int, int, int] = (2, 2, 2), **prepare: Any) -> Path:
    params = copy.deepcopy(PARAMS)
    params["prepare"] |= prepare | {"images": dict(zip(SPLITS, images, strict=True))}
    params["extract"]["train_images"] = 1
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder


def prepare(profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = COMMAND + list(words or ["data/dataset"])
    return subprocess.run(command, cwd=profile, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_shapes_are_generated_with_their_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = write_profile(tmp_path / "profile", images=(4, 8, 8), source="shapes", size=64)
    assert prepare(profile).returncode == 0
    monkeypatch.chdir(profile)
    splits = [load_split(Path("data/dataset/splits.json"), name) for name in SPLITS]
    paths = [image_path(split, image_id) for split in splits for image_id in split.image_ids]
    assert len(set(paths)) == 20 and all(path.is_file() and not path.is_absolute() for path in paths)
    for split in splits:
        for task in TASKS:
            truth = ground_truth(split, task)
            assert truth.getImgIds() == sorted(split.image_ids) and truth.anns
    first = files(profile / "data")
    assert prepare(profile).returncode == 0
    assert files(profile / "data") == first


def test_a_coco_source_is_read_where_it_lies(tmp_path: Path, coco_root: Path) -> None:
    before = files(coco_root)
    profile = write_profile(tmp_path / "profile", source="coco", coco_root="../coco")
    assert prepare(profile).returncode == 0
    assert set(files(profile)) == {"params.yaml", "data/dataset/splits.json"}
    assert files(coco_root) == before
    assert read_json(profile / "data/dataset/splits.json")["test"]["images"] == "../coco/val2017"


def test_a_killed_run_leaves_nothing_half(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "profile", images=(5000, 100, 100), source="shapes", size=64)
    run = subprocess.Popen(COMMAND + ["data/dataset"], cwd=profile, env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 30
    while not list(profile.glob("data/*/train2017/*")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (profile / "data" / "dataset").exists()
    (profile / "params.yaml").unlink()
    profile.rename(tmp_path / "killed")
    again = write_profile(profile, images=(4, 8, 8), source="shapes", size=64)
    (tmp_path / "killed" / "data").rename(again / "data")
    assert prepare(again).returncode == 0
    assert [path.name for path in (again / "data").iterdir()] == ["dataset"]


def test_what_is_missing_of_coco_is_named_with_the_commands_that_fetch_it(tmp_path: Path, coco_root: Path) -> None:
    """Each command with the archive's own size and checksum; the last line, on stderr, is the error."""
    (coco_root / "train2017").rename(tmp_path / "elsewhere")
    partly = prepare(write_profile(tmp_path / "partly", source="coco", coco_root="../coco"))
    none = prepare(write_profile(tmp_path / "none", source="coco", coco_root="../nowhere"))
    assert f"{coco_root} lacks train2017." in partly.stdout and "val2017" not in partly.stdout
    archives = {"train2017.zip": "19,336,861,798", "val2017.zip": "815,585,330"}
    for archive, size in (archives | {"annotations_trainval2017.zip": "252,907,541"}).items():
        fetch, unpack = (line for line in none.stdout.splitlines() if re.search(rf"[/ ]{archive}", line))
        assert fetch.startswith("  curl") and fetch.endswith(f"/{archive}  # {size} bytes")
        assert re.search(rf'"[0-9a-f]{{32}}  {archive}" \| md5sum -c && unzip -q {archive}$', unpack)
    for result in (partly, none):
        assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "README, COCO 2017" in none.stderr


@pytest.mark.parametrize(
    ("change", "words", "names"),
    [
        ({"source": "coco", "coco_root": "../nowhere"}, [], "../nowhere"),
        ({"source": "coco", "coco_root": "../coco", "images": (4, 2, 2)}, [], "train: 4"),
        ({"source": "coco", "coco_root": "../coco"}, ["../coco"], "move the images elsewhere"),
        ({"source": "imagenet"}, [], "prepare.source is 'imagenet'"),
        ({"source": "shapes", "size": 10**6}, [], "data/dataset: the disk has"),
        ({"source": "shapes"}, ["one", "two"], "usage: python -m stages.prepare out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, coco_root: Path, change: dict[str, Any], words: list[str], names: str
) -> None:
    before = files(coco_root)
    profile = write_profile(tmp_path / "profile", **change)
    result = prepare(profile, *words)
    assert result.returncode == 2
    assert names in result.stderr and result.stderr.count("\n") == 1
    assert set(files(profile)) == {"params.yaml"} and files(coco_root) == before
