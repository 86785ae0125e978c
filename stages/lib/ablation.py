"""Curves, models and predictions -> variants of the method that lack one part of it each, and how it meets a rate.

Every variant is one `Choose` (allocation): lambda' -> phi [n, 5], so that all are evaluated by the same code.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from stages.lib.allocation import (
    Choose,
    Importance,
    column,
    every_mean_loss,
    label_aware,
    label_free,
    least_cost,
    mean_bits_per_image,
    mfiba,
    mfiba_closed_form,
    mfiba_skip,
    operating_points,
    pseudo_labelled,
    rate_targets,
    static,
    upstream,
    with_skipping,
)
from stages.lib.loss_rate import Curves, mean_loss, predicted_bits, sensitivity_to, solve_power
from stages.lib.params import SCALES

POOL = SCALES.index("pool")
IMAGE_NOISE_FLOOR = 0.001  # upstream, of its fits to one image: smaller drops count as none
WEIGHT_BINS, NUDGE = 50, 0.01  # upstream, of its calibrated weights

ROWS = {  # part of the method -> variant -> what it is
    "fixed vector": {
        "static": "best fixed quality of each scale for the mean AP drops of fit",
        "static_smooth": "the same for the mean smooth losses",
        "static_skip": "the same, where a scale may be skipped",
    },
    "weights of the closed form": {
        "closed_form_equal": "1/5 for all: only pixels and curves of the scales differ",
        "closed_form_random": "drawn from a Dirichlet distribution, for each image",
        "closed_form_mean": "the mean label of fit",
        "mfiba_closed_form": "as MFIP predicts them",
    },
    "sensitivity": {
        "sensitivity_one": "1 for all scales and images",
        "sensitivity_mean": "the mean of those predicted on fit: only the bits are of the image",
        "sensitivity_weight": "MFIP's weight over its mean on fit",
        "sensitivity_share": "the predicted sensitivities as shares, over their mean on fit: no magnitude of the image",
        "sensitivity_permuted": "that of another image",
        "sensitivity_bits": "bits of the precoded scale over their mean on fit",
        "sensitivity_variance": "spatial variance of the features over its mean on fit",
        "sensitivity_gradient": "gradient of the detection scores, norm over its mean on fit",
        "sensitivity_channels": "predicted from the channels' statistics alone",
        "sensitivity_objectness": "predicted from objectness alone",
        "sensitivity_ap": "predicted, with AP drops as labels and as the loss",
        "mfiba": "predicted from both, with smooth losses: the method",
        "sensitivity_measured": "measured on the image: a perfect predictor",
        "oracle": "the image's own losses as measured, no model of them",
    },
    "bits of the qualities": {
        "bits_mean": "the mean of fit: nothing is precoded",
        "bits_two": "predicted from two precodings (mfiba: from one)",
        "bits_real": "real: precoded at every quality",
    },
    "skipping": {
        "pool_skip": "mfiba, pool always derived from scale 3, nothing else skipped",
        "coded_pool_skip": "mfiba, every scale but pool may be skipped",
        "mfiba_skip": "mfiba, every scale may be skipped",
        "measured_skip": "the same with measured sensitivities",
        "oracle_skip": "the same with the image's own losses as measured",
    },
    "pseudo-labels": {
        "pseudo_alone": "losses by the sender's own uncoded detections alone; bits are real here",
        "mfiba_pseudo": "the mean of these (7 parts) and mfiba's losses (3)",
        "pseudo_alone_skip": "pseudo_alone, every scale may be skipped",
        "mfiba_pseudo_skip": "mfiba_pseudo, every scale may be skipped",
    },
    "the authors' algorithm": {
        "upstream_predicted": "with MFIP's weights",
        "upstream_calibrated": "with MFIP's weights, calibrated on fit as the authors calibrate",
        "upstream_measured": "with measured weights",
        "upstream_image": "with a power law fitted to the drops of the very image",
    },
}
SEES_LABELS = {
    "sensitivity_measured",
    "oracle",
    "measured_skip",
    "oracle_skip",
    "upstream_measured",
    "upstream_image",
}
# Compared with mfiba_skip.
AGAINST_SKIPPING = {
    "static_skip",
    "coded_pool_skip",
    "measured_skip",
    "oracle_skip",
    "pseudo_alone_skip",
    "mfiba_pseudo_skip",
}


class Senses(NamedTuple):
    """Sensitivities other than MFIP's for the images of test."""

    learned: dict[str, np.ndarray]  # channels, objectness, ap: [n, 5], what ridges from other inputs or labels predict
    activity: dict[str, tuple[np.ndarray, np.ndarray]]  # variance, gradient: of fit [m, 5] and of test [n, 5]


