"""A receiver that reads the symbols gets the sender's latent, and every multiple of 32 is a size."""

import inspect
from pathlib import Path

import pytest
import tcm_parts
import torch
import yaml
from pytest import approx
from tcm_parts import WINDOW, noise
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.learned import LearnedCodec
from stages.lib.tcm import LicTcm

no_initial_weights = tcm_parts.no_initial_weights  # a fixture
LAMBDAS = (1e-4, 0.05)


def tiny(plane_channels: int = 1) -> LicTcm:
    torch.manual_seed(0)
    widths = {"head_dims": (4, 4, 8), "hyper_channels": 8, "context_widths": (16, 8, 8)}
    return LicTcm(plane_channels, 8, 32, slices=4, window=WINDOW, **widths).eval()


def with_gains(net: LicTcm, gains: int = 4) -> LearnedCodec:
    return LearnedCodec(net, 32, LAMBDAS, gains).eval()


@pytest.fixture(scope="module")
def codec() -> LicTcm:
    return tiny()


# ---- sizes


@pytest.mark.parametrize(("N", "weights"), [(64, 45.2e6), (128, 76.6e6)])
def test_the_papers_networks_have_the_papers_number_of_weights(N, weights, no_initial_weights):
    assert sum(p.numel() for p in LicTcm(3, N, 320).parameters()) == approx(weights, rel=0.01)


def test_the_coco_profile_has_the_papers_network():
    profile = Path(__file__).parents[1] / "profiles/coco/params.yaml"
    network = yaml.safe_load(profile.read_text())["codecs"]["tcm"]["network"]
    defaults = {name: p.default for name, p in inspect.signature(LicTcm).parameters.items() if name != "plane_channels"}
    wanted = defaults | {"N": 64, "M": 320}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in network.items()} == wanted


