"""Windows see their part of the map and nothing else; a receiver that reads the symbols gets the sender's latent."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from pytest import approx
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.coding import load_published
from stages.lib.learned import Family, LearnedCodec
from stages.lib.schema import InputError
from stages.lib.tcm import LicTcm, WindowAttention

WINDOW = 4
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


# ---- the authors' weights


def public_shapes(N: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of `TCM(N=N)` in github.com/jmliu206/LIC_TCM, models/tcm.py."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def conv(name: str, given: int, made: int, kernel: int = 3) -> None:
        layer(name, made, given, kernel, kernel)

    def gdn(name: str) -> None:
        shapes.update({f"{name}.beta": (2 * N,), f"{name}.gamma": (2 * N, 2 * N)})
        for part in ("beta", "gamma"):
            shapes.update({f"{name}.{part}_reparam.pedestal": (1,), f"{name}.{part}_reparam.lower_bound.bound": (1,)})

    def down(name: str, given: int) -> None:
        conv(f"{name}.conv1", given, 2 * N)
        conv(f"{name}.conv2", 2 * N, 2 * N)
        gdn(f"{name}.gdn")
        conv(f"{name}.skip", given, 2 * N, 1)

    def up(name: str, given: int) -> None:
        conv(f"{name}.subpel_conv.0", given, 8 * N)
        conv(f"{name}.conv", 2 * N, 2 * N)
        gdn(f"{name}.igdn")
        conv(f"{name}.upsample.0", given, 8 * N)

    def swin_block(name: str, dim: int, head_dim: int, window: int) -> None:
        shapes[f"{name}.msa.relative_position_params"] = (dim // head_dim, 2 * window - 1, 2 * window - 1)
        layer(f"{name}.msa.embedding_layer", 3 * dim, dim)
        layer(f"{name}.msa.linear", dim, dim)
        layer(f"{name}.ln1", dim)
        layer(f"{name}.ln2", dim)
        layer(f"{name}.mlp.0", 4 * dim, dim)
        layer(f"{name}.mlp.2", dim, 4 * dim)

    def stage(name: str, first: int, head_dim: int, window: int = 8) -> None:
        for block in (f"{name}.{first}", f"{name}.{first + 1}"):
            swin_block(f"{block}.trans_block", N, head_dim, window)
            conv(f"{block}.conv1_1", 2 * N, 2 * N, 1)
            conv(f"{block}.conv1_2", 2 * N, 2 * N, 1)
            conv(f"{block}.conv_block.conv1", N, N)
            conv(f"{block}.conv_block.conv2", N, N)

    for k, head_dim in enumerate((8, 16, 32)):
        down(f"g_a.{3 * k}", 2 * N if k else 3)
        stage("g_a", 3 * k + 1, head_dim)
        up(f"g_s.{3 * k}", 2 * N if k else 320)
        stage("g_s", 3 * k + 1, (32, 16, 8)[k])
    conv("g_a.9", 2 * N, 320)
    conv("g_s.9.0", 2 * N, 12)
    down("h_a.0", 320)
    stage("h_a", 1, 32, 4)
    conv("h_a.3", 2 * N, 192)
    for kind in ("mean", "scale"):
        up(f"h_{kind}_s.0", 192)
        stage(f"h_{kind}_s", 1, 32, 4)
        conv(f"h_{kind}_s.3.0", 2 * N, 1280)

    def transform(name: str, given: int) -> None:
        for place, widths in ((0, (given, 224)), (2, (224, 128)), (4, (128, 64))):
            conv(f"{name}.{place}", *widths)

    for k in range(5):
        support = 320 + 64 * k
        for kind in ("mean", "scale"):
            attention = f"atten_{kind}.{k}.0"
            conv(f"{attention}.in_conv", support, 128, 1)
            conv(f"{attention}.out_conv", 128, support, 1)
            for unit in [f"{attention}.conv_{branch}.{i}.conv" for branch in "ab" for i in range(3)]:
                conv(f"{unit}.0", 128, 64, 1)
                conv(f"{unit}.2", 64, 64)
                conv(f"{unit}.4", 64, 128, 1)
            conv(f"{attention}.conv_b.3", 128, 128, 1)
            swin_block(f"{attention}.non_local_block.block_1", 128, 16, 8)
            swin_block(f"{attention}.non_local_block.block_2", 128, 16, 8)
            transform(f"cc_{kind}_transforms.{k}", support)
        transform(f"lrp_transforms.{k}", support + 64)

    filters = (1, 3, 3, 3, 3, 1)
    for i in range(5):  # compressai's older names
        shapes[f"entropy_bottleneck._matrix{i}"] = (192, filters[i + 1], filters[i])
        shapes[f"entropy_bottleneck._bias{i}"] = (192, filters[i + 1], 1)
        if i < 4:
            shapes[f"entropy_bottleneck._factor{i}"] = (192, filters[i + 1], 1)
    shapes |= {"entropy_bottleneck.quantiles": (192, 1, 3), "entropy_bottleneck.target": (3,)}
    for model in ("entropy_bottleneck", "gaussian_conditional"):
        shapes |= {f"{model}.{name}": (0,) for name in ("_offset", "_quantized_cdf", "_cdf_length")}
        shapes[f"{model}.likelihood_lower_bound.bound"] = (1,)
    shapes |= {f"gaussian_conditional.{name}": (1,) for name in ("lower_bound_scale.bound", "scale_bound")}
    shapes["gaussian_conditional.scale_table"] = (0,)
    return {f"module.{name}": shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict as the authors publish it, the i-th entry full of i."""
    shapes = public_shapes(64)
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def test_the_authors_weights_fit_name_by_name(no_initial_weights, published, tmp_path):
    torch.save({"epoch": 3, "state_dict": published, "loss": 0.5}, tmp_path / "0.05.pth.tar")
    family = Family([LicTcm(3, 64, 320)], 320, [0.05])
    load_published(family, [str(tmp_path / "0.05.pth.tar")])
    ours = family.members[0].net.state_dict()
    for theirs, name in {
        "g_s.9.0.bias": "g_s.9.0.bias",
        "g_a.2.conv1_1.weight": "g_a.2.split.weight",
        "g_a.2.conv_block.conv2.weight": "g_a.2.convolutions.conv2.weight",
        "h_mean_s.1.trans_block.ln2.weight": "h_mean_s.1.swin.1.norm2.weight",
        "atten_scale.3.0.non_local_block.block_2.msa.linear.bias": "slices.3.scale_attention.swin.2.attn.proj.bias",
        "cc_mean_transforms.4.2.weight": "slices.4.mean.2.weight",
        "lrp_transforms.0.4.weight": "slices.0.residual.4.weight",
        "entropy_bottleneck._matrix3": "entropy_bottleneck.matrices.3",
    }.items():
        assert (ours[name] == published[f"module.{theirs}"].flatten()[0]).all()


