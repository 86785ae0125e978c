"""Whatever a network predicts and whatever arrives: both sides do the same, or the receiver says that it cannot."""

import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional
from pytest import approx
from torch import Tensor
from torch.nn import functional

from stages.lib import learned
from stages.lib.ans import LIMIT, Part, Tables, gaussians
from stages.lib.coding import load_codec
from stages.lib.elic import Elic
from stages.lib.learned import SCALE_LIMITS, SCALE_TABLE, LearnedCodec, packet
from stages.lib.schema import InputError
from stages.lib.tcm import LicTcm

M = 32
NETWORKS = {
    "elic": lambda: Elic(1, 16, M, [8, 24], {"widths": [8, 8], "kernel": 3}),
    "tcm": lambda: LicTcm(1, 8, M, 4, (4, 4, 8), window=4, blocks=1, hyper_channels=8, context_widths=(16, 8, 8)),
}


def tiny(network: str) -> LearnedCodec:
    torch.manual_seed(0)
    return LearnedCodec(NETWORKS[network](), M, (1e-4, 0.05), 4).eval().update()


def planes(n: int, *shape: int, seed: int = 7) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def with_scales(codec: LearnedCodec, value: Callable[[int], Tensor]) -> LearnedCodec:
    """The networks ask for the scales value(channels), whatever they see."""
    if isinstance(codec.net, Elic):
        last = [board.entropy_parameters[-1] for board in codec.net.latent_codec["y"].latent_codec.values()]
    else:
        last = [model.scale[-1] for model in codec.net.slices]
    for layer in last:
        channels = len(layer.bias) // (2 if isinstance(codec.net, Elic) else 1)  # of ELIC's the means come after
        with torch.no_grad():
            layer.weight[:channels] = 0
            layer.bias[:channels] = value(channels)
    return codec


@pytest.fixture
def parts(monkeypatch) -> list:
    """The parts of every string that is written while the test runs."""
    seen, encode = [], Tables.encode

    def record(tables: Tables, parts: list):
        seen.append(parts)
        return encode(tables, parts)

    monkeypatch.setattr(Tables, "encode", record)
    return seen


# ---- transform start


def orthonormal(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q[:count].view(-1, 16, 16)


@pytest.mark.parametrize("count", [1, 64, 100, 256])
def test_the_levels_of_a_packet_are_orthonormal_and_lead_to_its_basis(count):
    levels = packet(orthonormal(count))
    assert [tuple(level.shape) for level in levels] == [(4, 1, 2, 2), (16, 4, 2, 2), (64, 16, 2, 2), (count, 64, 2, 2)]
    for level in levels:
        rows = level.flatten(1)
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
    x = planes(2, 1, 48, 64)
    expected = orthonormal(count).flatten(1) @ functional.unfold(x, 16, stride=16)
    y = x
    for level in levels:
        y = functional.conv2d(y, level, stride=2)
    assert torch.allclose(y.flatten(2), expected, atol=1e-5)
    if count == 256:
        for level in reversed(levels):
            y = functional.conv_transpose2d(y, level, stride=2)
        assert torch.allclose(y, x, atol=1e-5)


def test_the_first_levels_of_a_packet_are_those_of_haar():
    (first, second, third, _), x = packet(orthonormal(256)), planes(1, 1, 16, 16)
    y = functional.conv2d(x, first, stride=2)
    a, b, c, d = x[0, 0, ::2, ::2], x[0, 0, ::2, 1::2], x[0, 0, 1::2, ::2], x[0, 0, 1::2, 1::2]
    expected = torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2
    assert torch.allclose(y[0], expected, atol=1e-6)
    y = functional.conv2d(functional.conv2d(y, second, stride=2), third, stride=2)
    assert torch.allclose(y[:, :1], 8 * functional.avg_pool2d(x, 8), atol=1e-5)  # no band is lower than the first


# ---- numbers and scales at their ends


@pytest.mark.parametrize("network", NETWORKS)
def test_numbers_beyond_the_limit_are_clipped_alike_at_both_sides(network, parts):
    codec, x = tiny(network), planes(1, 1, 40, 72)
    with torch.no_grad():
        codec.log_gain += 15
    (coded,) = codec.encode(x, 255)
    z, *y = [part.numbers for part in parts[0]]
    assert {LIMIT, -LIMIT} <= set(z.tolist()) and {LIMIT, -LIMIT} <= set(np.concatenate(y).tolist())
    assert max(np.abs(numbers).max() for numbers in (z, *y)) == LIMIT
    assert torch.equal(codec.decode([coded.string], 255, (1, 40, 72))[0], coded.plane)
    assert np.isfinite(coded.estimated_bits) and torch.isfinite(coded.plane).all()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-9, 0.11, 64.0, 64.1, 1e6, torch.inf])