def test_narrow_slice_networks_make_a_small_codec():
    widths = {"head_dims": (8, 8, 24), "hyper_channels": 32, "context_widths": (16, 32, 16)}
    small = LicTcm(1, 24, 256, slices=4, window=4, **widths)
    assert sum(p.numel() for p in small.parameters()) < 5e6


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 64, 128), (1, 192, 64), (1, 32, 96), (3, 160, 32)])
def test_every_multiple_of_32_is_a_size(shape):
    c, height, width = shape
    codec, x = with_gains(tiny(c)), torch.rand(2, *shape)
    with torch.no_grad():
        y = codec.net.g_a(x)
        z = codec._hyper(y)
        assert y.shape == (2, 32, height // 16, width // 16)
        assert z.shape == (2, 8, -(-height // 64), -(-width // 64))
        assert codec.net.h_s(z).shape == (2, 64, 4 * z.shape[2], 4 * z.shape[3])
        assert codec._side(z, y).shape == (2, 64, height // 16, width // 16)
        assert codec.net.g_s(y).shape == x.shape
        x_hat, bits = codec(x, torch.tensor(LAMBDAS))
    assert x_hat.shape == x.shape and bits.shape == (2,)
    assert torch.isfinite(x_hat).all() and (bits > 0).all()


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="M = 32 does not divide into 5 equal slices"):
        LicTcm(1, 8, 32, slices=5, head_dims=(8, 8, 8))
    with pytest.raises(ValueError, match="8 channels do not divide into heads of 16"):
        LicTcm(1, 8, 32, slices=4)


# ---- coding order


def symbols_of(codec: LicTcm, side: Tensor, y: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The sender's y_hat, and symbols, scales and means of every slice."""
    steps = []

    def code(part: Tensor, channels: slice, scales: Tensor, means: Tensor) -> Tensor:
        assert torch.equal(part, y[:, channels])
        steps.append((torch.round(part - means), scales, means))
        return steps[-1][0] + means

    with torch.inference_mode():
        return codec.walk(side, y, code), steps


@pytest.mark.parametrize("changed", range(4))
def test_a_slice_reaches_itself_and_later_ones(codec, changed):
    side, y = noise(2, 64, 4, 8), 9 * noise(2, 32, 4, 8, seed=8)
    other = y.clone()
    other[:, 8 * changed : 8 * changed + 8] += 5
    (before, steps), (after, other_steps) = symbols_of(codec, side, y), symbols_of(codec, side, other)
    assert [torch.equal(a, b) for a, b in zip(before.chunk(4, 1), after.chunk(4, 1), strict=True)] == [
        k < changed for k in range(4)
    ]
    for of_entropy_model in (1, 2):  # scales, means: of the slice itself they stay
        same = [torch.equal(a[of_entropy_model], b[of_entropy_model]) for a, b in zip(steps, other_steps, strict=True)]
        assert same == [k <= changed for k in range(4)]


def test_means_and_scales_have_their_own_halves_of_the_side_information(codec):
    side, y = noise(1, 64, 4, 4), noise(1, 32, 4, 4, seed=8)
    for half, constant in ((slice(0, 32), 1), (slice(32, 64), 2)):
        other = side.clone()
        other[:, half] += 1
        first, changed = symbols_of(codec, side, y)[1][0], symbols_of(codec, other, y)[1][0]
        assert torch.equal(first[constant], changed[constant])
        assert not torch.equal(first[3 - constant], changed[3 - constant])


def test_the_predicted_residual_is_below_half_a_step(codec):
    y_hat, steps = symbols_of(codec, noise(1, 64, 4, 4), 9 * noise(1, 32, 4, 4, seed=8))
    residual = y_hat - torch.cat([symbols + means for symbols, _, means in steps], 1)
    assert residual.abs().min() > 0 and residual.abs().max() < 0.5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(4, 8), (5, 3)])
def test_the_receiver_gets_the_senders_latent_to_the_bit(size, memory_format):
    codec = tiny().to(memory_format=memory_format)
    side = noise(2, 64, *size).contiguous(memory_format=torch.channels_last)
    y = 9 * noise(2, 32, *size, seed=8)
    sent, steps = symbols_of(codec, side, y.contiguous(memory_format=torch.channels_last))
    symbols = iter([s.contiguous() for s, _, _ in steps])  # as a decoder lays them out
    with torch.inference_mode():
        received = codec.walk(side, torch.zeros_like(y), lambda _, __, scales, means: next(symbols) + means)
    assert torch.equal(received, sent)


# The weights' memory format decides which convolution routine runs, and routines round differently.
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 40, 72), (1, 130, 3), (1, 1, 1), (3, 64, 100)])
@pytest.mark.parametrize("level", [0, 255])
def test_the_receiver_reconstructs_what_the_sender_did_to_the_bit(memory_format, shape, level):
    codec = with_gains(tiny(shape[0]).to(memory_format=memory_format)).update()
    coded = codec.encode(noise(2, *shape) / 4 + 0.5, level)
    decoded = codec.decode([c.string for c in coded], level, shape)
    assert decoded.shape == (2, *shape)
    assert torch.equal(decoded, torch.stack([c.plane for c in coded]))


@pytest.mark.parametrize("thrift", [0.0, 0.5])
def test_real_bits_are_the_estimated_ones(thrift):
    codec, level = with_gains(tiny()), 255
    v, u = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    x = (0.5 + 0.3 * torch.sin(u / 11) * torch.cos(v / 17) + 0.1 * torch.sign(torch.sin((u + v) / 9)))[None, None]
    codec.thrift = thrift
    with torch.no_grad():
        y = codec.net.g_a(x - 0.5) * codec._at(codec.log_gain, codec._position_of(level))
        codec.log_gain += (20 / y.std()).log()
        y *= 20 / y.std()
        for model in codec.net.slices:  # scales that fit on the whole, where untrained ones do not
            model.scale[-1].weight.mul_(0.1)
            model.scale[-1].bias.fill_(y.std())
    (coded,) = codec.update().encode(x, level)
    assert coded.estimated_bits > 20_000
    assert 0.995 * coded.estimated_bits < 8 * len(coded.string) < 1.005 * coded.estimated_bits + 32
    assert torch.equal(codec.decode([coded.string], level, (1, 256, 256))[0], coded.plane)


