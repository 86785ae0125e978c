"""The choice of each method, against small examples, plain loops and all the others that it had."""

from itertools import product

import curves
import numpy as np
import pytest
from curves import PRECODE, K, N
from pytest import approx
from scipy.optimize import minimize

from stages.lib import allocation
from stages.lib.allocation import (
    closed_form,
    least_cost,
    mfiba,
    mfiba_closed_form,
    mfiba_skip,
    static,
    upstream,
    with_skipping,
)
from stages.lib.params import COARSER, SCALES, SKIPPED

evaluated, fit, importance = curves.evaluated, curves.fit, curves.importance  # fixtures


def test_equal_weights_and_models_give_equal_rates():
    rate = closed_form(np.full((2, 5), 0.2), np.full(5, 0.1), np.full(5, -0.7), np.ones((2, 5)), 1e-3)
    assert rate == approx(rate[0, 0])


def test_all_scales_lose_the_same_per_bit():
    rng = np.random.default_rng(0)
    weights, rho = rng.dirichlet(np.ones(5), 6), 4.0 ** -np.arange(5) * np.ones((6, 1))
    alpha, beta, lambda_prime = rng.uniform(0.01, 1, 5), rng.uniform(-2, -0.1, 5), 3e-3
    rate = closed_form(weights, alpha, beta, rho, lambda_prime)
    slope = weights * alpha * beta * rate ** (beta - 1) / rho  # drop per bit per pixel of scale 0
    assert slope == approx(-lambda_prime * np.ones((6, 5)))


def test_closed_form_is_the_minimum():
    rng = np.random.default_rng(1)
    weights, rho = rng.dirichlet(np.ones(5), 1), 4.0 ** -np.arange(5)[None]
    alpha, beta, lambda_prime = rng.uniform(0.1, 1, 5), rng.uniform(-1.5, -0.3, 5), 0.05

    def cost(log_rate):
        rate = np.exp(log_rate)
        return (weights[0] * alpha * rate**beta + lambda_prime * rho[0] * rate).sum()

    found = minimize(cost, np.zeros(5), method="BFGS", options={"gtol": 1e-9})
    assert closed_form(weights, alpha, beta, rho, lambda_prime)[0] == approx(np.exp(found.x), rel=1e-4)


def test_no_weight_means_no_rate():
    rate = closed_form(np.array([[0, 0.25, 0.25, 0.25, 0.25]]), np.ones(5), -np.ones(5), np.ones((1, 5)), 1.0)
    assert rate[0, 0] == 0 and (rate[0, 1:] > 0).all()


def test_the_closed_form_is_rounded_to_a_precoded_quality():
    # alpha = 1, beta = -1, rho = 1, lambda' = 0.01 -> R = sqrt(w / 0.01) = 10 sqrt(w); phi = (R - 1) / 2
    weights = np.array([[0.64, 0.25, 0.09, 0.02, 0.0]])
    one = np.ones(5)
    phi = mfiba_closed_form(weights, one, -one, np.ones((1, 5)), 2 * one, one, 4, 0.01)
    assert phi.tolist() == [[3, 2, 1, 0, 0]]  # 3.5 clipped, 2, 1, 0.21, -0.5 clipped


def test_the_closed_form_of_a_rate_that_does_not_rise_stays_in_range(importance):
    slope = np.array([0.0, -0.1, 0.2, 0.2, 0.2])
    phi = mfiba_closed_form(
        importance.weights, np.ones(5), -np.ones(5), np.ones((N, 5)), slope, 0.1 * np.ones(5), K, 0.1
    )
    assert np.isin(phi, np.arange(K)).all()


PRICES = [1e-9, *np.geomspace(1e-6, 1e-1, 40), 1.0]


def test_mfiba_is_the_least_of_predicted_loss_and_price(evaluated, fit, importance):
    precoded = evaluated.bits[:, :, PRECODE]
    choose, seen = mfiba(importance.sensitivity, precoded, fit, PRECODE), set()
    for lambda_prime in PRICES:
        phi = choose(lambda_prime)
        for n, (s, scale) in product(range(N), enumerate(SCALES)):
            slope, offset = fit["rate"][scale]["slope"], fit["rate"][scale]["offset"]
            loss = [importance.sensitivity[n, s] * mean for mean in fit["mean"][scale]["loss"]]
            bits = [np.exp(offset[q]) * precoded[n, s] ** slope[q] for q in range(K)]
            assert bits == sorted(bits)
            costs = [loss[q] + lambda_prime * bits[q] for q in range(K)]
            assert phi[n, s] == costs.index(min(costs))
            seen.add(phi[n, s])
    assert seen == set(range(K))


