"""A wrong number is named before any work; files are whole or absent."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from stages.lib.command import entry
from stages.lib.files import atomic, read_csv, read_json, write_csv, write_json
from stages.lib.params import check_params, load_params
from stages.lib.schema import InputError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([ROOT / "params.yaml", *ROOT.glob("profiles/*/params.yaml")])
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MISSING = object()


def changed(key: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(PARAMS)
    *sections, last = key.split(".")
    place = params
    for section in sections:
        place = place[section]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return params


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_profiles_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert load_params() == yaml.safe_load(path.read_text())


BAD = [  # key, value, what the line must say beside the key
    ("seed", MISSING, "is missing"),
    ("seed", -1, "-1"),
    ("seed", True, "True"),
    ("sed", 1, "did you mean seed?"),
    ("prepare.imagse", {}, "did you mean images?"),
    ("zzz", 1, "choose from root, seed"),
    ("prepare", None, "must be a mapping"),
    ("prepare.source", "imagenet", "one of shapes, coco"),
    ("prepare.source", ["coco"], "one of shapes, coco"),
    ("prepare.size", 16, "at least 64"),
    ("prepare.images.train", 0, "at least 1"),
    ("prepare.images.fit", 1.5, "1.5"),
    ("prepare.images.test", MISSING, "is missing"),
    ("models", {}, "must be a mapping"),
    ("models.a/b", PARAMS["models"]["small"], "letters, digits"),
    ("models.small.architecture", "vgg16", "resnet10_fpn"),
    ("models.small.tasks", [], "a list with some of"),
    ("models.small.tasks", ["panoptic"], "a list with some of"),
    ("models.small.tasks", [["detection"]], "a list with some of"),
    ("models.small.image_size.max", 64, "at least min"),
    ("models.small.lr", "1e-3", "1.0e-3"),
    ("models.small.lr", math.nan, "nan"),
    ("models.small.weights", 3, "a text or null"),
    ("extract.train_images", 10**6, "prepare.images.train has only"),
    ("extract.dtype", "uint8", "float32, float16"),
    ("lambdas.high", 0.1, "q1, q2"),
    ("lambdas.q2", 0.0001, "above the one before it"),
    ("lambdas.q6", 0.5, "lambda_range is [0.0001, 0.05]"),
    ("lambdas", {"q1": 0.002}, "at least two"),
    ("codecs.vvc", PARAMS["codecs"]["elic"], "choose from elic, tcm, hevc"),
    ("codecs.elic.packing", "rgb", "pca, quilt, tile"),
    ("codecs.tcm.packing", "quilts", "pca, quilt, tile"),
    ("codecs.elic.network.groups", [16, 16], "must be M = 256"),
    ("codecs.elic.network.groups", [256, 0], "whole numbers"),
    ("codecs.elic.network.context.widths", [96], "2 of them"),
    ("codecs.tcm.network.slices", 5, "M = 256 must be a multiple"),
    ("codecs.tcm.network.head_dims", [8, 16, 24], "N = 32 must be a multiple"),
    ("codecs.tcm.network.context_widths", [24, 32, 32], "multiple of 16"),
    ("codecs.tcm.network.window", 5, "multiple of 2"),
    ("codecs.elic.lambda_range", [0.2, 0.1], "lowest < highest"),
    ("codecs.elic.crop", 96, "multiple of 64"),
    ("codecs.elic.init", "", "a text or null"),
    ("codecs.elic.entropy_steps", -1, "at least 0"),
    ("codecs.elic.entropy_steps", MISSING, "is missing"),
    ("codecs.elic.famly", [], "did you mean family?"),
    ("tasks.panoptic", {"points": 8}, "one of detection"),
    ("mfip.precode", "q99", "not in lambdas"),
    ("tasks.detection.points", 0, "at least 1"),
    ("mfip.validation", 1, "between 0 and 1"),
    ("report.bootstrap", "many", "'many'"),
    ("cells.detection-elic.task", "panoptic", "not in tasks"),
    ("cells.detection-elic.model", "large", "not in models"),
    ("cells.detection-elic.codec", "vvc", "not in codecs"),
    ("cells.twice", PARAMS["cells"]["detection-elic"], "cells.detection-elic has this task and codec"),
]


@pytest.mark.parametrize(("key", "value", "says"), BAD, ids=[f"{key}-{says}" for key, _, says in BAD])
def test_a_bad_number_is_one_line_with_its_key(key: str, value: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        check_params(changed(key, value))
    assert key in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("packing", ["pca", "quilt", "tile"])
@pytest.mark.parametrize("codec", ["elic", "tcm"])
def test_a_learned_codec_may_have_any_packing(codec: str, packing: str) -> None:
    check_params(changed(f"codecs.{codec}.packing", packing))


FAMILY = [{"lmbda": lmbda, "weights": f"{lmbda}.pth.tar"} for lmbda in PARAMS["lambdas"].values()]
NETWORK = {"N": 192, "M": 320, "groups": [16, 16, 32, 64, 192], "context": {"widths": [224, 128], "kernel": 5}}
PUBLISHED = {"packing": "tile", "network": NETWORK, "family": FAMILY}  # no range of lambdas, nothing to train


@pytest.mark.parametrize("codec", ["elic", "tcm"])
def test_a_codec_may_be_a_family_of_published_weights(codec: str) -> None:
    network = NETWORK if codec == "elic" else PARAMS["codecs"]["tcm"]["network"]
    check_params(changed(f"codecs.{codec}", PUBLISHED | {"network": network}))
    check_params(changed("codecs.elic", PUBLISHED | {"family": FAMILY[::-1]}))


BAD_FAMILIES = [  # what is another in `codecs.elic`, what the line must say
    ({"family": []}, "codecs.elic.family is []: it must be a list with at least one entry"),
    ({"family": {"lmbda": 0.1, "weights": "a.pth"}}, "it must be a list with at least one entry"),
    ({"family": None}, "codecs.elic.family is None: it must be a list"),
    ({"family": ["a.pth"]}, "codecs.elic.family[0] is 'a.pth': it must be a mapping"),
    ({"family": [*FAMILY, {"lmbda": 0.1, "wieghts": "a.pth"}]}, "codecs.elic.family[6].wieghts: 'a.pth'; did you mean"),
    ({"family": [*FAMILY, {"lmbda": 0.1}]}, "codecs.elic.family[6].weights is missing"),
    ({"family": [FAMILY[0], {"lmbda": "high", "weights": "a.pth"}]}, "codecs.elic.family[1].lmbda is 'high'"),
    ({"family": [{"lmbda": 0, "weights": "a.pth"}]}, "codecs.elic.family[0].lmbda is 0: it must be a number above 0"),
    ({"family": [{"lmbda": 0.1, "weights": None}]}, "codecs.elic.family[0].weights is None: it must be a text"),
    ({"family": FAMILY[1:]}, "lambdas.q1 is 0.0008: codecs.elic.family has only [0.0016, "),
    ({"packing": "pca"}, "codecs.elic.packing is 'pca': it must be one of tile"),
    ({"steps": 10}, "unknown key codecs.elic.steps: 10"),
    ({"init": None}, "unknown key codecs.elic.init: None"),
    ({"network": NETWORK | {"M": 300}}, "must be M = 300"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_FAMILIES, ids=[says for _, says in BAD_FAMILIES])
def test_a_bad_family_is_one_line_with_its_entry(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        check_params(changed("codecs.elic", PUBLISHED | changes))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("packing", ["pca", "quilt"])
def test_a_transform_start_needs_a_wide_tcm(packing: str) -> None:
    network = PARAMS["codecs"]["tcm"]["network"] | {"N": 24, "head_dims": [8, 8, 24]}
    narrow = PARAMS["codecs"]["tcm"] | {"network": network, "packing": packing}
    with pytest.raises(InputError, match="codecs.tcm.network.N is 24: init: null needs at least 32"):
        check_params(changed("codecs.tcm", narrow | {"init": None}))
    check_params(changed("codecs.tcm", narrow | {"init": "narrow.pt"}))
    check_params(changed("codecs.tcm", narrow | {"init": None, "packing": "tile"}))  # for grey planes only


def test_coco_needs_a_folder() -> None:
    with pytest.raises(InputError, match="prepare.coco_root is None"):
        check_params(changed("prepare", PARAMS["prepare"] | {"source": "coco", "coco_root": None}))


def test_a_model_serves_only_tasks_that_it_has_heads_for() -> None:
    with pytest.raises(InputError, match="models.small.tasks is 'keypoints': maskrcnn_resnet50_fpn serves only"):
        check_params(changed("models.small.architecture", "maskrcnn_resnet50_fpn"))


def test_a_cell_needs_a_model_of_its_task() -> None:
    with pytest.raises(InputError, match="cells.keypoints-elic.model is 'small': models.small.tasks lacks keypoints"):
        check_params(changed("models.small.tasks", ["detection", "segmentation"]))


def test_every_pair_of_model_and_codec_has_a_cell() -> None:
    cells = {name: cell for name, cell in PARAMS["cells"].items() if cell["codec"] != "hevc"}
    with pytest.raises(InputError, match="no cell has model small and codec hevc"):
        check_params(changed("cells", cells))


@pytest.mark.parametrize(
    ("text", "says"), [(None, "no such file"), ("a: [", "not valid YAML"), ("", "must be a mapping"), ("3", "is 3")]
)
def test_an_unreadable_params_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("params.yaml").write_text(text)
    with pytest.raises(InputError, match="params.yaml") as error:
        load_params()
    assert says in str(error.value)


def test_entry_converts_the_words_and_counts_them(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = []

    def main(model: str, out: Path) -> None:
        calls.append((model, out))

    monkeypatch.setattr(sys, "argv", ["stages/fit.py", "small", "data/out"])
    entry(main)
    assert calls == [("small", Path("data/out"))]
    monkeypatch.setattr(sys, "argv", ["stages/fit.py", "small"])
    with pytest.raises(SystemExit) as stop:
        entry(main)
    assert stop.value.code == 2 and len(calls) == 1
    assert capsys.readouterr().err == "usage: python -m stages.fit model out\n"


@pytest.mark.parametrize("error", [InputError("a.csv:\n no rows"), OSError(28, "No space left on device", "a.csv")])
def test_entry_turns_bad_input_into_one_line(monkeypatch: pytest.MonkeyPatch, capsys, error: Exception) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["stages/fit.py"])
    with pytest.raises(SystemExit) as stop:
        entry(main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "a.csv" in line


@pytest.mark.parametrize("module", ["files", "params", "coco"])
def test_reading_and_writing_does_not_import_torch(module: str) -> None:
    code = f"import sys, stages.lib.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---------------------------------------------------------------- files


def test_tables_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    floats = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-100, 100)
    frame = pd.DataFrame({"scale": ["0", "pool"] * 100, "method": ["none", "static"] * 100, "drop": floats})
    frame.loc[3, "drop"] = np.nan
    write_csv(path, frame)
    pd.testing.assert_frame_equal(read_csv(path), frame, check_exact=True)
    first = path.read_bytes()
    write_csv(path, read_csv(path))
    assert path.read_bytes() == first and b"\r" not in first


def test_json_keeps_its_order(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 0.1, "a": [1, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 0.1,\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]


@pytest.mark.parametrize(("read", "content"), [(read_json, b"{"), (read_json, b"\xff"), (read_csv, b"")])
def test_an_unreadable_file_is_named(tmp_path: Path, read: Any, content: bytes) -> None:
    path = tmp_path / "broken"
    with pytest.raises(FileNotFoundError, match="broken"):
        read(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match="broken"):
        read(path)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "deep" / "out.png"

    def write(text: str, interrupt: bool) -> None:
        with atomic(path) as scratch:
            assert scratch.parent == path.parent and scratch.suffix == path.suffix
            if folder:
                scratch.mkdir()
            (scratch / "part" if folder else scratch).write_text(text)
            if interrupt:
                raise KeyboardInterrupt

    for text, interrupt in (("old", False), ("half", True)):
        try:
            write(text, interrupt)
        except KeyboardInterrupt:
            assert interrupt
        assert (path / "part" if folder else path).read_text() == "old"
        assert list(path.parent.iterdir()) == [path]
    write("new", False)
    assert (path / "part" if folder else path).read_text() == "new"
