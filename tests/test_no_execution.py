"""What could run code from an input is not in the stages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DANGEROUS_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__", "yaml.unsafe_load", "yaml.full_load", "os.system"}


def dangers(source: str) -> list[str]:
    """Calls and imports that could run what an input says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            found += names & DANGEROUS_MODULES
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                name in DANGEROUS_CALLS
                or (name == "torch.load" and keywords.get("weights_only") != "True")
                or (name == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["_PlainLoader"])
                or {"allow_pickle": "True", "shell": "True"}.items() & keywords.items()
            ):
                found.append(ast.unparse(node))
    return found


def test_no_input_is_ever_executed() -> None:
    files = sorted(ROOT.glob("stages/**/*.py"))
    assert len(files) > 20 and {str(file): found for file in files if (found := dangers(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path,\n  allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_could_execute_an_input_is_found(source: str) -> None:
    assert dangers(source) and not dangers("torch.load(path, weights_only=True)\nmodel.eval()\nre.compile('a')")
