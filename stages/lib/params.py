"""params.yaml -> a dict of numbers that is known to be right; a command line -> one call."""

import inspect
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple

import yaml

SCALES = ("0", "1", "2", "3", "pool")
COARSER = {"0": "1", "1": "2", "2": "3", "pool": "3"}  # scale -> what a receiver predicts it from if it is not sent
COARSE_TO_FINE = ("3", "2", "1", "0", "pool")  # every scale after its coarser one
SKIPPED = -1  # as phi: nothing is sent of a scale
MAX_SIDE = 16384  # px, of an image; far above any that a detector is given, and a multiple of its padding, 32
MOST_KEYS = 1000  # of a mapping in a YAML file; merges of merges can ask for any number
LARGEST = 2**31 - 1  # of the whole numbers that count or measure something
SHORT = Repr()  # of a value in a message; a file can hold one that is too long to print, or endless
SHORT.maxstring = SHORT.maxother = 100
OUTPUTS = ("out", "ledger", "reports", "picture")  # parameters of a stage that are written; its other paths are read
TASKS = {"detection": "bbox", "segmentation": "segm", "keypoints": "keypoints"}  # task -> COCO's iouType
ARCHITECTURES = {  # architecture -> the tasks that its heads serve
    "resnet10_fpn": ("detection", "segmentation", "keypoints"),
    "fasterrcnn_resnet50_fpn": ("detection",),
    "maskrcnn_resnet50_fpn": ("detection", "segmentation"),
    "keypointrcnn_resnet50_fpn": ("detection", "keypoints"),
}


class InputError(ValueError):
    """Bad input: one line that names the file or key, the value and the remedy."""


class Check(NamedTuple):
    """A leaf of the schema."""

    accepts: Callable[[Any], bool]
    wanted: str


class Named(NamedTuple):
    """A mapping from names that the user chooses (those that `name` accepts) to values of one schema."""

    name: Check
    schema: Any


class Listed(NamedTuple):
    """A list of at least one value of one schema."""

    schema: Any


class Either(NamedTuple):
    """A mapping of one schema where it has `key`, else of another."""

    key: str
    having: Any
    lacking: Any


class Some(NamedTuple):
    """A mapping with at least one of these keys, each with a schema of its own."""

    schemas: dict[str, Any]


class Having(NamedTuple):
    """A mapping with all of these keys, each with a schema of its own, and maybe others."""

    schemas: dict[str, Any]


class Section(dict):
    """A section of params.yaml: what the user's names stand for. Another name, as of a command line, is bad input."""

    def __init__(self, title: str, values: dict[str, Any]):
        super().__init__(values)
        self.title = title

    def __missing__(self, name: str) -> Any:
        raise InputError(f"{name!r} is not in params.yaml: {self.title}; choose from {', '.join(self)}")


yaml.SafeDumper.add_representer(Section, yaml.SafeDumper.represent_dict)


def is_number(value: Any) -> bool:
    """Finite; a whole one has 64 bits, as numpy's."""
    return math.isfinite(value) if isinstance(value, float) else is_whole(value) and abs(value) < 2**63


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def whole(least: int, multiple_of: int = 1, most: int = LARGEST) -> Check:
    wanted = f"a whole number of at least {least} and at most {most}"
    wanted += f", a multiple of {multiple_of}" if multiple_of > 1 else ""
    return Check(lambda value: is_whole(value) and least <= value <= most and value % multiple_of == 0, wanted)


def one_of(choices: tuple[str, ...]) -> Check:
    return Check(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


NUMBER = Check(is_number, "a finite number")
POSITIVE = Check(lambda value: is_number(value) and value > 0, "a number above 0 (an exponent needs a point: 1.0e-3)")
SHARE = Check(lambda value: is_number(value) and 0 < value < 1, "a number between 0 and 1")
NUMBER_OR_NULL = Check(lambda value: value is None or is_number(value), "a finite number or null")
NEGATIVE = Check(lambda value: is_number(value) and value < 0, "a number below 0")
TEXT = Check(_is_text, "a text that can be printed")
TEXT_OR_NULL = Check(lambda value: value is None or _is_text(value), "a text or null")
NAME = Check(
    lambda name: isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
    "made of letters, digits, - and _ (it becomes a file name)",
)
TASK_LIST = Check(
    lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) and v in TASKS for v in value),
    f"a list with some of {', '.join(TASKS)}",
)


def numbers(count: int) -> Check:
    return Check(
        lambda value: isinstance(value, list) and len(value) == count and all(map(is_number, value)),
        f"a list of {count} finite numbers",
    )


