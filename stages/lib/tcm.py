"""LIC-TCM: a transform of mixed transformer-CNN blocks and a channel-wise entropy model with window attention.

    x -> g_a -> y ---> round(y - mean) + mean, slice by slice ---> y_hat -> g_s -> x_hat
                |                   ^         ^
               h_a -> z -> z_hat -> h_s       earlier slices of y_hat

Liu, Sun, Katto, Learned Image Compression with Mixed Transformer-CNN Architectures, CVPR 2023 (arXiv 2303.14978);
windows and their shift: Liu et al., Swin Transformer, ICCV 2021; latent residual prediction: Minnen, Singh,
Channel-wise Autoregressive Entropy Models for Learned Image Compression, ICIP 2020.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import (
    AttentionBlock,
    ResidualBlock,
    ResidualBlockUpsample,
    ResidualBlockWithStride,
    conv1x1,
    conv3x3,
    subpel_conv3x3,
)
from compressai.models import CompressionModel
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock
from torchvision.ops import Permute

from stages.lib.learned import Code, packet

PART = 2**16  # positions of maps whose attention and hidden layers are in memory at a time: large maps have millions
SLICE_HEAD_DIM = 16  # of the attention in front of a slice's mean and scale, at every width


class WindowAttention(ShiftedWindowAttention):
    """torchvision's window attention with padding masked out; its own would attend to what it pads maps with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        index = self.relative_position_index  # follows from the window's size: weights need not hold it
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same shape, for any H and W."""
        _, height, width, _ = x.shape
        size = self.window_size[0]
        # A shift moves the borders between windows, and one window has none.
        shifts = [shift if n > size else 0 for shift, n in zip(self.shift_size, (height, width), strict=True)]
        right, down = -width % size, -height % size
        if right or down:
            x = functional.pad(x, (0, 0, 0, right, 0, down))
        if any(shifts):
            x = x.roll([-shift for shift in shifts], (1, 2))
        rows = x.shape[1] // size
        x = _windows(x, size)  # [B, n, L, C]: n windows, L = size^2
        step = max(1, PART // (len(x) * size**2))
        masked = right or down or any(shifts)
        regions = _regions((height, width), tuple(shifts), size, x.device).split(step) if masked else repeat(None)
        x = torch.cat([self._attended(*part) for part in zip(x.split(step, 1), regions, strict=False)], 1)
        x = x.unflatten(2, (size, size)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shifts):
            x = x.roll(shifts, (1, 2))
        return x[:, :height, :width]

    def _attended(self, x: Tensor, region: Tensor | None) -> Tensor:
        """Windows [B, n, L, C] -> the same shape; a position sees those of its window's that have its `region`
        [n, 1, L, 1] (None: all)."""
        bias = self.get_relative_position_bias()  # [1, heads, L, L]
        if region is not None:
            bias = bias.masked_fill(region != region.mT, -torch.inf).expand(len(x), -1, -1, -1, -1).flatten(0, 1)
        kind = torch.float32 if x.is_cpu else x.dtype  # on a CPU attention takes twice as long in bfloat16
        qkv = self.qkv(x).to(kind).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B n, heads, L, C / heads]
        attended = functional.scaled_dot_product_attention(q, k, v, bias.to(kind)).to(x.dtype)
        return self.proj(attended.transpose(1, 2).flatten(2)).view_as(x)


class SwinBlock(SwinTransformerBlock):
    """torchvision's; the hidden layer, four times as wide as the map, is there for a part of it at a time."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        parts = x.split(max(1, PART // (len(x) * x.shape[2])), 1)
        return torch.cat([part + self.mlp(self.norm2(part)) for part in parts], 1)


