"""Whole numbers + which distribution each has <-> one string: asymmetric numeral systems, by `constriction`.

    part 0 ... part P  --Tables.encode-->  string  --Decoder.read, part by part-->  part 0 ... part P

ANS: Duda, arXiv 1311.2540; the library: Bamler, arXiv 2201.01741. The numbers of a part that share a distribution are
coded by one call each, not number by number: several times as fast as a coder that is handed a distribution per number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from constriction import stream
from scipy.stats import norm

from stages.lib.params import InputError

BOTTOM = stream.model.Uniform(2)  # of the stack lies a 1, a bit that tells a string that ran out from one that ended
LIMIT = 511  # the largest number that is coded; every one up to it has a probability of at least 2^-24


class Part(NamedTuple):
    """Numbers whose distributions are known once the parts before them are."""

    numbers: np.ndarray  # [n] int32, within +-LIMIT
    tables: np.ndarray  # [n] uint16, the table of each


class Tables:
    """Distributions over -LIMIT .. LIMIT, one for each row of `probabilities` [tables, 2 LIMIT + 1]."""

    def __init__(self, probabilities: np.ndarray):
        rows = probabilities.astype(np.float32)
        self.models = [stream.model.Categorical(row, perfect=False) for row in rows]

    def encode(self, parts: list[Part]) -> tuple[bytes, int]:
        """Parts, in the order they are to be read -> string, and how many of its bytes the first part takes."""
        coder, bits = stream.stack.AnsCoder(), 0
        coder.encode_reverse(1, BOTTOM)
        for part in reversed(parts):  # a stack: what goes in last comes out first
            bits = coder.num_valid_bits()
            order, runs = _runs(part.tables)
            numbers = part.numbers[order] + LIMIT
            for table, start, end in reversed(runs):
                coder.encode_reverse(numbers[start:end], self.models[table])
        string = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
        return string, round((coder.num_valid_bits() - bits) / 8)


class Decoder:
    """Reader of one string."""

    def __init__(self, tables: Tables, string: bytes):
        if string.endswith(b"\0"):
            raise InputError(f"a coded plane of {len(string)} bytes ends with 0, which none does; code it again")
        words = np.frombuffer(string + bytes(-len(string) % 4), dtype="<u4").astype(np.uint32)
        self._models, self._coder = tables.models, stream.stack.AnsCoder(words if len(words) else None)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """The tables of a part [n] -> its numbers [n] int32. Any string gives some; see `close`."""
        order, runs = _runs(tables)
        numbers = np.empty(len(tables), dtype=np.int32)
        for table, start, end in runs:
            numbers[order[start:end]] = self._coder.decode(self._models[table], end - start)
        return numbers - LIMIT

    def close(self) -> None:
        """Raises InputError unless the parts that were read are the whole string: damage ends it elsewhere."""
        if self._coder.decode(BOTTOM) != 1 or not self._coder.is_empty():
            raise InputError("a coded plane does not end where its numbers do: it is damaged; code it again")


def gaussians(scales: np.ndarray) -> np.ndarray:
    """Standard deviations [n] -> probabilities [n, 2 LIMIT + 1] of rounded normal variables of mean 0."""
    edges = (np.arange(-LIMIT, LIMIT + 2) - 0.5) / scales[:, None]
    below = norm.cdf(-np.abs(edges))  # of the nearer tail: differences of numbers near 1 would be 0
    return np.abs(np.diff(np.where(edges < 0, below, 1 - below), axis=1))


def _runs(tables: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """A stable order that brings equal tables together, and the runs in it: (table, start, end)."""
    order = np.argsort(tables, kind="stable")  # a radix sort, for 16 bits
    ranked = tables[order]
    starts = np.flatnonzero(np.diff(ranked, prepend=np.uint16(2**16 - 1)))
    ends = np.append(starts, len(tables))[1:]
    return order, list(zip(ranked[starts].tolist(), starts.tolist(), ends.tolist(), strict=True))
