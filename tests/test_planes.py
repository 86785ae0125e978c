"""A plane is its feature map, turned and tiled: nothing is lost but what its codec loses."""

import numpy as np
import pytest
import torch
from pytest import approx

from stages.lib.params import SCALES
from stages.lib.planes import Packing, grid, layout, learn_packing, pack, plane_shape, unpack

ROTATED = ("pca", "quilt")
KINDS = (*ROTATED, "tile")
CHANNELS = (1, 5, 7, 32, 256)


def packing_of(kind: str, channels: int) -> Packing:
    if kind == "tile":
        return Packing("tile", {}, {})
    generator = torch.Generator().manual_seed(channels)
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q.float()
    return Packing(kind, {"0": basis}, {"0": torch.randn(channels, generator=generator)})


def noise(channels: int, height: int = 3, width: int = 4) -> torch.Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("shift", [-20, 0, 20])
def test_unpacking_undoes_packing(kind, channels, shift):
    features, packing = noise(channels) * 3 + shift, packing_of(kind, channels)
    plane, value_range = pack(features, "0", packing)
    span = value_range.high - value_range.low
    assert (unpack(plane, value_range, "0", channels, packing) - features).abs().max() < 2e-6 * span


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_planes_have_the_shape_that_the_receiver_derives(kind, channels):
    packing = packing_of(kind, channels)
    plane, _ = pack(noise(channels), "0", packing)
    assert plane.shape == plane_shape(channels, 3, 4, packing)
    assert plane.shape[0] == packing.plane_channels == (3 if kind == "tile" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-6, 0.1, 1, 1000.3])
@pytest.mark.parametrize("shift", [-5, 0, 5])
def test_the_range_is_float16_and_covers_every_feature(kind, scale, shift):
    plane, value_range = pack((noise(7) + shift) * scale, "0", packing_of(kind, 7))
    assert [np.float16(v) for v in value_range] == list(value_range)
    assert plane.min() >= 0 and plane.max() <= 1
    assert plane.max() - plane.min() > (0.4 if scale > 1e-3 else 0)  # and is not much wider than needed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-2.5, -0.1, 0.0, 1.0, 0.1])
