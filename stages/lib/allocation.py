"""Precoded curves + loss-rate model + importance -> phi [n, 5] of every method at every operating point.

Every method turns a multiplier lambda' (the price of a bit) into one of the K precoded qualities per image and scale,
those named `..._skip` also into SKIPPED; `operating_points` sets the price by the bits alone, so that the methods are
compared at like rates.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from stages.lib.loss_rate import Curves, importance_labels, predicted_bits, read_table
from stages.lib.params import COARSE_TO_FINE, COARSER, SCALES, SKIPPED
from stages.lib.schema import InputError

NOISE_FLOOR = 0.01  # upstream: smaller drops count as none
LEAST_WEIGHT = 1e-8  # upstream
LAMBDA_DIVISOR = np.array([1, 4, 16, 60, 60])  # upstream, scales 0, 1, 2, 3, pool
LOG10_LAMBDA_PRIME = np.arange(-30, 31)  # the methods' lambda' differ by many orders; the ends are found within
PSEUDO_SHARE = 0.7  # of what a sender believes it loses: by its own detections; the rest is what MFIP says
MORE_POINTS = 4  # of a method that may skip, below those of the others
BISECTIONS = 50  # of the bracket of lambda'; each halves it
SAME_BITS = 1e-9  # relative: means over images in floating point

Choose = Callable[[float], np.ndarray]  # lambda' -> phi [n, 5]


class Point(NamedTuple):
    lambda_prime: float  # NaN for uniform
    phi: np.ndarray  # [n, 5] floats that hold integers in [0, K-1], only precoded qualities are sent; or SKIPPED


class Importance(NamedTuple):
    """What MFIP predicts of n images."""

    weights: np.ndarray  # [n, 5], >= 0, sum 1: the shares of the scales
    sensitivity: np.ndarray  # [n, 5], >= 0: how many times the mean loss of the scale the image loses


def read_importance(file: Path, split: str, image_ids: np.ndarray) -> Importance:
    """CSV of MFIP (image_id, split, scale, weight, sensitivity) -> of these images; InputError names a bad file."""
    found = {column: read_table(file, column, image_ids, split=split) for column in ("weight", "sensitivity")}
    for column, values in found.items():
        if (values < 0).any():
            raise InputError(f"{file}: column {column!r} holds {values.min()}, below 0; run train_mfip again")
    return Importance(*found.values())


def allocate(test: Curves, fit: dict, importance: Importance, precode: int, points: int) -> pd.DataFrame:
    """Curves of test, `fit_scales`, predictions -> method, point, lambda_prime, image_id, scale, phi.

    `point` counts from 0 in rising bits; `precode` is the quality whose bits a sender knows. The measured drops and
    losses of the evaluated images reach `label_aware` only.
    """
    methods = (
        label_free(test.bits, test.pixels, fit, importance, precode)
        | pseudo_labelled(test.bits, test.pseudo_loss, fit, importance)
        | label_aware(test, fit)
    )
    return allocation_table(methods, test, points)


def allocation_table(methods: dict[str, Choose], test: Curves, points: int) -> pd.DataFrame:
    """`uniform` at every quality, then each method at its operating points -> the columns of `allocate`."""
    n, _, k = test.bits.shape
    targets = rate_targets(test.bits, points)
    table = {"uniform": [Point(np.nan, uniform(q, n)) for q in range(k)]}
    for name, choose in methods.items():
        wanted = targets_below(targets) if name.endswith("_skip") else targets
        table[name] = operating_points(choose, test.bits, wanted)
    return pd.concat(
        pd.DataFrame(
            {
                "method": method,
                "point": number,
                "lambda_prime": point.lambda_prime,
                "image_id": np.repeat(test.image_ids, len(SCALES)),
                "scale": np.tile(SCALES, n),
                "phi": point.phi.ravel(),
            }
        )
        for method, found in table.items()
        for number, point in enumerate(found)
    ).reset_index(drop=True)


def label_free(
    bits: np.ndarray, pixels: np.ndarray, fit: dict, importance: Importance, precode: int
) -> dict[str, Choose]:
    """What a sender can do: it knows the bits of its codings, models from `fit` and predictions, no label."""
    n, _, k = bits.shape
    bpp_plane, rho = bits / pixels[:, :, None], pixels / pixels[:, :1]
    a, b = column(fit, "upstream", "a"), column(fit, "upstream", "b")
    alpha, beta = column(fit, "power", "alpha"), column(fit, "power", "beta")
    slope, offset = column(fit, "rate_phi", "a"), column(fit, "rate_phi", "b")
    drop_fit, bits_fit = column(fit, "mean", "drop"), column(fit, "mean", "bits")
    loss_fit, skipped_fit = column(fit, "mean", "loss"), column(fit, "mean", "loss_skipped")
    weights, sensitivity, precoded = importance.weights, importance.sensitivity, bits[:, :, precode]
    return {
        "static": lambda lambda_prime: np.tile(static(drop_fit, bits_fit, lambda_prime), (n, 1)),
        "upstream_predicted": lambda lam: upstream(weights, a, b, bpp_plane, lam),
        "mfiba_closed_form": lambda lam: mfiba_closed_form(weights, alpha, beta, rho, slope, offset, k, lam),
        "mfiba": mfiba(sensitivity, precoded, fit, precode),
        "static_skip": lambda lam: np.tile(
            with_skipping(loss_fit[None], skipped_fit[None], bits_fit[None], lam), (n, 1)
        ),
        "mfiba_skip": mfiba_skip(sensitivity, precoded, fit, precode),
    }


def pseudo_labelled(
    bits: np.ndarray, pseudo_loss: np.ndarray, fit: dict, importance: Importance, share: float = PSEUDO_SHARE
) -> dict[str, Choose]:
    """What a sender can do that decodes its codings and runs the heads: it knows all bits and its pseudo-losses.

    bits [n, 5, K], pseudo_loss [n, 5, K + 1 + K]. It expects of every choice `share` of the pseudo-loss, which each
    scale's factor brings to the size of the true ones, and the rest of sensitivity * mean loss, as `mfiba` does: both
    have the mean of the true losses of fit, and their errors little to do with each other.
    """
    seen = column(fit, "pseudo", "factor")[:, None] * pseudo_loss
    predicted = importance.sensitivity[:, :, None] * every_mean_loss(fit)
    loss, skipped = np.split(share * seen + (1 - share) * predicted, [bits.shape[2]], 2)
    return {
        "mfiba_pseudo": least_cost(loss, bits),
        "mfiba_pseudo_skip": lambda lambda_prime: with_skipping(loss, skipped, bits, lambda_prime),
    }


def label_aware(test: Curves, fit: dict) -> dict[str, Choose]:
    """What needs the labels of the images that are evaluated: the authors' protocol, and a bound."""
    measured = upstream_weights(test.drop, test.clean)
    a, b = column(fit, "upstream", "a"), column(fit, "upstream", "b")
    return {
        "upstream_measured": lambda lam: upstream(measured, a, b, test.bpp_plane, lam),
        "oracle": least_cost(test.loss, test.bits),
        "oracle_skip": lambda lambda_prime: with_skipping(test.loss, test.loss_skipped, test.bits, lambda_prime),
    }


