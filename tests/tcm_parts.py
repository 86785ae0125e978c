"""Parts and inputs of LIC-TCM, for its tests."""

import pytest
import torch
from torch import Tensor, nn

from stages.lib.tcm import WindowAttention

WINDOW = 4


@pytest.fixture
def no_initial_weights(monkeypatch):
    """Large networks are built at once, with whatever the memory holds."""
    for layer in (nn.Conv2d, nn.Linear):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(shift: int) -> WindowAttention:
    torch.manual_seed(1)
    layer = WindowAttention(8, [WINDOW] * 2, [shift] * 2, 2)
    nn.init.normal_(layer.relative_position_bias_table, std=2)  # so that a wrong entry shows
    return layer.requires_grad_(False)