def described_rows() -> pd.DataFrame:
    """`ROWS` as a table: part, method, description, sees_labels, reference (the method that it is compared with)."""
    rows = [
        (part, name, text, name in SEES_LABELS, "mfiba_skip" if name in AGAINST_SKIPPING else "mfiba")
        for part, names in ROWS.items()
        for name, text in names.items()
    ]
    return pd.DataFrame(rows, columns=["part", "method", "description", "sees_labels", "reference"])


def variants(
    fit: Curves,
    test: Curves,
    model: dict,
    importance: Importance,
    of_fit: Importance,
    senses: Senses,
    precode: int,
    seed: int,
) -> dict[str, Choose]:
    """Curves, `fit_scales`, predictions for test and, out of fold, fit -> a choice for each of `ROWS`.

    The labels of test reach those of SEES_LABELS only.
    """
    calibration = calibrate(fit, of_fit.weights, model)
    pseudo = test.bits, test.pseudo_loss, model, importance
    alone = pseudo_labelled(*pseudo, share=1.0)
    main = label_free(test.bits, test.pixels, model, importance, precode) | label_aware(test, model)
    found = (
        main
        | weights_of_closed_form(test.pixels, model, seed)
        | sensitivities(fit, test, model, importance, of_fit, senses, precode, seed)
        | other_bits(fit.bits, test.bits, model, importance.sensitivity, precode)
        | skipping(test, model, importance.sensitivity, precode)
        | pseudo_labelled(*pseudo)
        | {
            "pseudo_alone": alone["mfiba_pseudo"],
            "pseudo_alone_skip": alone["mfiba_pseudo_skip"],
            "static_smooth": _static_smooth(model, len(test.bits)),
            "upstream_calibrated": upstream_with(calibration[weight_bins(importance.weights)], test, model),
            "upstream_image": upstream_image(test),
        }
    )
    return {name: found[name] for names in ROWS.values() for name in names}


def weights_of_closed_form(pixels: np.ndarray, model: dict, seed: int) -> dict[str, Choose]:
    """`mfiba_closed_form` with weights [n, 5] that tell nothing of the image."""
    n, k = len(pixels), len(model["mean"][SCALES[0]]["bits"])
    alpha, beta = column(model, "power", "alpha"), column(model, "power", "beta")
    slope, offset = column(model, "rate_phi", "a"), column(model, "rate_phi", "b")
    weights = {
        "closed_form_equal": np.full((n, len(SCALES)), 1 / len(SCALES)),
        "closed_form_random": np.random.default_rng(seed).dirichlet(np.ones(len(SCALES)), n),
        "closed_form_mean": np.tile(column(model, "label", "mean"), (n, 1)),
    }

    rho = pixels / pixels[:, :1]

    def choose(w: np.ndarray) -> Choose:
        return lambda lambda_prime: mfiba_closed_form(w, alpha, beta, rho, slope, offset, k, lambda_prime)

    return {name: choose(w) for name, w in weights.items()}


def sensitivities(
    fit: Curves,
    test: Curves,
    model: dict,
    importance: Importance,
    of_fit: Importance,
    senses: Senses,
    precode: int,
    seed: int,
) -> dict[str, Choose]:
    """`mfiba` with sensitivities [n, 5] from elsewhere; "ap": the losses of the qualities are mean AP drops, too."""
    precoded = test.bits[:, :, precode]
    found = {
        "one": np.ones_like(precoded),
        "mean": np.broadcast_to(of_fit.sensitivity.mean(0), precoded.shape),
        "weight": importance.weights / of_fit.weights.mean(0),
        "share": shares(importance.sensitivity) / shares(of_fit.sensitivity).mean(0),
        "permuted": of_another_image(importance.sensitivity, seed),
        "bits": relative(fit.bits[:, :, precode], precoded),
        **{name: relative(*activity) for name, activity in senses.activity.items()},
        **senses.learned,
        "measured": measured(test, model),
    }
    choices = {f"sensitivity_{name}": mfiba(k, precoded, model, precode) for name, k in found.items()}
    ap_loss = senses.learned["ap"][:, :, None] * mean_loss(drops(fit))
    return choices | {"sensitivity_ap": least_cost(ap_loss, predicted_bits(precoded, model["rate"], precode))}


