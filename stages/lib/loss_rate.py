"""Coded + losses -> curves of the images; curves of `fit` -> task loss-rate model, rate-phi model and mean curves.

The models of MFIBA (arXiv 2503.19278) are, per scale s, with R in bits per plane pixel:
drop_s(R) = w_s * alpha_s * R**beta_s (alpha > 0, beta < 0) and R_s(phi) = a_s * phi + b_s (phi = 0 .. K - 1).
Those that replace them: the mean smooth loss of every quality, which an image multiplies by its sensitivity, and
log bits_s(q) = slope_sq * log bits_s(precoding) + offset_sq, from one precoding of the image.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import curve_fit, minimize_scalar

from stages.lib.files import read_csv, read_json
from stages.lib.params import SCALES
from stages.lib.schema import FLAGS, NEGATIVE, NUMBER, NUMBER_OR_NULL, POSITIVE, Having, InputError, numbers, whole

BETA_RANGE = (-5.0, -0.01)
BETA_GRID = 200  # starts of the search: the error has several minima in beta
FOLDS = 5
FEW_IMAGES = 2 * FOLDS
# A failed fit says "no measurable loss": the scale asks for next to nothing until the others have theirs.
FAILED_ALPHA, FAILED_BETA = 1e-6, -1.0
WITHOUT_TRUTH = ("clean", "drop")  # columns that are empty for images without ground truth
EQUAL_DROPS = 1e-9  # drops nearer than this are the same AP; a real step of an image's AP is above 1e-5
RIVALS = ("power", "power_offset", "exponential", "mse", "quality", "quality_sensitivity")  # see `rivals`
PEAK_SQUARED = 255**2  # planes are normalised to [0, 1]; upstream's constants are for 8-bit MSE


class Curves(NamedTuple):
    """What precoding n images at K qualities gave; images in rising id, scales as SCALES, qualities in rising phi."""

    image_ids: np.ndarray  # [n]
    drop: np.ndarray  # [n, 5, K] clean - coded AP of the image, only this scale coded; NaN without ground truth
    loss: np.ndarray  # [n, 5, K] the smooth task loss of the same, in objects; 0 without ground truth: nothing to lose
    loss_skipped: np.ndarray  # [n, 5, 1 + K] if the scale is not sent; its coarser one neither, or at each quality
    clean: np.ndarray  # [n] the image's AP with uncoded features; NaN without ground truth
    bits: np.ndarray  # [n, 5, K] whole bits, > 0
    pixels: np.ndarray  # [n, 5] of the plane
    mse: np.ndarray  # [n, 5, K] of the normalised plane
    pseudo_loss: np.ndarray  # [n, 5, K + 1 + K] `every_loss` by the uncoded detections: no label in it

    @property
    def labelled(self) -> np.ndarray:
        """[n] bool: has ground truth of the task. The others count in rate and accuracy, never in a fit of drops."""
        return np.isfinite(self.clean)

    @property
    def every_loss(self) -> np.ndarray:
        """[n, 5, K + 1 + K] `loss`, then `loss_skipped`."""
        return np.concatenate([self.loss, self.loss_skipped], 2)

    @property
    def bpp_plane(self) -> np.ndarray:
        """[n, 5, K] bits per plane pixel, the R of the formulas."""
        return self.bits / self.pixels[:, :, None]


class PowerFit(NamedTuple):
    alpha: float
    beta: float
    r2: float  # held out: every image predicted by a fit to the other folds
    rmse: float  # held out, units of the drop
    r2_in_sample: float
    rmse_in_sample: float
    flags: list[str]  # failed, beta_at_bound, negative_r2, too_few_images


def read_curves(coded: Path, losses: Path, uncoded: Path, lambdas: list[str], task: str, split: str) -> Curves:
    """coded/<q>.csv (bits, MSE), losses/<q>.csv and what `measure_uncoded` wrote -> curves of one split, K = `lambdas`.

    Raises InputError, naming the file, for a missing column, image or scale, a duplicate, or bits that are not > 0.
    """
    coded_files = [Path(coded) / f"{q}.csv" for q in lambdas]
    rates = [_rows(file, ["bits", "pixels", "mse"], split=split) for file in coded_files]
    image_ids = np.unique(rates[0]["image_id"])
    bits, pixels, mse = (
        np.stack([_table(frame, column, image_ids, file) for frame, file in zip(rates, coded_files, strict=True)], 2)
        for column in ("bits", "pixels", "mse")
    )  # [n, 5, K]
    if not (bits > 0).all() or not (pixels > 0).all():
        file = coded_files[np.argwhere(~((bits > 0) & (pixels > 0)))[0][2]]
        raise InputError(f"{file}: split {split!r} has bits or pixels that are not > 0; run compress again")

    loss_files = [Path(losses) / f"{q}.csv" for q in lambdas]
    columns = ["clean", "drop", "loss", "loss_skipped", "pseudo_loss", "pseudo_loss_skipped"]
    measured = [_rows(file, columns, split=split, task=task) for file in loss_files]

    def table(column: str) -> np.ndarray:
        parts = [_table(frame, column, image_ids, file) for frame, file in zip(measured, loss_files, strict=True)]
        return np.stack(parts, 2)

    clean = table("clean")[:, 0, 0]  # the same for every scale and quality
    drop = table("drop")
    unlabelled = np.isnan(clean)
    if (np.isnan(drop) != unlabelled[:, None, None]).any():
        raise InputError(f"{losses}: an image of split {split!r} has a drop and no `clean`, or none; run measure again")
    lost = []
    for name in ("loss", "pseudo_loss"):
        nothing = read_table(uncoded, f"{name}_skipped", image_ids, split=split, task=task)[:, :, None]
        lost.append((table(name), np.concatenate([nothing, table(f"{name}_skipped")], 2)))
    (loss, skipped), pseudo = lost
    return Curves(image_ids, drop, loss, skipped, clean, bits, pixels[:, :, 0], mse, np.concatenate(pseudo, 2))


def read_table(file: Path, column: str, image_ids: np.ndarray, **where: str) -> np.ndarray:
    """CSV with image_id, scale -> one column as [n, 5] for just these images, of the rows where column = value.

    Raises InputError, naming the file, for a missing column, image or scale, a duplicate, or a value not finite.
    """
    return _table(_rows(file, [column], **where), column, image_ids, file)


def importance_labels(drop: np.ndarray) -> np.ndarray:
    """Drops [n, 5, K] -> weights [n, 5] >= 0 with sum 1: what MFIP learns to predict (labels of the authors' code).

    u[s, q] = (drop[s, q] - min_s drop[q]) / (max_s drop[q] - min_s drop[q]), 1 where all scales are equal;
    w[s] = sum_q u[s, q] / sum_sq u[s, q]. Images without drops (NaN) get NaN.
    """
    lowest = drop.min(1, keepdims=True)
    span = drop.max(1, keepdims=True) - lowest
    equal = span < EQUAL_DROPS
    share = np.where(equal, 1.0, (drop - lowest) / np.where(equal, 1.0, span)).sum(2)
    return share / share.sum(1, keepdims=True)


def mean_loss(loss: np.ndarray) -> np.ndarray:
    """Losses [n, 5, K] by rising quality -> their mean over the images, never below 0 nor rising, [5, K]."""
    mean = np.clip(loss.mean(0), 0, None)
    return np.maximum.accumulate(mean[:, ::-1], 1)[:, ::-1]


def sensitivity_labels(loss: np.ndarray, loss_skipped: np.ndarray) -> np.ndarray:
    """Losses [n, 5, K] and [n, 5, 1 + K] -> sensitivities [n, 5]: how many times the mean loss an image loses.

    Over the qualities and over the ways to skip the scale: the more is measured, the less noise.
    """
    mean = np.concatenate([mean_loss(loss), mean_loss(loss_skipped)], 1)
    return sensitivity_to(mean, np.concatenate([loss, loss_skipped], 2))


def sensitivity_to(mean: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """`mean_loss` [5, Q] of some images, losses [n, 5, Q] of others -> sensitivities [n, 5] of these.

    k_s = sum_q loss[s, q] * mean[s, q] / sum_q mean[s, q]^2, the least squares of loss ~ k * mean; 1 for a scale
    without any mean loss.
    """
    power = (mean**2).sum(1)
    return np.where(power > 0, (loss * mean).sum(2) / np.where(power > 0, power, 1), 1.0)


def predicted_bits(bits: np.ndarray, rate: dict, precode: int) -> np.ndarray:
    """Bits [n, 5] of the precoding, "rate" of `fit_scales` -> what every quality would take, [n, 5, K].

    exp(offset_sq) * bits**slope_sq, and never less than the quality below; those of the precoding are known.
    """
    slope, offset = (np.array([rate[scale][name] for scale in SCALES], float) for name in ("slope", "offset"))
    predicted = np.exp(offset + slope * np.log(bits)[:, :, None])
    predicted[:, :, precode] = bits
    above, below = predicted[:, :, precode:], predicted[:, :, precode::-1]
    return np.concatenate([np.minimum.accumulate(below, 2)[:, :, :0:-1], np.maximum.accumulate(above, 2)], 2)


def fit_power(weight: np.ndarray, drop: np.ndarray, rate: np.ndarray) -> PowerFit:
    """drop[n, q] ~ weight[n] * alpha * rate[n, q]**beta, least squares, alpha > 0, -5 <= beta <= -0.01.

    weight [n], drop [n, K], rate [n, K] > 0; rows with NaN are left out. The task loss-rate model of one scale (arXiv
    2503.19278). r2 and rmse: held out, 5 folds, index mod 5. Flags: `failed` (no rows, or no loss that falls with the
    rate's power: alpha, beta = 1e-6, -1), `beta_at_bound`, `negative_r2` (the mean is better), `too_few_images` (< 10).
    """
    usable = np.isfinite(weight) & np.isfinite(drop).all(1)
    weight, drop, rate = weight[usable], drop[usable], rate[usable]
    alpha, beta, failed = solve_power(weight, drop, rate)
    fold = np.arange(len(weight)) % FOLDS
    held_out = np.full(drop.shape, np.nan)
    for k in np.unique(fold):
        train, left = fold != k, fold == k
        held_out[left] = _predict(*solve_power(weight[train], drop[train], rate[train])[:2], weight[left], rate[left])
    r2, rmse = _quality(drop, held_out)
    flags = [
        ("failed", failed),
        ("beta_at_bound", not failed and np.isclose(beta, BETA_RANGE, rtol=0, atol=1e-3).any()),
        ("negative_r2", r2 < 0),
        ("too_few_images", len(weight) < FEW_IMAGES),
    ]
    in_sample = _quality(drop, _predict(alpha, beta, weight, rate))
    return PowerFit(alpha, beta, r2, rmse, *in_sample, [name for name, raised in flags if raised])


def fit_scales(curves: Curves, precode: int) -> dict:
    """Curves of the fit split -> every number that `allocate` takes over from it; inner keys are scale names.

    power: the task loss-rate model {alpha, beta, r2, rmse, ..., flags}; its weights are `importance_labels`.
    upstream: {a, b, r2}, mean plane MSE * 255**2 ~ a * bpp_plane**b over the K qualities (the authors' model).
    rate_phi: {a, b, r2, flags}, bpp_plane ~ a * phi + b over images and qualities.
    mean: {drop: [K], bits: [K], loss: [K], loss_skipped: [1 + K] of `mean_loss`}: drop of the labelled images, the
    others of all. pseudo: {factor}, mean loss over mean pseudo-loss, of all images and choices; 1 if one is not > 0.
    rate: {slope: [K], offset: [K], error: [K]} for `predicted_bits` from quality `precode`; error is the mean of
    |predicted / real - 1|, held out. label: {mean, std} of the importance labels. rivals: {model: r2 or None}, see
    `rivals`. n_images, n_labelled. An r2 without variance to explain is None. Whatever is flagged also warns.
    """
    weights = importance_labels(curves.drop)  # [n, 5]
    labels = weights[curves.labelled]
    drops = curves.drop[curves.labelled]
    bpp_plane = curves.bpp_plane
    out: dict[str, Any] = {"n_images": len(curves.image_ids), "n_labelled": len(labels)}
    out |= {model: {} for model in ("power", "upstream", "rate_phi", "mean", "pseudo", "label", "rate", "rivals")}
    losses, losses_skipped = mean_loss(curves.loss), mean_loss(curves.loss_skipped)
    for s, scale in enumerate(SCALES):
        power = fit_power(weights[:, s], curves.drop[:, s], bpp_plane[:, s])
        out["power"][scale] = {name: _json_number(value) for name, value in power._asdict().items()}
        out["upstream"][scale] = _fit_mse(curves.mse[:, s], bpp_plane[:, s])
        out["rate_phi"][scale] = _fit_rate_phi(bpp_plane[:, s])
        out["mean"][scale] = {
            "drop": drops[:, s].mean(0).tolist(),
            "bits": curves.bits[:, s].mean(0).tolist(),
            "loss": losses[s].tolist(),
            "loss_skipped": losses_skipped[s].tolist(),
        }
        out["pseudo"][scale] = {"factor": _ratio(curves.every_loss[:, s].mean(), curves.pseudo_loss[:, s].mean())}
        out["rate"][scale] = _fit_rate(curves.bits[:, s], precode)
        out["rivals"][scale] = rivals(curves, s)
        out["label"][scale] = {"mean": float(labels[:, s].mean()), "std": float(labels[:, s].std())}
        for model in ("power", "upstream", "rate_phi"):
            fit = out[model][scale]
            if fit["flags"]:
                flags, r2 = ", ".join(fit["flags"]), fit["r2"] if fit["r2"] is None else round(fit["r2"], 3)
                warnings.warn(f"{model} fit of scale {scale!r} is doubtful: {flags} (r2 {r2})", stacklevel=2)
    return out


def read_fit(path: Path, k: int, *models: str) -> dict:
    """A file of what `fit_scales` gave, of k qualities; `models`: those of its models that the caller takes.

    Raises InputError that names the file where it is another's, or was fitted on another number of qualities.
    """
    of_scale = {
        "power": {"alpha": POSITIVE, "beta": NEGATIVE, "r2": NUMBER_OR_NULL, "flags": FLAGS},
        "upstream": {"a": POSITIVE, "b": NEGATIVE},
        "rate_phi": {"a": NUMBER, "b": NUMBER, "r2": NUMBER_OR_NULL},
        "mean": {"drop": numbers(k), "bits": numbers(k), "loss": numbers(k), "loss_skipped": numbers(1 + k)},
        "pseudo": {"factor": POSITIVE},
        "rate": {"slope": numbers(k), "offset": numbers(k), "error": numbers(k)},
        "label": {"mean": NUMBER, "std": NUMBER},
        "rivals": dict.fromkeys(RIVALS, NUMBER_OR_NULL),
    }
    schema = {model: dict.fromkeys(SCALES, Having(of_scale[model])) for model in models or of_scale}
    try:
        return read_json(path, Having({"n_labelled": whole(0)} | schema))
    except InputError as error:
        raise InputError(f"{error}; params.yaml has {k} lambdas: run fit_loss_rate again") from None


def rivals(curves: Curves, s: int) -> dict[str, float | None]:
    """Models of one scale's smooth loss from its rate or error, without anything of the image: model -> held-out r2.

    power: alpha R^beta (the paper's, all weights alike), power_offset: alpha R^beta + c, exponential:
    alpha exp(-beta R), mse: kappa * MSE, quality: the mean of each quality; then quality_sensitivity: the latter times
    the image's sensitivity, as measured on the others: what a perfect predictor could reach. 5 folds as in `fit_power`.
    """
    loss, rate, mse = curves.loss[:, s], curves.bpp_plane[:, s], curves.mse[:, s]
    rate, mse = rate / rate.mean(), mse / mse.mean()
    fold = np.arange(len(loss)) % FOLDS
    shapes: dict[str, tuple[Callable[..., np.ndarray], np.ndarray]] = {
        "power": (lambda r, a, b: a * r**-b, rate),
        "power_offset": (lambda r, a, b, c: a * r**-b + c, rate),
        "exponential": (lambda r, a, b: a * np.exp(-b * r), rate),
        "mse": (lambda m, kappa: kappa * m, mse),
    }
    predicted = {name: np.full(loss.shape, np.nan) for name in RIVALS}
    every = curves.every_loss[:, s : s + 1]
    sensitivity = np.hstack([_sensitivity_without(every, q) for q in range(loss.shape[1])])  # [n, K]
    for k in np.unique(fold):
        train, left = fold != k, fold == k
        predicted["quality"][left] = loss[train].mean(0)
        predicted["quality_sensitivity"][left] = loss[train].mean(0) * sensitivity[left]
        for name, (shape, x) in shapes.items():
            start = np.full(shape.__code__.co_argcount - 1, 0.1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a covariance that cannot be estimated
                try:
                    found, _ = curve_fit(shape, x[train].ravel(), loss[train].ravel(), start, bounds=(0, np.inf))
                except RuntimeError:  # no convergence: the row says so
                    continue
            predicted[name][left] = shape(x[left], *found)
    return {name: _json_number(_quality(loss, values)[0]) for name, values in predicted.items()}


def _sensitivity_without(loss: np.ndarray, q: int) -> np.ndarray:
    """Losses [n, 1, Q] of one scale -> the images' sensitivities [n, 1] by all of them but the q-th."""
    others = np.delete(loss, q, 2)
    return sensitivity_to(np.clip(others.mean(0), 0, None), others)


def solve_power(weight: np.ndarray, drop: np.ndarray, rate: np.ndarray) -> tuple[float, float, bool]:
    """Least squares (alpha, beta, failed). alpha is linear given beta, so one bounded search needs no start value."""
    failure = FAILED_ALPHA, FAILED_BETA, True
    if not weight.size or not drop.any():
        return failure
    log_rate = np.log(rate)
    centre = log_rate.mean()  # keeps R**beta near 1

    def project(beta: float) -> tuple[float, float]:
        x = weight[:, None] * np.exp(beta * (log_rate - centre))
        gain = max((x * drop).sum() / max((x * x).sum(), np.finfo(float).tiny), 0.0)
        return gain, ((drop - gain * x) ** 2).sum()

    grid = np.linspace(*BETA_RANGE, BETA_GRID)
    best = int(np.argmin([project(beta)[1] for beta in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, BETA_GRID - 1)]
    found = minimize_scalar(lambda beta: project(beta)[1], bounds=around, method="bounded", options={"xatol": 1e-9})
    beta = float(min((found.x, grid[best]), key=lambda candidate: project(candidate)[1]))
    gain = project(beta)[0]
    alpha = float(gain * np.exp(-beta * centre))
    return (alpha, beta, False) if gain > 0 and np.isfinite(alpha) else failure


def _predict(alpha: float, beta: float, weight: np.ndarray, rate: np.ndarray) -> np.ndarray:
    return weight[:, None] * alpha * rate**beta  # [n, K]


def _quality(measured: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """(r2, rmse); r2 is NaN where there is nothing to explain."""
    if not measured.size:
        return np.nan, np.nan
    error = ((measured - predicted) ** 2).mean()
    variance = measured.var()
    return float(1 - error / variance) if variance > 0 else np.nan, float(np.sqrt(error))


def _fit_mse(mse: np.ndarray, bpp_plane: np.ndarray) -> dict:
    """Mean over images of mse [n, K] * 255**2 ~ a * (mean bpp_plane)**b: upstream's loss-rate model of one scale."""
    error, rate = PEAK_SQUARED * mse.mean(0)[None], bpp_plane.mean(0)[None]  # [1, K]
    one = np.ones(1)
    a, b, failed = solve_power(one, error, rate)
    r2 = _json_number(_quality(error, _predict(a, b, one, rate))[0])
    return {"a": a, "b": b, "r2": r2, "flags": ["failed"] if failed else []}


def _fit_rate_phi(bpp_plane: np.ndarray) -> dict:
    """bpp_plane [n, K] ~ a * phi + b; the flag `not_rising` says that a quality cannot be found for a rate."""
    phi = np.broadcast_to(np.arange(bpp_plane.shape[1]), bpp_plane.shape)
    a, b = np.polyfit(phi.ravel(), bpp_plane.ravel(), 1)
    r2 = _json_number(_quality(bpp_plane, a * phi + b)[0])
    return {"a": float(a), "b": float(b), "r2": r2, "flags": [] if a > 0 else ["not_rising"]}


def _fit_rate(bits: np.ndarray, precode: int) -> dict[str, list[float]]:
    """bits [n, K] -> straight lines of log bits over the log bits of quality `precode`, one for each quality."""
    x, y = np.log(bits[:, precode]), np.log(bits)

    def line(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centred = x[chosen] - x[chosen].mean()
        spread = (centred**2).sum()
        slope = centred @ y[chosen] / spread if spread > 0 else np.ones(y.shape[1])
        return slope, y[chosen].mean(0) - slope * x[chosen].mean()

    fold, error = np.arange(len(bits)) % FOLDS, np.zeros(bits.shape)
    for k in np.unique(fold):
        slope, offset = line(fold != k if len(bits) > 1 else fold == k)
        error[fold == k] = np.exp(offset + np.outer(x[fold == k], slope) - y[fold == k]) - 1
    slope, offset = line(np.full(len(bits), True))
    return {"slope": slope.tolist(), "offset": offset.tolist(), "error": np.abs(error).mean(0).tolist()}


def _ratio(loss: float, pseudo_loss: float) -> float:
    return float(loss / pseudo_loss) if loss > 0 and pseudo_loss > 0 else 1.0


def _json_number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and np.isnan(value) else value


def _rows(file: Path, columns: list[str], **where: str) -> pd.DataFrame:
    frame = read_csv(file, [*where, "image_id", "scale", *columns])
    for column, value in where.items():
        frame = frame[frame[column] == value]
    if frame.empty:
        raise InputError(f"{file} has no rows of {where}; run the stage that writes it for them")
    return frame


def _table(frame: pd.DataFrame, column: str, image_ids: np.ndarray, file: Path) -> np.ndarray:
    """One column as [n, 5], every image and scale exactly once."""
    values = frame.set_index(["image_id", "scale"])[column]
    wanted = pd.MultiIndex.from_product([image_ids, SCALES])
    if not values.index.is_unique:
        raise InputError(f"{file}: image, scale {values.index[values.index.duplicated()][0]} is there twice")
    odd = values.index.symmetric_difference(wanted)
    if len(odd):
        raise InputError(f"{file}: image, scale {odd[0]} is missing, or is in this file only; run the stage again")
    table = values.reindex(wanted).to_numpy(float).reshape(len(image_ids), len(SCALES))
    if column not in WITHOUT_TRUTH and not np.isfinite(table).all():
        raise InputError(f"{file}: column {column!r} holds values that are not finite; run the stage again")
    return table
