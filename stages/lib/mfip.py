"""Pyramid -> importance of its five scales (MFIP), learned from the losses that were measured on `fit`.

Two outputs. The weight is the paper's: shares of the scales, which throw the magnitude away. The sensitivity keeps it:
how many times the mean loss of a scale this image loses, so that bits move between images too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d

from stages.lib.features import Features
from stages.lib.files import atomic
from stages.lib.loss_rate import FEW_IMAGES, FOLDS
from stages.lib.models import DEVICE, UNBUILT, load_weights, naming, read_checkpoint
from stages.lib.params import SCALES
from stages.lib.schema import InputError
from stages.lib.shards import map_in_memory

LEAST_WEIGHT = 1e-4  # of the mean weights: a softmax never gives 0
LEAST_STD = 1e-6  # of a statistic; a smaller one is rounding, as the spatial deviation of a map of 1 pixel
CLAMP = 3.0  # standard deviations; a rare image must not reach far beyond what was trained on
BATCH = 32
DROPOUT = 0.5
WEIGHT_DECAY = 0.1
GATE = 2.0  # standard errors by which the network must beat the constant, held out, to be used
OBJECTNESS = 5  # numbers that `objectness` gives of a scale
INPUTS = {"channels": slice(None, -OBJECTNESS), "objectness": slice(-OBJECTNESS, None)}  # of what `describe` gives
CONSTANT = 1e9  # a ridge that leaves the mean sensitivity
RIDGES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, CONSTANT)  # candidates, in units of a standardised input's mean square
LABEL_RANGE = (-1.0, 5.0)  # of sensitivities to learn from: a ratio to a small mean can be any size
LEAST_SENSITIVITY = 0.05  # predicted: no scale of no image is worth nothing
Described = Iterable[tuple[list[int], np.ndarray]]  # batches: image ids, what `describe` says of their pyramids


class MFIP(nn.Module):
    """Importance predictor: weights w_s >= 0, sum_s w_s = 1, and sensitivities k_s > 0, from the pyramid.

        scale [N, C, H_s, W_s] -> describe [N, 3 C + 5] -> standardise -> 1x1 conv shared by the scales, GELU
                                   |             five of these, concatenated -> linear [N, 5] -> + -> softmax -> w
                                   |                               log of the mean weight [5] ---^
                                   '--> five of these, concatenated -> linear [N, 5], a ridge regression -> k

    The last layer starts at zero: the untrained network is the constant mean weight, and training adds only what the
    image shows beyond it. The statistics are fixed, so maps may have any size, and training keeps no pyramid.
    After the importance predictor of MFIBA (arXiv 2503.19278): purpose and weights are the paper's; its exact layers
    are not reproduced, since `fit` has few images and noisy labels, and the input is the sender's own pyramid.
    """

    mean: Tensor
    std: Tensor
    log_mean_weight: Tensor

    def __init__(self, feature_channels: int, channels: int):
        super().__init__()
        width = 3 * feature_channels + OBJECTNESS
        self.sense = nn.Linear(len(SCALES) * width, len(SCALES))
        self.project = nn.Linear(width, channels)  # a 1x1 conv: of a pooled map one pixel is left
        self.weigh = nn.Linear(len(SCALES) * channels, len(SCALES))
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("mean", torch.zeros(len(SCALES), width))  # of the statistics, over training images
        self.register_buffer("std", torch.ones(len(SCALES), width))
        self.register_buffer("log_mean_weight", torch.zeros(len(SCALES)))

    def forward(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """What `describe` gives, [N, 5, 3 C + 5] -> weights and sensitivities [N, 5], in the order of SCALES."""
        sensitivity = self.sense(self.standard(statistics).flatten(1)).clamp(min=LEAST_SENSITIVITY)
        return self.log_weights(statistics).exp(), sensitivity

    def standard(self, statistics: Tensor) -> Tensor:
        return ((statistics - self.mean) / self.std).clamp(-CLAMP, CLAMP)

    def log_weights(self, statistics: Tensor) -> Tensor:
        """What `describe` gives, [N, 5, 3 C + 5] -> [N, 5]."""
        standard = self.standard(statistics)
        hidden = gelu(self.project(self.dropout(standard)))  # [N, 5, channels]
        return (self.log_mean_weight + self.weigh(self.dropout(hidden).flatten(1))).log_softmax(1)


class Trained(NamedTuple):
    model: MFIP
    report: dict  # see `train`
    image_ids: np.ndarray  # [n] rising: every image of the pyramids
    weights: np.ndarray  # [n, 5] of these; labelled images as predicted by a network that never saw their label
    sensitivity: np.ndarray  # [n, 5]; every image without its own label


@torch.inference_mode()
def describe(pyramid: dict[str, Tensor], proposer: nn.Module) -> Tensor:
    """scale -> [N, C, H_s, W_s], head of the region proposal network -> statistics [N, 5, 3 C + 5].

    Of every channel the mean, the spatial deviation and the peak: the deviation tells how much a scale holds, the peak
    beside it whether that is small and sharp or everywhere. Then `objectness`, how many objects hang on the scale.
    """
    scores, _ = proposer([pyramid[scale] for scale in SCALES])
    rows = []
    for scale, score in zip(SCALES, scores, strict=True):
        maps = pyramid[scale].flatten(2)  # [N, C, H W]
        rows.append(torch.cat([maps.mean(2), maps.std(2, correction=0), maps.abs().amax(2), objectness(score)], 1))
    return torch.stack(rows, 1)


def described(features: Features, proposer: nn.Module) -> list[tuple[list[int], np.ndarray]]:
    """`describe` of every pyramid of a split, batch by batch."""

    def of_batch(image_ids: list[int]) -> np.ndarray:
        pyramid = {scale: maps.to(DEVICE) for scale, maps in features.pyramids(image_ids).items()}
        return describe(pyramid, proposer).cpu().numpy()

    batches = list(features.batches())
    return list(zip(batches, map_in_memory(of_batch, batches, "describe"), strict=True))


def variance(statistics: np.ndarray) -> np.ndarray:
    """What `describe` gives, [n, 5, 3 C + 5] -> spatial variance, mean of the channels, [n, 5]."""
    channels = statistics[:, :, INPUTS["channels"]]
    deviation = np.split(channels, 3, 2)[1]
    return (deviation.astype(float) ** 2).mean(2)


def objectness(score: Tensor) -> Tensor:
    """Logits of the anchors of one scale [N, A, H, W] -> [N, 5]: over anchors the sum of the probabilities and of their
    squares, over places the sum of the best anchor's, the same at local maxima only, and the peak."""
    probability = score.sigmoid()
    best = probability.amax(1, keepdim=True)
    peaks = best * (best == max_pool2d(best, 3, 1, 1))
    sums = [part.flatten(1).sum(1) for part in (probability, probability**2, best, peaks)]
    return torch.stack([*sums, best.flatten(1).amax(1)], 1)


