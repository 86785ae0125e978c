"""What goes in comes out, in nearly as few bits as information theory allows, and damage does not pass for data."""

import numpy as np
import pytest
from pytest import approx
from scipy.stats import norm

from stages.lib import ans
from stages.lib.ans import LIMIT, RARE, Decoder, Part, Tables, gaussians
from stages.lib.schema import InputError

SCALES = np.geomspace(0.11, 64, 48)
PROBABILITIES = gaussians(SCALES)
TABLES = Tables(PROBABILITIES)


def drawn(n: int, seed: int) -> Part:
    """Numbers from tables chosen at random."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, len(SCALES), n).astype(np.uint16)
    numbers = np.rint(rng.normal(size=n) * SCALES[tables]).clip(-LIMIT, LIMIT)
    return Part(numbers.astype(np.int32), tables)


def with_outliers(part: Part, count: int = 5) -> Part:
    """The part with some numbers that may be anything."""
    rng, numbers = np.random.default_rng(count), part.numbers.copy()
    numbers[rng.choice(len(numbers), count, replace=False)] = rng.integers(-LIMIT, LIMIT + 1, count)
    return Part(numbers, part.tables)


def received(string: bytes, tables: list[np.ndarray]) -> list[np.ndarray]:
    decoder = Decoder(TABLES, string)
    parts = [decoder.read(part) for part in tables]
    decoder.close()
    return parts


def refused(string: bytes, tables: list[np.ndarray]) -> bool:
    try:
        received(string, tables)
    except InputError:
        return True
    return False


# ---- round trips


@pytest.mark.parametrize("lengths", [(1,), (2,), (1000,), (1, 1), (3, 500, 40), (700, 1, 1, 64, 9)])
def test_parts_come_back_in_their_order(lengths):
    parts = [drawn(n, seed) for seed, n in enumerate(lengths)]
    string, _ = TABLES.encode(parts)
    back = received(string, [part.tables for part in parts])
    assert all(numbers.dtype == np.int32 for numbers in back)
    assert [numbers.tolist() for numbers in back] == [part.numbers.tolist() for part in parts]


@pytest.mark.parametrize("lengths", [(0,), (0, 5), (5, 0), (5, 0, 0, 7)])
def test_empty_parts_come_back_empty(lengths):
    parts = [drawn(n, seed) for seed, n in enumerate(lengths)]
    string, _ = TABLES.encode(parts)
    back = received(string, [part.tables for part in parts])
    assert [numbers.tolist() for numbers in back] == [part.numbers.tolist() for part in parts]
    assert string == TABLES.encode([part for part in parts if len(part.numbers)])[0]


@pytest.mark.parametrize("table", [0, 20, 47])
def test_the_largest_numbers_are_coded_whatever_their_probability(table):
    numbers = np.array([LIMIT, -LIMIT, LIMIT, 0, 1 - LIMIT, -LIMIT], dtype=np.int32)
    tables = np.full(len(numbers), table, dtype=np.uint16)
    string, _ = TABLES.encode([Part(numbers, tables)])
    assert received(string, [tables])[0].tolist() == numbers.tolist()
    assert 8 * len(string) <= 31 * len(numbers) + 32  # none costs more than 31 bits


@pytest.mark.parametrize("lengths", [(3, 20), (400, 1)])
def test_the_receiver_may_know_a_parts_tables_only_after_the_parts_before_it(lengths):
    first, second = (drawn(n, seed) for seed, n in enumerate(lengths))
    decoder = Decoder(TABLES, TABLES.encode([first, second])[0])
    assert decoder.read(first.tables).tolist() == first.numbers.tolist()
    assert decoder.read(second.tables).tolist() == second.numbers.tolist()
    decoder.close()


def test_numbers_keep_their_places_in_any_order_of_their_tables():
    part = drawn(300, 0)
    for order in (
        np.argsort(part.tables),
        np.argsort(-part.tables.astype(int)),
        np.random.default_rng(1).permutation(300),
    ):
        string, _ = TABLES.encode([Part(part.numbers[order], part.tables[order])])
        assert received(string, [part.tables[order]])[0].tolist() == part.numbers[order].tolist()


def test_how_tables_alternate_changes_no_byte():
    """Numbers of one table follow each other as they do in the part; what stands between them does not matter."""
    part = drawn(300, 0)
    order = np.argsort(part.tables, kind="stable")
    assert TABLES.encode([part])[0] == TABLES.encode([Part(part.numbers[order], part.tables[order])])[0]


@pytest.mark.parametrize("block", [1, 7, 100, 300])
def test_long_parts_are_coded_block_by_block(block, monkeypatch):
    parts = with_outliers(drawn(300, 0)), drawn(2, 1)
    expected = TABLES.encode([Part(*(values[at : at + block] for values in parts[0])) for at in range(0, 300, block)])
    monkeypatch.setattr(ans, "BLOCK", block)
    assert TABLES.encode(parts[:1])[0] == expected[0]
    back = received(TABLES.encode(parts)[0], [part.tables for part in parts])
    assert [numbers.tolist() for numbers in back] == [part.numbers.tolist() for part in parts]


def test_equal_input_gives_equal_bytes():
    parts = [drawn(50, 0), drawn(900, 1)]
    assert len({TABLES.encode(parts)[0], Tables(gaussians(SCALES)).encode(parts)[0]}) == 1
    assert TABLES.encode(parts[::-1])[0] != TABLES.encode(parts)[0]


# ---- size


def ideal_bits(*parts: Part) -> float:
    return sum(-np.log2(PROBABILITIES[part.tables, part.numbers + LIMIT]).sum() for part in parts)


@pytest.mark.parametrize("pieces", [1, 10])
def test_a_string_is_as_long_as_its_information(pieces):
    whole = drawn(20_000, 0)
    parts = [Part(*pair) for pair in zip(*(np.split(values, pieces) for values in whole), strict=True)]
    string, _ = TABLES.encode(parts)
    assert ideal_bits(whole) < 8 * len(string) < 1.01 * ideal_bits(whole) + 32


def test_a_few_numbers_cost_no_more_than_a_word_beside_their_information():
    for n in range(1, 60):
        string, _ = TABLES.encode([drawn(n, n)])
        assert ideal_bits(drawn(n, n)) < 8 * len(string) < ideal_bits(drawn(n, n)) + 40


@pytest.mark.parametrize("table", [0, 20, 47])
def test_every_number_takes_the_bits_that_are_said_of_it(table):
    for number in (0, 1, -1, 3, -9, 40, -250, LIMIT, -LIMIT):
        string, _ = TABLES.encode([Part(np.full(4000, number, dtype=np.int32), np.full(4000, table, dtype=np.uint16))])
        assert 8 * len(string) == approx(4000 * TABLES.bits[table, number + LIMIT], rel=0.002, abs=40)


def test_a_table_costs_next_to_nothing_more_than_its_distribution():
    """The share of rare numbers is raised to RARE, and all else stays as it is."""
    excess = (PROBABILITIES * (TABLES.bits + np.log2(PROBABILITIES.clip(1e-300)))).sum(1)
    assert excess.max() < 1e-3
    common = PROBABILITIES >= RARE
    assert TABLES.bits[common] == approx(-np.log2(PROBABILITIES[common]), abs=1e-5)
    assert TABLES.bits.max() < 31


@pytest.mark.parametrize("centre", [-505, -30, 0, 300])
def test_a_table_need_not_lie_around_0(centre):
    row = np.exp(-np.abs(np.arange(-LIMIT, LIMIT + 1) - centre))
    tables, kinds = Tables(row[None] / row.sum()), np.zeros(500, dtype=np.uint16)
    numbers = np.rint(np.random.default_rng(0).laplace(centre, size=500)).clip(-LIMIT, LIMIT).astype(np.int32)
    numbers[:2] = LIMIT, -LIMIT
    string, _ = tables.encode([Part(numbers, kinds)])
    assert Decoder(tables, string).read(kinds).tolist() == numbers.tolist()
    assert 8 * len(string) == approx(tables.bits[0, numbers + LIMIT].sum(), abs=40)


def test_the_first_parts_bytes_are_its_share_of_the_string():
    first, second = drawn(500, 0), drawn(3000, 1)
    string, share = TABLES.encode([first, second])
    assert share == approx(ideal_bits(first) / 8, rel=0.01, abs=1)
    assert len(string) - share == approx(ideal_bits(second) / 8, rel=0.01, abs=4)


# ---- damage


@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize("lengths", [(1,), (4,), (2, 9, 30), (60, 250)])
def test_a_string_that_is_cut_extended_or_has_a_wrong_bit_is_refused(lengths, outliers):
    parts = [with_outliers(drawn(n, 5 + n), outliers) for n in lengths]
    tables = [part.tables for part in parts]
    string, _ = TABLES.encode(parts)
    assert not refused(string, tables)
    assert all(refused(string[:length], tables) for length in range(len(string)))
    assert all(refused(string[start:], tables) for start in range(1, len(string)))
    assert all(refused(string + bytes([byte]), tables) for byte in range(256))
    assert all(refused(string + bytes(n), tables) for n in range(1, 9))
    assert refused(string + string, tables)
    for bit in range(8 * len(string)):
        damaged = bytearray(string)
        damaged[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(damaged), tables), bit


def test_random_strings_are_refused():
    rng, tables = np.random.default_rng(0), drawn(40, 0).tables
    assert all(refused(rng.bytes(n), [tables]) for n in range(200))


def test_no_part_may_be_left_out_or_read_twice():
    parts = [drawn(30, 0), drawn(30, 1)]
    tables = [part.tables for part in parts]
    string, _ = TABLES.encode(parts)
    assert refused(string, tables[:1]) and refused(string, [*tables, tables[1]])


def test_an_empty_string_is_no_coded_part_even_where_there_is_next_to_no_information():
    zeros = Part(np.zeros(100, dtype=np.int32), np.zeros(100, dtype=np.uint16))
    string, _ = TABLES.encode([zeros])
    assert 0 < len(string) <= 4
    assert refused(b"", [zeros.tables]) and refused(b"", [])


# ---- tables


def test_gaussians_are_rounded_normal_variables():
    k = np.arange(-LIMIT, LIMIT + 1)
    assert PROBABILITIES.shape == (48, 2 * LIMIT + 1)
    assert PROBABILITIES.sum(1) == approx(1, abs=1e-12)
    assert np.array_equal(PROBABILITIES, PROBABILITIES[:, ::-1])
    for row, scale in zip(PROBABILITIES, SCALES, strict=True):
        expected = norm.sf(np.abs(k) - 0.5, scale=scale) - norm.sf(np.abs(k) + 0.5, scale=scale)
        assert row == approx(expected, rel=1e-9, abs=0)  # in both tails, where differences of numbers near 1 are 0
        assert (row * k**2).sum() == approx(scale**2 + 1 / 12, rel=0.01) or scale < 0.5  # Sheppard's correction