def test_mfiba_takes_the_fewest_bits_of_ties():
    models = {"mean": {"loss": [2.0, 1, 1, 0]}, "rate": {"slope": [1, 1, 1, 0.5], "offset": [0.0] * 4}}
    fit = {name: dict.fromkeys(SCALES, values) for name, values in models.items()}
    choose = mfiba(np.array([[1.0, 1, 2, 3, 0]]), np.full((1, 5), 100.0), fit, 0)  # 100 bits at any quality
    assert choose(1e-3).tolist() == [[3, 3, 3, 3, 0]]


def test_mfiba_knows_no_coding_but_the_first(evaluated, fit, importance):
    other = evaluated.bits * 1.5
    other[:, :, PRECODE] = evaluated.bits[:, :, PRECODE]
    for lambda_prime in PRICES:
        first, second = (
            allocation.label_free(bits, evaluated.pixels, fit, importance, PRECODE)["mfiba"](lambda_prime)
            for bits in (evaluated.bits, other)
        )
        assert (first == second).all()


def test_more_sensitivity_never_lowers_phi(evaluated, fit, importance):
    bits, k = evaluated.bits[:, :, PRECODE], importance.sensitivity
    raised = k * np.where(np.arange(5) == 2, 1.7, 1)
    once, twice, one_scale = (mfiba(sensitivity, bits, fit, PRECODE) for sensitivity in (k, 2 * k, raised))
    higher = np.zeros((N, 5), bool)
    for lambda_prime in PRICES:
        phi = once(lambda_prime)
        assert (twice(lambda_prime) >= phi).all()
        assert (twice(2 * lambda_prime) == phi).all()  # what counts is sensitivity / price
        moved = one_scale(lambda_prime) - phi
        assert (moved[:, 2] >= 0).all() and (np.delete(moved, 2, 1) == 0).all()
        higher |= twice(lambda_prime) > phi
    assert higher.all()


def test_of_equal_images_the_one_of_twice_the_sensitivity_gets_at_least_as_much(evaluated, fit):
    bits, share = np.tile(evaluated.bits[:1, :, PRECODE], (2, 1)), np.array([[1.0], [2.0]])
    choose = mfiba(share * np.array([0.2, 0.7, 1, 1.4, 2]), bits, fit, PRECODE)
    phi = np.array([choose(lambda_prime) for lambda_prime in PRICES])  # [prices, 2, 5]
    assert (phi[:, 1] >= phi[:, 0]).all() and (phi[:, 1] > phi[:, 0]).any((0, 1)).all()


def cost_of(vector: tuple[int, ...], loss: np.ndarray, skipped: np.ndarray, bits: np.ndarray, price: float) -> float:
    """Of one image: loss, bits [5, K], skipped [5, 1 + K]."""
    total = 0.0
    for s, scale in enumerate(SCALES):
        if vector[s] == SKIPPED:
            coarser = vector[SCALES.index(COARSER[scale])] if scale in COARSER else SKIPPED
            total += skipped[s, 1 + coarser]
        else:
            total += loss[s, vector[s]] + price * bits[s, vector[s]]
    return total


@pytest.mark.parametrize("lambda_prime", [1e-9, 1e-4, 1e-3, 3e-3, 1.0])
def test_with_skipping_is_the_best_of_all_vectors(lambda_prime):
    rng = np.random.default_rng(4)
    n, k = 6, 3
    loss, skipped = rng.normal(0.1, 0.1, (n, 5, k)), rng.normal(0.4, 0.4, (n, 5, 1 + k))
    skipped[:, 3] = skipped[:, 3, :1]  # scale 3 is predicted from nothing
    bits = np.sort(rng.uniform(10, 300, (n, 5, k)))
    found = with_skipping(loss, skipped, bits, lambda_prime)
    for image in range(n):
        parts = loss[image], skipped[image], bits[image], lambda_prime
        best = min(product(range(SKIPPED, k), repeat=5), key=lambda v: cost_of(v, *parts))  # noqa: B023
        assert found[image].tolist() == list(best)


def test_nothing_is_sent_where_nothing_is_to_lose():
    nothing, bits = np.zeros((1, 5, 4)), np.full((1, 5, 3), 10.0)
    assert with_skipping(nothing[:, :, 1:], nothing, bits, 1e-9).tolist() == [[SKIPPED] * 5]


def test_a_loss_that_skipping_never_repays_leaves_mfiba(evaluated, fit, importance):
    dear = fit | {"mean": {s: m | {"loss_skipped": [1e9] * (1 + K)} for s, m in fit["mean"].items()}}
    precoded = evaluated.bits[:, :, PRECODE]
    plain, skipping = (f(importance.sensitivity, precoded, dear, PRECODE) for f in (mfiba, mfiba_skip))
    for lambda_prime in PRICES:
        assert (plain(lambda_prime) == skipping(lambda_prime)).all()


