import time

import numpy as np
import pytest
from pytest import approx
from scipy.interpolate import PchipInterpolator

from stages.lib.bd_rate import Curve, Interval, bd_rate, bd_rates_of_resamples, interval_of, pareto

RATE = np.array([1e4, 2e4, 4e4, 7e4, 1.2e5, 2e5])
AP = np.array([0.10, 0.22, 0.31, 0.37, 0.40, 0.42])


def interval_of_curves(*curves: np.ndarray) -> Interval:
    return interval_of(bd_rates_of_resamples(*curves))


def test_a_fifth_fewer_bits_at_equal_accuracy_is_minus_20_percent():
    result = bd_rate(Curve(RATE, AP), Curve(0.8 * RATE, AP))
    assert (result.pchip, result.akima) == (approx(-20), approx(-20))
    assert result.overlap == approx(1) and result.n_points == 6 and result.flags == []


def test_pchip_agrees_with_numeric_integration():
    bits, accuracy = RATE[1:] * np.array([0.9, 0.7, 0.8, 0.75, 0.6]), AP[1:] + 0.01
    shared = np.linspace(accuracy[0], AP[-1], 20_001)
    gap = PchipInterpolator(accuracy, np.log10(bits))(shared) - PchipInterpolator(AP, np.log10(RATE))(shared)
    result = bd_rate(Curve(RATE, AP), Curve(bits, accuracy))
    assert result.pchip == approx(100 * (10 ** gap.mean() - 1), abs=0.01)
    assert result.overlap == approx((AP[-1] - accuracy[0]) / (AP[-1] - AP[0]))


def test_accuracies_from_a_least_one_on_count_and_no_others():
    bits, accuracy = RATE[1:] * np.array([0.9, 0.7, 0.8, 0.75, 0.6]), AP[1:] + 0.01
    shared = np.linspace(0.35, AP[-1], 20_001)
    gap = PchipInterpolator(accuracy, np.log10(bits))(shared) - PchipInterpolator(AP, np.log10(RATE))(shared)
    curves = Curve(RATE, AP), Curve(bits, accuracy)
    result = bd_rate(*curves, 0.35)
    assert result.pchip == approx(100 * (10 ** gap.mean() - 1), abs=0.01) and result.pchip < bd_rate(*curves).pchip - 1
    assert (result.overlap, result.n_points, result.flags) == (approx(1), 5, [])
    assert bd_rate(*curves, 0.05) == bd_rate(*curves)
    short = bd_rate(Curve(RATE, AP), Curve(bits[:-1], AP[1:-1]), 0.35)
    assert short.overlap == approx(0.05 / 0.07) and short.flags == ["points<5", "overlap<0.75"]
    rows = [np.stack([row] * 3) for row in (RATE, AP, bits, accuracy)]
    least = np.array([0.05, 0.35, 0.5])
    found = bd_rates_of_resamples(*rows, least)
    assert found[:2] == approx([bd_rate(*curves).pchip, result.pchip]) and np.isnan(found[2])
    assert bd_rate(*curves, 0.5).flags == ["no overlap"] and bd_rate(*curves, 0.5).overlap == 0


def test_order_of_the_points_does_not_matter():
    shuffled = np.random.default_rng(0).permutation(6)
    anchor, test = Curve(RATE, AP), Curve(0.8 * RATE, AP + 0.005)
    assert bd_rate(anchor, Curve(test.bits[shuffled], test.accuracy[shuffled])) == bd_rate(anchor, test)


def test_pareto_keeps_strictly_rising_accuracy():
    bits = np.array([1, 2, 3, 4, 5, 5, 6, 7, 0])
    accuracy = np.array([0.1, 0.3, 0.2, 0.3, 0.4, 0.5, np.nan, 0.6, 0.05])
    assert pareto(bits, accuracy).tolist() == [0, 1, 5, 7]


def test_pareto_against_pairwise_definition():
    rng = np.random.default_rng(1)
    for _ in range(100):
        bits, accuracy = rng.integers(1, 6, 7), rng.integers(0, 5, 7)
        points = list(zip(bits, accuracy, range(7), strict=True))
        kept = {
            i
            for b, a, i in points
            if not any(c <= b and d >= a and (c < b or d > a or j < i) for c, d, j in points if j != i)
        }
        assert set(pareto(bits, accuracy).tolist()) == kept


