"""Two rate-accuracy curves -> Bjontegaard delta rate in percent, with an interval and everything doubtful about it.

BD-rate = 100 * (10**mean(log10 r_test(a) - log10 r_anchor(a)) - 1) over the accuracies a that both curves reach
(Bjontegaard, VCEG-M33); r(a) interpolates log10 rate over accuracy, monotonically (pchip) or after Akima, as in
Herglotz et al., arXiv 2202.12565 (package `bjontegaard`). Negative is a saving.
"""

from typing import NamedTuple

import numpy as np
from bjontegaard import bd_rate as bjontegaard_bd_rate

MIN_POINTS = 2  # an interpolation
GOOD_POINTS = 5  # fewer are flagged
GOOD_OVERLAP = 0.75  # of the anchor's accuracy range; less is flagged
INTERVAL_PERCENTILES = (2.5, 97.5)
MAX_FAILED_SHARE = 0.5  # of the resamples of an interval


class Curve(NamedTuple):
    bits: np.ndarray  # [P] mean bits per image, > 0, in any order
    accuracy: np.ndarray  # [P] COCO AP in [0, 1]


class BdRate(NamedTuple):
    pchip: float  # percent, negative = saving; NaN with the reason among the flags
    akima: float
    overlap: float  # shared accuracy range / the anchor's, in [0, 1]
    n_points: int  # points of the test curve behind the number
    flags: list[str]


class Interval(NamedTuple):
    low: float  # percent
    high: float
    failed: float  # share of the resamples that gave no BD-rate


def pareto(bits: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """[P], [P] -> indices of the kept points in rising bits, with strictly rising accuracy.

    A point goes when another with fewer or equal bits has at least its accuracy (of twins the first stays), or when
    its bits are not positive or a value is not finite. AP is not monotone in rate, and the interpolation needs it so.
    """
    bits, accuracy = np.asarray(bits, float), np.asarray(accuracy, float)
    usable = np.flatnonzero(np.isfinite(accuracy) & np.isfinite(bits) & (bits > 0))
    order = usable[np.lexsort((-accuracy[usable], bits[usable]))]
    best_before = np.maximum.accumulate(np.append(-np.inf, accuracy[order]))[:-1]
    return order[accuracy[order] > best_before]


def bd_rate(anchor: Curve, test: Curve, least: float = -np.inf) -> BdRate:
    """Rate of `test` against `anchor` at equal accuracy, percent. Degenerate curves give NaN and a flag, no error.

    least: only accuracies from this one on count, for the overlap too. The curves are interpolated whole.
    Flags: `dropped:0 3` and `anchor_dropped:1` (indices of the points that `pareto` removed), `points<5`,
    `overlap<0.75`, `too few points`, `no overlap`.
    """
    keep_anchor, keep_test = pareto(*anchor), pareto(*test)
    flags = []
    for name, curve, keep in [("anchor_dropped", anchor, keep_anchor), ("dropped", test, keep_test)]:
        gone = sorted(set(range(len(curve.bits))) - set(keep.tolist()))
        if gone:
            flags.append(f"{name}:{' '.join(map(str, gone))}")
    anchor, test = _points(anchor, keep_anchor), _points(test, keep_test)
    fewest = min(len(keep_anchor), len(keep_test))
    overlap = _overlap(anchor, test, least)
    if fewest < MIN_POINTS:
        return BdRate(np.nan, np.nan, overlap, len(keep_test), [*flags, "too few points"])
    if overlap == 0:
        return BdRate(np.nan, np.nan, overlap, len(keep_test), [*flags, "no overlap"])
    if fewest < GOOD_POINTS:
        flags.append(f"points<{GOOD_POINTS}")
    if overlap < GOOD_OVERLAP:
        flags.append(f"overlap<{GOOD_OVERLAP}")
    pchip, akima = (_delta(anchor, test, least, method) for method in ("pchip", "akima"))
    return BdRate(pchip, akima, overlap, len(keep_test), flags)


def interval_of(deltas: np.ndarray) -> Interval:
    """Numbers of B resamples -> their 95 % percentile interval.

    NaNs are skipped and counted in `failed`; when more than half fail, low and high are NaN.
    """
    failed = float(np.isnan(deltas).mean()) if len(deltas) else 1.0
    if failed > MAX_FAILED_SHARE:
        return Interval(np.nan, np.nan, failed)
    low, high = np.nanpercentile(deltas, INTERVAL_PERCENTILES)
    return Interval(float(low), float(high), failed)


def bd_rates_of_resamples(
    anchor_bits: np.ndarray,
    anchor_accuracy: np.ndarray,
    bits: np.ndarray,
    accuracy: np.ndarray,
    least: np.ndarray | None = None,
) -> np.ndarray:
    """[B, P] twice, [B, P2] twice -> pchip BD-rates [B], percent; NaN where the curves share too little.

    least [B]: as in `bd_rate`; None for all accuracies.
    """
    deltas = []
    floors = np.full(len(bits), -np.inf) if least is None else least
    curves = zip(map(Curve, anchor_bits, anchor_accuracy), map(Curve, bits, accuracy), floors, strict=True)
    for anchor_b, test_b, floor in curves:
        anchor, test = _points(anchor_b, pareto(*anchor_b)), _points(test_b, pareto(*test_b))
        usable = min(len(anchor.bits), len(test.bits)) >= MIN_POINTS and _overlap(anchor, test, floor) > 0
        deltas.append(_delta(anchor, test, floor, "pchip") if usable else np.nan)
    return np.array(deltas)


def _points(curve: Curve, keep: np.ndarray) -> Curve:
    return Curve(np.asarray(curve.bits, float)[keep], np.asarray(curve.accuracy, float)[keep])


def _overlap(anchor: Curve, test: Curve, least: float) -> float:
    """Accuracies from `least` on that both reach / the anchor's, for curves that `pareto` has sorted."""
    if min(len(anchor.bits), len(test.bits)) < MIN_POINTS:
        return 0.0
    of_anchor = anchor.accuracy[-1] - max(anchor.accuracy[0], least)
    low, high = _shared(anchor, test, least)
    return float(max(high - low, 0) / of_anchor) if of_anchor > 0 else 0.0


def _shared(anchor: Curve, test: Curve, least: float) -> tuple[float, float]:
    return max(anchor.accuracy[0], test.accuracy[0], least), min(anchor.accuracy[-1], test.accuracy[-1])


def _delta(anchor: Curve, test: Curve, least: float, method: str) -> float:
    # The package integrates over all that both reach. min_overlap=0 silences its warning: the overlap is a column.
    _, of_anchor, of_test = bjontegaard_bd_rate(
        *anchor, *test, method=method, require_matching_points=False, interpolators=True, min_overlap=0
    )
    low, high = _shared(anchor, test, least)
    mean = (of_test.integrate(low, high) - of_anchor.integrate(low, high)) / (high - low)
    return float((10**mean - 1) * 100)
