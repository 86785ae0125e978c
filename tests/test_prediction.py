"""A scale that is not sent is told from its coarser one as well as a linear map can, and nothing else is changed."""

import numpy as np
import pytest
import torch
from artifacts import write_features
from pytest import approx
from torch.nn.functional import max_pool2d, pixel_shuffle, pixel_unshuffle, unfold

from stages.lib.coding import pyramid_shapes
from stages.lib.features import Features
from stages.lib.models import Sizes
from stages.lib.params import COARSE_TO_FINE, COARSER, SCALES
from stages.lib.prediction import KERNEL, Predictor, fit, load, save
from stages.lib.schema import InputError

CHANNELS, PADDED, IMAGES = 2, (64, 96), 12


def made_by(truth: Predictor, noise: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A pyramid whose fine scales are what `truth` says of the coarse ones, and noise."""
    pyramid = {}
    for scale in COARSE_TO_FINE:
        maps = torch.randn(1, CHANNELS, *pyramid_shapes(PADDED)[scale], generator=generator)
        if scale in ("0", "1", "2"):
            maps = truth(scale, pyramid[COARSER[scale]]) + noise * maps
        pyramid[scale] = maps if scale != "pool" else max_pool2d(pyramid["3"], 1, 2)
    return pyramid


def features_of(tmp_path, noise: float) -> tuple[Features, Predictor]:
    torch.manual_seed(1)
    truth, generator = Predictor(CHANNELS), torch.Generator().manual_seed(2)
    items = [("train", i, made_by(truth, noise, generator), Sizes(PADDED, PADDED, PADDED)) for i in range(IMAGES)]
    write_features(tmp_path / "f", items)
    return Features(tmp_path / "f", "train"), truth


def test_a_linear_relation_of_the_scales_is_found(tmp_path):
    features, truth = features_of(tmp_path, noise=0.0)
    pyramids = features.pyramids(features.image_ids)
    found = fit(features, 0)
    for scale in ("0", "1"):  # scale 2 has fewer places than slopes
        error = found(scale, pyramids[COARSER[scale]]) - truth(scale, pyramids[COARSER[scale]])
        assert error.square().mean() < 1e-3 * pyramids[scale].var()


def test_the_fit_is_a_ridge_regression_on_all_places_where_they_are_few(tmp_path):
    features, _ = features_of(tmp_path, noise=1.0)
    pyramids = features.pyramids(features.image_ids)
    x = unfold(pyramids["1"], KERNEL, padding=KERNEL // 2).transpose(1, 2).flatten(0, 1).double().numpy()
    y = pixel_unshuffle(pyramids["0"], 2).flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()
    centred = x - x.mean(0)
    ridge = 0.01 * (centred**2).sum() / x.shape[1]
    augmented = np.vstack([centred, np.sqrt(ridge) * np.eye(x.shape[1])])
    slopes, *_ = np.linalg.lstsq(augmented, np.vstack([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    expected = y.mean(0) + centred @ slopes
    found = pixel_unshuffle(fit(features, 0)("0", pyramids["1"]), 2).flatten(2).transpose(1, 2).flatten(0, 1)
    assert found.numpy() == approx(expected, abs=1e-4)


def test_a_fit_is_the_same_every_time(tmp_path):
    features, _ = features_of(tmp_path, noise=1.0)
    paths = tmp_path / "a" / "p.pt", tmp_path / "b" / "p.pt"
    for path in paths:
        path.parent.mkdir()
        save(path, fit(features, 0))
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    coarser = features.pyramids([3])["1"]
    assert torch.equal(load(paths[0])("0", coarser), fit(features, 0)("0", coarser))


@pytest.mark.parametrize("sent", [[], ["3"], ["2"], ["0"], ["1", "pool"], list(SCALES)])
def test_what_is_sent_stays_and_the_rest_follows_from_coarse_to_fine(sent):
    torch.manual_seed(0)
    predictor = Predictor(CHANNELS).eval()
    pyramid = {s: torch.randn(2, CHANNELS, *shape) for s, shape in pyramid_shapes(PADDED).items()}
    whole = predictor.complete({scale: pyramid[scale] for scale in sent}, pyramid["3"].shape)
    assert list(whole) == list(SCALES) and all(whole[s].shape == pyramid[s].shape for s in SCALES)
    for scale in SCALES:
        if scale in sent:
            assert whole[scale] is pyramid[scale]
        elif scale == "3":
            assert not whole["3"].any()
        elif scale == "pool":
            assert torch.equal(whole["pool"], max_pool2d(whole["3"], 1, 2))
        else:
            fine = pixel_shuffle(predictor.layers[scale](whole[COARSER[scale]]), 2)
            assert torch.equal(whole[scale], fine)


def test_the_prediction_of_other_channels_is_named(tmp_path):
    save(tmp_path / "p.pt", Predictor(CHANNELS))
    checkpoint = torch.load(tmp_path / "p.pt", weights_only=True)
    torch.save(checkpoint | {"channels": CHANNELS + 1}, tmp_path / "p.pt")
    with pytest.raises(InputError, match="p.pt: layer 'layers.0"):
        load(tmp_path / "p.pt")