@pytest.mark.parametrize("lambda_prime", [1e-9, 1e-5, 1e-4, 1e-3, 1.0])
def test_static_is_the_best_of_all_fixed_vectors(lambda_prime):
    rng = np.random.default_rng(4)
    drop, bits = rng.normal(0.1, 0.1, (5, 3)), np.sort(rng.uniform(10, 1000, (5, 3)))
    best = min(
        product(range(3), repeat=5), key=lambda v: sum(drop[s, q] + lambda_prime * bits[s, q] for s, q in enumerate(v))
    )
    assert static(drop, bits, lambda_prime).tolist() == list(best)


def test_oracle_takes_the_fewest_bits_of_ties_and_the_lowest_where_nothing_is_to_lose():
    loss = np.zeros((2, 5, 3))
    loss[0, 0] = [0.3, 0.1, 0.1]
    loss[0, 1] = [0.3, 0.2, 0.1]
    loss[0, 2] = [0.1, 0.2, 0.3]  # coding better makes it worse
    bits = np.tile([10.0, 20.0, 30.0], (2, 5, 1))
    bits[0, 3] = [20, 10, 30]  # quality 1 is the cheapest of equals
    assert least_cost(loss, bits)(1e-30).tolist() == [[1, 2, 0, 1, 0], [0] * 5]
    assert least_cost(loss, bits)(1e30).tolist() == [[0, 0, 0, 1, 0], [0] * 5]
    assert least_cost(loss, bits)(0.015).tolist() == [[1, 0, 0, 1, 0], [0] * 5]


def test_upstream_weights_of_a_small_example():
    drop = np.zeros((4, 5, 2))
    drop[:, 0] = [0.5, 0.009]  # the second is below the noise floor: all scales equal, 1 each
    drop[:, 1] = [0.25, -0.2]
    drop[3] = np.nan
    clean = np.array([0.6, 0.0, -1.0, np.nan])
    weights = allocation.upstream_weights(drop, clean)
    assert weights[0] == approx(np.array([2, 1.5, 1, 1, 1]) / 6.5)
    assert np.isnan(weights[1:]).all()


def test_upstream_of_a_small_example():
    # b = -1: t = sqrt(w * a * divisor / lam), with w * a / lam = 1 here: 1, 2, 4, 7.75, 7.75
    weights = np.array([[0.25] * 5, [0.25, 0.25, 0.25, 0.25, 0.0], [np.nan] * 5])
    bpp_plane = np.tile([0.5, 1.5, 3.0, 7.6, 8.0], (3, 5, 1))
    phi = upstream(weights, np.full(5, 4.0), -np.ones(5), bpp_plane, 1.0)
    # |0.5 - 1| = |1.5 - 1|: the first of the two; a weight of 0 counts as 1e-8, t = 0.0015
    assert phi.tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 3, 0], [0] * 5]


def test_upstream_against_plain_loops(evaluated, fit):
    n_scales, divisor, lam = 5, [1, 4, 16, 60, 60], 30.0
    expected = []
    for n in range(N):
        base, drop = evaluated.clean[n], evaluated.drop[n]
        if not base > 0:
            expected.append([0] * n_scales)
            continue
        score = [0.0] * n_scales
        for q in range(K):
            d = [0.0 if drop[s][q] < 0.01 else drop[s][q] for s in range(n_scales)]
            for s in range(n_scales):
                score[s] += 1.0 if max(d) == min(d) else (d[s] - min(d)) / (max(d) - min(d))
        row = []
        for s, scale in enumerate(SCALES):
            w = max(score[s] / sum(score), 1e-8)
            a, b = fit["upstream"][scale]["a"], fit["upstream"][scale]["b"]
            t = (lam / divisor[s] / (w * a * -b)) ** (1 / (b - 1))
            distance = [abs(evaluated.bits[n, s, q] / evaluated.pixels[n, s] - t) for q in range(K)]
            row.append(distance.index(min(distance)))
        expected.append(row)
    choose = allocation.label_aware(evaluated, fit)["upstream_measured"]
    assert choose(lam).tolist() == expected
    assert len({phi for row in expected for phi in row}) > 2


def test_the_bound_is_that_of_the_smooth_loss(evaluated, fit):
    choose = allocation.label_aware(evaluated, fit)["oracle"]
    assert (choose(1e-4) == least_cost(evaluated.loss, evaluated.bits)(1e-4)).all()
    assert (choose(1e-4) != least_cost(np.nan_to_num(evaluated.drop), evaluated.bits)(1e-4)).any()


def test_upstream_at_no_price_takes_the_highest_quality_and_at_any_price_the_lowest(evaluated, fit, importance):
    a, b = allocation.column(fit, "upstream", "a"), allocation.column(fit, "upstream", "b")
    assert (upstream(importance.weights, a, b, evaluated.bpp_plane, 1e-30) == K - 1).all()
    assert (upstream(importance.weights, a, b, evaluated.bpp_plane, 1e30) == 0).all()
