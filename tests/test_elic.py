"""The receiver sees what the sender saw, to the bit, and every bit of it was sent."""

import math

import pytest
import torch
from compressai.layers import CheckerboardMaskedConv2d
from pytest import approx
from torch import nn
from torch.nn import functional

from stages.lib import learned
from stages.lib.elic import Elic, context_of
from stages.lib.learned import SCALE_LIMITS, SCALE_TABLE, LearnedCodec, packet

CONTEXT = {"widths": [8, 8], "kernel": 3}
LAMBDAS = (1e-4, 0.05)


def tiny(plane_channels: int = 1) -> LearnedCodec:
    torch.manual_seed(0)
    return LearnedCodec(Elic(plane_channels, 16, 32, [8, 24], CONTEXT), 32, LAMBDAS, 4).eval().update()


@pytest.fixture(scope="module")
def codec() -> LearnedCodec:
    return tiny()


def random_basis(count: int = 256) -> torch.Tensor:
    """Orthonormal, of blocks: [count, 16, 16]."""
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q[:count].view(-1, 16, 16)


def started(basis: torch.Tensor) -> LearnedCodec:
    torch.manual_seed(0)
    net = Elic(1, 64, 256, [16, 48, 192], CONTEXT).transform_start(basis)
    return LearnedCodec(net, 256, LAMBDAS, 8).eval().update()


@pytest.fixture(scope="module")
def transform() -> LearnedCodec:
    return started(random_basis())


def planes(n: int, *shape: int) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7))


def smooth_plane() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    return (0.5 + 0.3 * torch.sin(x / 11) * torch.cos(y / 17) + 0.1 * torch.sin((x + y) / 5))[None, None]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10((a - b).square().mean().item())


# The weights' memory format decides which convolution routine runs, and routines round differently.
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 40, 72), (1, 130, 3), (1, 1, 1), (3, 64, 100)])
@pytest.mark.parametrize("level", [0, 255])
def test_the_receiver_reconstructs_what_the_sender_did_to_the_bit(memory_format, shape, level):
    codec = tiny(shape[0]).to(memory_format=memory_format)
    coded = codec.encode(planes(2, *shape), level)
    decoded = codec.decode([c.string for c in coded], level, shape)
    assert decoded.shape == (2, *shape)
    assert torch.equal(decoded, torch.stack([c.plane for c in coded]))


def test_a_plane_is_coded_alike_in_any_company(codec):
    x = planes(10, 1, 40, 72)
    together = codec.encode(x, 200)
    alone = [codec.encode(plane[None], 200)[0] for plane in x]
    assert [c.string for c in alone] == [c.string for c in together]
    order = [9, 0, 4]
    decoded = codec.decode([together[i].string for i in order], 200, (1, 40, 72))
    assert torch.equal(decoded, torch.stack([together[i].plane for i in order]))


def test_coding_twice_gives_the_same_bytes(codec):
    x = planes(1, 1, 64, 64)
    assert codec.encode(x, 100)[0].string == codec.encode(x, 100)[0].string


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_planes_are_coded(codec, value):
    coded = codec.encode(torch.full((1, 1, 20, 20), value), 30)[0]
    assert torch.equal(codec.decode([coded.string], 30, (1, 20, 20))[0], coded.plane)


def test_the_hyper_latent_is_a_part_of_the_one_string(codec):
    for coded in codec.encode(planes(2, 1, 64, 128), 255):
        assert 0 < coded.bytes_hyper < len(coded.string)


def test_coding_does_not_depend_on_what_the_padding_could_hold(codec):
    x = planes(1, 1, 64, 64)
    x[..., 40:] = 0.5  # what the codec pads with
    cut, whole = codec.encode(x[..., :40], 128)[0], codec.encode(x, 128)[0]
    assert cut.string == whole.string
    assert torch.equal(cut.plane, whole.plane[..., :40])


# ---- rate control