def test_the_authors_weights_for_another_width_name_a_layer(no_initial_weights, published, tmp_path):
    torch.save({"state_dict": published}, tmp_path / "N64.pth.tar")
    family = Family([LicTcm(3, 32, 320)], 320, [0.05])
    with pytest.raises(InputError, match=r"N64\.pth\.tar: layer 'g_a\.0\..*another network"):
        load_published(family, [str(tmp_path / "N64.pth.tar")])
    del (state := dict(published))["module.lrp_transforms.2.4.bias"]
    torch.save(state, tmp_path / "cut.pth.tar")
    with pytest.raises(InputError, match=r"cut\.pth\.tar: has no weights for layer 'slices\.2\.residual\.4\.bias'"):
        load_published(Family([LicTcm(3, 64, 320)], 320, [0.05]), [str(tmp_path / "cut.pth.tar")])


def test_the_authors_position_bias_is_ours():
    theirs = noise(2, 7, 7)  # head, rows from key to query + 3, columns + 3
    (ours,) = LicTcm.from_published({"g_a.1.trans_block.msa.relative_position_params": theirs}).values()
    layer = attention(0)
    layer.relative_position_bias_table.copy_(ours)
    at = torch.arange(16)
    down, right = (i[:, None] - i for i in (at // 4, at % 4))
    assert torch.equal(layer.get_relative_position_bias()[0], theirs[:, down + 3, right + 3])


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
