"""ELIC on feature planes: compressai's network, for planes of one channel too, with a context of any width.

He et al., ELIC: Efficient Learned Image Compression with Unevenly Grouped Space-Channel Contextual Adaptive Coding,
CVPR 2022 (arXiv 2203.10886).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import AttentionBlock, CheckerboardMaskedConv2d
from compressai.models import Elic2022Official
from compressai.models.sensetime import ResidualBottleneckBlock
from compressai.models.utils import conv
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.learned import Code, packet


def context_of(first: Tensor, convolution: CheckerboardMaskedConv2d) -> Tensor:
    """The first colour of a checkerboard [B, c, H, W / 2] -> what `convolution` says of the second [B, 2 c, H, W / 2].

    Of the plane that it would see, half is not coded yet, and half of what it would return is of no use.
    """
    at = _around(*first.shape[2:], convolution.kernel_size[0], first.device)
    rows = functional.pad(first.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 1, 0))  # [B, 1 + H W / 2, c]
    weight = convolution.weight.flatten(2)[:, :, 1::2].mT.flatten(1)  # the taps on the other colour: [2 c, taps c]
    context = functional.linear(rows[:, at].flatten(2), weight, convolution.bias)
    return context.unflatten(1, first.shape[2:]).permute(0, 3, 1, 2)


@functools.lru_cache
@torch.inference_mode(False)  # training may use what coding made
def _around(height: int, columns: int, kernel: int, device: torch.device) -> Tensor:
    """Around each place of the second colour, those of the first as 1 + their index; 0: beyond the border [n, taps]."""
    reach, row = torch.arange(kernel) - kernel // 2, torch.arange(height).view(-1, 1, 1, 1)
    down, right = torch.broadcast_tensors(  # on the board [H, W / 2, kernel, kernel]
        row + reach[:, None], 2 * torch.arange(columns)[:, None, None] + (row + 1) % 2 + reach
    )
    inside = (down >= 0) & (down < height) & (right >= 0) & (right < 2 * columns)
    at = torch.where(inside, 1 + down * columns + right // 2, 0)
    return at.flatten(2)[..., 1::2].flatten(0, 1).to(device)


class Elic(Elic2022Official):
    """compressai's ELIC as a `Network`.

    Args:
        plane_channels: 1 or 3.
        N, M, groups: widths of the network, as in compressai's Elic2022Official; sum(groups) == M.
        context: widths of the two hidden layers of the channel context, and the kernel of both contexts; compressai's
            and the paper's are {widths: [224, 128], kernel: 5}, most of the weights of a small network.
    """

    def __init__(self, plane_channels: int, N: int, M: int, groups: list[int], context: dict[str, Any]):
        super().__init__(N=N, M=M, groups=groups)
        if plane_channels != 3:
            self.g_a[0] = nn.Conv2d(plane_channels, N, 5, 2, 2)
            self.g_s[-1] = nn.ConvTranspose2d(N, plane_channels, 5, 2, 2, 1)
        self._set_context(groups, context["widths"], context["kernel"])

    def _set_context(self, groups: list[int], widths: list[int], kernel: int) -> None:
        """Channel and checkerboard context as in compressai's Elic2022Official, of other widths."""
        latent, (first, second) = self.latent_codec["y"], widths
        for k, width in enumerate(groups):
            latent[f"y{k}"].context_prediction = CheckerboardMaskedConv2d(width, 2 * width, kernel, 1, kernel // 2)
            if k > 0:
                latent.channel_context[f"y{k}"] = nn.Sequential(
                    conv(sum(groups[:k]), first, kernel, stride=1),
                    nn.ReLU(inplace=True),
                    conv(first, second, kernel, stride=1),
                    nn.ReLU(inplace=True),
                    conv(second, 2 * width, kernel, stride=1),
                )

    @staticmethod
    def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """compressai's names are the names here, for context = {widths: [224, 128], kernel: 5} and three channels."""
        return state

    @property
    def h_a(self) -> nn.Module:
        return self.latent_codec["hyper"].h_a

    @property
    def h_s(self) -> nn.Module:
        return self.latent_codec["hyper"].h_s

    @property
    def entropy_bottleneck(self) -> EntropyBottleneck:
        return self.latent_codec["hyper"].entropy_bottleneck

    @property
    def gaussian_conditional(self) -> GaussianConditional:
        return self.latent_codec["y"]["y0"]["y"].gaussian_conditional

    def walk(self, side: Tensor, y: Tensor, code: Code) -> Tensor:
        """Visit the latent in coding order: groups of channels, in each the two colours of a checkerboard.

        `code(part of y, its channels, scales, means)` returns the quantised part; y goes nowhere else.
        """
        groups = self.latent_codec["y"]
        y_hat: list[Tensor] = []
        start = 0
        for k, part in enumerate(y.split(groups.groups, 1)):
            channels = slice(start, start := start + part.shape[1])
            board = groups[f"y{k}"]
            contexts = board.unembed(groups._get_ctx_params(k, side, y_hat))  # [2, B, ..., H, W / 2]
            nothing = contexts.new_zeros(len(y), 2 * part.shape[1], *contexts.shape[3:])
            halves: list[Tensor] = []
            for half, context in zip(board.unembed(part), contexts, strict=True):
                spatial = context_of(halves[0], board.context_prediction) if halves else nothing
                scales, means = board.entropy_parameters(board.merge(spatial, context)).chunk(2, 1)
                halves.append(code(half, channels, scales, means))
            y_hat.append(board.embed(torch.stack(halves)))
        return torch.cat(y_hat, 1)

    @torch.no_grad()
    def transform_start(self, basis: Tensor) -> Elic:
        """Start as a transform codec instead of at noise, for grey planes.

        The stride-2 convolutions become the orthonormal `basis` [K, 16, 16] of blocks (`learned.packet`; narrower
        networks get its first bands), the transposed ones its inverse; residual and attention branches begin near zero.
        """
        for module in (*self.g_a.modules(), *self.g_s.modules()):
            if isinstance(module, ResidualBottleneckBlock):
                module.conv3.weight.mul_(0.01)
                module.conv3.bias.zero_()
            elif isinstance(module, AttentionBlock):
                module.conv_b[-1].weight.mul_(0.01)
                module.conv_b[-1].bias.fill_(-5.0)  # sigmoid: the gate is almost shut
        down: list[Any] = [m for m in self.g_a if isinstance(m, nn.Conv2d)]
        up: list[Any] = [m for m in self.g_s if isinstance(m, nn.ConvTranspose2d)]
        for analysis, synthesis, level in zip(down, reversed(up), packet(basis), strict=True):
            level = level[: analysis.out_channels, : analysis.in_channels]
            made, bands = level.shape[:2]
            for convolution in (analysis, synthesis):
                convolution.weight.mul_(0.02)
                convolution.bias.zero_()
                convolution.weight[:made] = 0
                convolution.weight[:made, :bands, 2:4, 2:4] = level  # of 5 taps, the 2x2 block that an output covers
        return self
