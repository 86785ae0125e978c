"""Objects and tables <-> files that are either whole or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from stages.lib.params import InputError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a free path beside `path`; the file or folder made there takes the place of `path` if no error occurs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".tmp-{path.name}")  # keeps the suffix: some writers choose their format by it
    _remove(scratch)  # a killed run's
    try:
        yield scratch
        if scratch.is_dir():
            os.sync()  # one call for thousands of files
            _remove(path)  # a folder cannot be replaced in one step: absent for a moment, never half
        else:
            _sync(scratch)
        os.replace(scratch, path)
        _sync(path.parent)
    except BaseException:
        _remove(scratch)
        raise


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path}: not valid JSON ({error}); write the file again") from None


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Floats in their shortest form that reads back as the same number; NaN is an empty field."""
    with atomic(path) as scratch:
        frame.to_csv(scratch, index=False, lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(
            path, dtype={"scale": str}, float_precision="round_trip", keep_default_na=False, na_values=[""]
        )
    except ValueError as error:  # EmptyDataError, ParserError and UnicodeDecodeError
        raise InputError(f"{path}: not a CSV table ({error}); write the file again") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
