"""The weights that the authors of LIC-TCM publish fit name by name, and others are refused."""

import pytest
import tcm_parts
import torch
from tcm_parts import attention, noise
from torch import Tensor

from stages.lib.coding import load_published
from stages.lib.learned import Family
from stages.lib.schema import InputError
from stages.lib.tcm import LicTcm

no_initial_weights = tcm_parts.no_initial_weights  # a fixture


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
