"""params.yaml -> a dict of numbers that is known to be right."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from stages.lib.schema import (
    POSITIVE,
    SHARE,
    TEXT,
    TEXT_OR_NULL,
    Check,
    Either,
    InputError,
    Listed,
    Named,
    Some,
    check,
    is_number,
    is_whole,
    need,
    one_of,
    whole,
    wholes,
)

SCALES = ("0", "1", "2", "3", "pool")
COARSER = {"0": "1", "1": "2", "2": "3", "pool": "3"}  # scale -> what a receiver predicts it from if it is not sent
COARSE_TO_FINE = ("3", "2", "1", "0", "pool")  # every scale after its coarser one
SKIPPED = -1  # as phi: nothing is sent of a scale
MAX_SIDE = 16384  # px, of an image; far above any that a detector is given, and a multiple of its padding, 32
PACKAGES = (  # whose version can change a number
    *("torch", "torchvision", "compressai", "constriction", "av", "pycocotools", "bjontegaard"),
    *("numpy", "scipy", "pandas", "h5py", "pillow", "matplotlib"),
)
MOST_KEYS = 1000  # of a mapping in a YAML file; merges of merges can ask for any number
TASKS = {"detection": "bbox", "segmentation": "segm", "keypoints": "keypoints"}  # task -> COCO's iouType
ARCHITECTURES = {  # architecture -> the tasks that its heads serve
    "resnet10_fpn": ("detection", "segmentation", "keypoints"),
    "fasterrcnn_resnet50_fpn": ("detection",),
    "maskrcnn_resnet50_fpn": ("detection", "segmentation"),
    "keypointrcnn_resnet50_fpn": ("detection", "keypoints"),
}


class Section(dict):
    """A section of params.yaml: what the user's names stand for. Another name, as of a command line, is bad input."""

    def __init__(self, title: str, values: dict[str, Any]):
        super().__init__(values)
        self.title = title

    def __missing__(self, name: str) -> Any:
        raise InputError(f"{name!r} is not in params.yaml: {self.title}; choose from {', '.join(self)}")


yaml.SafeDumper.add_representer(Section, yaml.SafeDumper.represent_dict)


NAME = Check(
    lambda name: isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
    "made of letters, digits, - and _ (it becomes a file name)",
)
TASK_LIST = Check(
    lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) and v in TASKS for v in value),
    f"a list with some of {', '.join(TASKS)}",
)


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
    need(tasks, "cells", list(params["cells"]), remedy)
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
            need(
                task in served, f"models.{name}.tasks", task, f"{model['architecture']} serves only {', '.join(served)}"
            )
        low, high = model["image_size"]["min"], model["image_size"]["max"]
        need(low <= high, f"models.{name}.image_size.max", high, f"it must be at least min, {low}")
    _check_lambdas(params)
    _check_networks(params["codecs"])
    _refer(params, "lambdas", params["mfip"]["precode"], "mfip.precode")
    _check_cells(params)
    for name, cell in params["studies"].items():
        _refer(params, "cells", name, f"studies.{name}")
        need(cell == params["cells"][name], f"studies.{name}", cell, f"it must be as in cells: *{name}")


def _check_networks(codecs: dict[str, Any]) -> None:
    if "elic" in codecs:
        network = codecs["elic"]["network"]
        total, groups = sum(network["groups"]), network["groups"]
        remedy = f"the sum, {total}, must be M = {network['M']}"
        need(total == network["M"], "codecs.elic.network.groups", groups, remedy)
    if "tcm" in codecs:
        network = codecs["tcm"]["network"]
        M, slices = network["M"], network["slices"]
        need(M % slices == 0, "codecs.tcm.network.slices", slices, f"M = {M} must be a multiple")
        for dim in network["head_dims"]:
            remedy = f"N = {network['N']} must be a multiple of each"
            need(network["N"] % dim == 0, "codecs.tcm.network.head_dims", network["head_dims"], remedy)
        starts = codecs["tcm"]["packing"] != "tile" and codecs["tcm"]["init"] is None
        need(not starts or network["N"] >= 32, "codecs.tcm.network.N", network["N"], "init: null needs at least 32")
        squeezed = network["context_widths"][0]
        need(squeezed % 16 == 0, "codecs.tcm.network.context_widths", squeezed, "the first must be a multiple of 16")


def _check_prepare(params: dict[str, Any]) -> None:
    prepare = params["prepare"]
    need(
        prepare["source"] != "coco" or prepare["coco_root"] is not None,
        "prepare.coco_root",
        None,
        "source is coco: give the folder with train2017/, val2017/ and annotations/",
    )
    wanted, available = params["extract"]["train_images"], prepare["images"]["train"]
    need(wanted <= available, "extract.train_images", wanted, f"prepare.images.train has only {available}")


def _check_lambdas(params: dict[str, Any]) -> None:
    lambdas = params["lambdas"]
    need(len(lambdas) >= 2, "lambdas", lambdas, "give at least two: the rate is fitted over them")
    highest = 0.0
    for name, value in lambdas.items():
        need(value > highest, f"lambdas.{name}", value, f"it must be above the one before it, {highest}")
        highest = value
        for codec, numbers in params["codecs"].items():
            low, high = numbers.get("lambda_range", (0, math.inf))
            need(low <= value <= high, f"lambdas.{name}", value, f"codecs.{codec}.lambda_range is [{low}, {high}]")
            family = [member["lmbda"] for member in numbers.get("family", ())]
            need(not family or value in family, f"lambdas.{name}", value, f"codecs.{codec}.family has only {family}")


def _check_cells(params: dict[str, Any]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for name, cell in params["cells"].items():
        for key in ("task", "model", "codec"):
            _refer(params, f"{key}s", cell[key], f"cells.{name}.{key}")
        tasks = params["models"][cell["model"]]["tasks"]
        need(
            cell["task"] in tasks,
            f"cells.{name}.model",
            cell["model"],
            f"models.{cell['model']}.tasks lacks {cell['task']}",
        )
        first = seen.setdefault((cell["task"], cell["codec"]), name)
        need(first == name, f"cells.{name}", cell, f"cells.{first} has this task and codec already; remove one")
    for model in params["models"]:
        for codec in params["codecs"]:
            tasks_of(params, model, codec)


def _refer(params: dict[str, Any], section: str, name: str, key: str) -> None:
    need(name in params[section], key, name, f"it is not in {section}; choose from {', '.join(params[section])}")
