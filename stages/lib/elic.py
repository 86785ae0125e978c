"""ELIC with gain units on feature planes: plane + phi -> one rANS string, and back.

    x - 0.5 -> g_a -> * gain -> y ---> round(y - mean) ---> rANS ---> y_hat -> * inverse gain -> g_s -> x_hat
                                |             ^   ^
                               h_a -> z -> h_s   channel and checkerboard context of what is coded already

ELIC: He et al., CVPR 2022 (arXiv 2203.10886), the network and its context model are compressai's. Gain units: Cui et
al., Asymmetric Gained Deep Image Compression with Continuous Rate Adaptation, CVPR 2021: one vector per trained lambda
and geometric interpolation between neighbours, so that one network codes at every rate in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compressai.ans import RansDecoder, RansEncoder
from compressai.layers import AttentionBlock, CheckerboardMaskedConv2d
from compressai.models import Elic2022Official
from compressai.models.sensetime import ResidualBottleneckBlock
from compressai.models.utils import conv
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 64  # of the hyper-latent: planes are padded to multiples of it
# The entropy networks always run on batches of this size, filled up with zeros: convolutions of another batch size may
# round differently, and one flipped bit in a scale ruins the rest of a stream.
CODING_BATCH = 8
SCALE_TABLE = torch.exp(torch.linspace(math.log(0.11), math.log(64), 48))


class Coded(NamedTuple):
    """One coded plane. `bytes_hyper` is the length of a string that holds the hyper-latent alone."""

    string: bytes
    bytes_hyper: int
    estimated_bits: float
    plane: Tensor  # [c, H, W], the receiver's reconstruction


class Elic(nn.Module):
    """compressai's ELIC between gain units.

    Args:
        plane_channels: 1 or 3.
        N, M, groups: widths of the network, as in compressai's Elic2022Official; sum(groups) == M.
        context: widths of the two hidden layers of the channel context, and the kernel of both contexts; compressai's
            and the paper's are {widths: [224, 128], kernel: 5}, most of the weights of a small network.
        lambda_range: lowest and highest trained lambda.
        gains: number of trained gain vectors, log-spaced in lambda over the range.
    """

    def __init__(
        self,
        plane_channels: int,
        N: int,
        M: int,
        groups: list[int],
        context: dict[str, Any],
        lambda_range: tuple[float, float],
        gains: int,
    ):
        super().__init__()
        self.net = Elic2022Official(N=N, M=M, groups=groups)
        if plane_channels != 3:
            self.net.g_a[0] = nn.Conv2d(plane_channels, N, 5, 2, 2)
            self.net.g_s[-1] = nn.ConvTranspose2d(N, plane_channels, 5, 2, 2, 1)
        self._set_context(groups, *context["widths"], context["kernel"])
        low, high = map(math.log, lambda_range)
        self.register_buffer("log_lambdas", torch.linspace(low, high, gains))
        # An orthonormal transform meets lambda with noise D = 1 / (2 ln 2 lambda 255^2), so with a step sqrt(12 D).
        gain = 0.5 * (self.log_lambdas + math.log(2 * math.log(2) * 255**2 / 12))
        self.log_gain = nn.Parameter(gain[:, None].repeat(1, M))
        self.log_inverse = nn.Parameter(-gain[:, None].repeat(1, M))

    def _set_context(self, groups: list[int], first: int, second: int, kernel: int) -> None:
        """Channel and checkerboard context as in compressai's Elic2022Official, of other widths."""
        latent = self.net.latent_codec["y"]
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

    def position(self, lmbda: Tensor) -> Tensor:
        """Where lambdas lie among the trained ones, in [0, gains - 1]."""
        step = self.log_lambdas[1] - self.log_lambdas[0]
        return ((lmbda.log() - self.log_lambdas[0]) / step).clamp(0, len(self.log_lambdas) - 1)

    def level(self, lmbda: float) -> int:
        """The byte that stands for the rate control nearest to `lmbda`: its position in 255ths of the trained range."""
        share = self.position(torch.tensor(lmbda, device=self.log_lambdas.device)) / (len(self.log_lambdas) - 1)
        return round(255 * share.item())

    @staticmethod
    def _at(table: Tensor, position: Tensor) -> Tensor:
        """Gain vectors [B, M, 1, 1] at positions [B], interpolated geometrically between the trained ones."""
        below = position.floor().clamp(max=len(table) - 2).long()
        share = (position - below)[:, None]
        return torch.exp((1 - share) * table[below] + share * table[below + 1])[:, :, None, None]

    def forward(self, x: Tensor, lmbda: Tensor) -> tuple[Tensor, Tensor]:
        """Planes [B, c, H, W], H and W multiples of 64, lambdas [B] -> reconstructions and estimated bits [B]."""
        position = self.position(lmbda)
        y = self.net.g_a(x - 0.5) * self._at(self.log_gain, position)
        out = self.net.latent_codec(y)
        x_hat = self.net.g_s(out["y_hat"] * self._at(self.log_inverse, position)) + 0.5
        return x_hat, sum(_bits(p) for p in out["likelihoods"].values())

    @property
    def _bottleneck(self) -> nn.Module:
        return self.net.latent_codec["hyper"].entropy_bottleneck

    @property
    def _gaussian(self) -> nn.Module:
        return self.net.latent_codec["y"]["y0"]["y"].gaussian_conditional

    # ---- coding

    def update(self) -> Elic:
        """Build the coder's tables: to be called before coding, and again after every change of the weights."""
        self.net.update(SCALE_TABLE, force=True)
        tables = (self._gaussian, self._bottleneck)  # one list for both: a plane becomes one string
        self._lengths = [n for t in tables for n in t.cdf_length.tolist()]
        self._offsets = [n for t in tables for n in t.offset.tolist()]
        rows = [row for t in tables for row in t.quantized_cdf.tolist()]
        self._cdfs = [row[:n] for row, n in zip(rows, self._lengths, strict=True)]
        return self

    @torch.inference_mode()
    def encode(self, planes: Tensor, level: int) -> list[Coded]:
        """Planes [B, c, H, W] in [0, 1], of any one size, rate control in 0..255 -> B coded planes."""
        return [coded for batch in planes.split(CODING_BATCH) for coded in self._encode_batch(batch, level)]

    @torch.inference_mode()
    def decode(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> Tensor:
        """B strings of planes of one shape (c, H, W) -> planes [B, c, H, W]."""
        batches = [strings[i : i + CODING_BATCH] for i in range(0, len(strings), CODING_BATCH)]
        return torch.cat([self._decode_batch(batch, level, shape) for batch in batches])

    def _encode_batch(self, planes: Tensor, level: int) -> list[Coded]:
        n, c, height, width = planes.shape
        x = planes.new_full((CODING_BATCH, c, height, width), 0.5)
        x[:n] = planes
        x = functional.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), value=0.5)
        position = self._position_of(level)
        y = self.net.g_a((x - 0.5).contiguous(memory_format=torch.channels_last)) * self._at(self.log_gain, position)
        hyper = self.net.latent_codec["hyper"]
        z_hat, z_likelihood = self._bottleneck(hyper.h_a(y))
        symbols = [(z_hat - self._bottleneck._get_medians()[None]).round()]
        indexes = [self._hyper_indexes(z_hat.shape)]
        bits = _bits(z_likelihood)

        def quantise(part: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            nonlocal bits
            symbol = torch.round(part - means)
            _, likelihood = self._gaussian(symbol, scales)
            bits = bits + _bits(likelihood)
            symbols.append(symbol)
            indexes.append(self._gaussian.build_indexes(scales))
            return symbol + means

        side = hyper.h_s(z_hat.contiguous(memory_format=torch.channels_last))  # as the decoder: layouts differ
        y_hat = self._walk(side, y, quantise)
        decoded = self._synthesis(y_hat, position)[:, :, :height, :width]
        hyper_length = symbols[0][0].numel()
        rows = torch.cat([s.flatten(1) for s in symbols], 1).int().tolist()
        tables = torch.cat([k.flatten(1) for k in indexes], 1).int().tolist()
        coded = []
        for i in range(n):
            alone = self._rans_encode(rows[i][:hyper_length], tables[i][:hyper_length])
            coded.append(Coded(self._rans_encode(rows[i], tables[i]), len(alone), bits[i].item(), decoded[i]))
        return coded

    def _decode_batch(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> Tensor:
        _, height, width = shape
        rows, columns = -(-height // STRIDE), -(-width // STRIDE)
        decoders = [RansDecoder() for _ in strings]
        for decoder, string in zip(decoders, strings, strict=True):
            decoder.set_stream(string)

        def read(indexes: Tensor) -> Tensor:
            symbols = torch.zeros(indexes.shape)
            for i, decoder in enumerate(decoders):
                row = decoder.decode_stream(indexes[i].flatten().tolist(), self._cdfs, self._lengths, self._offsets)
                symbols[i] = torch.tensor(row, dtype=torch.float32).view(indexes.shape[1:])
            return symbols.to(indexes.device)

        hyper = self.net.latent_codec["hyper"]
        medians = self._bottleneck._get_medians()[None]
        z_hat = read(self._hyper_indexes((CODING_BATCH, medians.shape[1], rows, columns))) + medians
        side = hyper.h_s(z_hat.contiguous(memory_format=torch.channels_last))
        blank = side.new_zeros(CODING_BATCH, self.net.latent_codec["y"].groups_acc[-1], *side.shape[2:])
        y_hat = self._walk(
            side, blank, lambda _, scales, means: read(self._gaussian.build_indexes(scales).int()) + means
        )
        return self._synthesis(y_hat, self._position_of(level))[: len(strings), :, :height, :width]

    def _walk(self, side: Tensor, y: Tensor, code: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Visit the latent in coding order: groups of channels, in each the two colours of a checkerboard.

        `code(part of y, scales, means)` returns the quantised part; it may only depend on y through what it returns.
        """
        groups = self.net.latent_codec["y"]
        y_hat: list[Tensor] = []
        for k, part in enumerate(y.split(groups.groups, 1)):
            board = groups[f"y{k}"]
            context = groups._get_ctx_params(k, side, y_hat)
            halves = torch.zeros_like(board.unembed(part))  # [2, B, c, H, W / 2]
            parts, contexts = board.unembed(part), board.unembed(context)
            for colour in range(2):
                if colour == 0:
                    spatial = torch.zeros_like(board.unembed(board.context_prediction(part))[0])
                else:
                    spatial = board.unembed(board.context_prediction(board.embed(halves)))[1]
                scales, means = board.entropy_parameters(board.merge(spatial, contexts[colour])).chunk(2, 1)
                halves[colour] = code(parts[colour], scales, means)
            y_hat.append(board.embed(halves))
        return torch.cat(y_hat, 1)

    def _position_of(self, level: int) -> Tensor:
        position = level / 255 * (len(self.log_lambdas) - 1)
        return self.log_lambdas.new_full((CODING_BATCH,), position)

    def _synthesis(self, y_hat: Tensor, position: Tensor) -> Tensor:
        return self.net.g_s(y_hat * self._at(self.log_inverse, position)) + 0.5

    def _hyper_indexes(self, shape: tuple[int, ...]) -> Tensor:
        """Tables of the hyper-latent [B, N, h, w]: one per channel, behind the Gaussians' tables."""
        first = len(self._gaussian.scale_table)
        rows = torch.arange(first, first + shape[1], device=self.log_lambdas.device, dtype=torch.int32)
        return rows[None, :, None, None].expand(*shape)

    def _rans_encode(self, symbols: list[int], indexes: list[int]) -> bytes:
        return RansEncoder().encode_with_indexes(symbols, indexes, self._cdfs, self._lengths, self._offsets)

    # ---- start

    @torch.no_grad()
    def haar_start(self) -> Elic:
        """Start as a transform codec instead of at noise (grey planes, N >= 64, M >= 256).

        The four stride-2 convolutions become a Haar wavelet packet, 1 -> 4 -> 16 -> 64 -> 256 bands with orthonormal
        rows, the transposed ones its inverse; residual and attention branches begin near zero.
        """
        branches = (*self.net.g_a.modules(), *self.net.g_s.modules())
        for module in branches:
            if isinstance(module, ResidualBottleneckBlock):
                module.conv3.weight.mul_(0.01)
                module.conv3.bias.zero_()
            elif isinstance(module, AttentionBlock):
                module.conv_b[-1].weight.mul_(0.01)
                module.conv_b[-1].bias.fill_(-5.0)  # sigmoid: the gate is almost shut
        down = [m for m in self.net.g_a if isinstance(m, nn.Conv2d)]
        up = [m for m in self.net.g_s if isinstance(m, nn.ConvTranspose2d)]
        signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).view(4, 2, 2) / 2
        for level, (analysis, synthesis) in enumerate(zip(down, reversed(up), strict=True)):
            bands = 4**level
            for convolution in (analysis, synthesis):
                convolution.weight.mul_(0.02)
                convolution.bias.zero_()
            for band in range(4):
                for i in range(bands):
                    # Taps 2 and 3 of the 5 are the 2x2 block that an output covers. Low bands come first.
                    analysis.weight[band * bands + i].zero_()
                    analysis.weight[band * bands + i, i, 2:4, 2:4] = signs[band]
                    synthesis.weight[band * bands + i].zero_()
                    synthesis.weight[band * bands + i, i, 2:4, 2:4] = signs[band]
        return self


def _bits(likelihood: Tensor) -> Tensor:
    return -likelihood.log2().flatten(1).sum(1)  # [B, ...] -> [B]
