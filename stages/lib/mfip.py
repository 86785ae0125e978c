"""Decoded pyramid -> importance of its five scales (MFIP), learned from drops that were measured on `fit`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from stages.lib.params import SCALES

LEAST_WEIGHT = 1e-4  # of the mean weights: a softmax cannot start at 0
CLAMP = 3.0  # standard deviations; a rare image must not reach far beyond what was trained on
BATCH = 32
DROPOUT = 0.5
WEIGHT_DECAY = 0.1


class MFIP(nn.Module):
    """Importance predictor: w_s >= 0, sum_s w_s = 1, from the pyramid that sender and receiver both can decode.

        pyramid[s] [N, C, H_s, W_s] -> describe -> [N, 3 C] -> standardise -> 1x1 conv, GELU (shared) -> [N, channels]
                                                                     five of them, concatenated -> linear -> [N, 5]
                                                        log of the mean weight [5] -------------------> + -> softmax

    The last layer starts at zero, so the untrained network is the constant mean weight, and training only adds what
    the images show beyond it. The statistics are fixed, so the maps of a scale may have any size, and training needs
    no pyramid twice. After the importance predictor of MFIBA (arXiv 2503.19278): input, output and purpose are the
    paper's; its layers, made for a hundred times more labels than `fit` has here, are not reproduced.
    """

    def __init__(self, feature_channels: int, channels: int):
        super().__init__()
        width = 3 * feature_channels
        self.project = nn.Linear(width, channels)  # a 1x1 conv: after pooling, each scale is one pixel
        self.weigh = nn.Linear(len(SCALES) * channels, len(SCALES))
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("mean", torch.zeros(len(SCALES), width))  # of the statistics, over training images
        self.register_buffer("std", torch.ones(len(SCALES), width))
        self.register_buffer("log_mean_weight", torch.full((len(SCALES),), -np.log(len(SCALES))))

    def forward(self, pyramid: dict[str, Tensor]) -> Tensor:
        """scale -> [N, C, H_s, W_s] to weights [N, 5], in the order of SCALES."""
        return self.log_weights(describe(pyramid).to(self.mean.device)).exp()

    def log_weights(self, statistics: Tensor) -> Tensor:
        """[N, 5, 3 C] as `describe` gives them -> [N, 5]."""
        standard = ((statistics - self.mean) / self.std).clamp(-CLAMP, CLAMP)
        hidden = gelu(self.project(self.dropout(standard)))  # [N, 5, channels]
        return (self.log_mean_weight + self.weigh(self.dropout(hidden).flatten(1))).log_softmax(1)


@torch.inference_mode()
def describe(pyramid: dict[str, Tensor]) -> Tensor:
    """scale -> [N, C, H_s, W_s] to statistics [N, 5, 3 C]: mean, spatial deviation and peak of each channel.

    The deviation tells how much there is on a scale, the peak over it whether that is small and sharp or everywhere.
    """
    rows = []
    for scale in SCALES:
        maps = pyramid[scale].flatten(2)  # [N, C, H W]
        rows.append(torch.cat([maps.mean(2), maps.std(2, correction=0), maps.abs().amax(2)], 1))
    return torch.stack(rows, 1)
