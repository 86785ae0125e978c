"""Objects, tables and arrays <-> files that are either whole or absent."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from stages.lib.params import SCALES, TASKS
from stages.lib.schema import InputError, check

PICTURES = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # others can be programs, as EPS is
RESERVE = 2**25  # bytes of a disk that no array takes: HDF5 writes once more where a file is closed
TEXTS = {  # columns of tables, any table or one; the others hold numbers
    *("task", "codec", "method", "split", "scale", "accuracy_name", "kind", "size", "name", "quantity"),
    *("part", "description", "sees_labels", "reference", "rate_control.bits"),
}
NAMES = {"task": TASKS, "scale": SCALES, "split": ("train", "fit", "test")}  # columns that hold one of a few texts


@contextmanager
def atomic(path: Path, writer: str = "") -> Iterator[Path]:
    """Yields a free path beside `path`; the file or folder made there takes the place of `path` if no error occurs.

    writer: a name that no other has, where several may write the same file at a time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".tmp-{writer}{path.name}")  # keeps the suffix: some writers choose their format by it
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
    except BaseException as error:
        _remove(scratch)
        if _is_disk_full(error):
            raise InputError(f"{path}: the disk is full; free some space and run the stage again") from None
        raise


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT) or "errno = 28" in str(error)  # h5py: in words only
    return isinstance(error, RuntimeError) and "inline_container" in str(error)  # what torch.save could not write


def disk_check(path: Path, needed_bytes: float) -> None:
    """Fails where the disk that holds, or will hold, `path` has too little space."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(
            f"{path}: the disk has {free / 1e9:.2f} GB free, {needed_bytes / 1e9:.2f} GB are needed; free some space"
        )


def write_text(path: Path, text: str) -> None:
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, schema: Any = None) -> Any:
    """Raises InputError that names the file, and a key whose value is not as `schema.check` wants it."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path}: not valid JSON ({error}); write the file again") from None
    if schema is not None:
        check(value, schema, str(path))
    return value


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Floats in their shortest form that reads back as the same number; NaN is an empty field."""
    with atomic(path) as scratch:
        frame.to_csv(scratch, index=False, lineterminator="\n")


def read_csv(path: Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Raises InputError that names the file where a column is missing, or a number is a text or infinite."""
    again = "run the stage that writes it again"
    try:
        frame = pd.read_csv(
            path, dtype={"scale": str}, float_precision="round_trip", keep_default_na=False, na_values=[""]
        )
    except ValueError as error:  # EmptyDataError, ParserError and UnicodeDecodeError
        raise InputError(f"{path}: not a CSV table ({error}); {again}") from None
    if not isinstance(frame.index, pd.RangeIndex):  # what pandas makes of the columns that the header lacks
        raise InputError(f"{path}: not a CSV table (its lines have more fields than its header); {again}")
    for column in columns:
        if column not in frame:
            raise InputError(f"{path} has no column {column!r}; {again}")
        if column in NAMES:
            bad, wanted = ~frame[column].isin(list(NAMES[column])), " or ".join(NAMES[column])
        elif not {column, f"{path.stem}.{column}"} & TEXTS:
            numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
            bad, wanted = frame[column].notna() & ~np.isfinite(numbers), "finite number"
        else:
            continue
        if bad.any():
            line = int(bad.argmax())
            raise InputError(
                f"{path}: line {line + 2}: {column} is {str(frame[column].iloc[line])!r}, no {wanted}; {again}"
            )
    return frame


@contextmanager
def picture(path: Path) -> Iterator[Image.Image]:
    """An image file; its size is known before its pixels are decoded. InputError for whatever Pillow raises within."""
    try:
        with Image.open(path, formats=PICTURES) as image:
            if image.mode[0] in "IF":  # Pillow makes all of it white that is above 8 bits
                raise InputError(f"{path}: its values have more than 8 bits (mode {image.mode}); convert it to 8")
            yield image
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise InputError(f"{path}: cannot be decoded ({error}); give a whole picture file") from None


@contextmanager
def open_h5(path: Path, stage: str) -> Iterator[h5py.File]:
    """An HDF5 file, to be read. `stage` writes such files: InputError about a damaged one names it."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:  # h5py raises all three for what it cannot make sense of
        raise InputError(f"{path}: cannot be read as HDF5 ({error}); run `{stage}` again") from None


def create_h5(path: Path) -> h5py.File:
    """A new HDF5 file; its format has checksums in the metadata, `write_array` adds those of the data."""
    return h5py.File(path, "w", libver="latest")


def write_array(group: h5py.Group, name: str, values: np.ndarray, rows: int | None = None, **filters: Any) -> None:
    """Chunks with a checksum each: a flipped bit is an error when it is read, and who reads takes whole chunks.

    rows: of a chunk; one holds all if None. Fails before the disk is full: HDF5 cannot close a file that it cannot
    write, and may end the process.
    """
    disk_check(Path(group.file.filename), values.nbytes + RESERVE)
    if values.size:
        chunks = values.shape if rows is None else (min(rows, len(values)), *values.shape[1:])
        group.create_dataset(name, data=values, chunks=chunks, fletcher32=True, **filters)
    else:
        group.create_dataset(name, data=values)


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
