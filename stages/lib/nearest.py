"""Allocations by price + a wanted size of the file -> the qualities whose file is nearest to it."""

from collections.abc import Callable

import numpy as np

from stages.lib.allocation import BISECTIONS, LOG10_LAMBDA_PRIME, Choose

TOLERANCE = 0.05  # of a wanted size of the file


def nearest_in_size(choose: Choose, bits: Callable[[np.ndarray], float], wanted: float, highest: float) -> np.ndarray:
    """The first phi [5] found within 5 % of the wanted bits, or the nearest of all that were tried.

    choose: lambda' -> phi, in steps. Bisection of log lambda' ends between two neighbouring allocations, one with too
    few bits and one with too many; a share of the way from the one to the other, again by bisection, passes the wanted
    size. Where even the cheapest bits leave the file too small, all phi go on to `highest`.

    The way leaps over a size where several scales take their next level at a time: they then take it one by one. And
    where a scale begins, with all the bits of its lowest quality: the others then go on to `highest` without it.
    """
    log_prices = LOG10_LAMBDA_PRIME[::-1]
    ends = np.array([choose(10.0**log_price) for log_price in log_prices])
    least = -log_prices[(ends == ends[0]).all(1)].min()  # nothing is coded to see where phi begins to rise
    most = -log_prices[(ends == ends[-1]).all(1)].max()
    tried: list[np.ndarray] = []

    def halve(phi_at: Callable[[float], np.ndarray], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """phi_at rises, and so do its bits -> the last with no more bits than wanted, and the first with more."""
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            tried.append(phi_at(middle))
            size = bits(tried[-1])
            if abs(size / wanted - 1) <= TOLERANCE:
                break
            low, high = (middle, high) if size < wanted else (low, middle)
        return phi_at(low), phi_at(high)

    def error(phi: np.ndarray) -> float:
        return abs(bits(phi) - wanted)

    def missed() -> bool:
        return min(map(error, tried)) > TOLERANCE * wanted

    low, high = halve(lambda x: choose(10.0**-x), least, most)
    if missed() and bits(low) < wanted:
        if bits(high) < wanted:
            low, high = high, np.full_like(high, highest)
        before, after = halve(lambda share: low + share * (high - low), 0, 1)
        if missed():
            tried += [np.where(np.arange(len(low)) < s, after, before) for s in range(1, len(low))]
        if missed() and bits(high) > wanted:
            halve(lambda share: np.where(low < 0, low, low + share * (highest - low)), 0, 1)
    return min(tried, key=error)