def train(
    described: Described,
    labels: dict[int, np.ndarray],
    sensitivities: dict[int, np.ndarray],
    params: dict,
    seed: int,
) -> Trained:
    """Batches (image ids, their `describe`) and labels, id -> weights [5], or NaN, and sensitivities [5], to MFIP.

    `params` is the section mfip of params.yaml. Images whose label is NaN are predicted, not trained on. By 5-fold
    cross-validation (fold = index mod 5) the network is compared with the constant, the mean weight of the training
    folds; only if its KL divergence is lower by 2 standard errors of the paired difference is it used, else MFIP is the
    constant (flag `constant`; below 10 labelled images also `too_few_images`). The sensitivity is a ridge regression,
    whose ridge the same cross-validation chooses for each scale, the constant among the candidates.

    report: n_images, n_labelled, flags, epoch (of the model; 0: the constant), mean_weight per scale, and held_out:
    {network: {kl, mae}, constant: {kl, mae}, gain: {kl, standard_error}, correlation per scale, epochs of the folds};
    sensitivity: scale -> {r2, ridge}, held out, against the mean label.
    """
    image_ids, collected = collect(described)
    statistics = torch.from_numpy(collected)
    unknown = set(image_ids.tolist()) ^ set(labels)
    if unknown:
        raise InputError(
            f"image {min(unknown)} has decoded features or a label, but not both; run compress and measure again"
        )
    target = torch.tensor(np.array([labels[i] for i in image_ids.tolist()]), dtype=torch.float32)
    usable = target.isfinite().all(1)
    n = int(usable.sum())
    if n < 2:
        raise InputError(f"split 'fit' has {n} images with ground truth, MFIP needs 2; raise prepare.images.fit")
    known, label = statistics[usable], target[usable]

    untrained = params | {"epochs": 0}
    fold = torch.arange(n) % FOLDS
    network, constant, epochs = torch.empty_like(label), torch.empty_like(label), []
    for k in fold.unique():
        left = fold == k
        model, epoch = _fit(known[~left], label[~left], params, seed)
        epochs.append(epoch)
        network[left] = _predict(model, known[left])
        # The constant goes the network's way: where nothing was learned the difference is 0, without rounding.
        constant[left] = _predict(_fit(known[~left], label[~left], untrained, seed)[0], known[left])
    gain = _kl(label, constant) - _kl(label, network)  # [n], paired
    standard_error = gain.std().item() / n**0.5
    few = n < FEW_IMAGES
    learned = not few and gain.mean().item() > GATE * standard_error

    model, epoch = _fit(known, label, params if learned else untrained, seed)
    weights = _predict(model, statistics)
    weights[usable] = network if learned else constant

    wanted = torch.from_numpy(np.array([sensitivities[i] for i in image_ids.tolist()]))
    sense = fit_sensitivity(model.standard(statistics).double(), wanted, few)
    model.sense.weight.data.copy_(sense.weight)
    model.sense.bias.data.copy_(sense.bias)
    sensitivity = sense.held_out.clamp(min=LEAST_SENSITIVITY)
    flags = [name for name, raised in (("constant", epoch == 0), ("too_few_images", few)) if raised]
    report = {
        "n_images": len(image_ids),
        "n_labelled": n,
        "flags": flags,
        "epoch": epoch,
        "mean_weight": dict(zip(SCALES, label.mean(0).tolist(), strict=True)),
        "held_out": {
            "network": _errors(label, network),
            "constant": _errors(label, constant),
            "gain": {"kl": gain.mean().item(), "standard_error": standard_error},
            "correlation": dict(zip(SCALES, _correlations(label, network, fold), strict=True)),
            "epochs": epochs,
        },
        "sensitivity": dict(zip(SCALES, sense.report, strict=True)),
    }
    return Trained(model, report, image_ids, weights.numpy(), sensitivity.numpy())