def other_bits(
    bits_fit: np.ndarray, bits: np.ndarray, model: dict, sensitivity: np.ndarray, precode: int
) -> dict[str, Choose]:
    """`mfiba` that knows less, or more, of the bits [n, 5, K] of its qualities."""
    loss = sensitivity[:, :, None] * column(model, "mean", "loss")
    mean_bits = np.broadcast_to(column(model, "mean", "bits"), bits.shape)
    k = bits.shape[2]
    second = 0 if precode >= k / 2 else k - 1  # the end that is further from the first
    known = {"mean": mean_bits, "two": predicted_from(bits_fit, bits, [precode, second]), "real": bits}
    return {f"bits_{name}": least_cost(loss, values) for name, values in known.items()}


def predicted_from(bits_fit: np.ndarray, bits: np.ndarray, known: list[int]) -> np.ndarray:
    """Bits [m, 5, K] of fit, of which the qualities `known` tell the others -> those of other images [n, 5, K].

    log bits_sq = offset_sq + sum over known k of slope_sqk * log bits_sk, least squares; never less than the quality
    below. Of [n, 5, K] only `known` is read.
    """
    predicted = np.empty_like(bits, dtype=float)
    for s in range(len(SCALES)):
        x, wanted = (np.log(b[:, s, known]) for b in (bits_fit, bits))
        x, wanted = (np.column_stack([values, np.ones(len(values))]) for values in (x, wanted))
        predicted[:, s] = np.exp(wanted @ np.linalg.lstsq(x, np.log(bits_fit[:, s]), rcond=None)[0])
    predicted[:, :, known] = bits[:, :, known]
    return np.maximum.accumulate(predicted, 2)


def skipping(test: Curves, model: dict, sensitivity: np.ndarray, precode: int) -> dict[str, Choose]:
    """`mfiba_skip` that must skip pool and only pool, or all but pool; and with a perfect predictor."""
    precoded = test.bits[:, :, precode]
    loss, skipped = (sensitivity[:, :, None] * column(model, "mean", name) for name in ("loss", "loss_skipped"))
    bits = predicted_bits(precoded, model["rate"], precode)
    is_pool = (np.arange(len(SCALES)) == POOL)[:, None]
    sent = np.where(is_pool, np.inf, loss)  # an infinite loss forbids
    skipped_pool, skipped_others = np.where(is_pool, skipped, np.inf), np.where(is_pool, np.inf, skipped)
    return {
        "pool_skip": lambda lambda_prime: with_skipping(sent, skipped_pool, bits, lambda_prime),
        "coded_pool_skip": lambda lambda_prime: with_skipping(loss, skipped_others, bits, lambda_prime),
        "measured_skip": mfiba_skip(measured(test, model), precoded, model, precode),
    }


def calibrate(fit: Curves, weights: np.ndarray, model: dict) -> np.ndarray:
    """height(c) = sum_p A_p(c) - slope_p * R_p(c) -> c [50], the weight that stands for each of `weight_bins`.

    c starts at the middles of the bins; every bin is nudged by 0.01 up as long as each nudge raises `height`, then
    every bin down. p are the operating points of `upstream` with the middles, at the lambdas that they have there, but
    for the lowest and the highest rate; R_p are mean bits, A_p AP, slope_p is that of the chord from p - 1 to p + 1
    before all nudges. So a nudge is kept if it lifts the points, on average, above lines along the chords.

    Bins, nudges and a chord are the authors' (SYSU-Video/MFIBA at 112619e). They tune on the images that they evaluate,
    at one lambda, with a run of the detector per nudge. Ours: `fit` and MFIP's weights [m, 5] for it, as many targets
    as qualities, an additive AP, - sum_s drop_s(phi_s) up to a constant, and no nudge that changes nothing.
    """
    bins, c = weight_bins(weights), (np.arange(WEIGHT_BINS) + 0.5) / WEIGHT_BINS
    targets = rate_targets(fit.bits, fit.bits.shape[2])
    lambdas = [p.lambda_prime for p in operating_points(upstream_with(c[bins], fit, model), fit.bits, targets)]
    tables = np.stack([fit.bits, -drops(fit)])[:, None]  # [2, 1, m, 5, K]

    def bits_and_ap(c: np.ndarray) -> np.ndarray:
        choose = upstream_with(c[bins], fit, model)
        phi = np.stack([choose(lam) for lam in lambdas]).astype(int)  # [P, m, 5]
        return np.take_along_axis(tables, phi[None, ..., None], 4).sum((3, 4)).mean(2)  # [2, P]

    bits, ap = bits_and_ap(c)
    slope = (ap[2:] - ap[:-2]) / (bits[2:] - bits[:-2])

    def height(c: np.ndarray) -> float:
        bits, ap = bits_and_ap(c)[:, 1:-1]
        return float((ap - slope * bits).sum())

    highest = height(c)
    for nudge, k in product((NUDGE, -NUDGE), np.unique(bins)):
        while (found := height(nudged := c + nudge * (np.arange(WEIGHT_BINS) == k))) > highest:
            c, highest = nudged, found
    return c


