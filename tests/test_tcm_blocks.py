"""The blocks of LIC-TCM: windows, and the two halves of a block."""

import pytest
import torch
from tcm_parts import WINDOW, attention, noise
from torch import Tensor, nn

from stages.lib import tcm
from stages.lib.tcm import SwinAttention, TcmBlock, swin


def changed_by(module: nn.Module, shape: tuple[int, ...], position: tuple[int, ...]) -> Tensor:
    """Where the output for a map [1, *shape] changes if one input value does."""
    x = noise(1, *shape)
    other = x.clone()
    other[(0, *position)] += 1
    with torch.no_grad():
        return ((module(x) - module(other)).abs() > 1e-7)[0]


@pytest.mark.parametrize("windows", [1, 3, 100])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 10), (9, 3), (4, 4), (2, 1)])
def test_window_attention_is_attention_among_positions_between_the_same_borders(size, shift, windows, monkeypatch):
    monkeypatch.setattr(tcm, "PART", 2 * WINDOW**2 * windows)  # that are attended to at a time
    layer, x = attention(shift), noise(2, *size, 8)
    bias, same = 0, True
    for axis, (n, stride) in enumerate(zip(size, (2 * WINDOW - 1, 1), strict=True)):
        at = torch.meshgrid(*map(torch.arange, size), indexing="ij")[axis].flatten()
        # Borders lie at the multiples of the window, or half a window later, if there is more than one window.
        window = (at - (shift if n > WINDOW else 0)).div(WINDOW, rounding_mode="floor")
        same = same & (window[:, None] == window)
        bias = bias + (at[:, None] - at + WINDOW - 1) * stride
    bias = layer.relative_position_bias_table[torch.where(same, bias, 0)].movedim(2, 0)
    q, k, v = layer.qkv(x.flatten(1, 2)).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    shares = (q @ k.mT / 2 + bias.masked_fill(~same, -torch.inf)).softmax(-1)  # 2: root of the head dim
    expected = layer.proj((shares @ v).transpose(1, 2).flatten(2)).view_as(x)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_shifted_windows_see_across_the_borders_of_regular_ones():
    regular, shifted = (changed_by(swin(8, 4, WINDOW, [s]), (8, 8, 8), (0, 3, 3)).any(0) for s in (False, True))
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[0, :4, :4] = expected[1, 2:6, 2:6] = True
    assert torch.equal(regular, expected[0])
    assert torch.equal(shifted, expected[1])


def test_padding_is_not_seen():
    layer, x = attention(0), noise(1, 6, 7, 8)
    parts = [[layer(x[:, i : i + 4, j : j + 4]) for j in (0, 4)] for i in (0, 4)]  # 4x4, 4x3, 2x4, 2x3
    assert torch.allclose(layer(x), torch.cat([torch.cat(row, 2) for row in parts], 1), atol=1e-6)


def test_a_map_in_parts_becomes_the_same(monkeypatch):
    blocks, x = swin(8, 4, WINDOW, [False, True]), noise(2, 8, 9, 14)
    whole = blocks(x)
    for rows in (1, 2, 4):
        monkeypatch.setattr(tcm, "PART", 2 * 14 * rows)
        assert torch.allclose(blocks(x), whole, atol=1e-6)


def test_the_position_bias_knows_distances_only():
    x = noise(1, 8, 8, 8)
    # The corner stands at the end of a shifted window with the rest of it masked, and at the start of its own.
    assert torch.allclose(attention(2)(x)[:, :2, :2], attention(0)(x[:, :2, :2]), atol=1e-6)


def test_one_half_of_a_tcm_block_is_local_and_the_other_sees_its_window():
    torch.manual_seed(0)
    block = TcmBlock(8, 4, WINDOW, shifted=False)
    for mix in (block.split, block.merge):
        nn.init.dirac_(mix.weight)
    near, far = (changed_by(block, (16, 12, 12), (channel, 4, 4)) for channel in (0, 8))
    expected = torch.zeros(2, 16, 12, 12, dtype=torch.bool)
    expected[0, :8, 2:7, 2:7] = True  # two 3x3 convolutions
    expected[1, 8:, 4:8, 4:8] = True
    assert not (near & ~expected[0]).any() and near[:8].any(0).sum() == 25
    assert not (far & ~expected[1]).any() and far[8:].any(0).sum() == 16


def test_the_local_half_skips_its_convolutions_twice():
    torch.manual_seed(0)
    block, x = TcmBlock(8, 4, WINDOW, shifted=False).requires_grad_(False), noise(1, 16, 8, 8)
    for mix in (block.split, block.merge):
        nn.init.dirac_(mix.weight)
        nn.init.zeros_(mix.bias)
    nn.init.zeros_(block.convolutions.conv2.weight)
    nn.init.zeros_(block.convolutions.conv2.bias)
    assert torch.allclose(block(x)[:, :8], 3 * x[:, :8])  # the skips around the block, and around its convolutions


@pytest.mark.parametrize("size", [(8, 8), (5, 3)])
def test_a_shut_gate_leaves_slice_attention_a_pair_of_1x1_convolutions(size):
    torch.manual_seed(0)
    layer, x = SwinAttention(24, 16, WINDOW).requires_grad_(False), noise(2, 24, *size)
    linear = layer.expand(layer.squeeze(x))
    assert layer(x).shape == x.shape
    assert not torch.allclose(layer(x), linear, atol=1e-3)
    nn.init.constant_(layer.conv_b[-1].bias, -1e4)
    assert torch.equal(layer(x), linear)


def test_slice_attention_sees_regular_and_then_shifted_windows_through_its_gate():
    torch.manual_seed(0)
    layer = SwinAttention(24, 16, WINDOW)

    def reach() -> int:
        return changed_by(layer, (24, 16, 16), (0, 0, 0)).nonzero().max(0).values[1:].max().item()

    # From 0: 3 by the regular window, 5 by the shifted one after it, and 3 more by three 3x3 convolutions, but faintly.
    assert 3 + 3 < reach() <= 5 + 3
    nn.init.zeros_(layer.conv_b[-1].weight)
    assert reach() <= 3