def save(path: Path, model: MFIP) -> None:
    channels, width = model.project.weight.shape
    with atomic(path) as scratch:
        feature_channels = (width - OBJECTNESS) // 3
        torch.save({"state": model.state_dict(), "feature_channels": feature_channels, "channels": channels}, scratch)


def load(path: Path) -> MFIP:
    """The predictor of a file written by `save`, in eval mode."""
    checkpoint = read_checkpoint(path, "feature_channels", "channels")
    with naming(path, UNBUILT):
        model = MFIP(checkpoint["feature_channels"], checkpoint["channels"])
    load_weights(model, checkpoint["state"], str(path))
    return model.eval()


def collect(described: Described) -> tuple[np.ndarray, np.ndarray]:
    """Image ids [n], rising, and statistics [n, 5, 3 C + 5]: all that is kept of the pyramids."""
    image_ids, rows = [], []
    for batch_ids, statistics in described:
        image_ids += batch_ids
        rows.append(statistics)
    order = np.argsort(image_ids)
    return np.array(image_ids)[order], np.concatenate(rows)[order]


def _fit(statistics: Tensor, label: Tensor, params: dict, seed: int) -> tuple[MFIP, int]:
    """Statistics [n, 5, 3 C + 5], label [n, 5] -> the network at the epoch of least validation loss, and this epoch.

    loss = cross-entropy of label and prediction (the KL divergence but for the label's own entropy). Epoch 0 is the
    constant, a candidate like the others; it alone knows the validation labels, so it wins a little too often.
    """
    n = len(label)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MFIP((statistics.shape[2] - OBJECTNESS) // 3, params["channels"])
        std = statistics.std(0, correction=0)
        model.mean.copy_(statistics.mean(0))
        model.std.copy_(torch.where(std > LEAST_STD, std, 1.0))
        model.log_mean_weight.copy_(label.mean(0).clamp(min=LEAST_WEIGHT).log())
        held_out = min(max(1, round(params["validation"] * n)), n - 1)
        validation, rest = torch.randperm(n).split([held_out, n - held_out])
        optimizer = torch.optim.AdamW(model.parameters(), lr=params["lr"], weight_decay=WEIGHT_DECAY)
        best = (_validate(model, statistics[validation], label[validation]), 0, copy.deepcopy(model.state_dict()))
        for epoch in range(1, params["epochs"] + 1):
            model.train()
            for batch in rest[torch.randperm(len(rest))].split(BATCH):
                optimizer.zero_grad()
                _cross_entropy(label[batch], model.log_weights(statistics[batch])).backward()
                optimizer.step()
            loss = _validate(model, statistics[validation], label[validation])
            if loss < best[0]:
                best = (loss, epoch, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[2])
    return model.eval(), best[1]


class Sense(NamedTuple):
    weight: Tensor  # [5, 5 (3 C + 5)]
    bias: Tensor  # [5]
    held_out: Tensor  # [n, 5], predicted without the image's fold
    report: list[dict[str, float | None]]  # of each scale


def fit_sensitivity(standard: Tensor, label: Tensor, constant: bool, kinds: Iterable[str] = tuple(INPUTS)) -> Sense:
    """Standardised statistics [n, 5, 3 C + 5], labels [n, 5], float64 -> a ridge regression for each scale.

    `kinds`: the numbers that it sees; the few of objectness weigh as much as all those of the channels
    together. `constant`: learn the mean only.
    """
    label = label.clamp(*LABEL_RANGE)
    share = standard.new_zeros(standard.shape[1:])
    for kind in kinds:
        part = share[:, INPUTS[kind]]
        part += 1 / math.sqrt(part.numel())
    inputs = (standard * share).flatten(1)

    def solve(chosen: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """-> slopes [5 (3 C + 5), 5], bias [5], from the side of the images: they are fewer than the numbers."""
        centre, mean = inputs[chosen].mean(0), label[chosen].mean(0)
        x = inputs[chosen] - centre
        slopes = x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x), dtype=x.dtype), label[chosen] - mean)
        return slopes, mean - centre @ slopes

    candidates = (CONSTANT,) if constant else RIDGES
    predicted, fold = torch.empty(len(candidates), *label.shape, dtype=label.dtype), torch.arange(len(label)) % FOLDS
    for c, ridge in enumerate(candidates):
        for k in fold.unique():
            left = fold == k
            slopes, bias = solve(~left, ridge)
            predicted[c, left] = inputs[left] @ slopes + bias
    error = (predicted - label).square().mean(1)  # [candidates, 5]
    best = error.argmin(0)
    everything = torch.ones(len(label), dtype=torch.bool)
    solved = {c: solve(everything, candidates[c]) for c in set(best.tolist())}
    weights, biases, report = [], [], []
    for s, c in enumerate(best.tolist()):
        slopes, all_bias = solved[c]
        weights.append(slopes[:, s] * share.flatten())
        biases.append(all_bias[s])
        variance = label[:, s].var(correction=0).item()
        r2 = 1 - error[c, s].item() / variance if variance > LEAST_STD else None
        report.append({"r2": r2, "ridge": candidates[c]})
    chosen = predicted.gather(0, best[None, None].expand(1, *label.shape))[0]
    return Sense(torch.stack(weights), torch.stack(biases), chosen, report)