def column(fit: dict, model: str, name: str) -> np.ndarray:
    """One number of each scale from `fit_scales` -> [5], or [5, K]."""
    return np.array([fit[model][scale][name] for scale in SCALES], float)


def every_mean_loss(fit: dict) -> np.ndarray:
    """The mean of `Curves.every_loss` on fit, [5, K + 1 + K]."""
    return np.concatenate([column(fit, "mean", name) for name in ("loss", "loss_skipped")], 1)


def uniform(k: int, n: int) -> np.ndarray:
    """One quality for all: the anchor. [n, 5]"""
    return np.full((n, len(SCALES)), float(k))


def static(mean_drop: np.ndarray, mean_bits: np.ndarray, lambda_prime: float) -> np.ndarray:
    """phi_s = argmin_q mean drop[s, q] + lambda' * mean bits[s, q], both [5, K] from the fit split -> [5].

    The sum over scales is least where each scale's is: the best of all K**5 fixed vectors, were drops additive.
    """
    return _cheapest(mean_drop + lambda_prime * mean_bits, mean_bits)


def upstream_weights(drop: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Drops [n, 5, K], clean AP [n] -> the authors' measured weights [n, 5]; NaN without label or with clean AP <= 0.

    `importance_labels` of the drops, those below 0.01 set to 0 (SYSU-Video/MFIBA at 112619e, fasterrcnn_getw).
    """
    weights = importance_labels(np.where(drop < NOISE_FLOOR, 0.0, drop))
    return np.where((clean > 0)[:, None], weights, np.nan)


def upstream(weights: np.ndarray, a: np.ndarray, b: np.ndarray, bpp_plane: np.ndarray, lam: float) -> np.ndarray:
    """phi_s = argmin_q |bpp_plane[s, q] - t_s|, first of ties; images whose weights are NaN: lowest quality.

    t_s = (lam_s / (max(w_s, 1e-8) * a_s * -b_s))**(1 / (b_s - 1)), lam_s = lam / {1, 4, 16, 60, 60}
    (SYSU-Video/MFIBA at 112619e). weights [n, 5], a > 0 and b < 0 [5], bpp_plane [n, 5, K] -> [n, 5].
    """
    target = (lam / LAMBDA_DIVISOR / (np.maximum(weights, LEAST_WEIGHT) * a * -b)) ** (1 / (b - 1))  # [n, 5]
    # Beyond the coded rates the nearest is the end of them; unclipped, a huge target would swallow all differences.
    target = np.clip(target, bpp_plane.min(2), bpp_plane.max(2))
    phi = np.abs(bpp_plane - target[:, :, None]).argmin(2)
    return np.where(np.isnan(weights), 0.0, phi)


def closed_form(
    weights: np.ndarray, alpha: np.ndarray, beta: np.ndarray, rho: np.ndarray, lambda_prime: float
) -> np.ndarray:
    """R_s = (lambda' * rho_s / (w_s * alpha_s * -beta_s))**(1 / (beta_s - 1)), bits per plane pixel, [n, 5].

    It minimises sum_s w_s * alpha_s * R_s**beta_s + lambda' * sum_s rho_s * R_s over R > 0 (arXiv 2503.19278, bit
    allocation; the paper writes 1/4**s for rho_s, the pixels of scale s / those of scale 0). weights >= 0, rho > 0
    [n, 5]; alpha > 0, beta < 0 [5]; lambda' > 0. A weight of 0 gives R = 0.
    """
    return (weights * alpha * -beta / (lambda_prime * rho)) ** (1 / (1 - beta))  # the reciprocal: no division by w = 0


def mfiba(sensitivity: np.ndarray, precoded_bits: np.ndarray, fit: dict, precode: int) -> Choose:
    """phi_s = argmin_q sensitivity_s * mean loss[s, q] + lambda' * predicted bits[s, q] -> lambda' to phi [n, 5].

    The discrete Lagrangian: no curve is forced on loss or rate. The sender codes the image once, at quality `precode`:
    precoded_bits [n, 5] of its records (`predicted_bits`); sensitivity [n, 5] is MFIP's; the mean losses are those of
    `fit`.
    """
    loss = sensitivity[:, :, None] * column(fit, "mean", "loss")
    bits = predicted_bits(precoded_bits, fit["rate"], precode)
    return least_cost(loss, bits)


def mfiba_skip(sensitivity: np.ndarray, precoded_bits: np.ndarray, fit: dict, precode: int) -> Choose:
    """`mfiba` that may also send nothing of a scale (`with_skipping`), the mean losses of that being those of `fit`."""
    loss, skipped = (sensitivity[:, :, None] * column(fit, "mean", name) for name in ("loss", "loss_skipped"))
    bits = predicted_bits(precoded_bits, fit["rate"], precode)
    return lambda lambda_prime: with_skipping(loss, skipped, bits, lambda_prime)


def with_skipping(
    loss: np.ndarray, loss_skipped: np.ndarray, bits: np.ndarray, lambda_prime: float | np.ndarray
) -> np.ndarray:
    """argmin over phi of  sum_s cost_s(phi_s),  phi_s in SKIPPED, 0 .. K-1 -> [n, 5], fewest bits of ties.

    cost_s = loss[s, phi_s] + lambda' * bits[s, phi_s] of a scale that is sent; one that is not costs loss_skipped[s,
    1 + phi of its coarser scale], which it is predicted from. So the costs form a tree, 3 - 2 - 1 - 0 and 3 - pool, and
    dynamic programming from its leaves finds the least sum (Viterbi). loss, bits [n, 5, K], loss_skipped [n, 5, 1 + K].
    """
    n, _, k = bits.shape
    sent = loss + lambda_prime * bits
    beyond = np.zeros((n, len(SCALES), 1 + k))  # by phi of the scale: the least cost of all that is predicted from it
    choice = np.empty((n, len(SCALES), 1 + k), int)  # by phi of the coarser scale: the best phi - SKIPPED
    for scale in reversed(COARSE_TO_FINE):
        s = SCALES.index(scale)
        own = np.concatenate([loss_skipped[:, s, :, None], np.repeat(sent[:, s, None], 1 + k, 1)], 2)
        total = own + beyond[:, s, None]  # [n, phi of the coarser scale, phi]
        choice[:, s] = total.argmin(2)
        if scale in COARSER:
            beyond[:, SCALES.index(COARSER[scale])] += total.min(2)
    phi, images = np.zeros((n, len(SCALES)), int), np.arange(n)
    for scale in COARSE_TO_FINE:
        s = SCALES.index(scale)
        coarser = phi[:, SCALES.index(COARSER[scale])] if scale in COARSER else np.zeros(n, int)
        phi[:, s] = choice[images, s, coarser]
    return (phi + SKIPPED).astype(float)


def mfiba_closed_form(
    weights: np.ndarray,
    alpha: np.ndarray,
    beta: np.ndarray,
    rho: np.ndarray,
    slope: np.ndarray,
    offset: np.ndarray,
    k: int,
    lambda_prime: float,
) -> np.ndarray:
    """phi_s = (R_s - offset_s) / slope_s, clipped to [0, k-1], rounded to the nearest precoded quality -> [n, 5].

    R_s = (lambda' * rho_s / (w_s * alpha_s * -beta_s))**(1 / (beta_s - 1)) as in `closed_form`, and the rate-phi model
    R_s = slope_s * phi_s + offset_s inverted (MFIBA, arXiv 2503.19278). slope, offset [5].
    """
    rate = closed_form(weights, alpha, beta, rho, lambda_prime)
    # A slope <= 0 is flagged by the fit; the scale then takes one of the end qualities.
    phi = (rate - offset) / np.maximum(slope, np.finfo(float).tiny ** 0.5)
    return np.rint(np.clip(phi, 0, k - 1))


def least_cost(loss: np.ndarray, bits: np.ndarray) -> Choose:
    """phi = argmin_q loss[q] + lambda' * bits[q] per image and scale, fewest bits of ties; [n, 5, K] both.

    As the sender, or with an image's true losses an oracle, believes them to be, as far as those of the scales add up.
    """
    return lambda lambda_prime: _cheapest(loss + lambda_prime * bits, bits)


def rate_targets(bits: np.ndarray, points: int) -> np.ndarray:
    """bits [n, 5, K] -> [points] mean bits per image, log-spaced from uniform lowest to uniform highest quality."""
    per_quality = bits.sum(1).mean(0)
    return np.geomspace(per_quality[0], per_quality[-1], points)


def targets_below(targets: np.ndarray) -> np.ndarray:
    """The same and MORE_POINTS further, at the same ratio: with skipping a file can be smaller than any other."""
    ratio = targets[0] / targets[1] if len(targets) > 1 else 1.0
    return np.concatenate([targets[0] * ratio ** np.arange(MORE_POINTS, 0, -1), targets])


def operating_points(choose: Choose, bits: np.ndarray, targets: np.ndarray) -> list[Point]:
    """For each target the choice with the most mean bits per image that are not above it, by bisection on log lambda'.

    Bits fall as lambda' rises. Where a method has nothing at or below a target, or saturates below it, the nearest end
    stands in; equal phi tables are kept once. bits [n, 5, K], targets [P] mean bits per image -> points in rising bits.
    """

    def mean_bits(log_lambda: float) -> float:
        return mean_bits_per_image(choose(10.0**log_lambda), bits)

    ends = np.array([mean_bits(log_lambda) for log_lambda in LOG10_LAMBDA_PRIME])
    generous = LOG10_LAMBDA_PRIME[np.flatnonzero(ends == ends[0])[-1]]  # the largest price that changes nothing
    frugal = LOG10_LAMBDA_PRIME[np.flatnonzero(ends == ends[-1])[0]]
    found: dict[bytes, Point] = {}
    for target in targets:
        low, high = float(generous), float(frugal)
        limit = target * (1 + SAME_BITS)
        if ends[0] <= limit:
            high = low
        elif ends[-1] > limit:
            low = high
        for _ in range(BISECTIONS if low < high else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if mean_bits(middle) <= limit else (middle, high)
        phi = choose(10.0**high)
        found.setdefault(phi.tobytes(), Point(10.0**high, phi))
    return sorted(found.values(), key=lambda point: mean_bits_per_image(point.phi, bits))


def mean_bits_per_image(phi: np.ndarray, bits: np.ndarray) -> float:
    """phi [n, 5] and bits [n, 5, K] -> mean over images of the sum of the scales' bits; a skipped one has none."""
    chosen = np.take_along_axis(bits, np.maximum(phi, 0).astype(int)[:, :, None], 2)[:, :, 0]
    return float(np.where(phi == SKIPPED, 0, chosen).sum(1).mean())


def _cheapest(cost: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """argmin over the last axis, fewest bits of ties."""
    tied = cost == cost.min(-1, keepdims=True)
    return np.where(tied, bits, np.inf).argmin(-1).astype(float)
