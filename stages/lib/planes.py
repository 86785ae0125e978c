"""Pyramid <-> planes: one scale, channel-rotated, normalised and tiled into an image that an image codec takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stages.lib.params import SCALES

# Channels that a quilt interleaves; more make several quilts, in tiles. A latent sees 16 x 16 samples: of 32 channels
# 2 x 4 places, of 256 it would be one place, where the rotation leaves nothing for a transform to gain.
QUILTED = 32


class Range(NamedTuple):
    """Feature values that a plane's 0 and 1 stand for; float16, since the receiver is sent these very numbers."""

    low: float
    high: float


class Packing(NamedTuple):
    """How feature maps become planes. The basis belongs to the codec's weights and costs no bits.

    kind: `tile` (the paper's: channels as they are, in tiles, 3 per pixel), `pca` (grey planes of rotated, centred
        channels, in tiles) or `quilt` (the same, interleaved: all channels of a pixel stand side by side). Tiling and
        quilting after Choi and Bajic, Deep Feature Compression for Collaborative Object Detection, ICIP 2018.
    basis: scale -> [C, C], rows orthonormal, by falling variance (not `tile`).
    mean: scale -> [C], the mean over the training split (not `tile`).
    """

    kind: str
    basis: dict[str, Tensor]
    mean: dict[str, Tensor]

    @property
    def plane_channels(self) -> int:
        return 3 if self.kind == "tile" else 1


def learn_packing(kind: str, moments: dict[str, tuple[int, Tensor, Tensor]]) -> Packing:
    """The packing from sums over `train`: scale -> (count, sum [C], sum of outer products [C, C]), float64."""
    if kind == "tile":
        return Packing(kind, {}, {})
    basis, mean = {}, {}
    for scale in SCALES:
        count, first, second = moments[scale]
        mean[scale] = (first / count).float()
        covariance = second / count - torch.outer(first, first) / count**2
        basis[scale] = principal(covariance)
    return Packing(kind, basis, mean)


def principal(covariance: Tensor) -> Tensor:
    """[n, n], float64 -> its eigenvectors as rows, by falling eigenvalue, float32."""
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1).T  # rising eigenvalues -> falling
    # eigh leaves the sign open: make the largest entry of each row positive.
    sign = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return (vectors * sign).float().contiguous()


def grid(tiles: int) -> tuple[int, int]:
    """Rows and columns of the tiling: without empty tiles if the sides' ratio stays within 2, else nearly square."""
    rows = math.isqrt(tiles - 1) + 1 if tiles > 1 else 1
    for exact in range(rows, 2 * rows):
        if tiles % exact == 0 and exact <= 2 * (tiles // exact):
            return exact, tiles // exact
    return rows, -(-tiles // rows)


def layout(channels: int, packing: Packing) -> tuple[int, int, int, int]:
    """Rows and columns of tiles, and of the channels that are interleaved in a tile."""
    c = packing.plane_channels
    together = min(channels, QUILTED) if packing.kind == "quilt" else 1
    return *grid(-(-channels // (c * together))), *grid(together)


def pack(features: Tensor, scale: str, packing: Packing) -> tuple[Tensor, Range]:
    """Features of one image [C, H, W] -> plane [c, gh*H, gw*W] in [0, 1] and its range."""
    channels, height, width = features.shape
    if packing.kind != "tile":
        centred = features - packing.mean[scale][:, None, None]
        features = torch.einsum("kc,chw->khw", packing.basis[scale], centred)
        peak = _float16_above(features.abs().max().item())
        value_range = Range(-peak, peak)  # symmetric: a feature at its mean is 0.5 in every plane
    else:
        value_range = Range(-_float16_above(-features.min().item()), _float16_above(features.max().item()))
    c = packing.plane_channels
    rows, columns, down, right = layout(channels, packing)
    span = value_range.high - value_range.low or 1.0
    plane = features.new_full((c * rows * columns * down * right, height, width), 0.5)  # where there is no channel
    plane[:channels] = (features - value_range.low) / span
    plane = plane.view(rows, columns, down, right, c, height, width).permute(4, 0, 5, 2, 1, 6, 3)
    return plane.reshape(plane_shape(channels, height, width, packing)), value_range


def unpack(plane: Tensor, value_range: Range, scale: str, channels: int, packing: Packing) -> Tensor:
    """Inverse of `pack`: plane [c, gh*H, gw*W] -> features [C, H, W]."""
    rows, columns, down, right = layout(channels, packing)
    height, width = plane.shape[1] // (rows * down), plane.shape[2] // (columns * right)
    tiles = plane.view(-1, rows, height, down, columns, width, right).permute(1, 4, 3, 6, 0, 2, 5)
    tiles = tiles.reshape(-1, height, width)
    features = tiles[:channels] * (value_range.high - value_range.low) + value_range.low
    if packing.kind != "tile":
        rotated = torch.einsum("kc,khw->chw", packing.basis[scale], features)
        features = rotated + packing.mean[scale][:, None, None]
    return features


def plane_shape(channels: int, height: int, width: int, packing: Packing) -> tuple[int, int, int]:
    """Shape of the plane of a feature map [C, H, W]: what the receiver derives instead of being told."""
    rows, columns, down, right = layout(channels, packing)
    return packing.plane_channels, rows * down * height, columns * right * width


def _float16_above(value: float) -> float:
    """The smallest float16 that is at least `value`: the range must hold every feature."""
    rounded = torch.tensor(value, dtype=torch.float16)
    if rounded.item() < value:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.float16))
    return rounded.item()