def test_scales_beyond_the_tables_ends_are_coded(network, scale, parts):
    codec, x = with_scales(tiny(network), lambda n: torch.full((n,), scale)), planes(1, 1, 40, 72)
    (coded,) = codec.encode(x, 255)
    tables = {int(table) for part in parts[0][1:] for table in part.tables}
    assert tables == {0 if scale <= 0.11 else len(SCALE_TABLE) - 1}
    assert torch.equal(codec.decode([coded.string], 255, (1, 40, 72))[0], coded.plane)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_number_is_coded_with_the_table_of_the_nearest_scale(network, parts):
    step = SCALE_TABLE[1] / SCALE_TABLE[0]
    away = torch.tensor([0.4, 0.4, 0.6, 0.0, 0.45, -0.45, 0.6, 9.0])  # in steps
    wanted = SCALE_TABLE[[0, 3, 3, 20, 31, 31, 62, 63]] * step**away
    codec = with_scales(tiny(network), lambda n: wanted.repeat(n // 8))
    codec.encode(planes(1, 1, 64, 64), 128)
    expected = [0, 3, 4, 20, 31, 31, 63, 63]
    positions = 8 if network == "elic" else 16  # of 4 x 4; ELIC codes the two colours of a checkerboard in turn
    for part in parts[0][1:]:
        tables = part.tables.reshape(-1, positions)
        assert tables.tolist() == [[table] * positions for table in expected] * (len(tables) // 8)


def test_the_scale_table_covers_what_the_gaussians_can_ask_for():
    bound = GaussianConditional(None).lower_bound_scale.bound.item()
    assert SCALE_TABLE[0].item() == approx(bound)
    # Halfway to the next scale, where a table fits worst, it costs next to nothing more than the right one would.
    right = gaussians(SCALE_LIMITS.double().numpy())
    for scales in (SCALE_TABLE[:-1], SCALE_TABLE[1:]):
        table = gaussians(scales.double().numpy())
        excess = np.where(right > 1e-20, right * np.log2(right.clip(1e-20) / table.clip(1e-20)), 0).sum(1)
        assert excess.max() < 0.005


@pytest.mark.parametrize("network", NETWORKS)
def test_the_hyper_latents_tables_are_the_entropy_bottlenecks(network):
    """Of each channel its own, around its own median."""
    codec = tiny(network)
    bottleneck = codec.net.entropy_bottleneck
    with torch.no_grad():
        bottleneck.quantiles[:, 0, 1] = torch.linspace(-3, 3, len(bottleneck.quantiles))
        offsets = torch.arange(-5.0, 6)
        _, likelihood = codec.update().net.entropy_bottleneck(codec._medians + offsets, training=False)  # [1, Z, 1, 11]
    for channel in (0, len(bottleneck.quantiles) - 1):
        tables, costs = np.full(5000, len(SCALE_TABLE) + channel, dtype=np.uint16), []
        for number in offsets.int().tolist():
            string, _ = codec._tables.encode([Part(np.full(5000, number, dtype=np.int32), tables)])
            costs.append(8 * len(string) / 5000)
        assert costs == approx((-likelihood[0, channel, 0].log2()).tolist(), abs=0.02)


# ---- the sender's decisions


@pytest.mark.parametrize("thrift", [0.0, 0.5, 2.0])
def test_a_number_is_the_cheaper_of_the_nearest_and_the_next_towards_0(thrift):
    codec = tiny("elic")
    codec.thrift = thrift
    exact = torch.cat([torch.linspace(-9, 9, 400), torch.tensor([0.0, 600.3, -511.4, 510.6, 1e6])])
    for table, price in ((0, 3.0), (20, 0.1), (20, 3.0), (63, 0.5)):
        tables, prices = torch.full(exact.shape, table), torch.tensor([price])
        chosen = codec._worth_sending(exact, tables, prices)
        bits = codec._tables.bits[table]
        for x, number in zip(exact.tolist(), chosen.tolist(), strict=True):
            nearest = min(max(round(x), -LIMIT), LIMIT)
            less = nearest - (nearest > 0) + (nearest < 0)
            cost = {n: thrift * bits[n + LIMIT] + price * (n - x) ** 2 for n in (nearest, less)}
            assert cost[number] <= min(cost.values()) * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_a_receiver_does_not_know_the_senders_thrift(network):
    codec, receiver = tiny(network), tiny(network)
    receiver.thrift = 7.0
    for thrift in (0.0, 0.5, 4.0):
        codec.thrift = thrift
        (coded,) = codec.encode(planes(1, 1, 40, 72), 200)
        assert torch.equal(receiver.decode([coded.string], 200, (1, 40, 72))[0], coded.plane)


# ---- the shipped weights


@pytest.mark.parametrize("level", [128, 255])
@pytest.mark.parametrize("network", NETWORKS)
def test_real_bits_are_within_3_percent_of_the_networks_own_estimate(network, level, monkeypatch):
    """That of `forward`, from likelihoods at its own scales and of numbers rounded to the nearest."""
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", torch.float32)
    codec = load_codec(Path(__file__).parents[1] / f"data/pretrained/{network}.pt").codec
    codec.thrift = 0.0
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    tile = 8 * y.div(32, rounding_mode="floor") + x.div(32, rounding_mode="floor")
    waves = torch.sin(x * (0.2 + tile % 3 / 10) + tile) * torch.cos(y * (0.1 + tile % 5 / 20))
    plane = 0.5 + 0.15 * waves + 0.1 * torch.sin(7 * tile) + 0.05 * (planes(1, 1, 256, 256) - 0.5)
    share = level / 255
    lmbda = torch.exp((1 - share) * codec.log_lambdas[:1] + share * codec.log_lambdas[-1:])
    with torch.no_grad():
        _, estimate = codec(plane, lmbda)
    (coded,) = codec.encode(plane, level)
    assert estimate > 50_000
    assert abs(8 * len(coded.string) - estimate) < 0.03 * estimate + 100


# ---- sizes


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("size", "latents", "hyper"),
    [
        ((1, 1), (2, 2), (1, 1)),
        ((32, 16), (2, 2), (1, 1)),
        ((64, 64), (4, 4), (1, 1)),
        ((33, 65), (4, 6), (1, 2)),
        ((3, 130), (2, 10), (1, 3)),
    ],
)
def test_a_small_plane_has_few_numbers(network, size, latents, hyper, parts):
    codec = tiny(network)
    codec.encode(planes(1, 1, *size), 128)
    z, *y = [len(part.numbers) for part in parts[0]]
    assert z == codec._medians.numel() * math.prod(hyper)
    assert sum(y) == M * math.prod(latents)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [(32, 16), (32, 96), (160, 64)])
def test_training_sender_and_receiver_have_one_hyper_path(network, size, parts, monkeypatch):
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", torch.float32)
    codec, x, seen = tiny(network), planes(1, 1, *size), []
    walk = codec.net.walk
    monkeypatch.setattr(codec.net, "walk", lambda side, y, code: seen.append((side, y)) or walk(side, y, code))
    with torch.no_grad():
        codec.net.h_a[-1].weight *= 30  # a hyper-latent other than 0
        codec(functional.pad(x, (0, -size[1] % 32, 0, 0), value=0.5), codec.log_lambdas[-1:].exp())
    (coded,) = codec.encode(x, 255)
    codec.decode([coded.string], 255, (1, *size))
    (trained, y), (sent, _), (received, _) = seen
    assert trained.shape[2:] == y.shape[2:] == (size[0] // 16, -(-size[1] // 32) * 2)
    assert torch.allclose(trained, sent, atol=1e-4) and torch.equal(sent, received)
    assert 0 < np.abs(parts[0][0].numbers).max() < LIMIT  # of the hyper-latent, which training does not clip


@pytest.mark.parametrize("network", NETWORKS)
def test_the_hyper_path_sees_zeros_beyond_the_latents(network):
    """And what it says of them is dropped: what it says of a latent stays at its place."""
    codec, y = tiny(network), planes(1, M, 2, 6)
    whole = torch.zeros(1, M, 4, 8)
    whole[:, :, :2, :6] = y
    with torch.no_grad():
        z = codec.net.h_a(whole)
        assert torch.equal(codec._hyper(y), z) and torch.equal(codec._hyper(whole), z)
        assert torch.equal(codec._side(z, y), codec.net.h_s(z)[:, :, :2, :6])


# ---- types of numbers


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 40, 72), (1, 1, 1), (1, 130, 3), (1, 16, 8), (1, 33, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_agree_to_the_bit_whatever_the_transforms_compute_in(network, shape, dtype, monkeypatch):
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", dtype)
    codec, x = tiny(network), planes(2, *shape)
    coded = codec.encode(x, 200)
    assert torch.equal(codec.decode([c.string for c in coded], 200, shape), torch.stack([c.plane for c in coded]))
    assert all(c.plane.dtype == torch.float32 for c in coded)
    assert all(value.dtype != torch.bfloat16 for value in codec.state_dict().values())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sender", [torch.float32, torch.bfloat16])
def test_a_receiver_of_another_type_reads_the_same_numbers(network, sender, monkeypatch):
    codecs = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(learned, "TRANSFORM_TYPE", dtype)
        codecs[dtype] = tiny(network)
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", sender)
    (coded,) = codecs.pop(sender).encode(planes(1, 1, 40, 72), 200)
    (other, receiver), *_ = codecs.items()
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", other)
    (received,) = receiver.decode([coded.string], 200, (1, 40, 72))  # refused if a number had another table
    assert (received - coded.plane).abs().max() < 0.02


@pytest.mark.parametrize("network", NETWORKS)
def test_small_planes_are_transformed_in_float32(network, monkeypatch):
    for shape, kind in (((1, 32, 64), torch.float32), ((1, 33, 64), torch.bfloat16)):
        seen = []
        monkeypatch.setattr(learned, "TRANSFORM_TYPE", torch.bfloat16)
        codec = tiny(network)
        for transforms in codec._transforms.values():
            for part in transforms:
                part.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].dtype))
        (coded,) = codec.encode(planes(1, *shape), 200)
        codec.decode([coded.string], 200, shape)
        assert seen == [kind] * 3


