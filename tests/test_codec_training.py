"""Training sees real pixels only, goes downhill, and is the same twice."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trainable
from compressai.layers import AttentionBlock
from compressai.models.sensetime import ResidualBottleneckBlock
from pytest import approx
from trainable import CONFIG, PLAIN, SIDES, WIDE, tiny

from stages.lib import codec_training
from stages.lib.codec_training import Schedule, fit_packing, random_crops
from stages.lib.coding import build_codec
from stages.lib.features import Features
from stages.lib.params import SCALES
from stages.lib.planes import pack
from stages.lib.schema import InputError

path = trainable.path  # a fixture


@pytest.fixture(scope="module")
def train_split(path) -> Features:
    return Features(path, "train")


# ---- packing


def test_the_packing_is_that_of_all_samples_at_once(train_split):
    packing = fit_packing(train_split, "pca")
    for scale in SCALES:
        samples = torch.cat([train_split.scale(i, scale).flatten(1) for i in range(3)], 1).double().numpy()
        assert packing.mean[scale].numpy() == approx(samples.mean(1), abs=1e-5)
        basis = packing.basis[scale].double().numpy()
        rotated = np.cov(basis @ samples, bias=True)
        assert rotated == approx(np.diag(np.diag(rotated)), abs=1e-4 * rotated.max())
        assert (np.diff(np.diag(rotated)) <= 0).all()


# ---- crops


def crops(features, packing=PLAIN, batch=4, seed=0):
    return list(random_crops(features, packing, batch, 64, np.random.default_rng(seed)))


def test_masks_mark_exactly_the_real_pixels(train_split):
    # Real pixels are moved away from the padding's 0.5, so that they can be told apart.
    shifted = SimpleNamespace(image_ids=train_split.image_ids, scale=lambda i, s: 2 + train_split.scale(i, s).abs())
    sides = []
    for planes, masks in crops(shifted):
        assert planes.shape[2:] == masks.shape[2:] and planes.shape[2] % 32 == planes.shape[3] % 32 == 0
        assert torch.equal(masks == 1, planes != 0.5)
        assert set(masks.unique().tolist()) <= {0.0, 1.0}
        assert (masks[..., -32, -32] == 1).all()  # and no plane is padded further than it must be
        sides += [math.isqrt(int(mask.sum())) for mask in masks]
    assert sorted(sides) == sorted([64] * 4 + [48, 24, 12, 6] * 2)


def test_crops_are_parts_of_planes(train_split):
    planes = torch.stack([pack(train_split.scale(i, "0"), "0", PLAIN)[0] for i in range(3)])[:, 0]
    windows = planes.unfold(1, 64, 1).unfold(2, 64, 1)  # [3, 33, 33, 64, 64]
    found = set()
    for planes_of_shape, masks in crops(train_split):
        for crop, mask in zip(planes_of_shape, masks, strict=True):
            if mask.all():
                (at,) = torch.nonzero((windows == crop[0]).all(-1).all(-1)).tolist()
                found.add(tuple(at))
    assert len(found) == 4  # from other images and places


# ---- training


def loss_of(codec, features) -> float:
    """Of fixed crops at a middle lambda, with real rounding."""
    codec.eval()
    total = 0.0
    with torch.no_grad():
        for x, mask in crops(features, batch=2, seed=1):
            x_hat, bits = codec(x, torch.full((len(x),), 0.002))
            total += (bits.sum() + 0.002 * 255**2 * ((x_hat - x).square() * mask).sum()).item()
    return total


def test_training_reduces_the_loss(train_split):
    codec = tiny()
    before = loss_of(codec, train_split)
    log = codec_training.train(codec, train_split, PLAIN, Schedule(0, 30, batch=1, crop=64, lr=1e-3), seed=0)
    assert not codec.training
    assert [line.keys() for line in log] == [{"step": 0, "loss": 0, "bpp_plane": 0, "mse": 0}.keys()]
    assert loss_of(codec, train_split) < 0.9 * before


def test_a_crop_counts_by_the_side_of_its_real_pixels(train_split, monkeypatch):
    """Bits that are weights themselves have the gradient that their crop counts for. The log is of the plain sums."""
    codec, masks = tiny(), torch.zeros(4, 1, 64, 64)
    for mask, (height, width) in zip(masks, ((64, 64), (48, 48), (8, 32), (6, 6)), strict=True):
        mask[:, :height, :width] = 1
    shown = [(torch.full((4, 1, 64, 64), 0.5), masks)]
    monkeypatch.setattr(codec_training, "random_crops", lambda *_: shown)
    monkeypatch.setattr(codec, "forward", lambda x, lmbda: (x, codec.log_gain[0, : len(x)]))
    bits = codec.log_gain[0, :4].sum().item()
    (line,) = codec_training.train(codec, train_split, PLAIN, Schedule(0, 1, batch=2, crop=64, lr=1e-3), seed=0)
    share = codec.log_gain.grad[0, :4] * codec_training.SAMPLES * 2 * 64
    assert share.tolist() == approx([1 / 64, 1 / 48, 1 / 16, 1 / 6])
    assert line["bpp_plane"] == approx(bits / masks.sum().item()) and line["loss"] == approx(line["bpp_plane"])


def test_latents_of_padding_alone_are_no_error(train_split, monkeypatch):
    codec, mask = tiny(), torch.zeros(1, 1, 64, 64)
    mask[..., :33, :16] = 1  # in 3 x 1 of the 4 x 4 latents
    monkeypatch.setattr(codec_training, "random_crops", lambda *_: [(torch.full((1, 1, 64, 64), 0.5), mask)])
    monkeypatch.setattr(codec, "quantised", lambda y, _: (y + 1, codec.log_gain[0, :1]))
    (line,) = codec_training.train(codec, train_split, PLAIN, Schedule(1, 0, batch=1, crop=64, lr=1e-3), seed=0)
    assert line["mse"] == approx(codec.log_gain.shape[1] * 3 / (33 * 16))


def test_the_same_seed_gives_the_same_weights(train_split):
    results = []
    for seed in (5, 5, 6):
        codec = tiny()
        codec_training.train(codec, train_split, PLAIN, Schedule(2, 3, batch=1, crop=64, lr=1e-3), seed=seed)
        results.append(codec.state_dict())
    first, same, other = results
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["log_gain"], other["log_gain"])


def test_it_does_not_matter_who_makes_the_crops(train_split, monkeypatch):
    results = []
    for feeders in (0, 2):
        monkeypatch.setattr(codec_training, "FEEDERS", feeders)
        codec = tiny()
        codec_training.train(codec, train_split, PLAIN, Schedule(2, 3, batch=1, crop=64, lr=1e-3), seed=5)
        results.append(codec.state_dict())
    alone, fed = results
    assert all(torch.equal(alone[name], fed[name]) for name in alone)


@pytest.mark.parametrize("killed_in_step", [1, 2, 4])  # the second is the last of the entropy model alone
def test_a_killed_training_goes_on_and_ends_with_the_same_weights(train_split, tmp_path, monkeypatch, killed_in_step):
    schedule, checkpoint = Schedule(2, 4, batch=1, crop=64, lr=1e-3), tmp_path / "training.pt"
    monkeypatch.setattr(codec_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    undisturbed, codec, draw = tiny(), tiny(), random_crops
    log = codec_training.train(undisturbed, train_split, PLAIN, schedule, 5)
    drawn = []

    def crops_until_killed(*args):
        drawn.append(args)
        if len(drawn) == killed_in_step + 1:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(codec_training, "random_crops", crops_until_killed)
    with pytest.raises(KeyboardInterrupt):
        codec_training.train(codec, train_split, PLAIN, schedule, 5, checkpoint)
    fresh = tiny()
    assert codec_training.train(fresh, train_split, PLAIN, schedule, 5, checkpoint) == log
    assert len(drawn) == 1 + 6  # no step was taken twice
    weights = fresh.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in undisturbed.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_training_and_is_in_no_checkpoint(train_split, tmp_path, monkeypatch):
    schedule, checkpoint, draw, drawn = Schedule(2, 4, 1, 64, 1e-3), tmp_path / "training.pt", random_crops, []
    monkeypatch.setattr(codec_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)

    def crops_until_step_3(*args):
        drawn.append(args)
        for x, mask in draw(*args):
            yield (x * math.nan if len(drawn) == 3 else x), mask

    monkeypatch.setattr(codec_training, "random_crops", crops_until_step_3)
    with pytest.raises(InputError, match=r"^train codec: the loss .* not finite in step 3; lower codecs\.\*\.lr"):
        codec_training.train(tiny(), train_split, PLAIN, schedule, 5, checkpoint)
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["done"] == 2 and all(value.isfinite().all() for value in kept["state"].values())


def test_a_checkpoint_that_is_damaged_is_named_with_what_to_do(train_split, tmp_path):
    checkpoint = tmp_path / "training.pt"
    for damaged in (b"", b"no weights"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match=f"^{checkpoint}: .*; remove {checkpoint}, and the training begins again$"):
            codec_training.train(tiny(), train_split, PLAIN, Schedule(1, 1, 1, 64, 1e-3), 5, checkpoint)


def test_no_step_and_no_process_repeats_the_crops_of_another(train_split):
    schedule = Schedule(1, 1, batch=2, crop=64, lr=1e-3)
    drawn = [codec_training.Crops(train_split, PLAIN, schedule, (0, rank))[step] for rank in (0, 1) for step in (0, 1)]
    largest = [next(x for x, _ in pairs if x.shape[2] == 64) for pairs in drawn]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(largest, 2))


def test_the_block_basis_is_that_of_the_planes_blocks(train_split):
    basis = codec_training.block_basis(train_split, PLAIN).flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(256), atol=1e-5)
    planes = {s: [pack(train_split.scale(i, s), s, PLAIN)[0] - 0.5 for i in train_split.image_ids] for s in SCALES}
    covariance = torch.zeros(256, 256)
    for scale, side in SIDES.items():
        for plane in planes[scale]:
            whole = torch.zeros(1, *(-(-n // 16) * 16 for n in plane.shape[1:]))
            whole[:, : plane.shape[1], : plane.shape[2]] = plane
            blocks = whole[0].unfold(0, 16, 16).unfold(1, 16, 16).reshape(-1, 256)
            covariance += side * (blocks.T @ blocks) / len(blocks)
    diagonal = basis @ covariance @ basis.T
    assert torch.allclose(diagonal, diagonal.diagonal().diag(), atol=1e-4 * diagonal.max().item())
    assert (diagonal.diagonal().diff() < 1e-4 * diagonal.max()).all()


def test_the_entropy_model_learns_alone_and_then_everything(train_split):
    codec = tiny()
    codec.net.transform_start(codec_training.block_basis(train_split, PLAIN))
    for entropy_steps, steps, moves in ((2, 0, False), (0, 2, True)):
        before = {name: value.clone() for name, value in codec.named_parameters()}
        codec_training.train(codec, train_split, PLAIN, Schedule(entropy_steps, steps, 1, 64, 1e-3), seed=0)
        moved = {name for name, value in codec.named_parameters() if not torch.equal(value, before[name])}
        assert any(name.startswith(("net.g_a", "net.g_s")) for name in moved) == moves
        assert {"log_gain", "log_inverse"} <= moved and any(name.startswith("net.latent_codec") for name in moved)


def test_the_error_of_a_plane_is_that_of_its_latents_at_the_start(train_split):
    torch.manual_seed(0)
    codec = build_codec(CONFIG | {"network": WIDE})
    codec.net.transform_start(codec_training.block_basis(train_split, PLAIN))
    for x, _ in crops(train_split):
        with torch.no_grad():
            y = codec.net.g_a(x - 0.5)
            y_hat, _ = codec.quantised(y, torch.full((len(x),), 0.001))
            error = (codec.net.g_s(y_hat) + 0.5 - x).square().sum().item()
        assert error == approx((y_hat - y).square().sum().item(), rel=0.03)  # branches are near zero, not zero


def test_both_phases_see_the_same_error_and_bits_of_an_orthonormal_transform(train_split, monkeypatch):
    """In their first step, before anything was learned, on crops without padding."""
    (x, mask), *_ = (pair for pair in crops(train_split) if pair[0].shape[2] == 64)
    whole = mask.flatten(1).all(1)
    assert whole.sum() == 4
    monkeypatch.setattr(codec_training, "random_crops", lambda *_: [(x[whole], mask[whole])])
    logs = []
    for entropy_steps in (1, 0):
        torch.manual_seed(0)
        codec = build_codec(CONFIG | {"network": WIDE})
        codec.net.transform_start(codec_training.block_basis(train_split, PLAIN))
        with torch.no_grad():  # what is near zero at the start, exactly zero
            for module in (*codec.net.g_a.modules(), *codec.net.g_s.modules()):
                if isinstance(module, ResidualBottleneckBlock):
                    module.conv3.weight.zero_()
                elif isinstance(module, AttentionBlock):
                    module.conv_b[-1].bias.fill_(-1e4)
        schedule = Schedule(entropy_steps, 1 - entropy_steps, 2, 64, 1e-3)
        logs += codec_training.train(codec, train_split, PLAIN, schedule, seed=0)
    of_latents, of_planes = logs
    for name in ("mse", "bpp_plane", "loss"):
        assert of_latents[name] == approx(of_planes[name], rel=0.01)