def test_levels_rise_from_0_to_255_over_the_trained_range(codec):
    lambdas = torch.logspace(math.log10(LAMBDAS[0]), math.log10(LAMBDAS[1]), 60).tolist()
    levels = [codec.level(lmbda) for lmbda in lambdas]
    assert levels[0] == 0 and levels[-1] == 255
    assert levels == sorted(levels) and len(set(levels)) == 60
    assert codec.level(1e-9) == 0 and codec.level(9.0) == 255


def test_the_level_meets_its_lambda_within_half_a_step(codec):
    for lmbda in (2e-4, 1e-3, 0.02):
        position = codec._position_of(codec.level(lmbda))[0].item()
        assert position == approx(codec.position(torch.tensor(lmbda)).item(), abs=0.51 * 3 / 255)


def test_gains_between_trained_ones_are_their_geometric_mean():
    table = torch.randn(4, 5)
    gain = LearnedCodec._at(table, torch.tensor([0.0, 1.0, 1.5, 2.25, 3.0]))[:, :, 0, 0]
    expected = [table[0], table[1], (table[1] + table[2]) / 2, 0.75 * table[2] + 0.25 * table[3], table[3]]
    assert torch.allclose(gain, torch.stack(expected).exp())


def test_the_starting_inverse_undoes_the_starting_gain(codec):
    assert torch.equal(codec.log_gain, -codec.log_inverse)
    # D = 1 / (2 ln 2 lambda 255^2) from a uniform quantiser of step 1 / gain: D = 1 / (12 gain^2).
    for lmbda, gain in zip(codec.log_lambdas.exp().tolist(), codec.log_gain[:, 0].exp().tolist(), strict=True):
        assert 1 / (12 * gain**2) == approx(1 / (2 * math.log(2) * lmbda * 255**2), rel=1e-4)


# ---- bits


def test_a_higher_level_costs_more_bits_and_leaves_less_error(transform):
    x = smooth_plane()
    coded = [transform.encode(x, level)[0] for level in (0, 85, 170, 255)]
    sizes = [len(c.string) for c in coded]
    errors = [(c.plane - x[0]).square().mean().item() for c in coded]
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


def with_known_scales(codec: LearnedCodec, scale: float) -> LearnedCodec:
    """Every Gaussian of the latent gets this scale and mean 0."""
    for board in codec.net.latent_codec["y"].latent_codec.values():
        last = board.entropy_parameters[-1]
        nn.init.zeros_(last.weight)
        half = len(last.bias) // 2
        with torch.no_grad():
            last.bias[:half], last.bias[half:] = scale, 0.0
    return codec


@pytest.mark.parametrize("level", [128, 255])
def test_real_bits_are_the_estimated_ones(level):
    codec, x = tiny(), planes(2, 1, 128, 128)
    with torch.no_grad():  # a latent of unequal channels, so that some scales fit and some do not
        y = codec.net.g_a(x - 0.5) * codec._at(codec.log_gain, codec._position_of(level)[:1])
    codec = with_known_scales(codec, y.std().item()).update()
    for coded in codec.encode(x, level):
        real = 8 * len(coded.string)
        assert 0.995 * coded.estimated_bits < real < 1.005 * coded.estimated_bits + 32


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_a_sender_without_thrift_codes_what_training_saw(size, monkeypatch):
    """But for the scales, which training does not round to those of the tables, and rare numbers: none is here."""
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", torch.float32)
    codec, x, position = tiny(), planes(2, 1, *size), 2.0
    codec.thrift = 0.0
    with torch.no_grad():
        for board in codec.net.latent_codec["y"].latent_codec.values():
            scales, _ = board.entropy_parameters[-1].bias.chunk(2)
            scales += 2
    gaussian = codec.net.gaussian_conditional
    gaussian.register_forward_pre_hook(
        lambda _, given: (given[0], SCALE_TABLE[torch.bucketize(given[1].contiguous(), SCALE_LIMITS)], *given[2:])
    )
    with torch.no_grad():
        x_hat, bits = codec(x, codec.log_lambdas[2].exp().expand(2))
    coded = codec.encode(x, round(255 * position / 3))
    assert [c.estimated_bits for c in coded] == approx(bits.tolist(), rel=1e-3)
    assert torch.allclose(torch.stack([c.plane for c in coded]), x_hat, atol=1e-5)


