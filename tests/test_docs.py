"""What README.md and docs/ say is so: links, commands, examples. Their tables: test_doc_tables.py."""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stages.lib import coding

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# ---------------------------------------------------------------- links


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(path.read_text(encoding="utf-8"))):
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{path.name}: {link}: no such file"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}: no such heading"


def test_what_messages_of_stages_refer_to_is_a_heading_of_the_readme() -> None:
    assert "README, COCO 2017" in (ROOT / "stages/lib/coco.py").read_text()
    assert "coco-2017" in anchors(ROOT / "README.md")


def test_the_readme_describes_every_stage_and_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(re.findall(r"^\| `(\w+)` \| .* \| [\d.-]+ \|$", text, re.M)) == set(stages)
    tree = re.search(r"## What is where\s+```(.*?)```", text, re.DOTALL)[1]
    for name in re.findall(r"\w+\.(?:py|yaml)", tree):
        assert (ROOT / name).exists() or (ROOT / "stages/lib" / name).exists(), f"{name} is in the tree only"


# ---------------------------------------------------------------- commands

UNTESTED = "**No test runs the commands of this page**"
NEEDS = re.compile(r"^# needs ", re.MULTILINE)  # first line of a block that no test can run
PLAIN = {"cd", "cp", "git", "mypy", "ruff", ".", "python -m venv", "python -m tests.test_doc_tables"}
PARAMS = {folder: yaml.safe_load((ROOT / folder / "params.yaml").read_text()) for folder in ("", "profiles/smoke")}
PARAMS |= {
    f"profiles/{name}": yaml.safe_load((ROOT / f"profiles/{name}/params.yaml").read_text())
    for name in ("coco", "study")
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Folder, words of each command of a block that starts in the root; without heredocs, assignments and comments.

    What a loop of several lines repeats comes once for each value.
    """
    folder = ""
    text = re.sub(r"<<(\w+)\n.*?^\1\n", "\n", block, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^for (\w+) in (.*); do\n(.*?)^done$", _repeated, text, flags=re.DOTALL | re.MULTILINE)
    for words in map(_words, re.split(r"\n|&&|\|\|", text.replace("\\\n", " "))):
        if words[:1] == ["cd"]:
            folder = str(Path(folder) / words[1])
        elif words:
            yield folder, words


def _repeated(loop: re.Match) -> str:
    name, values, body = loop.groups()
    return "".join(body.replace(f"${name}", value) for value in values.split())


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a string of several lines: no command of this project
        return []
    return list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words))


SHELL = [
    pytest.param(path, block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(blocks(path, "sh"), 1)
]


def stage_names(params: dict) -> set[str]:
    """As DVC resolves dvc.yaml: `stage`, `stage@item`, `stage@item-item`."""
    names = set()
    for name, definition in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        over = definition.get("matrix") or ({"": definition["foreach"]} if "foreach" in definition else {})
        keys = [list(params[section.strip("${}")]) for section in over.values()]
        names |= {name} if not keys else {f"{name}@{'-'.join(items)}" for items in itertools.product(*keys)}
    return names


def module_is_called_as_it_wants(module: str, words: list[str]) -> None:
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    known = [call.args for call in ast.walk(tree) if isinstance(call, ast.Call) and _name(call) == "add_argument"]
    if known:
        options = {arg.value for args in known for arg in args} | {"--help", "-h"}
        assert {word for word in words if word.startswith("-") and not word[1:2].isdigit()} <= options
    else:
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert len(words) == len(main.args.args), f"{module} takes {len(main.args.args)} arguments"


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def has_key(params: dict, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(params, dict) or part not in params:
            return False
        params = params[part]
    return True


def dvc_is_called_as_it_can_be(folder: str, words: list[str]) -> None:
    settings = [value for option, value in itertools.pairwise(words) if option in ("-S", "--set-param")]
    for setting in settings:
        assert has_key(PARAMS[folder], setting.partition("=")[0]), f"{folder}/params.yaml has no {setting}"
    verb, rest = words[:2] if words[0] in ("exp", "metrics", "plots", "params") else words[:1], []
    if verb in (["repro"], ["exp", "run"], ["commit"]):
        taking = {"-S", "--set-param", "-n", "--name", "-j"}
        rest = [
            w for before, w in itertools.pairwise([*words[len(verb) - 1 :]]) if before not in taking and w[0] != "-"
        ]
    for target in rest:
        file, _, stage = target.rpartition(":")
        file, stage = (stage, "") if stage.endswith("dvc.yaml") else (file, stage)
        place = str((Path(folder) / file).parent) if file else folder
        params = PARAMS["" if place == "." else place]
        assert not stage or stage in stage_names(params) | {n.partition("@")[0] for n in stage_names(params)}, target


@pytest.mark.parametrize(("path", "block"), SHELL)
def test_commands_name_what_exists(path: Path, block: str) -> None:
    for folder, words in commands(block):
        start = " ".join(words[:3]) if words[0] == "python" else words[0]
        if words[:2] == ["python", "-m"] and words[2].startswith("stages."):
            module_is_called_as_it_wants(words[2], words[3:])
        elif words[0] == "torchrun":
            at = words.index("-m")
            module_is_called_as_it_wants(words[at + 1], words[at + 2 :])
        elif words[0] == "dvc":
            dvc_is_called_as_it_can_be(folder, words[1:])
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-"))
        elif words[0] == "pip":
            assert all((ROOT / words[n + 1]).exists() for n, word in enumerate(words) if word == "-r")
        else:
            assert start in PLAIN or NEEDS.search(block) or UNTESTED in path.read_text(), f"{path.name}: {start}"


@pytest.mark.parametrize(("path", "block"), SHELL)
def test_a_command_is_run_by_a_test_or_says_what_it_needs(path: Path, block: str) -> None:
    if NEEDS.search(block) or UNTESTED in path.read_text(encoding="utf-8"):
        return
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("*.py")) + (ROOT / ".ci/run").read_text()
    stages = (ROOT / "dvc.yaml").read_text()
    for folder, words in commands(block):
        assert "coco" not in folder, f"{path.name}: {words}"
        if words[:2] == ["python", "-m"] and words[2].startswith("stages."):
            stage = words[2].removeprefix("stages.")  # test_bad_input calls them by their names
            run = re.search(rf"stages\.{stage}\b|\"{stage} |from stages import {stage}\b", tests + stages)
            assert run, f"{path.name}: no test runs {words[2]}"


def test_two_runs_are_compared_by_the_commands_of_the_docs(tmp_path: Path) -> None:
    """Those of docs/usage.md, but that only `prepare` runs, and one number of the metrics is changed by hand."""
    (block,) = (block for block in blocks(ROOT / "docs/usage.md", "sh") if "metrics diff" in block)
    run, *compare = (words for _, words in commands(block))

    def call(*words: str) -> str:
        author = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | author | {"PATH": path}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for words in ("git init -q", "dvc init -q"):
        call(*words.split())
    copied = ("stages", "profiles", ".dvc/plots", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore")
    for name in (*copied, "reports/metrics", "reports/rd_points.csv"):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "data", "figures", "tables")
            shutil.copytree(ROOT / name, place, ignore=ignored)
        else:
            shutil.copy(ROOT / name, place)
    for words in ("git add .", "git commit -qm baseline"):
        call(*words.split())
    call(*run, "prepare")
    file = tmp_path / "reports/metrics/detection_elic.json"
    metrics = json.loads(file.read_text())
    was = metrics["mfiba_skip"]["bd_rate"]
    metrics["mfiba_skip"]["bd_rate"] = -12.25
    file.write_text(json.dumps(metrics))
    params, cells, numbers, table, _ = (call(*words) for words in compare)
    assert re.search(r"tasks.detection.points +\| 7 +\| 6 ", params)
    assert {line.split("|")[1].strip() for line in cells.splitlines() if ".json" in line} == {
        f"reports/metrics/{path.name}" for path in (ROOT / "reports/metrics").iterdir()
    }
    assert re.search(rf"mfiba_skip.bd_rate +\| {was:.5g}\d* +\| -12.25 ", numbers)
    rows = [re.split(r" *\| *", line) for line in table.splitlines() if "|" in line]
    assert [row[-2] for row in rows if "points-6" in row[1]] == ["6"]
    assert any(f"{was:.3f}" in row for row in rows) and any("-12.25" in row for row in rows)
    drawn = (tmp_path / "dvc_plots/index.html").read_text()
    assert '"facet"' in drawn and '"rev": "HEAD"' in drawn and '"rev": "workspace"' in drawn


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name)
def test_examples_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(coding, "CODECS", coding.CODECS.copy())
    names: dict = {}
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), names)


EXTENSIONS = blocks(ROOT / "docs/extending.md", "diff")
TRIAL = """
import numpy as np, sys, torch, tracemalloc, yaml, zlib
from pathlib import Path
from stages.lib import allocation
from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import CODECS, FeatureCodec, decode_scale, encode_scale
from stages.lib.params import SCALES, check_params
from stages.lib.planes import Packing

params = yaml.safe_load(Path("profiles/smoke/params.yaml").read_text())
params["codecs"]["deflate"] = {"packing": "pca"}
params["tasks"]["persons"] = {"points": 5}
params["models"]["small"]["tasks"].append("persons")
params["cells"]["persons-deflate"] = {"task": "persons", "model": "small", "codec": "deflate"}
check_params(params)

torch.manual_seed(0)
maps = torch.randn(2, 6, 8, 12)
codec = FeatureCodec(CODECS["deflate"]({}).update(), Packing("tile", {}, {}), 6)
errors, bits = [], []
for level in map(codec.codec.level, params["lambdas"].values()):
    records = encode_scale(maps, "0", level, codec)
    received = decode_scale([record.data for record in records], "0", (8, 12), codec)
    assert np.isclose((received - maps).square().mean().item(), np.mean([r.mse_feature for r in records]), rtol=1e-4)
    errors.append(records[0].mse_feature)
    bits.append(len(records[0].data))
assert errors == sorted(errors)[::-1] and bits == sorted(bits)
bomb = zlib.compress(bytes(10**8))
tracemalloc.start()
forged = codec.codec.decode([bomb], 0, (3, 8, 12))
assert forged.shape == (1, 3, 8, 12) and not forged.any() and tracemalloc.get_traced_memory()[1] < 10**6
tracemalloc.stop()

split = load_split(Path(sys.argv[1]), "test")
persons, everything = ground_truth(split, "persons"), ground_truth(split, "detection")
assert [c["name"] for c in persons.dataset["categories"]] == ["person"]
assert 0 < len(persons.anns) < len(everything.anns)

mean_bits = np.array([100.0, 200.0, 400.0])  # of every scale; losses that are a power of them
mean = {"bits": mean_bits.tolist(), "loss": (30 * mean_bits**-0.5).tolist()}
rate = {"slope": [1.0] * 3, "offset": np.log(mean_bits / 200).tolist()}
fit = {"mean": dict.fromkeys(SCALES, mean), "rate": dict.fromkeys(SCALES, rate)}
sensitivity = np.array([[0.5, 1.0, 2.0, 4.0, 8.0]])
known = np.full((1, 5), 200.0)
for lambda_prime in np.geomspace(1e-4, 1, 30):
    ours = allocation.mfiba_power(sensitivity, known, fit, 1)(lambda_prime)
    assert (ours == allocation.mfiba(sensitivity, known, fit, 1)(lambda_prime)).all()
"""


def test_the_codec_of_the_readme_is_that_which_is_tried() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    added = re.findall(r"(?m)^\+ *(.+)", EXTENSIONS[0].replace(" Tensor", " torch.Tensor"))
    code = [line.partition("  #")[0].strip() for line in example.split("\n\n\n", 1)[1].splitlines()]
    assert {line for line in code if line} <= {*added} and len(code) > 10


@pytest.mark.parametrize("number", range(len(EXTENSIONS)))
def test_an_extension_takes_at_most_15_lines_besides_imports(number: int) -> None:
    lines = [line[1:].strip() for line in EXTENSIONS[number].splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len([line for line in lines if line and not re.match(r"import |from ", line)]) <= 15


def test_the_extensions_work(tmp_path: Path, coco_root: Path) -> None:
    from stages.lib.coco import make_splits

    for name in ("stages", "profiles/smoke"):
        ignored = shutil.ignore_patterns("__pycache__", "data", "reports", "dvc.lock")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / ".ruff.toml", tmp_path)
    splits = make_splits(coco_root, {"train": 3, "fit": 2, "test": 2}, ["detection", "keypoints"])
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for patch in EXTENSIONS:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    for words in (["ruff", "check", "-q", "stages"], ["ruff", "format", "--check", "-q", "stages"]):
        subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-c", TRIAL, "splits.json"], cwd=tmp_path, check=True)


def test_the_columns_of_tables_are_those_of_the_code() -> None:
    from stages.lib import comparing, features, measuring, results

    text = " ".join((ROOT / "docs/formats.md").read_text(encoding="utf-8").split())
    for columns in (coding.LEDGER, measuring.LOSSES, results.RD_POINTS, results.RESAMPLES, comparing.BD_RATE):
        assert f"`{', '.join(columns)}`" in text
    assert features.INDEX[:2] == ["split", "image_id"]
