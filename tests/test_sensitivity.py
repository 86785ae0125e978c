"""MFIP's sensitivities: a ridge regression for each scale."""

import numpy as np
import torch
from pytest import approx
from test_mfip import IDLE, C

from stages.lib import mfip
from stages.lib.mfip import CONSTANT, LEAST_SENSITIVITY, OBJECTNESS
from stages.lib.params import SCALES


def planted(seed, n=160, noise=0.1):
    """Statistics [n, 5, 3 C + 5] and sensitivities [n, 5] that follow one channel and one number of objectness."""
    rng = np.random.default_rng(seed)
    statistics = rng.normal(3, 2, (n, 5, 3 * C + OBJECTNESS)).astype(np.float32)
    standard = (statistics.astype(float) - 3) / 2
    k = 1.8 + 0.4 * standard[:, :, -2] + 0.3 * standard[:, :1, 1] + rng.normal(0, noise, (n, 5))
    return statistics, k


def learn(statistics, k, unlabelled=()):
    labels = {i: np.full(5, np.nan if i in unlabelled else 0.2) for i in range(len(k))}
    return mfip.train([(list(labels), statistics)], labels, dict(enumerate(k)), IDLE, 0)


def share_explained(k, found):
    return 1 - ((k - found) ** 2).mean(0) / k.var(0)


def test_sensitivities_of_new_images_are_learned():
    statistics, k = planted(0)
    model, report, _, _, held_out = learn(statistics, k)
    new, wanted = planted(1)
    assert (share_explained(k, held_out) > 0.7).all()
    assert (share_explained(wanted, model(torch.from_numpy(new))[1].detach().numpy()) > 0.7).all()
    assert [report["sensitivity"][s]["r2"] for s in SCALES] == approx(share_explained(k, held_out), abs=1e-3)


def test_sensitivities_are_those_of_a_ridge_regression_on_the_other_folds():
    statistics, k = planted(2, n=60, noise=0.5)
    trained = learn(statistics, k, unlabelled=range(0, 60, 7))  # images with nothing to lose are learned from, too
    x = trained.model.standard(torch.from_numpy(statistics)).double().numpy()
    x[:, :, :-OBJECTNESS] /= np.sqrt(5 * 3 * C)
    x[:, :, -OBJECTNESS:] /= np.sqrt(5 * OBJECTNESS)
    x = x.reshape(60, -1)
    for s, scale in enumerate(SCALES):
        ridge = trained.report["sensitivity"][scale]["ridge"]
        errors = {}
        for candidate in (*mfip.RIDGES[:-1], CONSTANT):
            found = np.empty(60)
            for fold in range(5):
                left = np.arange(60) % 5 == fold
                centre, mean = x[~left].mean(0), k[~left, s].mean()
                z = x[~left] - centre
                slopes = np.linalg.solve(z.T @ z + candidate * np.eye(len(centre)), z.T @ (k[~left, s] - mean))
                found[left] = mean + (x[left] - centre) @ slopes
            errors[candidate] = ((found - k[:, s]) ** 2).mean()
            if candidate == ridge:
                assert trained.sensitivity[:, s] == approx(np.maximum(found, LEAST_SENSITIVITY), abs=1e-6)
        assert ridge == min(errors, key=errors.get)
        assert trained.report["sensitivity"][scale]["r2"] == approx(1 - errors[ridge] / k[:, s].var())


def test_sensitivities_without_relation_to_the_images_are_their_mean():
    statistics, k = planted(5)
    k = np.random.default_rng(3).permutation(k)
    model, report, _, _, held_out = learn(statistics, k)
    assert [report["sensitivity"][s]["ridge"] for s in SCALES] == [CONSTANT] * 5
    assert max(report["sensitivity"][s]["r2"] for s in SCALES) <= 0
    expected = [k[np.arange(160) % 5 != n % 5].mean(0) for n in range(160)]
    assert held_out == approx(np.array(expected), abs=1e-6)
    assert model(torch.from_numpy(statistics))[1].detach().numpy() == approx(np.tile(k.mean(0), (160, 1)), abs=1e-5)


def test_a_sensitivity_is_predicted_without_the_images_own_label():
    statistics, k = planted(0)
    before, other = learn(statistics, k).sensitivity, k.copy()
    other[7] = -1
    after = learn(statistics, other).sensitivity
    assert (after[7::5] == before[7::5]).all()  # its fold
    assert (np.delete(after, np.s_[2::5], 0) != np.delete(before, np.s_[2::5], 0)).all()


def test_a_label_beyond_its_range_counts_as_its_end():
    statistics, k = planted(0)
    k[[3, 9]] = [[5.0], [-1.0]]
    expected = learn(statistics, k).sensitivity
    k[[3, 9]] = [[1e6], [-1e6]]
    assert (learn(statistics, k).sensitivity == expected).all()


def test_few_images_give_the_mean_sensitivity_and_nothing_is_worth_nothing():
    statistics, k = planted(0, n=30, noise=0)
    k[:, 4] = -0.5
    few = learn(statistics, k, unlabelled=range(9, 30))
    assert {found["ridge"] for found in few.report["sensitivity"].values()} == {CONSTANT}
    assert few.report["sensitivity"]["pool"]["r2"] is None
    expected = np.array([k[np.arange(30) % 5 != n % 5].mean(0) for n in range(30)])
    assert few.sensitivity[:, :4] == approx(expected[:, :4], abs=1e-5)
    assert (few.sensitivity[:, 4] == LEAST_SENSITIVITY).all()
    assert few.model(torch.from_numpy(statistics))[1][:, 4].tolist() == approx([LEAST_SENSITIVITY] * 30)
    assert learn(statistics, k, unlabelled=range(10, 30)).report["sensitivity"]["0"]["ridge"] != CONSTANT
