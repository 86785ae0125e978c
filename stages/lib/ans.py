"""Whole numbers + which distribution each has <-> one string: asymmetric numeral systems, by `constriction`.

    part 0 ... part P  --Tables.encode-->  string  --Decoder.read, part by part-->  part 0 ... part P

ANS: Duda, arXiv 1311.2540; the library: Bamler, arXiv 2201.01741. The numbers of a part that share a distribution are
coded by one call each, not number by number: several times as fast as a coder that is handed a distribution per number.
A decoder searches a distribution for the number: it is kept short by one symbol for all rare numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from constriction import stream
from scipy.stats import norm

from stages.lib.schema import InputError

BOTTOM = stream.model.Uniform(2)  # of the stack lies a 1, a bit that tells a string that ran out from one that ended
LIMIT = 511  # the largest number that is coded
# Numbers outside the range of those at least as probable share symbol 0. Itself it is never less probable: networks err
# by more than their distributions say. Which number it is follows by `FAR`, for which none is out of the question.
RARE = 2.0**-18
FAR = 1 / (1 + np.abs(np.arange(-LIMIT, LIMIT + 1)))
FAR /= FAR.sum()
FAR_MODEL = stream.model.Categorical(FAR.astype(np.float32), perfect=False)
BLOCK = 2**16  # numbers that are sorted at a time: what no longer fits the caches takes twice as long


class Part(NamedTuple):
    """Numbers whose distributions are known once the parts before them are."""

    numbers: np.ndarray  # [n] int32, within +-LIMIT
    tables: np.ndarray  # [n] uint16, the table of each


class Tables:
    """Distributions over -LIMIT .. LIMIT, one for each row of `probabilities` [tables, 2 LIMIT + 1].

    Attributes:
        bits: what each number takes [tables, 2 LIMIT + 1] float32.
    """

    def __init__(self, probabilities: np.ndarray):
        rows = probabilities / probabilities.sum(1, keepdims=True, dtype=np.float64)
        self.models, self.bits = [], np.empty(rows.shape, dtype=np.float32)
        self.lowest = np.empty(len(rows), dtype=np.int32)  # the number before that of symbol 1
        self.common = np.empty(len(rows), dtype=np.uint32)  # symbols but 0
        for table, row in enumerate(rows):
            first, last = np.flatnonzero(row >= RARE)[[0, -1]]
            common = row[first : last + 1]
            rare = max(row[:first].sum() + row[last + 1 :].sum(), RARE)
            self.models.append(stream.model.Categorical(np.array([rare, *common], dtype=np.float32), perfect=False))
            self.lowest[table], self.common[table] = first - LIMIT - 1, len(common)
            self.bits[table] = -np.log2(rare * FAR)
            self.bits[table, first : last + 1] = -np.log2(common)

    def encode(self, parts: list[Part]) -> tuple[bytes, int]:
        """Parts, in the order they are to be read -> string, and how many of its bytes the first part takes."""
        coder, bits = stream.stack.AnsCoder(), 0
        coder.encode_reverse(1, BOTTOM)
        for part in reversed(parts):  # a stack: what goes in last comes out first
            bits = coder.num_valid_bits()
            for block in reversed(_blocks(part.tables)):
                self._push(part.numbers[block], part.tables[block], coder)
        string = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
        return string, round((coder.num_valid_bits() - bits) / 8)

    def _push(self, numbers: np.ndarray, tables: np.ndarray, coder: stream.stack.AnsCoder) -> None:
        order, ranked, bounds = _runs(tables)
        lengths = bounds[1:] - bounds[:-1]
        numbers = numbers[order]
        symbols = numbers - self.lowest[ranked].repeat(lengths)
        far = np.flatnonzero((symbols - 1).view(np.uint32) >= self.common[ranked].repeat(lengths))  # below 1, too
        if len(far):
            coder.encode_reverse(numbers[far] + LIMIT, FAR_MODEL)
            symbols[far] = 0
        bounds = bounds.tolist()
        for table, start, end in zip(ranked[::-1].tolist(), bounds[-2::-1], bounds[:0:-1], strict=True):
            coder.encode_reverse(symbols[start:end], self.models[table])


class Decoder:
    """Reader of one string."""

    def __init__(self, tables: Tables, string: bytes):
        if string.endswith(b"\0"):
            raise InputError(f"a coded plane of {len(string)} bytes ends with 0, which none does; code it again")
        words = np.frombuffer(string + bytes(-len(string) % 4), dtype="<u4").astype(np.uint32)
        self._tables, self._coder = tables, stream.stack.AnsCoder(words if len(words) else None)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """The tables of a part [n] -> its numbers [n] int32. Any string gives some; see `close`."""
        numbers = np.empty(len(tables), dtype=np.int32)
        for block in _blocks(tables):
            self._pop(tables[block], numbers[block])
        return numbers

    def _pop(self, tables: np.ndarray, out: np.ndarray) -> None:
        order, ranked, bounds = _runs(tables)
        lengths, decode, models = bounds[1:] - bounds[:-1], self._coder.decode, self._tables.models
        runs = zip(ranked.tolist(), lengths.tolist(), strict=True)
        symbols = np.concatenate([decode(models[table], length) for table, length in runs])
        far = np.flatnonzero(symbols == 0)
        numbers = symbols + self._tables.lowest[ranked].repeat(lengths)
        if len(far):
            numbers[far] = decode(FAR_MODEL, len(far)) - LIMIT
        out[order] = numbers

    def close(self) -> None:
        """Raises InputError unless the parts that were read are the whole string.

        Damage changes what follows, so that nearly always the string ends elsewhere; a file's checksum finds the rest.
        So does a table that is another than the sender's: of an undamaged string, networks that round otherwise.
        """
        if self._coder.decode(BOTTOM) != 1 or not self._coder.is_empty():
            raise InputError(
                "a coded plane does not end where its numbers do: it is damaged, or another processor, GPU or version "
                "of the libraries, which rounds otherwise, has coded it; decode it there, or code it again"
            )


def gaussians(scales: np.ndarray) -> np.ndarray:
    """Standard deviations [n] -> probabilities [n, 2 LIMIT + 1] of rounded normal variables of mean 0."""
    edges = np.arange(LIMIT + 2) - 0.5
    upper = -np.diff(norm.sf(edges / scales[:, None]))  # of 0 .. LIMIT; the lower tail is as far from 1, and the same
    return np.concatenate([upper[:, :0:-1], upper], axis=1)


def _blocks(tables: np.ndarray) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, len(tables), BLOCK)]


def _runs(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stable order that brings equal tables together; of the runs in it the tables [r] and the bounds [r + 1]."""
    order = tables.argsort(kind="stable")  # a radix sort, for 16 bits
    ranked = tables[order]
    bounds = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1], [True])))
    return order, ranked[bounds[:-1]], bounds