def wholes(count: int | None = None) -> Check:
    wanted = "a list of whole numbers of at least 1" + (f", {count} of them" if count else "")
    return Check(
        lambda value: (
            isinstance(value, list)
            and (len(value) == count if count else len(value) > 0)
            and all(is_whole(v) and v > 0 for v in value)
        ),
        wanted,
    )


FLAGS = Check(lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts")
WHOLES, PAIR, TRIPLE = wholes(), wholes(2), wholes(3)
ODD = Check(lambda value: is_whole(value) and value > 1 and value % 2 == 1, "an odd whole number of at least 3")
RANGE = Check(
    lambda value: (
        isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and 0 < value[0] < value[1]
    ),
    "[lowest, highest] with 0 < lowest < highest",
)

PACKING = one_of(("pca", "quilt", "tile"))


def learned(network: dict[str, Any]) -> Either:
    """One network for all rates, trained here; or a family of published ones, one for each lambda."""
    trained = {
        "packing": PACKING,
        "network": network,
        "lambda_range": RANGE,
        "gains": whole(2),
        "init": TEXT_OR_NULL,
        "entropy_steps": whole(0),
        "steps": whole(0),
        "batch": whole(1),
        "crop": whole(64, multiple_of=64),  # the codecs' total stride
        "lr": POSITIVE,
    }
    published = {
        "packing": one_of(("tile",)),  # they are made for pictures of three channels
        "network": network,
        "family": Listed({"lmbda": POSITIVE, "weights": TEXT}),
    }
    return Either("family", published, trained)


NETWORK = {"N": whole(1), "M": whole(1)}

SCHEMA = {
    "root": TEXT,
    "seed": whole(0),
    "prepare": {
        "seed": whole(0),
        "source": one_of(("shapes", "coco")),
        "coco_root": TEXT_OR_NULL,
        "size": whole(64),
        "images": {"train": whole(1), "fit": whole(2), "test": whole(1)},  # fit: one to learn from, one to validate
    },
    "models": Named(
        NAME,
        {
            "architecture": one_of(tuple(ARCHITECTURES)),
            "tasks": TASK_LIST,
            "weights": TEXT_OR_NULL,
            "image_size": {"min": whole(32, most=MAX_SIDE), "max": whole(32, most=MAX_SIDE)},
            "steps": whole(0),
            "batch": whole(1),
            "lr": POSITIVE,
        },
    ),
    "extract": {"train_images": whole(1), "dtype": one_of(("float32", "float16", "uint10"))},
    "lambdas": Named(
        Check(lambda name: isinstance(name, str) and re.fullmatch(r"q[0-9]+", name) is not None, "q1, q2, ..."),
        POSITIVE,
    ),
    "codecs": Some(
        {
            "elic": learned(NETWORK | {"groups": WHOLES, "context": {"widths": PAIR, "kernel": ODD}}),
            "tcm": learned(
                NETWORK
                | {
                    "slices": whole(1),
                    "head_dims": TRIPLE,
                    "window": whole(2, multiple_of=2),
                    "blocks": whole(1),
                    "hyper_channels": whole(1),
                    "context_widths": TRIPLE,
                }
            ),
            "hevc": {"packing": PACKING},
        }
    ),
    "tasks": Named(one_of(tuple(TASKS)), {"points": whole(1)}),
    "mfip": {"precode": TEXT, "channels": whole(1), "epochs": whole(1), "lr": POSITIVE, "validation": SHARE},
    "report": {"bootstrap": whole(1)},
    "cells": Named(NAME, {"task": TEXT, "model": TEXT, "codec": TEXT}),
    "studies": Check(lambda value: isinstance(value, dict), "a mapping of some of the cells, {} for none"),
}


def load_params() -> dict[str, Any]:
    """The profile's params.yaml (in the working folder), checked as a whole."""
    params = read_yaml(Path("params.yaml"))
    check_params(params)
    named = {title for title, schema in SCHEMA.items() if isinstance(schema, Named | Some)}
    return params | {title: Section(title, params[title]) for title in named}


def read_yaml(path: Path) -> Any:
    """Plain values only, whatever tags a file has; no key twice in a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, _PlainLoader)
    except FileNotFoundError:
        raise InputError(f"{path.absolute()}: no such file; run the stage in the folder of a profile") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, dates or numbers of no meaning
        raise InputError(f"{path}: not valid YAML ({error}); correct the file") from None


class _PlainLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:  # YAML lets the last one win
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            raise yaml.MarkedYAMLError(problem=f"over {MOST_KEYS} keys in a mapping", problem_mark=node.start_mark)


def tasks_of(params: dict[str, Any], model: str, codec: str) -> list[str]:
    """The tasks of the cells of a model and a codec, at least one."""
    tasks = [cell["task"] for cell in params["cells"].values() if (cell["model"], cell["codec"]) == (model, codec)]
    remedy = f"no cell has model {model} and codec {codec}; add one, or remove the model or the codec"
    _need(tasks, "cells", list(params["cells"]), remedy)
    return tasks


def precode_of(params: dict[str, Any]) -> int:
    """The quality at which a sender codes first, as phi."""
    return list(params["lambdas"]).index(params["mfip"]["precode"])


def check_params(params: Any) -> None:
    check(params, SCHEMA, "params.yaml")
    _check_prepare(params)
    for name, model in params["models"].items():
        served = ARCHITECTURES[model["architecture"]]
        for task in model["tasks"]:
            _need(
                task in served, f"models.{name}.tasks", task, f"{model['architecture']} serves only {', '.join(served)}"
            )
        low, high = model["image_size"]["min"], model["image_size"]["max"]
        _need(low <= high, f"models.{name}.image_size.max", high, f"it must be at least min, {low}")
    _check_lambdas(params)
    _check_networks(params["codecs"])
    _refer(params, "lambdas", params["mfip"]["precode"], "mfip.precode")
    _check_cells(params)
    for name, cell in params["studies"].items():
        _refer(params, "cells", name, f"studies.{name}")
        _need(cell == params["cells"][name], f"studies.{name}", cell, f"it must be as in cells: *{name}")


def _check_networks(codecs: dict[str, Any]) -> None:
    if "elic" in codecs:
        network = codecs["elic"]["network"]
        total, groups = sum(network["groups"]), network["groups"]
        remedy = f"the sum, {total}, must be M = {network['M']}"
        _need(total == network["M"], "codecs.elic.network.groups", groups, remedy)
    if "tcm" in codecs:
        network = codecs["tcm"]["network"]
        M, slices = network["M"], network["slices"]
        _need(M % slices == 0, "codecs.tcm.network.slices", slices, f"M = {M} must be a multiple")
        for dim in network["head_dims"]:
            remedy = f"N = {network['N']} must be a multiple of each"
            _need(network["N"] % dim == 0, "codecs.tcm.network.head_dims", network["head_dims"], remedy)
        starts = codecs["tcm"]["packing"] != "tile" and codecs["tcm"]["init"] is None
        _need(not starts or network["N"] >= 32, "codecs.tcm.network.N", network["N"], "init: null needs at least 32")
        squeezed = network["context_widths"][0]
        _need(squeezed % 16 == 0, "codecs.tcm.network.context_widths", squeezed, "the first must be a multiple of 16")


def _check_prepare(params: dict[str, Any]) -> None:
    prepare = params["prepare"]
    _need(
        prepare["source"] != "coco" or prepare["coco_root"] is not None,
        "prepare.coco_root",
        None,
        "source is coco: give the folder with train2017/, val2017/ and annotations/",
    )
    wanted, available = params["extract"]["train_images"], prepare["images"]["train"]
    _need(wanted <= available, "extract.train_images", wanted, f"prepare.images.train has only {available}")


def _check_lambdas(params: dict[str, Any]) -> None:
    lambdas = params["lambdas"]
    _need(len(lambdas) >= 2, "lambdas", lambdas, "give at least two: the rate is fitted over them")
    highest = 0.0
    for name, value in lambdas.items():
        _need(value > highest, f"lambdas.{name}", value, f"it must be above the one before it, {highest}")
        highest = value
        for codec, numbers in params["codecs"].items():
            low, high = numbers.get("lambda_range", (0, math.inf))
            _need(low <= value <= high, f"lambdas.{name}", value, f"codecs.{codec}.lambda_range is [{low}, {high}]")
            family = [member["lmbda"] for member in numbers.get("family", ())]
            _need(not family or value in family, f"lambdas.{name}", value, f"codecs.{codec}.family has only {family}")


def _check_cells(params: dict[str, Any]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for name, cell in params["cells"].items():
        for key in ("task", "model", "codec"):
            _refer(params, f"{key}s", cell[key], f"cells.{name}.{key}")
        tasks = params["models"][cell["model"]]["tasks"]
        _need(
            cell["task"] in tasks,
            f"cells.{name}.model",
            cell["model"],
            f"models.{cell['model']}.tasks lacks {cell['task']}",
        )
        first = seen.setdefault((cell["task"], cell["codec"]), name)
        _need(first == name, f"cells.{name}", cell, f"cells.{first} has this task and codec already; remove one")
    for model in params["models"]:
        for codec in params["codecs"]:
            tasks_of(params, model, codec)


def check(value: Any, schema: Any, source: str, key: str = "") -> None:
    """Raises InputError that names the file `source` and the key where `value` is not what the schema wants."""
    if isinstance(schema, Check):
        _need(schema.accepts(value), key, value, f"it must be {schema.wanted}", source)
        return
    if isinstance(schema, Listed):
        _need(isinstance(value, list) and value, key, value, "it must be a list with at least one entry", source)
        for number, inner in enumerate(value):
            check(inner, schema.schema, source, f"{key}[{number}]")
        return
    wanted = "it must be a mapping with at least one key"
    _need(isinstance(value, dict) and value, key or "the file", value, wanted, source)
    prefix = f"{key}." if key else ""
    if isinstance(schema, Named):
        for name, inner in value.items():
            _need(schema.name.accepts(name), f"{prefix}{name}", inner, f"its name must be {schema.name.wanted}", source)
            check(inner, schema.schema, source, f"{prefix}{name}")
        return
    known = [schema.key] if isinstance(schema, Either) else []  # misspelt, it has chosen the wrong schema
    if isinstance(schema, Either):
        schema = schema.having if schema.key in value else schema.lacking
    schemas = schema.schemas if isinstance(schema, Some | Having) else schema
    for name in value:
        if name not in schemas and not isinstance(schema, Having):
            close = get_close_matches(str(name), [*known, *schemas], n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(schemas)}"
            raise InputError(f"{source}: unknown key {prefix}{name}: {SHORT.repr(value[name])}; {remedy}")
    for name, inner in schemas.items():
        if name in value:
            check(value[name], inner, source, f"{prefix}{name}")
        elif not isinstance(schema, Some):
            raise InputError(f"{source}: {prefix}{name} is missing; add it")


def _refer(params: dict[str, Any], section: str, name: str, key: str) -> None:
    _need(name in params[section], key, name, f"it is not in {section}; choose from {', '.join(params[section])}")


def _need(condition: Any, key: str, value: Any, remedy: str, source: str = "params.yaml") -> None:
    if not condition:
        raise InputError(f"{source}: {key} is {SHORT.repr(value)}: {remedy}")


# ---------------------------------------------------------------- the command line


def entry(main: Callable[..., None]) -> None:
    """The command line -> `main`, as `attempt`. Among OUTPUTS, what has a suffix is a file, what has none a folder."""
    parameters = inspect.signature(main, eval_str=True).parameters.values()
    words = sys.argv[1:]
    if len(words) != len(parameters) or any(word.startswith("-") for word in words):
        stage = Path(sys.argv[0]).stem
        sys.exit(_fail(f"usage: python -m stages.{stage} {' '.join(parameter.name for parameter in parameters)}"))
    attempt(main, {p.name: p.annotation(word) for p, word in zip(parameters, words, strict=True)}, folders=True)


def attempt(main: Callable[..., None], given: dict[str, Any], folders: bool) -> None:
    """Calls `main`; bad input, or an output that could not be written -> one line on stderr and exit code 2.

    folders: an output without a suffix is one.
    """
    paths = {name: value for name, value in given.items() if isinstance(value, Path)}
    try:
        for name in OUTPUTS:
            if name in paths:
                others = [path for other, path in paths.items() if other != name]
                check_output(paths[name], folders and not paths[name].suffix, others)
        main(**given)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        remedy = "give another path, or see to this one"
        sys.exit(_fail(f"{error.filename}: {error.strerror}; {remedy}" if error.filename else str(error)))


def check_output(path: Path, is_folder: bool, others: Iterable[Path]) -> None:
    """Raises InputError where nothing could be written to `path`, or what is written would replace one of `others`."""
    place = _place(path)
    for other in (Path.cwd(), *others):
        if _place(other).is_relative_to(place):
            raise InputError(f"{path}: writing it would replace {other}; give another path")
    if path.exists() and path.is_dir() != is_folder:
        is_there, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise InputError(f"{path}: is {is_there}, but {wanted} is to be written; give another path")
    folder = next(parent for parent in place.parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written in {folder} ({error.strerror}); give another path") from None


def _place(path: Path) -> Path:
    """Where a path leads to, without links but for its last part, which is what a writer replaces."""
    whole_path = Path(os.path.abspath(path))
    return Path(os.path.realpath(whole_path.parent)) / whole_path.name


def _fail(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 2
