"""A tiny ELIC, and features of waves to train it on."""

from pathlib import Path

import pytest
import torch
from artifacts import write_features

from stages.lib.coding import build_codec
from stages.lib.models import Sizes
from stages.lib.params import SCALES
from stages.lib.planes import Packing

CHANNELS = 4  # tiled 2 x 2
SIDES = {"0": 48, "1": 24, "2": 12, "3": 6, "pool": 3}  # planes of 96, 48, 24, 12, 6 px
CONFIG = {
    "codec": "elic",
    "packing": "pca",
    "network": {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [8, 8], "kernel": 3}},
    "lambda_range": [1e-4, 0.05],
    "gains": 3,
}
WIDE = {
    "N": 64,
    "M": 256,
    "groups": [64, 192],
    "context": {"widths": [8, 8], "kernel": 3},
}  # can start as a transform
PLAIN = Packing("pca", {s: torch.eye(CHANNELS) for s in SCALES}, {s: torch.zeros(CHANNELS) for s in SCALES})


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Three images in each split: waves whose channels depend on each other, and some noise."""
    path = tmp_path_factory.mktemp("features") / "f"
    torch.manual_seed(0)
    mix = {scale: torch.randn(CHANNELS, CHANNELS) for scale in SCALES}
    items = []
    for split in ("fit", "train"):
        for image_id in range(3):
            pyramid = {}
            for scale, side in SIDES.items():
                x = torch.arange(side) * (40 / side)
                waves = torch.stack([torch.sin(x / (c + 2) + image_id) for c in range(CHANNELS)])
                maps = waves[:, None] * waves[:, :, None] + 0.02 * torch.randn(CHANNELS, side, side)
                pyramid[scale] = torch.einsum("kc,chw->khw", mix[scale], maps)[None] + 1
            items.append((split, image_id, pyramid, Sizes((192, 192), (192, 192), (192, 192))))
    write_features(path, items)
    return path


def tiny():
    torch.manual_seed(0)
    return build_codec(CONFIG)
