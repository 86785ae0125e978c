"""A learned image codec between gain units, on feature planes: plane + rate control -> one string, and back.

    x - 0.5 -> g_a -> * gain -> y ---> round(y - mean) ---> ANS ----> y_hat -> * inverse gain -> g_s -> x_hat
                                |             ^   ^
                               h_a -> z -> h_s   walk: context of what is coded already

Gain units: Cui et al., Asymmetric Gained Deep Image Compression with Continuous Rate Adaptation, CVPR 2021: one vector
per trained lambda and geometric interpolation between neighbours, so that one network codes at every rate in between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.ops import quantize_ste
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.ans import LIMIT, Decoder, Part, Tables, gaussians
from stages.lib.models import emulates_bfloat16
from stages.lib.schema import InputError

STRIDE = 32  # planes are padded to multiples of it, so that the sides of y are even, as a checkerboard needs
LATENT_STRIDE = 16  # of y in the plane
HYPER_STRIDE = 4  # of z in y, which is padded to multiples of it
SCALE_TABLE = torch.exp(torch.linspace(math.log(0.11), math.log(64), 64))
SCALE_LIMITS = (SCALE_TABLE[1:] * SCALE_TABLE[:-1]).sqrt()  # between a scale and the next
# What a number's own bits count for when the sender decides whether it is worth them. Below 1, because what is not sent
# is missing in the context of what follows: of 0 to 1.3 the best at nearly every rate (images of `fit`).
THRIFT = 0.3
# What analysis and synthesis compute in when they code. A receiver's may differ from a sender's in the last bits, so it
# is what the processor multiplies fastest; the entropy networks, which have to agree to the bit, keep to float32.
FAST = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
TRANSFORM_TYPE = torch.bfloat16 if FAST else torch.float32
SMALL = 32 * 64  # pixels of a plane up to which float32 is as fast (default profile, CPU): the calls take the time
LANES = 2 if torch.cuda.is_available() else 1  # planes at a time: a GPU has one's networks while a core codes the other

Code = Callable[[Tensor, slice, Tensor, Tensor], Tensor]  # (part of y, its channels, scales, means) -> quantised part


class Network(Protocol):
    """What a learned codec supplies: a torch module with these parts.

    y has M channels at 1/16 of the plane's size, z is at 1/64. Planes are padded to multiples of 32, y for z alone.
    """

    g_a: nn.Module  # plane [B, c, H, W] -> y
    g_s: nn.Module
    h_a: nn.Module  # y -> z
    h_s: nn.Module  # z_hat -> what `walk` needs of it
    entropy_bottleneck: EntropyBottleneck  # of z
    gaussian_conditional: GaussianConditional  # of every part of y

    def walk(self, side: Tensor, y: Tensor, code: Code) -> Tensor:
        """Visit y in coding order -> y_hat. A part's scales and means may depend on `side` and on what `code` gave."""

    def aux_loss(self) -> Tensor: ...


class Coded(NamedTuple):
    """One coded plane. `bytes_hyper` of the string hold the hyper-latent."""

    string: bytes
    bytes_hyper: int
    estimated_bits: float
    plane: Tensor  # [c, H, W], the receiver's reconstruction; [0] where it was not asked for


class Rate(NamedTuple):
    """What follows from a rate control."""

    gain: Tensor  # [1, M, 1, 1]
    inverse: Tensor  # [1, M, 1, 1]
    price: Tensor  # [M], of a squared error of gained latents, in bits