# ---- training


def test_training_blurs_the_likelihoods_and_rounds_the_reconstruction():
    codec, x, lmbda = with_gains(tiny()), torch.rand(2, 1, 64, 64), torch.tensor([0.001, 0.05])
    with torch.no_grad():
        whole, rounded_bits = codec(x, lmbda)
        (one, bits), (two, other_bits) = (codec.train()(x, lmbda) for _ in range(2))
        gain = codec._at(codec.log_gain, codec.position(lmbda))
        y = codec.net.g_a(x - 0.5) * gain
        side = codec.net.h_s((codec.net.h_a(y) - codec._medians).round() + codec._medians)
        rounded = codec.net.g_s(symbols_of(codec.net, side, y)[0] / gain) + 0.5
    assert not torch.equal(bits, other_bits) and not torch.equal(bits, rounded_bits)
    assert all(torch.allclose(x_hat, rounded, atol=1e-5) for x_hat in (whole, one, two))


def test_every_weight_is_trained():
    codec = with_gains(tiny(), gains=2).train()
    nn.init.ones_(codec.net.h_a[-1].bias)  # z of untrained weights rounds to 0, and what meets only 0 has no gradient
    x_hat, bits = codec(torch.rand(2, 1, 128, 64), torch.tensor([0.001, 0.02]))
    (x_hat.square().sum() + bits.sum()).backward()
    idle = [n for n, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["net.entropy_bottleneck.quantiles"]


# ---- transform start


def random_basis() -> Tensor:
    """Orthonormal, of blocks: [256, 16, 16]."""
    return torch.linalg.qr(noise(256, 256)).Q.view(-1, 16, 16)


def wide(M: int = 256) -> LicTcm:
    torch.manual_seed(0)
    return LicTcm(1, 32, M, 4, window=4, blocks=1, hyper_channels=32, context_widths=(16, 16, 16)).eval()


def started(basis: Tensor, M: int = 256) -> LicTcm:
    return wide(M).transform_start(basis)


def planes_around_0() -> Tensor:
    """Flat, smooth and rough ones, as LearnedCodec shows planes to g_a [3, 1, 64, 128]."""
    v, u = torch.meshgrid(torch.arange(64.0), torch.arange(128.0), indexing="ij")
    smooth = 0.3 * torch.sin(u / 11) * torch.cos(v / 17) + 0.1 * torch.sin((u + v) / 5)
    rough = torch.rand(64, 128, generator=torch.Generator().manual_seed(7)) - 0.5
    return torch.stack([torch.full_like(smooth, -0.5), smooth, rough])[:, None]


@pytest.mark.parametrize(("M", "count"), [(256, 256), (320, 256), (256, 100), (128, 256)])
def test_the_transform_starts_analysis_is_the_block_transform(M, count):
    x, basis = planes_around_0(), random_basis()[:count]
    with torch.no_grad():
        y = started(basis, M).g_a(x)
    expected = (basis.flatten(1) @ functional.unfold(x, 16, stride=16)).view(3, count, 4, 8)[:, :M]
    for plane, coefficients in zip(y, expected, strict=True):
        assert (plane[:count] - coefficients).square().mean() < 0.01**2 * coefficients.square().mean()
        assert len(plane) <= count or plane[count:].square().mean() < 0.02**2 * coefficients.square().mean()


def test_the_transform_start_reconstructs():
    x, untrained, net = planes_around_0(), wide(), started(random_basis())
    with torch.no_grad():
        for plane in x:
            assert -10 * (untrained.g_s(untrained.g_a(plane[None])) - plane).square().mean().log10() < 20
            assert -10 * (net.g_s(net.g_a(plane[None])) - plane).square().mean().log10() > 45


def test_a_network_too_narrow_for_the_transform_start_is_refused():
    with pytest.raises(ValueError, match="N = 24 is too narrow.*choose 32 or more"):
        LicTcm(1, 24, 64, 4, (8, 8, 8), window=4, hyper_channels=8, context_widths=(16, 8, 8)).transform_start(
            random_basis()
        )
