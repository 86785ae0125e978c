"""Sensitivities from other inputs than the method's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx

from stages.lib import mfip
from stages.lib.loss_rate import sensitivity_labels
from stages.lib.params import SCALES
from stages.lib.senses import score_gradients

CHANNELS = 3


def described(seed: int, n: int) -> np.ndarray:
    statistics = np.random.default_rng(seed).gamma(2, 1, (n, 5, 3 * CHANNELS + mfip.OBJECTNESS))
    return statistics.astype(np.float32)


@pytest.fixture(scope="module")
def learned() -> SimpleNamespace:
    fit, test = described(0, 60), described(1, 12)
    loss = (fit[:, :, 0] + fit[:, :, -1])[:, :, None] * np.array([0.3, 0.1])
    labels = sensitivity_labels(loss, loss[:, :, [0, 0, 1]])
    params = {"channels": 4, "epochs": 1, "lr": 1e-3, "validation": 0.2}
    ids = list(range(60))
    weights = dict.fromkeys(ids, np.full(5, 0.2))
    trained = mfip.train([(ids, fit)], weights, dict(zip(ids, labels, strict=True)), params, 0)
    return SimpleNamespace(fit=fit, test=test, labels=labels, model=trained.model)


def predicted(learned: SimpleNamespace, test: np.ndarray, kinds) -> np.ndarray:
    return mfip.learned_sensitivity(learned.model, learned.fit, learned.labels, test, kinds)


def test_both_kinds_of_numbers_give_the_sensitivity_of_the_method(learned):
    with torch.no_grad():
        wanted = learned.model(torch.from_numpy(learned.test))[1].numpy()
    assert predicted(learned, learned.test, mfip.INPUTS) == approx(wanted, rel=1e-4)
    assert wanted.std(0).min() > 0.01


@pytest.mark.parametrize(("kind", "other"), [("channels", "objectness"), ("objectness", "channels")])
def test_a_ridge_sees_only_its_own_kind_of_numbers(learned, kind, other):
    moved, blind = learned.test.copy(), learned.test.copy()
    moved[:, :, mfip.INPUTS[kind]] += 1
    blind[:, :, mfip.INPUTS[other]] += 1
    before = predicted(learned, learned.test, [kind])
    assert np.array_equal(before, predicted(learned, blind, [kind]))
    assert not np.allclose(before, predicted(learned, moved, [kind]))


def test_variance_is_that_of_the_maps():
    pyramid = {scale: torch.randn(2, CHANNELS, 8 - s, 6) * (1 + s) for s, scale in enumerate(SCALES)}
    statistics = mfip.describe(pyramid, lambda maps: ([part[:, :2] for part in maps], None)).numpy()
    wanted = [pyramid[scale].var((2, 3), correction=0).mean(1).numpy() for scale in SCALES]
    assert mfip.variance(statistics) == approx(np.stack(wanted, 1), rel=1e-4)


def test_gradients_are_those_of_the_scores():
    """A box head whose one logit is a known linear function of scales 0 and 2: the score is its sigmoid."""
    slope = {"0": 0.3, "2": -0.02}

    def linear(pyramid, proposals, shapes):
        return sum(c * pyramid[scale].flatten(1).sum(1) for scale, c in slope.items())

    heads = SimpleNamespace(
        box_roi_pool=linear,
        box_head=lambda x: x,
        box_predictor=lambda x: (torch.stack([torch.zeros_like(x), x], 1), None),
    )
    model = SimpleNamespace(rpn=lambda images, pyramid: ([None] * len(images.image_sizes), {}), roi_heads=heads)
    torch.manual_seed(0)
    pyramid = {scale: torch.randn(2, 2, 6 - s, 6 - s) / 9 for s, scale in enumerate(SCALES)}
    sizes_ = [SimpleNamespace(resized=(24, 24), padded=(24, 24))] * 2
    found = score_gradients(model, pyramid, sizes_)
    score = torch.sigmoid(linear(pyramid, None, None))
    for s, scale in enumerate(SCALES):
        wanted = score * (1 - score) * abs(slope.get(scale, 0)) * (2 * (6 - s) ** 2) ** 0.5
        assert found[:, s].numpy() == approx(wanted.numpy(), rel=1e-4)
