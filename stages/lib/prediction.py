"""Pyramids of `train` -> what a receiver puts in the place of a scale that is not sent, from the next coarser one.

Skipping a scale is a quality below the lowest, SKIPPED, for no bits. A feature pyramid is built from coarse to fine:
scale s holds the finer side of s + 1, so much of it can be told from there (on the default profile's scale 0 four
fifths of the variance). Scale `pool` is a subsample of scale 3, which the receiver has; nothing tells of scale 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.features import Features
from stages.lib.files import atomic
from stages.lib.models import DEVICE, UNBUILT, load_weights, naming, read_checkpoint
from stages.lib.params import COARSE_TO_FINE, COARSER, SCALES
from stages.lib.progress import progress

NOTHING = 0.0  # what stands for scale 3, all over: it shows the heads no object, where the mean shows them some
KERNEL = 5  # places of the coarser scale, each way, that a prediction sees
PLACES = 20_000  # of the coarser scale, drawn from all images, that it is fitted on
RIDGE = 0.01  # times the places and the variance of the features


class Predictor(nn.Module):
    """Linear prediction of scales 0, 1, 2 from the next coarser: a 5x5 convolution, four fine places from each coarse.

    Features of C channels; the coarser maps are what the receiver has of them, sent or predicted.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        layers = {scale: nn.Conv2d(channels, 4 * channels, KERNEL, padding=KERNEL // 2) for scale in SCALES[:3]}
        self.layers: Mapping[str, nn.Conv2d] = nn.ModuleDict(layers)  # type: ignore[assignment]  # forgets what it holds
        self.requires_grad_(False)  # solved for, not trained

    def forward(self, scale: str, coarser: Tensor) -> Tensor:
        """[N, C, h, w] of COARSER[scale] -> `scale`: [N, C, 2 h, 2 w], or pool's [N, C, ceil(h / 2), ceil(w / 2)]."""
        if scale == "pool":
            return coarser[:, :, ::2, ::2]  # torchvision's max_pool2d(kernel 1, stride 2)
        return functional.pixel_shuffle(self.layers[scale](coarser), 2)

    def complete(self, received: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Scales that were sent, and the shape [N, C, h, w] of scale 3 -> all five scales."""
        pyramid: dict[str, Tensor] = {}
        for scale in COARSE_TO_FINE:
            if scale in received:
                pyramid[scale] = received[scale]
            elif scale in COARSER:
                pyramid[scale] = self(scale, pyramid[COARSER[scale]])
            else:
                pyramid[scale] = self.layers["0"].weight.new_full(shape, NOTHING)
        return {scale: pyramid[scale] for scale in SCALES}


def fit(features: Features, seed: int) -> Predictor:
    """Ridge regression on places drawn from the split, in float64; memory does not grow with the images."""
    channels = len(features.scale(features.image_ids[0], "3"))
    predictor, rng = Predictor(channels), np.random.default_rng(seed)
    inputs, outputs = channels * KERNEL**2, 4 * channels
    share = -(-PLACES // len(features.image_ids))  # of each image
    sums = {scale: torch.zeros(1 + inputs, 1 + inputs + outputs, dtype=torch.float64) for scale in SCALES[:3]}
    for image_id in progress(features.image_ids, "prediction of scales", len(features.image_ids)):
        for scale, moments in sums.items():
            coarser, fine = features.scale(image_id, COARSER[scale]), features.scale(image_id, scale)
            x = functional.unfold(coarser[None], KERNEL, padding=KERNEL // 2)[0]  # [25 C, h w]
            y = functional.pixel_unshuffle(fine, 2).flatten(1)  # [4 C, h w]
            places = np.sort(rng.permutation(x.shape[1])[:share])
            x, y = x[:, places].double(), y[:, places].double()
            ones = x.new_ones(1, len(places))
            moments += torch.cat([ones, x]) @ torch.cat([ones, x, y]).T
    for scale, moments in sums.items():
        weight, bias = _ridge(moments, inputs)
        weight = weight.T.view(outputs, channels, KERNEL, KERNEL)
        predictor.layers[scale].load_state_dict({"weight": weight, "bias": bias})
    return predictor


def _ridge(moments: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Sums of (1, x) (1, x, y)^T -> slopes [inputs, outputs], bias [outputs]."""
    count = moments[0, 0]
    mean = moments[0, 1:] / count
    covariance = moments[1:, 1:] / count - torch.outer(mean[:inputs], mean)
    square = covariance[:, :inputs]
    ridge = RIDGE * square.trace() / inputs
    slopes = torch.linalg.solve(square + ridge * torch.eye(inputs, dtype=square.dtype), covariance[:, inputs:])
    return slopes, mean[inputs:] - mean[:inputs] @ slopes


def save(path: Path, predictor: Predictor) -> None:
    with atomic(path) as scratch:
        torch.save({"state": predictor.state_dict(), "channels": predictor.channels}, scratch)


def load(path: Path) -> Predictor:
    """The predictor of a file written by `save`, in eval mode on DEVICE."""
    checkpoint = read_checkpoint(path, "channels")
    with naming(path, UNBUILT):
        predictor = Predictor(checkpoint["channels"])
    load_weights(predictor, checkpoint["state"], str(path))
    return predictor.eval().to(DEVICE)