@functools.lru_cache
@torch.inference_mode(False)  # training may use what coding made
def _regions(sizes: tuple[int, int], shifts: tuple[int, int], window: int, device: torch.device) -> Tensor:
    """A number of each position of a window [n, 1, L, 1]: unequal where only padding or the roll brought two together.

    Of rows and of columns, 0: the map, 1: its part that the roll brought from the other end, 2 and 3: padding.
    """
    regions = []
    for n, shift in zip(sizes, shifts, strict=True):
        padded = n + -n % window
        at = torch.arange(padded, device=device) + shift
        regions.append(at // padded + 2 * (at % padded >= n))
    down, right = regions
    region = (4 * down[:, None] + right).to(torch.int8)
    return _windows(region[None, :, :, None], window).movedim(1, 0)


def _windows(x: Tensor, size: int) -> Tensor:
    """[B, H, W, C], H and W multiples of `size` -> [B, H W / size^2, size^2, C]"""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def swin(dim: int, head_dim: int, window: int, shifted: list[bool]) -> nn.Sequential:
    """Swin blocks on [B, dim, H, W], one for each entry of `shifted`: windows regular, or shifted by half a window."""
    if dim % head_dim:
        raise ValueError(f"{dim} channels do not divide into heads of {head_dim}; choose a multiple")
    blocks = [
        SwinBlock(dim, dim // head_dim, [window] * 2, [window // 2 * s] * 2, attn_layer=WindowAttention)
        for s in shifted
    ]
    return nn.Sequential(Permute([0, 2, 3, 1]), *blocks, Permute([0, 3, 1, 2]))


class TcmBlock(nn.Module):
    """Half of the channels through convolutions, the other half through a Swin block, and mixed.

    [B, 2 N, H, W] -> the same shape.
    """

    def __init__(self, N: int, head_dim: int, window: int, shifted: bool):
        super().__init__()
        self.split = conv1x1(2 * N, 2 * N)
        self.convolutions = ResidualBlock(N, N)
        self.swin = swin(N, head_dim, window, [shifted])
        self.merge = conv1x1(2 * N, 2 * N)

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.split(x).chunk(2, 1)
        near = near + self.convolutions(near)  # a second skip around the block's own, as in the published network
        return x + self.merge(torch.cat([near, self.swin(far)], 1))


class SwinAttention(AttentionBlock):
    """compressai's attention block on squeezed channels, its gate computed from two Swin blocks (SWAtten in the paper).

    [B, channels, H, W] -> the same shape.
    """

    def __init__(self, channels: int, squeezed: int, window: int):
        super().__init__(squeezed)
        self.squeeze = conv1x1(channels, squeezed)
        self.swin = swin(squeezed, SLICE_HEAD_DIM, window, [False, True])
        self.expand = conv1x1(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return self.expand(x + self.conv_a(x) * torch.sigmoid(self.conv_b(self.swin(x))))


class SliceModel(nn.Module):
    """The networks of one slice of `channels`, which knows `support` channels; widths as in LicTcm."""

    def __init__(self, support: int, channels: int, widths: tuple[int, int, int], window: int):
        super().__init__()
        squeezed, first, second = widths

        def transform(known: int) -> nn.Sequential:
            layers = conv3x3(known, first), nn.GELU(), conv3x3(first, second), nn.GELU(), conv3x3(second, channels)
            return nn.Sequential(*layers)

        self.mean_attention = SwinAttention(support, squeezed, window)
        self.scale_attention = SwinAttention(support, squeezed, window)
        self.mean = transform(support)
        self.scale = transform(support)
        self.residual = transform(support + channels)


class LicTcm(CompressionModel):
    """LIC-TCM; the defaults are the paper's, with N = 64, 96 or 128 and M = 320.

    Args:
        plane_channels: 1 or 3.
        N: width of either half of a TCM block, a multiple of every head dim.
        M: channels of the latent, coded in `slices` equal slices of which each knows all earlier ones.
        head_dims: of the Swin blocks of the three stages, from the image inwards; the hyper path has the last one.
        window: side of the attention windows in latents and feature maps; the hyper path has half of it.
        blocks: TCM blocks of a stage, with regular and shifted windows in turn.
        hyper_channels: of the hyper-latent.
        context_widths: of a slice's attention (a multiple of 16) and of its transforms' two hidden layers.
    """

    def __init__(
        self,
        plane_channels: int,
        N: int,
        M: int,
        slices: int = 5,
        head_dims: tuple[int, int, int] = (8, 16, 32),
        window: int = 8,
        blocks: int = 2,
        hyper_channels: int = 192,
        context_widths: tuple[int, int, int] = (128, 224, 128),
    ):
        super().__init__()
        if M % slices:
            raise ValueError(f"M = {M} does not divide into {slices} equal slices; choose a multiple")

        def stage(head_dim: int, side: int = window) -> list[nn.Module]:
            return [TcmBlock(N, head_dim, side, shifted=i % 2 == 1) for i in range(blocks)]

        def hyper_synthesis() -> nn.Sequential:
            first, last = ResidualBlockUpsample(hyper_channels, 2 * N), subpel_conv3x3(2 * N, M, 2)
            return nn.Sequential(first, *stage(head_dims[2], window // 2), last)

        self.g_a = nn.Sequential(
            ResidualBlockWithStride(plane_channels, 2 * N),
            *stage(head_dims[0]),
            ResidualBlockWithStride(2 * N, 2 * N),
            *stage(head_dims[1]),
            ResidualBlockWithStride(2 * N, 2 * N),
            *stage(head_dims[2]),
            conv3x3(2 * N, M, 2),
        )
        self.g_s = nn.Sequential(
            ResidualBlockUpsample(M, 2 * N),
            *stage(head_dims[2]),
            ResidualBlockUpsample(2 * N, 2 * N),
            *stage(head_dims[1]),
            ResidualBlockUpsample(2 * N, 2 * N),
            *stage(head_dims[0]),
            subpel_conv3x3(2 * N, plane_channels, 2),
        )
        self.h_a = nn.Sequential(
            ResidualBlockWithStride(M, 2 * N),
            *stage(head_dims[2], window // 2),
            conv3x3(2 * N, hyper_channels, 2),
        )
        self.h_mean_s = hyper_synthesis()
        self.h_scale_s = hyper_synthesis()
        width = M // slices
        models = (SliceModel(M + k * width, width, context_widths, window) for k in range(slices))
        self.slices: Sequence[SliceModel] = nn.ModuleList(models)  # type: ignore[assignment]  # forgets what it lists
        self.entropy_bottleneck = EntropyBottleneck(hyper_channels)
        self.gaussian_conditional = GaussianConditional(None)

    @staticmethod
    def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the authors' TCM (`state_dict` of their checkpoints) -> weights of LicTcm(3, N, 320)."""
        weights = {}
        for name, value in state.items():
            for theirs, ours in PUBLISHED_NAMES.items():
                name = re.sub(theirs, ours, name)
            if name.endswith("relative_position_bias_table"):
                value = value.flatten(1).T  # [heads, 2 w - 1, 2 w - 1] -> [(2 w - 1)^2, heads]
            weights[name] = value
        return weights

    def h_s(self, z_hat: Tensor) -> Tensor:
        """[B, hyper_channels, H / 64, W / 64] -> what the slices know from it [B, 2 M, H / 16, W / 16]: of means, of
        scales."""
        return torch.cat([self.h_mean_s(z_hat), self.h_scale_s(z_hat)], 1)

    def walk(self, side: Tensor, y: Tensor, code: Code) -> Tensor:
        """Visit the latent's slices in coding order -> y_hat [B, M, H / 16, W / 16].

        `code(part of y, its channels, scales, means)` returns the quantised part; y goes nowhere else, so a receiver
        may pass zeros.
        What rounding took away, at most half a step, is predicted and added back: y_hat = coded + tanh(residual) / 2.
        """
        side_of_means, side_of_scales = side.chunk(2, 1)
        y_hat: list[Tensor] = []
        for k, (part, model) in enumerate(zip(y.chunk(len(self.slices), 1), self.slices, strict=True)):
            channels = slice(k * part.shape[1], (k + 1) * part.shape[1])
            known = model.mean_attention(torch.cat([side_of_means, *y_hat], 1))
            scales = model.scale(model.scale_attention(torch.cat([side_of_scales, *y_hat], 1)))
            # Layouts choose convolution routines, which round differently: a receiver's would not be the sender's.
            coded = code(part, channels, scales, model.mean(known)).contiguous(memory_format=torch.channels_last)
            y_hat.append(coded + 0.5 * torch.tanh(model.residual(torch.cat([known, coded], 1))))
        return torch.cat(y_hat, 1)

    @torch.no_grad()
    def transform_start(self, basis: Tensor) -> LicTcm:
        """Start as a transform codec instead of at noise, for grey planes and N >= 32.

        As Elic.transform_start. Up, the transform goes through the linear skips. Down, these see one pixel in four: the
        first two levels go through the convolutions of their blocks as b and -b, because of what a leaky ReLU of slope
        r leaves of both, l(b) - l(-b) = (1 + r) b. The second block lays out the four pixels that the third needs as
        channels, and its skip takes them. All other branches begin near zero.
        """
        down: list[Any] = [m for m in self.g_a if not isinstance(m, TcmBlock)]
        up: list[Any] = [m for m in self.g_s if not isinstance(m, TcmBlock)]
        first, second, third, last = down
        if third.skip.in_channels < 64:
            raise ValueError(
                f"N = {third.skip.in_channels // 2} is too narrow to start as a transform; choose 32 or more"
            )
        ups = [m.upsample[0] if isinstance(m, ResidualBlockUpsample) else m[0] for m in up]
        beside = [m.merge for m in self.modules() if isinstance(m, TcmBlock)]
        beside += [m.conv for m in up if isinstance(m, ResidualBlockUpsample)]
        for block in (first, second, third):
            beside += [block.conv1, block.conv2, block.skip]
            block.gdn.gamma.copy_(block.gdn.gamma_reparam.init(torch.zeros_like(block.gdn.gamma)))
        for convolution in (*beside, last, *ups):
            convolution.weight.mul_(0.002)
            convolution.bias.zero_()
        levels = packet(basis)
        for block, level, pixels in zip((first, second), levels, (1, 4), strict=False):
            made, bands = level.shape[:2]
            block.conv1.weight[: 2 * made] = 0
            block.conv1.weight[: 2 * made, :bands, 1:, 1:] = torch.cat([level, -level])  # of 3 taps, an output's block
            block.conv2.weight[: pixels * made] = 0
            gain = 1 / (1 + block.leaky_relu.negative_slope)
            for row in range(pixels * made):
                pixel, band = divmod(row, made)
                taps = block.conv2.weight[row, :, 1 + pixel // 2, 1 + pixel % 2]
                taps[band], taps[made + band] = gain, -gain
        third.skip.weight[:64] = 0
        third.skip.weight[:64, :64, 0, 0] = levels[2].permute(0, 2, 3, 1).flatten(1)  # [64, 4 pixels of 16 bands]
        made = min(len(basis), last.out_channels)
        last.weight[:made] = 0
        last.weight[:made, :64, 1:, 1:] = levels[3][:made]
        for convolution, level in zip(reversed(ups), levels, strict=True):
            level = level[: convolution.in_channels]
            made, bands = level.shape[:2]
            convolution.weight[: 4 * bands, :made] = 0
            convolution.weight[: 4 * bands, :made, 1, 1] = level.permute(1, 2, 3, 0).flatten(0, 2)  # as it is shuffled
        return self


# Names in github.com/jmliu206/LIC_TCM -> names here. Swin blocks are numbered from 1: a Permute stands before them.
PUBLISHED_NAMES = {
    r"\.conv1_1\.": ".split.",
    r"\.conv1_2\.": ".merge.",
    r"\.conv_block\.": ".convolutions.",
    r"\.trans_block\.": ".swin.1.",
    r"\.non_local_block\.block_": ".swin.",
    r"\.ln([12])\.": r".norm\1.",
    r"\.msa\.embedding_layer\.": ".attn.qkv.",
    r"\.msa\.linear\.": ".attn.proj.",
    r"\.msa\.relative_position_params$": ".attn.relative_position_bias_table",
    r"\.mlp\.2\.": ".mlp.3.",
    r"\.in_conv\.": ".squeeze.",
    r"\.out_conv\.": ".expand.",
    r"^atten_(mean|scale)\.(\d+)\.0\.": r"slices.\2.\1_attention.",
    r"^cc_(mean|scale)_transforms\.(\d+)\.": r"slices.\2.\1.",
    r"^lrp_transforms\.(\d+)\.": r"slices.\1.residual.",
}