def test_constant_maps_survive(kind, value):
    features, packing = torch.full((5, 2, 2), value), packing_of(kind, 5)
    plane, value_range = pack(features, "0", packing)
    assert torch.isfinite(plane).all()
    assert torch.allclose(unpack(plane, value_range, "0", 5, packing), features, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_without_range_is_known_whatever_the_codec_returns(kind):
    packing = packing_of(kind, 5)
    features = packing.mean["0"][:, None, None].expand(5, 2, 2) if kind != "tile" else torch.ones(5, 2, 2)
    plane, value_range = pack(features, "0", packing)
    assert value_range.low == value_range.high
    assert torch.equal(unpack(plane + 0.3, value_range, "0", 5, packing), features)


@pytest.mark.parametrize("channels", [7, 32])
def test_tiles_are_placed_row_by_row(channels):
    packing = Packing("tile", {}, {})
    features = noise(channels)
    plane, (low, high) = pack(features, "0", packing)
    _, columns = grid(-(-channels // 3))
    for c in range(channels):
        tile, colour = divmod(c, 3)
        row, column = divmod(tile, columns)
        part = plane[colour, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4]
        assert torch.allclose(part * (high - low) + low, features[c], atol=1e-5)


@pytest.mark.parametrize("channels", [5, 7, 32])  # two, two and no places are left empty
def test_all_channels_of_a_place_stand_together_in_a_quilt(channels):
    features, packing = noise(channels), packing_of("quilt", channels)
    plane, (low, high) = pack(features, "0", packing)
    rows, columns = grid(channels)
    for i in range(3):
        for j in range(4):
            patch = plane[0, rows * i : rows * (i + 1), columns * j : columns * (j + 1)].flatten()
            expected = packing.basis["0"] @ (features[:, i, j] - packing.mean["0"])
            assert torch.allclose(patch[:channels] * (high - low) + low, expected, atol=1e-4)
            assert (patch[channels:] == 0.5).all()  # what a feature at its mean is


def test_of_many_channels_a_latent_sees_several_places():
    """16 x 16 samples of 256 channels: 32 channels in a row, at 2 x 4 places."""
    features, packing = noise(256, 8, 8), packing_of("quilt", 256)
    plane, (low, high) = pack(features, "0", packing)
    assert plane.shape == (1, 256, 64)
    rotated = torch.einsum("kc,chw->khw", packing.basis["0"], features - packing.mean["0"][:, None, None])
    seen = (
        plane[0, 64:80, 32:48] * (high - low) + low
    )  # of the second row and column of 4 x 2 quilts of 64 x 32 samples
    expected = rotated[96:128, :2, :4]  # [8 x 4 channels, places]
    assert torch.allclose(seen.view(2, 8, 4, 4).permute(1, 3, 0, 2).reshape(32, 2, 4), expected, atol=1e-4)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_quilt_is_the_tiles_in_another_order(channels):
    (quilt, of_quilt), (tiles, of_tiles) = (
        pack(noise(channels), "0", packing_of(k, channels)) for k in ("quilt", "pca")
    )
    assert of_quilt == of_tiles and quilt.numel() == tiles.numel()
    assert torch.equal(quilt.flatten().sort().values, tiles.flatten().sort().values)
    assert quilt.shape != tiles.shape or torch.equal(quilt, tiles) == (channels == 1)


@pytest.mark.parametrize("kind", ROTATED)
@pytest.mark.parametrize("channels", [5, 32, 256])
def test_the_error_of_a_rotated_plane_is_the_error_of_its_features(kind, channels):
    features, packing = noise(channels), packing_of(kind, channels)
    plane, value_range = pack(features, "0", packing)
    bent = (plane + 0.02 * torch.randn(plane.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    rows, columns, down, right = layout(channels, packing)
    used = torch.arange(rows * columns * down * right).view(rows, columns, down, right) < channels
    inside = (
        used.permute(0, 2, 1, 3)[:, None, :, :, None].expand(rows, 3, down, columns, 4, right).reshape(plane[0].shape)
    )
    of_plane = ((bent - plane)[0][inside]).square().mean().item() * (value_range.high - value_range.low) ** 2
    of_features = (unpack(bent, value_range, "0", channels, packing) - features).square().mean().item()
    assert of_features == approx(of_plane, rel=1e-4)


@pytest.mark.parametrize(("tiles", "expected"), [(1, (1, 1)), (32, (8, 4)), (256, (16, 16)), (86, (10, 9))])
def test_known_grids(tiles, expected):
    assert grid(tiles) == expected


def test_every_tile_has_a_place_and_no_row_or_column_is_empty():
    for tiles in range(1, 300):
        rows, columns = grid(tiles)
        assert rows * columns >= tiles
        assert (rows - 1) * columns < tiles and rows * (columns - 1) < tiles
        assert columns <= rows <= 2 * columns or tiles == 2


def sums(samples: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    return samples.shape[1], samples.sum(1), samples @ samples.T


@pytest.mark.parametrize("kind", ROTATED)
def test_the_learned_basis_is_numpys_eigenbasis(kind):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    samples = mix @ torch.randn(6, 500, generator=generator, dtype=torch.float64) + 4
    packing = learn_packing(kind, {scale: sums(samples) for scale in SCALES})
    assert packing.kind == kind
    values, vectors = np.linalg.eigh(np.cov(samples.numpy(), bias=True))
    basis = packing.basis["2"].double().numpy()
    assert packing.mean["2"].numpy() == approx(samples.mean(1).numpy(), abs=1e-5)
    assert np.abs(basis @ vectors[:, ::-1]) == approx(np.eye(6), abs=1e-5)  # the same but for signs
    assert basis @ basis.T == approx(np.eye(6), abs=1e-6)
    assert (np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], 1) > 0).all()  # and the signs are fixed
    variance = (basis @ (samples.numpy() - samples.mean(1, keepdim=True).numpy())).var(1)
    assert variance == approx(values[::-1], rel=1e-4)
    assert (np.diff(variance) < 0).all()


def test_channels_that_never_change_leave_the_basis_orthonormal():
    samples = torch.zeros(4, 50, dtype=torch.float64)
    samples[0] = torch.linspace(-1, 1, 50)
    packing = learn_packing("pca", {scale: sums(samples) for scale in SCALES})
    assert torch.allclose(packing.basis["0"] @ packing.basis["0"].T, torch.eye(4), atol=1e-6)
    assert packing.basis["0"][0, 0] == approx(1)


def test_tiling_learns_nothing():
    assert learn_packing("tile", {}) == Packing("tile", {}, {})
