"""A value + what it must be -> nothing, or an InputError that names the file, the key, the value and the remedy."""

import math
from collections.abc import Callable
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # of the whole numbers that count or measure something
NO_MEMORY = (
    *("can't allocate memory", "std::bad_alloc", "could not create a primitive", "can't start new thread"),
    *("CUDA out of memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "unable to find an engine"),
)
SHORT = Repr()  # of a value in a message; a file can hold one that is too long to print, or endless
SHORT.maxstring = SHORT.maxother = 100


class InputError(ValueError):
    """Bad input: one line that names the file or key, the value and the remedy."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which torch tells by its words alone: of a CPU, of oneDNN, of a GPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


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


def is_number(value: Any) -> bool:
    """Finite; a whole one has 64 bits, as numpy's."""
    return math.isfinite(value) if isinstance(value, float) else is_whole(value) and abs(value) < 2**63


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
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
TEXT = Check(is_text, "a text that can be printed")
TEXT_OR_NULL = Check(lambda value: value is None or is_text(value), "a text or null")


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


FLAGS = Check(lambda value: isinstance(value, list) and all(map(is_text, value)), "a list of texts")


def check(value: Any, schema: Any, source: str, key: str = "") -> None:
    """Raises InputError that names the file `source` and the key where `value` is not what the schema wants."""
    if isinstance(schema, Check):
        need(schema.accepts(value), key, value, f"it must be {schema.wanted}", source)
        return
    if isinstance(schema, Listed):
        need(isinstance(value, list) and value, key, value, "it must be a list with at least one entry", source)
        for number, inner in enumerate(value):
            check(inner, schema.schema, source, f"{key}[{number}]")
        return
    wanted = "it must be a mapping with at least one key"
    need(isinstance(value, dict) and value, key or "the file", value, wanted, source)
    prefix = f"{key}." if key else ""
    if isinstance(schema, Named):
        for name, inner in value.items():
            need(schema.name.accepts(name), f"{prefix}{name}", inner, f"its name must be {schema.name.wanted}", source)
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


def need(condition: Any, key: str, value: Any, remedy: str, source: str = "params.yaml") -> None:
    if not condition:
        raise InputError(f"{source}: {key} is {SHORT.repr(value)}: {remedy}")