# ---- damage


@pytest.fixture(scope="module", params=NETWORKS)
def sent(request) -> tuple[LearnedCodec, bytes]:
    """A codec whose scales are as wide as its numbers, as of trained ones, and the string of a plane of 40 x 72."""
    codec = with_scales(tiny(request.param), lambda n: torch.full((n,), 8.0))
    return codec, codec.encode(planes(1, 1, 40, 72), 255)[0].string


def refused(codec: LearnedCodec, string: bytes, shape: tuple[int, int, int] = (1, 40, 72)) -> bool:
    try:
        codec.decode([string], 255, shape)
    except InputError as error:
        assert "code it again" in str(error)
        return True
    return False


def test_damaged_strings_are_refused(sent):
    (codec, string), rng = sent, random.Random(0)
    assert not refused(codec, string)
    n = len(string)
    assert all(refused(codec, string[:length]) for length in {*range(0, n, -(-n // 9)), n - 1})
    assert all(refused(codec, string + more) for more in (b"\0", b"\1", b"\xff" * 4, string))
    for _ in range(15):
        damaged = bytearray(string)
        damaged[rng.randrange(n)] ^= 1 << rng.randrange(8)
        assert refused(codec, bytes(damaged))
        assert refused(codec, rng.randbytes(rng.randrange(2 * n)))


def test_a_string_of_another_size_or_network_is_refused(sent):
    codec, string = sent
    assert refused(codec, string, (1, 80, 72)) and refused(codec, string, (1, 40, 200))
    torch.manual_seed(1)
    other = LearnedCodec(NETWORKS["elic" if isinstance(codec.net, LicTcm) else "tcm"](), M, (1e-4, 0.05), 4)
    assert refused(other.eval().update(), string)


def test_one_damaged_string_is_found_among_whole_ones(sent):
    codec, string = sent
    with pytest.raises(InputError):
        codec.decode([string, string[:-1], string], 255, (1, 40, 72))


def test_lanes_code_what_one_does_in_threads_that_stay(monkeypatch):
    codec, x = tiny("elic"), planes(5, 1, 64, 64)
    alone = codec.encode(x, 90)
    monkeypatch.setattr(learned, "LANES", 2)
    before = threading.active_count()
    for _ in range(3):
        assert [c.string for c in codec.encode(x, 90)] == [c.string for c in alone]
        assert torch.equal(
            codec.decode([c.string for c in alone], 90, (1, 64, 64)), torch.stack([c.plane for c in alone])
        )
    assert threading.active_count() <= before + 2
    with pytest.raises(InputError):
        codec.decode([alone[0].string, b"damaged", alone[1].string], 90, (1, 64, 64))