def test_dropped_points_are_named_and_change_nothing():
    bits, accuracy = np.insert(0.8 * RATE, 3, 5e4), np.insert(AP, 3, 0.15)
    result = bd_rate(Curve(RATE, AP), Curve(bits, accuracy))
    assert result.pchip == approx(-20) and result.flags == ["dropped:3"] and result.n_points == 6
    result = bd_rate(Curve(bits, accuracy), Curve(RATE, AP))
    assert result.pchip == approx(25) and result.flags == ["anchor_dropped:3"]


def test_little_overlap_is_flagged():
    result = bd_rate(Curve(RATE, AP), Curve(0.8 * RATE, AP + 0.15))
    assert np.isfinite(result.pchip) and result.overlap == approx(0.17 / 0.32) and result.flags == ["overlap<0.75"]


def test_few_points_are_flagged():
    result = bd_rate(Curve(RATE, AP), Curve(0.5 * RATE[[0, 5]], AP[[0, 5]]))
    assert np.isfinite([result.pchip, result.akima]).all() and result.flags == ["points<5"]


@pytest.mark.parametrize(
    "accuracy, flag",
    [
        (AP + 1, "no overlap"),
        (AP * 0, "too few points"),
        (AP * np.nan, "too few points"),
        (AP[::-1], "too few points"),
    ],
)
def test_degenerate_curves_give_nan_and_the_reason(accuracy, flag):
    for anchor, test in [(AP, accuracy), (accuracy, AP)]:
        result = bd_rate(Curve(RATE, anchor), Curve(RATE, test))
        assert np.isnan(result.pchip) and np.isnan(result.akima) and result.flags[-1] == flag


def test_all_zero_curves_give_nan():
    zero = Curve(RATE, AP * 0)
    result = bd_rate(zero, zero)
    assert np.isnan(result.pchip) and result.overlap == 0 and "too few points" in result.flags


def test_resamples_have_the_bd_rates_of_their_curves():
    rng = np.random.default_rng(0)
    rows = [RATE * rng.uniform(0.9, 1.1, (6, 1)), AP + rng.normal(0, 0.01, (6, 6))]
    rows += [0.8 * RATE * rng.uniform(0.9, 1.1, (6, 1)), AP + rng.normal(0, 0.01, (6, 6))]
    rows[3][2], rows[1][4] = 0, rows[1][4] + 1  # a flat curve, no shared accuracy
    expected = [bd_rate(Curve(*part[:2]), Curve(*part[2:])).pchip for part in zip(*rows, strict=True)]
    found = bd_rates_of_resamples(*rows)
    assert found == approx(np.array(expected), nan_ok=True) and np.flatnonzero(np.isnan(found)).tolist() == [2, 4]


def test_interval_of_equal_resamples_is_the_number():
    low, high, failed = interval_of_curves(*(np.tile(row, (20, 1)) for row in (RATE, AP, 0.8 * RATE, AP)))
    assert (low, high, failed) == (approx(-20), approx(-20), 0)


def test_interval_is_the_percentiles_of_the_resamples_savings():
    factor = np.linspace(0.5, 0.9, 201)[:, None]
    same = np.ones_like(factor)
    low, high, _ = interval_of_curves(same * RATE, same * AP, factor * RATE, same * AP)
    assert (low, high) == (approx(-49), approx(-11))


def test_failed_resamples_are_counted_and_most_of_them_void_the_interval_of_curves():
    rows = [np.tile(row, (10, 1)) for row in (RATE, AP, 0.8 * RATE, AP)]
    rows[3][:4] = 0
    assert interval_of_curves(*rows) == (approx(-20), approx(-20), approx(0.4))
    rows[3][:6] = 0
    low, high, failed = interval_of_curves(*rows)
    assert np.isnan([low, high]).all() and failed == approx(0.6)


def test_200_resamples_take_less_than_a_second():
    noise = np.random.default_rng(0).normal(0, 0.002, (200, 6))
    start = time.process_time()
    interval_of_curves(np.tile(RATE, (200, 1)), AP + noise, np.tile(0.8 * RATE, (200, 1)), AP + noise[::-1])
    assert time.process_time() - start < 1
