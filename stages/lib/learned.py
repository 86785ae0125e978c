"""A learned image codec between gain units, on feature planes: plane + rate control -> one rANS string, and back.

    x - 0.5 -> g_a -> * gain -> y ---> round(y - mean) ---> rANS ---> y_hat -> * inverse gain -> g_s -> x_hat
                                |             ^   ^
                               h_a -> z -> h_s   walk: context of what is coded already

Gain units: Cui et al., Asymmetric Gained Deep Image Compression with Continuous Rate Adaptation, CVPR 2021: one vector
per trained lambda and geometric interpolation between neighbours, so that one network codes at every rate in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from compressai.ans import RansDecoder, RansEncoder
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.ops import quantize_ste
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.params import InputError

STRIDE = 64  # of z: planes are padded to multiples of it
# The entropy networks always run on batches of this size, filled up with zeros: convolutions of another batch size may
# round differently, and one flipped bit in a scale ruins the rest of a stream.
CODING_BATCH = 8
SCALE_TABLE = torch.exp(torch.linspace(math.log(0.11), math.log(64), 48))

Code = Callable[[Tensor, Tensor, Tensor], Tensor]  # (part of y, scales, means) -> the quantised part


class Network(Protocol):
    """What a learned codec supplies: a torch module with these parts.

    y has M channels at 1/16 of the plane's size, z is at 1/64.
    """

    g_a: nn.Module  # plane [B, c, H, W] -> y
    g_s: nn.Module
    h_a: nn.Module  # y -> z
    h_s: nn.Module  # z_hat -> what `walk` needs of it
    entropy_bottleneck: EntropyBottleneck  # of z
    gaussian_conditional: GaussianConditional  # of every part of y

    def walk(self, side: Tensor, y: Tensor, code: Code) -> Tensor:
        """Visit y in coding order -> y_hat. A part's scales and means may depend on `side` and on what `code` gave."""

    def update(self, scale_table: Tensor, force: bool) -> bool: ...

    def aux_loss(self) -> Tensor: ...


class Coded(NamedTuple):
    """One coded plane. `bytes_hyper` is the length of a string that holds the hyper-latent alone."""

    string: bytes
    bytes_hyper: int
    estimated_bits: float
    plane: Tensor  # [c, H, W], the receiver's reconstruction


class LearnedCodec(nn.Module):
    """A network between gain units.

    Args:
        net: the network, of M latent channels.
        lambda_range: lowest and highest trained lambda.
        gains: number of trained gain vectors, log-spaced in lambda over the range.
    """

    def __init__(self, net: Network, M: int, lambda_range: tuple[float, float], gains: int):
        super().__init__()
        self.net = net
        low, high = map(math.log, lambda_range)
        self.register_buffer("log_lambdas", torch.linspace(low, high, gains))
        # An orthonormal transform meets lambda with noise D = 1 / (2 ln 2 lambda 255^2), so with a step sqrt(12 D).
        gain = 0.5 * (self.log_lambdas + math.log(2 * math.log(2) * 255**2 / 12))
        self.log_gain = nn.Parameter(gain[:, None].repeat(1, M))
        self.log_inverse = nn.Parameter(-gain[:, None].repeat(1, M))

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
        """Planes [B, c, H, W], H and W multiples of 64, lambdas [B] -> reconstructions, estimated bits [B].

        In training the bits are those of y and z with uniform noise, the reconstruction that of the rounded ones.
        """
        position = self.position(lmbda)
        y = self.net.g_a(x - 0.5) * self._at(self.log_gain, position)
        z = self.net.h_a(y)
        bits = _bits(self.net.entropy_bottleneck(z)[1])

        def quantise(part: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            nonlocal bits
            bits = bits + _bits(self.net.gaussian_conditional(part, scales, means)[1])
            return quantize_ste(part - means) + means

        side = self.net.h_s(quantize_ste(z - self._medians) + self._medians)
        y_hat = self.net.walk(side, y, quantise)
        return self.net.g_s(y_hat * self._at(self.log_inverse, position)) + 0.5, bits

    @property
    def _medians(self) -> Tensor:
        return self.net.entropy_bottleneck._get_medians()[None]  # [1, Z, 1, 1]

    # ---- coding

    def update(self) -> LearnedCodec:
        """Build the coder's tables: to be called before coding, and again after every change of the weights."""
        self.net.update(SCALE_TABLE, force=True)
        tables = (
            self.net.gaussian_conditional,
            self.net.entropy_bottleneck,
        )
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
        z_hat, z_likelihood = self.net.entropy_bottleneck(self.net.h_a(y))
        symbols = [(z_hat - self._medians).round()]
        indexes = [self._hyper_indexes(z_hat.shape)]
        bits = _bits(z_likelihood)

        def quantise(part: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            nonlocal bits
            symbol = torch.round(part - means)
            _, likelihood = self.net.gaussian_conditional(symbol, scales)
            bits = bits + _bits(likelihood)
            symbols.append(symbol)
            indexes.append(self.net.gaussian_conditional.build_indexes(scales))
            return symbol + means

        side = self.net.h_s(z_hat.contiguous(memory_format=torch.channels_last))  # as the decoder: layouts differ
        y_hat = self.net.walk(side, y, quantise)
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
            # The decoder does not know where a string ends. Damaged, it may ask for 4 bytes a symbol and more.
            decoder.set_stream(string + bytes(8 * (height + STRIDE) * (width + STRIDE)))

        def read(indexes: Tensor) -> Tensor:
            symbols = torch.zeros(indexes.shape)
            for i, decoder in enumerate(decoders):
                row = decoder.decode_stream(indexes[i].flatten().tolist(), self._cdfs, self._lengths, self._offsets)
                symbols[i] = torch.tensor(row, dtype=torch.float32).view(indexes.shape[1:])
            return symbols.to(indexes.device)

        z_hat = read(self._hyper_indexes((CODING_BATCH, self._medians.shape[1], rows, columns))) + self._medians
        side = self.net.h_s(z_hat.contiguous(memory_format=torch.channels_last))
        blank = side.new_zeros(CODING_BATCH, self.log_gain.shape[1], *side.shape[2:])

        def receive(_: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            return read(self.net.gaussian_conditional.build_indexes(scales).int()) + means

        y_hat = self.net.walk(side, blank, receive)
        planes = self._synthesis(y_hat, self._position_of(level))[: len(strings), :, :height, :width]
        if not planes.isfinite().all():
            raise InputError(
                "a coded plane decodes to numbers beyond all measure; its string is damaged: code it again"
            )
        return planes

    def _position_of(self, level: int) -> Tensor:
        position = level / 255 * (len(self.log_lambdas) - 1)
        return self.log_lambdas.new_full((CODING_BATCH,), position)

    def _synthesis(self, y_hat: Tensor, position: Tensor) -> Tensor:
        return self.net.g_s(y_hat * self._at(self.log_inverse, position)) + 0.5

    def _hyper_indexes(self, shape: tuple[int, ...]) -> Tensor:
        """Tables of the hyper-latent [B, N, h, w]: one per channel, behind the Gaussians' tables."""
        first = len(self.net.gaussian_conditional.scale_table)
        rows = torch.arange(first, first + shape[1], device=self.log_lambdas.device, dtype=torch.int32)
        return rows[None, :, None, None].expand(*shape)

    def _rans_encode(self, symbols: list[int], indexes: list[int]) -> bytes:
        return RansEncoder().encode_with_indexes(symbols, indexes, self._cdfs, self._lengths, self._offsets)


def _bits(likelihood: Tensor) -> Tensor:
    return -likelihood.log2().flatten(1).sum(1)  # [B, ...] -> [B]