class LearnedCodec(nn.Module):
    """A network between gain units.

    Args:
        net: the network, of M latent channels.
        lambda_range: lowest and highest trained lambda.
        gains: number of trained gain vectors, log-spaced in lambda over the range.
        centre: what the networks see as 0. Planes lie around 0.5; networks made for pictures take them as they are.
        thrift: share of a number's bits in the sender's decisions (see THRIFT); for a transform that nearly keeps
            squared error.
    """

    log_lambdas: Tensor  # [gains], rising

    def __init__(
        self,
        net: Network,
        M: int,
        lambda_range: tuple[float, float],
        gains: int,
        centre: float = 0.5,
        thrift: float = THRIFT,
    ):
        super().__init__()
        self.net: Any = net  # a Network and a torch module: no type says both
        self.centre, self.thrift = centre, thrift
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
        """Planes [B, c, H, W], H and W multiples of 32, lambdas [B] -> reconstructions, estimated bits [B]."""
        y_hat, bits = self.quantised(self.net.g_a(x - self.centre), lmbda)
        return self.net.g_s(y_hat) + self.centre, bits

    def quantised(self, y: Tensor, lmbda: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, M, h, w] -> what the receiver has of them, estimated bits [B].

        In training the bits are those of y and z with uniform noise, the result that of the rounded ones. Under
        autocast the networks run in its type; likelihoods, differences of nearly equal numbers, stay in float32.
        """
        position = self.position(lmbda)
        y = y.float() * self._at(self.log_gain, position)
        z = self._hyper(y).float()
        with torch.autocast(z.device.type, enabled=False):
            bits = _bits(self.net.entropy_bottleneck(z)[1])

        def quantise(part: Tensor, _: slice, scales: Tensor, means: Tensor) -> Tensor:
            nonlocal bits
            scales, means = scales.float(), means.float()
            bits = bits + _bits(self.net.gaussian_conditional(part, scales, means)[1])
            return quantize_ste(part - means) + means

        side = self._side(quantize_ste(z - self._medians) + self._medians, y)
        return self.net.walk(side, y, quantise) * self._at(self.log_inverse, position), bits

    def _hyper(self, y: Tensor) -> Tensor:
        """Latents [B, M, h, w] -> z [B, Z, ceil(h / 4), ceil(w / 4)]."""
        rows, columns = y.shape[2:]
        return self.net.h_a(functional.pad(y, (0, -columns % HYPER_STRIDE, 0, -rows % HYPER_STRIDE)))

    def _side(self, z_hat: Tensor, y: Tensor) -> Tensor:
        """What the hyper-latent says of y, of y's height and width."""
        rows, columns = y.shape[2:]
        return self.net.h_s(z_hat)[:, :, :rows, :columns]

    @property
    def _medians(self) -> Tensor:
        return self.net.entropy_bottleneck._get_medians()[None]  # [1, Z, 1, 1]

    # ---- coding: plane by plane, so that no plane's bits depend on the company it keeps

    def update(self) -> LearnedCodec:
        """Make ready for coding: to be called before it, and again after every change of the weights."""
        transforms = self.net.g_a, self.net.g_s
        self._transforms = {torch.float32: transforms}
        self._transforms[fast_type()] = tuple(copy.deepcopy(part).to(fast_type()) for part in transforms)
        numbers = torch.arange(-LIMIT, LIMIT + 1, device=self.log_lambdas.device)
        with torch.no_grad():
            likelihood = self.net.entropy_bottleneck._likelihood(self._medians[0, :, :, 0, None] + numbers)[0]
        self._tables = Tables(np.concatenate([gaussians(SCALE_TABLE.numpy()), likelihood[:, 0].cpu().numpy()]))
        bits = self._tables.bits[: len(SCALE_TABLE), LIMIT:]  # of the Gaussians' 0 .. LIMIT; negative ones are alike
        self._saved = torch.from_numpy(np.diff(bits, prepend=bits[:, :1])).to(numbers.device)
        return self

    def encode(self, planes: Tensor, level: int, reconstruct: bool = True) -> list[Coded]:
        """Planes [B, c, H, W] in [0, 1], of any one size, rate control in 0..255 -> B coded planes."""
        rate = self._rate(level)
        return _in_lanes(lambda plane: self._encode(plane[None], rate, reconstruct), planes)

    def decode(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> Tensor:
        """B strings of planes of one shape (c, H, W) -> planes [B, c, H, W]; raises InputError at a damaged one."""
        rate = self._rate(level)
        return torch.cat(_in_lanes(lambda string: self._decode(string, rate, shape), strings))

    @torch.inference_mode()
    def _rate(self, level: int) -> Rate:
        position = self._position_of(level)
        gain, inverse = self._at(self.log_gain, position), self._at(self.log_inverse, position)
        lmbda = (self.log_lambdas[0] + level / 255 * (self.log_lambdas[-1] - self.log_lambdas[0])).exp()
        return Rate(gain, inverse, 255**2 * lmbda * inverse.square().flatten())

    @torch.inference_mode()
    def _encode(self, plane: Tensor, rate: Rate, reconstruct: bool) -> Coded:
        height, width = plane.shape[2:]
        x = functional.pad(plane - self.centre, (0, -width % STRIDE, 0, -height % STRIDE))
        kind = _transform_type(x.shape[2] * x.shape[3])
        y = self._transforms[kind][0](x.to(kind, memory_format=torch.channels_last)).float() * rate.gain
        z = self._hyper(y)
        numbers = (z - self._medians).round().clamp(-LIMIT, LIMIT)
        parts = [Part(_array(numbers.flatten(), np.int32), self._hyper_tables(z.shape[2:]))]

        def send(part: Tensor, channels: slice, scales: Tensor, means: Tensor) -> Tensor:
            tables = _table_of(scales)
            numbers = self._worth_sending((part - means).flatten(), tables, rate.price[channels])
            parts.append(Part(_array(numbers, np.int32), _array(tables, np.uint16)))
            return numbers.view(means.shape) + means

        y_hat = self._walk(numbers, y, send)
        string, bytes_hyper = self._tables.encode(parts)
        sent = Part(*map(np.concatenate, zip(*parts, strict=True)))
        bits = self._tables.bits[sent.tables, sent.numbers + LIMIT].sum().item()
        received = self._synthesis(y_hat, rate)[0, :, :height, :width] if reconstruct else y_hat.new_empty(0)
        return Coded(string, bytes_hyper, bits, received)

    def _worth_sending(self, exact: Tensor, tables: Tensor, price_of_error: Tensor) -> Tensor:
        """Numbers [n], channel by channel -> the nearest whole ones, or the next towards 0.

        What is least of  thrift * bits + price * error^2,  prices being those of the channels. Of x > 0 the next costs
        (x - n + 1)^2 - (x - n)^2 = 2 (x - n) + 1  more error^2. Rate-distortion optimised quantisation of each number
        for itself: only the sender knows of it.
        """
        numbers = exact.round().clamp(-LIMIT, LIMIT)
        at = numbers.nonzero()[:, 0]  # at most rates the fewer part
        nearest = numbers[at]
        size = nearest.abs()
        more_error = 2 * (exact[at].abs() - size) + 1
        price = price_of_error[at // (len(exact) // len(price_of_error))]
        lower = self.thrift * self._saved[tables[at], size.int()] > price * more_error
        numbers[at] = nearest - nearest.sign() * lower
        return numbers

    @torch.inference_mode()
    def _decode(self, string: bytes, rate: Rate, shape: tuple[int, int, int]) -> Tensor:
        _, height, width = shape
        rows, columns = (-(-side // STRIDE) * STRIDE // LATENT_STRIDE for side in (height, width))  # of y
        size = -(-rows // HYPER_STRIDE), -(-columns // HYPER_STRIDE)  # of z
        decoder, device = Decoder(self._tables, string), self.log_lambdas.device
        numbers = torch.from_numpy(decoder.read(self._hyper_tables(size))).to(device, torch.float32)

        def receive(_: Tensor, __: slice, scales: Tensor, means: Tensor) -> Tensor:
            read = decoder.read(_array(_table_of(scales), np.uint16))
            return torch.from_numpy(read).to(device, torch.float32).view(means.shape) + means

        blank = torch.zeros(1, self.log_gain.shape[1], rows, columns, device=device)
        y_hat = self._walk(numbers.view(1, -1, *size), blank, receive)
        decoder.close()
        return self._synthesis(y_hat, rate)[:, :, :height, :width]

    def _walk(self, numbers: Tensor, y: Tensor, code: Code) -> Tensor:
        """The same steps on both sides, in the same memory layout: layouts choose routines, which round differently."""
        side = self._side((numbers + self._medians).contiguous(memory_format=torch.channels_last), y)
        side, y = (part.contiguous(memory_format=torch.channels_last) for part in (side, y))
        return self.net.walk(side, y, code)

    def _position_of(self, level: int) -> Tensor:
        return self.log_lambdas.new_tensor([level / 255 * (len(self.log_lambdas) - 1)])

    def _synthesis(self, y_hat: Tensor, rate: Rate) -> Tensor:
        kind = _transform_type(y_hat.shape[2] * y_hat.shape[3] * LATENT_STRIDE**2)
        return self._transforms[kind][1]((y_hat * rate.inverse).to(kind)).float() + self.centre

    def _hyper_tables(self, size: tuple[int, ...]) -> np.ndarray:
        """Tables of the hyper-latent's numbers [N h w]: one per channel, behind the Gaussians' tables."""
        channels = np.arange(self._medians.shape[1], dtype=np.uint16)
        return np.repeat(len(SCALE_TABLE) + channels, size[0] * size[1])


class Family(nn.Module):
    """Networks for one lambda each, as they are mostly published: the interface of LearnedCodec, for integer phi.

    Args:
        nets: one network for each lambda, of M latent channels, made for pictures.
        lambdas: rising.
    """

    def __init__(self, nets: list[Network], M: int, lambdas: list[float]):
        super().__init__()
        members = [LearnedCodec(net, M, (1.0, 2.0), 2, centre=0.0, thrift=0.0) for net in nets]
        self.members: Sequence[LearnedCodec] = nn.ModuleList(members)  # type: ignore[assignment]  # forgets what it lists
        for member in members:
            for table in (member.log_gain, member.log_inverse):
                nn.init.zeros_(table)
        self.lambdas = lambdas

    def update(self) -> Family:
        for member in self.members:
            member.update()
        return self

    def level(self, lmbda: float) -> int:
        """The network whose lambda is nearest."""
        return min(range(len(self.lambdas)), key=lambda k: abs(math.log(self.lambdas[k] / lmbda)))

    def encode(self, planes: Tensor, level: int, reconstruct: bool = True) -> list[Coded]:
        return self.members[level].encode(planes, 0, reconstruct)

    def decode(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> Tensor:
        if level >= len(self.members):
            raise InputError(f"rate control {level}: the codec has only {len(self.members)} networks; code it again")
        return self.members[level].decode(strings, 0, shape)


def fast_type() -> torch.dtype:
    """What large planes are transformed in."""
    return torch.float32 if emulates_bfloat16() else TRANSFORM_TYPE


def _transform_type(pixels: int) -> torch.dtype:
    return fast_type() if pixels > SMALL else torch.float32


def _in_lanes(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    if LANES == 1:
        return list(map(function, items))
    return list(_lanes(torch.cuda.current_device() if torch.cuda.is_initialized() else None).map(function, items))


@cache
def _lanes(gpu: int | None) -> ThreadPoolExecutor:
    """Threads that stay, as torch plans convolutions for each anew, and that compute as the thread of a worker does."""

    def begin() -> None:
        torch.set_num_threads(1)
        if gpu is not None:
            torch.cuda.set_device(gpu)

    return ThreadPoolExecutor(LANES, initializer=begin)


def _table_of(scales: Tensor) -> Tensor:
    """The tables of the nearest scales, in the order of the numbers in a part [n]."""
    return torch.bucketize(scales.flatten(), SCALE_LIMITS.to(scales.device), out_int32=True)


def _array(values: Tensor, dtype: type) -> np.ndarray:
    return values.cpu().numpy().astype(dtype)


def packet(basis: Tensor) -> list[Tensor]:
    """Orthonormal transform of 16 x 16 blocks [K, 16, 16] -> the kernels of four stride-2 convolutions [out, in, 2, 2].

    Three levels of a Haar wavelet packet, 1 -> 4 -> 16 -> 64 bands, and what leads from there to the basis. Their
    transposes invert them. Analysis and synthesis networks that begin with these begin as a transform codec.
    """
    haar = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).view(4, 2, 2) / 2
    levels, bank = [], torch.ones(1, 1, 1)
    for _ in range(3):
        bands = len(bank)
        level = torch.zeros(4, bands, bands, 2, 2)
        level[:, range(bands), range(bands)] = haar[:, None]
        levels.append(level.flatten(0, 1))
        bank = torch.stack([torch.kron(signs, band) for signs in haar for band in bank])
    return [*levels, torch.einsum("kuivj,bij->kbuv", basis.view(-1, 2, 8, 2, 8), bank)]


def _bits(likelihood: Tensor) -> Tensor:
    return -likelihood.log2().flatten(1).sum(1)  # [B, ...] -> [B]