def weight_bins(weights: np.ndarray) -> np.ndarray:
    """floor(50 w), and 49 for w = 1."""
    return np.minimum(np.floor(weights * WEIGHT_BINS), WEIGHT_BINS - 1).astype(int)


def upstream_with(weights: np.ndarray, curves: Curves, model: dict) -> Choose:
    """`upstream` with weights [n, 5] for the images of `curves`."""
    a, b = column(model, "upstream", "a"), column(model, "upstream", "b")
    return lambda lam: upstream(weights, a, b, curves.bpp_plane, lam)


def upstream_image(test: Curves) -> Choose:
    """`upstream` with a_ns, b_ns of the image's own drops, drop ~ a_ns * bpp_plane**b_ns, in place of weights.

    The authors' image-specific option; what a drop is worth is in a_ns, so all weights are 1. Images without label or
    with clean AP <= 0 take the lowest quality. b is bounded as in `fit_power`; the authors' b <= 0 need not converge.
    """
    drop = np.where(test.drop < IMAGE_NOISE_FLOOR, 0.0, test.drop)
    usable = test.clean > 0
    a, b = np.ones(test.pixels.shape), -np.ones(test.pixels.shape)
    one = np.ones(1)
    for n, s in np.ndindex(a.shape):
        if usable[n]:
            a[n, s], b[n, s], _ = solve_power(one, drop[n, s, None], test.bpp_plane[n, s, None])
    weights = np.where(usable[:, None], np.ones(len(SCALES)), np.nan)
    return lambda lam: upstream(weights, a, b, test.bpp_plane, lam)


def of_another_image(values: np.ndarray, seed: int) -> np.ndarray:
    """Rows [n, 5] in an order in which none is at its place (n > 1)."""
    order = np.random.default_rng(seed).permutation(len(values))
    shuffled = np.empty_like(values)
    shuffled[order] = values[np.roll(order, 1)]
    return shuffled


def shares(values: np.ndarray) -> np.ndarray:
    """[n, 5] > 0 -> the same with sum 1 in every row."""
    return values / values.sum(1, keepdims=True)


def relative(fit: np.ndarray, test: np.ndarray) -> np.ndarray:
    """[m, 5], [n, 5] >= 0 -> test over the mean of fit; 1 for a scale where that is 0."""
    mean = fit.mean(0)
    return np.where(mean > 0, test / np.where(mean > 0, mean, 1), 1.0)


def measured(test: Curves, model: dict) -> np.ndarray:
    """What a perfect MFIP would say, [n, 5]: how many times the mean losses of fit the image loses."""
    return np.maximum(sensitivity_to(every_mean_loss(model), test.every_loss), 0)


def drops(curves: Curves) -> np.ndarray:
    """Drops of AP [n, 5, K]; 0 without ground truth: nothing to lose, as for the smooth loss."""
    return np.where(curves.labelled[:, None, None], curves.drop, 0.0)


def rate_control(
    bits: np.ndarray, model: dict, sensitivity: np.ndarray, precode: int, points: int, header: int
) -> pd.DataFrame:
    """Asked mean bits per image -> those reached with one lambda' for the split: method, bits, asked, reached, error.

    `bits`: by which of them lambda' was found, "predicted" from one precoding, all that a sender knows, or "real".
    error = reached / asked - 1. Asked are the rates between those of the lowest and the highest quality for all, as in
    the operating points; bits [n, 5, K], `header` bits more for every image.
    """
    precoded = bits[:, :, precode]
    known = {"predicted": predicted_bits(precoded, model["rate"], precode), "real": bits}
    rows = []
    for method, build in (("mfiba", mfiba), ("mfiba_skip", mfiba_skip)):
        choose = build(sensitivity, precoded, model, precode)
        for asked in rate_targets(bits, points)[1:-1]:
            for name, believed in known.items():
                (point,) = operating_points(choose, believed, asked[None])
                whole, reached = header + asked, header + mean_bits_per_image(point.phi, bits)
                rows.append((method, name, whole, reached, reached / whole - 1))
    return pd.DataFrame(rows, columns=["method", "bits", "asked", "reached", "error"])


def _static_smooth(model: dict, n: int) -> Choose:
    losses, bits = column(model, "mean", "loss"), column(model, "mean", "bits")
    return lambda lambda_prime: np.tile(static(losses, bits, lambda_prime), (n, 1))