@pytest.mark.parametrize("level", [60, 128, 255])
def test_thrift_lowers_the_loss_that_the_level_stands_for(level):
    """Of an orthonormal transform, whose error is that of its latents, with scales that fit."""
    codec, x = with_known_scales(started(random_basis()), 0.0), smooth_plane() + 0.05 * planes(1, 1, 64, 64)
    with torch.no_grad():
        y = codec.net.g_a(x - 0.5) * codec._at(codec.log_gain, codec._position_of(level))
    codec = with_known_scales(codec, y.std().item()).update()
    lmbda = codec.log_lambdas[0].exp() ** (1 - level / 255) * codec.log_lambdas[-1].exp() ** (level / 255)

    def loss(thrift: float) -> tuple[float, int]:
        codec.thrift = thrift
        (coded,) = codec.encode(x, level)
        return (8 * len(coded.string) + lmbda * 255**2 * (coded.plane - x[0]).square().sum()).item(), len(coded.string)

    assert loss(1.0)[0] < loss(0.0)[0] and loss(1.0)[1] < loss(0.0)[1]
    assert loss(0.0)[1] > loss(0.5)[1] > loss(1.0)[1]


# ---- coding order


def record_walk(codec: LearnedCodec, y: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What `walk` hands out, step by step: (part, scales, means)."""
    steps = []

    def code(part, channels, scales, means):
        assert part.shape[1] == len(range(32)[channels]) and part.shape == scales.shape == means.shape
        steps.append((part.clone(), scales.clone(), means.clone()))
        return torch.round(part - means) + means

    side = planes(len(y), 32, *y.shape[2:])
    with torch.inference_mode():
        codec.net.walk(side, y, code)
    return steps


@pytest.mark.parametrize("changed", [1, 2, 3])  # steps: group 0 colour 0, group 0 colour 1, group 1 colour 0, ...
def test_what_comes_later_does_not_reach_what_came_before(codec, changed):
    y = 9 * planes(1, 32, 4, 4)
    group, colour = divmod(changed, 2)
    channels = slice(0, 8) if group == 0 else slice(8, 32)
    even = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    other = y.clone()
    other[:, channels] += 50 * (even if colour == 0 else ~even)
    before, after = record_walk(codec, y), record_walk(codec, other)
    assert len(before) == 4
    for step in range(changed):
        assert all(torch.equal(a, b) for a, b in zip(before[step], after[step], strict=True))
    # The models of the changed step come from earlier ones only; those of every later step know of the change.
    assert all(torch.equal(a, b) for a, b in zip(before[changed][1:], after[changed][1:], strict=True))
    assert all(not torch.equal(before[step][1], after[step][1]) for step in range(changed + 1, 4))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(2, 2), (2, 6), (8, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_context_of_the_second_colour_is_compressais(kernel, size, memory_format):
    torch.manual_seed(0)
    board, (height, width) = tiny().net.latent_codec["y"]["y0"], size
    convolution = CheckerboardMaskedConv2d(3, 6, kernel, 1, kernel // 2).to(memory_format=memory_format)
    halves = torch.randn(2, 2, 3, height, width // 2)
    halves[1] = 0  # not coded yet
    with torch.no_grad():
        context = context_of(halves[0], convolution)
        expected = board.unembed(convolution(board.embed(halves)))[1]
    assert context.shape == expected.shape and torch.allclose(context, expected, atol=1e-6)


def test_the_walk_visits_every_latent_once(codec):
    y = torch.arange(32.0 * 4 * 4).view(1, 32, 4, 4)
    visited = torch.cat([part.flatten() for part, _, _ in record_walk(codec, y)])
    assert torch.equal(visited.sort().values, y.flatten())


def test_the_walk_names_the_channels_of_a_part(codec):
    y = torch.arange(32.0).view(1, 32, 1, 1).expand(1, 32, 4, 4)
    named = []

    def code(part, channels, scales, means):
        named.append(channels)
        assert part[0, :, 0, 0].tolist() == list(range(32))[channels]
        return part

    with torch.inference_mode():
        assert torch.equal(codec.net.walk(planes(1, 32, 4, 4), y, code), y)
    assert named == [slice(0, 8)] * 2 + [slice(8, 32)] * 2


# ---- transform start


def blocks_of(plane: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Planes [B, 1, H, W] -> their transform by `basis` [B, K, H / 16, W / 16]."""
    coefficients = basis.flatten(1) @ functional.unfold(plane, 16, stride=16)
    return coefficients.unflatten(2, (plane.shape[2] // 16, -1))


def test_the_transform_starts_convolutions_are_the_levels_of_the_basis(transform):
    down = [m for m in transform.net.g_a if isinstance(m, nn.Conv2d)]
    up = [m for m in transform.net.g_s if isinstance(m, nn.ConvTranspose2d)]
    for level, analysis, synthesis in zip(packet(random_basis()), down, reversed(up), strict=True):
        made, bands = level.shape[:2]
        for weight in (analysis.weight, synthesis.weight):
            rows = weight[:made].flatten(1)
            assert torch.allclose(rows @ rows.T, torch.eye(made), atol=1e-5)
            assert torch.equal(weight[:made, :bands, 2:4, 2:4], level)
            assert (weight[:made, bands:] == 0).all()
        assert not analysis.bias.any() and not synthesis.bias.any()


@pytest.mark.parametrize("count", [100, 256])
def test_the_transform_starts_analysis_is_the_block_transform(count):
    codec, x = started(random_basis(count)), torch.cat([planes(1, 1, 64, 64), smooth_plane()]) - 0.5
    with torch.no_grad():
        y = codec.net.g_a(x)
    expected = blocks_of(x, random_basis(count))
    assert (y[:, :count] - expected).square().mean() < 0.015**2 * expected.square().mean()
    assert count == 256 or y[:, count:].square().mean() < 0.05**2 * expected.square().mean()


def test_the_transform_start_reconstructs(transform):
    for x in (smooth_plane(), planes(1, 1, 128, 64)):
        with torch.no_grad():
            x_hat = transform.net.g_s(transform.net.g_a(x - 0.5)) + 0.5
            coded, bits = transform(x, torch.tensor([LAMBDAS[1]]))
        assert psnr(x_hat, x) > 45
        # The steps of the highest rate are uniform: D = 1 / (2 ln 2 lambda 255^2).
        assert psnr(coded, x) > 10 * math.log10(2 * math.log(2) * LAMBDAS[1] * 255**2) - 1
        assert torch.isfinite(bits).all()


def test_a_narrow_network_starts_with_the_first_bands():
    torch.manual_seed(0)
    net = Elic(1, 16, 32, [8, 24], CONTEXT).transform_start(random_basis())
    levels = packet(random_basis())
    down = [m for m in net.g_a if isinstance(m, nn.Conv2d)]
    for level, layer, (made, bands) in zip(levels, down, ((4, 1), (16, 4), (16, 16), (32, 16)), strict=True):
        assert torch.equal(layer.weight[:made, :bands, 2:4, 2:4], level[:made, :bands])


def test_training_forward_has_gradients_everywhere(codec):
    net = tiny().train()
    x_hat, bits = net(planes(2, 1, 64, 64), torch.tensor([2e-4, 0.03]))
    (bits.sum() + (x_hat**2).sum()).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None and not n.endswith(".quantiles")]
    assert without == []