def learned_sensitivity(
    model: MFIP, fit: np.ndarray, labels: np.ndarray, test: np.ndarray, kinds: Iterable[str]
) -> np.ndarray:
    """Statistics of fit [m, 5, 3 C + 5], their labels [m, 5], statistics of test -> predicted sensitivities [n, 5].

    As `train` fits it, standardised as in `model`, but from these labels and these kinds of numbers.
    """
    known, new = (model.standard(torch.from_numpy(part)).double() for part in (fit, test))
    sense = fit_sensitivity(known, torch.from_numpy(labels), len(labels) < FEW_IMAGES, kinds)
    predicted = new.flatten(1) @ sense.weight.T + sense.bias
    return predicted.clamp(min=LEAST_SENSITIVITY).numpy()


def _cross_entropy(label: Tensor, log_weights: Tensor) -> Tensor:
    return -(label * log_weights).sum(1).mean()


@torch.no_grad()
def _validate(model: MFIP, statistics: Tensor, label: Tensor) -> float:
    return _cross_entropy(label, model.eval().log_weights(statistics)).item()


@torch.no_grad()
def _predict(model: MFIP, statistics: Tensor) -> Tensor:
    return model.log_weights(statistics).exp()  # [n, 5]


def _kl(label: Tensor, predicted: Tensor) -> Tensor:
    """sum_s label_s * ln(label_s / predicted_s), [n], with 0 ln 0 = 0."""
    return (torch.xlogy(label, label) - torch.xlogy(label, predicted.clamp(min=LEAST_WEIGHT))).sum(1)


def _errors(label: Tensor, predicted: Tensor) -> dict[str, float]:
    return {"kl": _kl(label, predicted).mean().item(), "mae": (predicted - label).abs().mean().item()}


def _correlations(label: Tensor, predicted: Tensor, fold: Tensor) -> list[float | None]:
    """Pearson's r per scale within the folds; None where either side does not vary.

    Across folds it would mislead: a fold of high labels leaves a low mean to its network's training.
    """
    label, predicted = label.double(), predicted.double()
    for k in fold.unique():
        label[fold == k] -= label[fold == k].mean(0)
        predicted[fold == k] -= predicted[fold == k].mean(0)
    scale = label.norm(dim=0) * predicted.norm(dim=0)
    return [(x / s).item() if s > LEAST_STD else None for x, s in zip((label * predicted).sum(0), scale, strict=True)]
