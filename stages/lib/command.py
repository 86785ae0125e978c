"""A command line -> one call of a stage; bad input -> one line on stderr and exit code 2."""

import argparse
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from stages.lib.schema import InputError, is_out_of_memory

OUTPUTS = ("out", "ledger", "reports", "picture")  # parameters of a stage that are written; its other paths are read


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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(_fail(f"out of memory ({error}); close other programs, or lower models.*.image_size or batch"))
    except OSError as error:
        remedy = "give another path, or see to this one"
        sys.exit(_fail(f"{error.filename}: {error.strerror}; {remedy}" if error.filename else str(error)))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and not the usage before it."""
        self.exit(2, f"{self.prog}: {message}; --help lists what may be given\n")


def run(parser: argparse.ArgumentParser, main: Callable[..., None]) -> None:
    """`entry` for a command with options, all of whose outputs are files."""
    attempt(main, vars(parser.parse_args()), folders=False)


def check_output(path: Path, is_folder: bool, others: Iterable[Path]) -> None:
    """Raises InputError where nothing could be written to `path`, or what is written would replace one of `others`."""
    place = _place(path)
    for other in (Path.cwd(), *others):
        if any(where.is_relative_to(place) for where in (_place(other), Path(os.path.realpath(other)))):
            raise InputError(f"{path}: writing it would replace {other}; give another path")
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device: whoever may replace it, must not
        raise InputError(f"{path}: is neither a file nor a folder, and would be replaced by one; give another path")
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
