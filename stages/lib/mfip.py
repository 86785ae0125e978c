"""Decoded pyramid -> importance of its five scales (MFIP), learned from drops that were measured on `fit`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from stages.lib.files import atomic
from stages.lib.loss_rate import FEW_IMAGES, FOLDS
from stages.lib.models import load_weights, read_checkpoint
from stages.lib.params import SCALES, InputError

LEAST_WEIGHT = 1e-4  # of the mean weights: a softmax never gives 0
LEAST_STD = 1e-6  # of a statistic; a smaller one is rounding, as the spatial deviation of a map of 1 pixel
CLAMP = 3.0  # standard deviations; a rare image must not reach far beyond what was trained on
BATCH = 32
DROPOUT = 0.5
WEIGHT_DECAY = 0.1
GATE = 2.0  # standard errors by which the network must beat the constant, held out, to be used


class MFIP(nn.Module):
    """Importance predictor: w_s >= 0, sum_s w_s = 1, from the decoded pyramid, which the receiver could do as well.

        scale [N, C, H_s, W_s] -> describe [N, 3 C] -> standardise -> 1x1 conv shared by the scales, GELU [N, channels]
                                               five of these, concatenated -> linear [N, 5] -> + -> softmax -> w
                                                                 log of the mean weight [5] ---^

    The last layer starts at zero: the untrained network is the constant mean weight, and training adds only what the
    image shows beyond it. The statistics are fixed, so maps may have any size, and training keeps no pyramid.
    After the importance predictor of MFIBA (arXiv 2503.19278): input, output and purpose are the paper's; its exact
    layers are not reproduced, since `fit` has few images and noisy labels.
    """

    def __init__(self, feature_channels: int, channels: int):
        super().__init__()
        width = 3 * feature_channels
        self.project = nn.Linear(width, channels)  # a 1x1 conv: of a pooled map one pixel is left
        self.weigh = nn.Linear(len(SCALES) * channels, len(SCALES))
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("mean", torch.zeros(len(SCALES), width))  # of the statistics, over training images
        self.register_buffer("std", torch.ones(len(SCALES), width))
        self.register_buffer("log_mean_weight", torch.zeros(len(SCALES)))

    def forward(self, pyramid: dict[str, Tensor]) -> Tensor:
        """scale -> [N, C, H_s, W_s] to weights [N, 5], in the order of SCALES."""
        return self.log_weights(describe(pyramid).to(self.mean.device)).exp()

    def log_weights(self, statistics: Tensor) -> Tensor:
        """What `describe` gives, [N, 5, 3 C] -> [N, 5]."""
        standard = ((statistics - self.mean) / self.std).clamp(-CLAMP, CLAMP)
        hidden = gelu(self.project(self.dropout(standard)))  # [N, 5, channels]
        return (self.log_mean_weight + self.weigh(self.dropout(hidden).flatten(1))).log_softmax(1)


class Trained(NamedTuple):
    model: MFIP
    report: dict  # see `train`
    image_ids: np.ndarray  # [n] rising: every image of the pyramids
    weights: np.ndarray  # [n, 5] of these; labelled images as predicted by a network that never saw their label


def describe(pyramid: dict[str, Tensor]) -> Tensor:
    """scale -> [N, C, H_s, W_s] to statistics [N, 5, 3 C]: mean, spatial deviation and peak of every channel.

    The deviation tells how much a scale holds, the peak beside it whether that is small and sharp or everywhere.
    """
    rows = []
    for scale in SCALES:
        maps = pyramid[scale].flatten(2)  # [N, C, H W]
        rows.append(torch.cat([maps.mean(2), maps.std(2, correction=0), maps.abs().amax(2)], 1))
    return torch.stack(rows, 1)


def train(
    described: Iterable[tuple[list[int], np.ndarray]],
    labels: dict[int, np.ndarray],
    params: dict,
    seed: int,
) -> Trained:
    """Batches (image ids, their `describe` [N, 5, 3 C]) and labels, id -> [5] or NaN, to a network or the constant.

    `params` is the section mfip of params.yaml. Images whose label is NaN are predicted, not trained on. By 5-fold
    cross-validation (fold = index mod 5) the network is compared with the constant, the mean weight of the training
    folds; only if its KL divergence is lower by 2 standard errors of the paired difference is it used, else MFIP is the
    constant (flag `constant`; below 10 labelled images also `too_few_images`).

    report: n_images, n_labelled, flags, epoch (of the model; 0: the constant), mean_weight per scale, and held_out:
    {network: {kl, mae}, constant: {kl, mae}, gain: {kl, standard_error}, correlation per scale, epochs of the folds}.
    """
    image_ids, statistics = _collect(described)
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
    }
    if flags:
        warnings.warn(f"MFIP learned nothing beyond the mean weight: {report}", stacklevel=2)
    return Trained(model, report, image_ids, weights.numpy())


def save(path: Path, model: MFIP) -> None:
    channels, width = model.project.weight.shape
    with atomic(path) as scratch:
        torch.save({"state": model.state_dict(), "feature_channels": width // 3, "channels": channels}, scratch)


def load(path: Path) -> MFIP:
    """The predictor of a file written by `save`, in eval mode."""
    checkpoint = read_checkpoint(path)
    model = MFIP(checkpoint["feature_channels"], checkpoint["channels"])
    load_weights(model, checkpoint["state"], str(path))
    return model.eval()


def _collect(described: Iterable[tuple[list[int], np.ndarray]]) -> tuple[np.ndarray, Tensor]:
    """Image ids [n], rising, and statistics [n, 5, 3 C]: all that is kept of the pyramids."""
    image_ids, rows = [], []
    for batch_ids, statistics in described:
        image_ids += batch_ids
        rows.append(statistics)
    order = np.argsort(image_ids)
    return np.array(image_ids)[order], torch.from_numpy(np.concatenate(rows)[order])


def _fit(statistics: Tensor, label: Tensor, params: dict, seed: int) -> tuple[MFIP, int]:
    """Statistics [n, 5, 3 C], label [n, 5] -> the network at the epoch of least validation loss, and this epoch.

    loss = cross-entropy of label and prediction (the KL divergence but for the label's own entropy). Epoch 0 is the
    constant, a candidate like the others; it alone knows the validation labels, so it wins a little too often.
    """
    n = len(label)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MFIP(statistics.shape[2] // 3, params["channels"])
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
