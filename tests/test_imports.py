"""What imports what: the stages stand side by side, the library has no cycle, numeric modules do without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMERIC = ("ablation_tables", "allocation", "bd_rate", "bound_tables", "figures", "loss_rate", "results", "tables")


def imported(file: Path) -> set[str]:
    """Names of what a file imports, with all their dots: modules, and what it takes out of them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_library(name: str) -> set[str]:
    """The modules of stages/lib that one of them imports, for its types too."""
    parts = (full.split(".") for full in imported(ROOT / f"stages/lib/{name}.py"))
    return {words[2] for words in parts if words[:2] == ["stages", "lib"]}


LIBRARY = {path.stem: of_library(path.stem) for path in ROOT.glob("stages/lib/*.py") if path.stem != "__init__"}


def behind(name: str) -> set[str]:
    """What a module of the library needs of it, directly or not, itself included; the cycle in the message, if any."""

    def visit(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, f"a cycle: {' -> '.join([*path[path.index(name) :], name])}"
        return {name}.union(*(visit(inner, (*path, name)) for inner in LIBRARY[name]))

    return visit(name, ())


@pytest.mark.parametrize("name", LIBRARY)
def test_no_module_needs_itself(name: str) -> None:
    assert name in behind(name)


@pytest.mark.parametrize("path", [*ROOT.glob("stages/*.py"), *ROOT.glob("stages/lib/*.py")], ids=lambda p: p.stem)
def test_only_the_library_is_imported_from(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("stages.") and not name.startswith("stages.lib.")]


def test_no_import_begins_cuda() -> None:
    """Forks of a process that has would have no GPU: plan and benchmark begin forks."""
    modules = ", ".join(f"stages.{path.stem}" for path in sorted((ROOT / "stages").glob("[a-z]*.py")))
    code = f"import torch\ntorch.cuda.is_available = lambda: True\ntorch.cuda._lazy_init = None\nimport {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", NUMERIC)
def test_a_numeric_module_does_without_torch(name: str) -> None:
    for module in behind(name):
        packages = {full.split(".")[0] for full in imported(ROOT / f"stages/lib/{module}.py")}
        assert not packages & {"torch", "torchvision"}


def test_no_module_is_longer_than_a_reader_takes_in_at_once():
    files = [path for folder in ("stages", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert not {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 400}
