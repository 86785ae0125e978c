"""The bound never costs more than where it starts, and is exact where losses add up."""

import numpy as np
import pytest
from pytest import approx

from stages.lib.allocation import least_cost, with_skipping
from stages.lib.bound import (
    KINDS,
    TUPLES,
    additive_loss,
    additivity,
    choose_on,
    cost_of,
    descend,
    descend_points,
    enumerate_tuples,
    random_tuples,
)
from stages.lib.evaluating import Choices
from stages.lib.loss_rate import Curves
from stages.lib.params import SCALES, SKIPPED

N, K = 6, 4
IDS = np.array([3, 4, 8, 10, 11, 30])
PRICES = np.array([1e-5, 1e-3, 1e-2, 1e-1])


@pytest.fixture
def curves() -> Curves:
    rng = np.random.default_rng(0)
    loss = rng.gamma(0.5, size=(N, 5, 1)) * 0.5 ** np.arange(K) + rng.normal(0, 0.02, (N, 5, K))
    skipped = np.abs(rng.normal(1, 0.5, (N, 5, 1 + K)))
    bits = np.cumsum(rng.integers(8, 200, (N, 5, K)), 2).astype(float)
    skipped[:, 3] = skipped[:, 3, :1]  # scale 3 has no coarser one
    nothing = np.zeros((N, 5, K))
    return Curves(IDS, nothing, loss, skipped, np.ones(N), bits, np.ones((N, 5)), nothing, np.zeros((N, 5, 2 * K + 1)))


def additive(curves: Curves):
    """The joint loss of a world in which losses add up."""

    def loss(image_ids: np.ndarray, phi: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(curves.image_ids, image_ids.ravel())
        tuples = phi.reshape(-1, 5)
        return additive_loss(curves.loss[rows], curves.loss_skipped[rows], tuples).reshape(image_ids.shape)

    return loss


def rugged(image_ids: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """A joint loss without any order, the same whenever it is asked."""
    return np.sin(1000.0 * (phi * [1.0, 7, 31, 177, 1013]).sum(-1) + image_ids)


def by_hand(curves: Curves, image_id: int, phi: tuple[int, ...]) -> float:
    row = IDS.tolist().index(image_id)
    coarser = {0: 1, 1: 2, 2: 3, 4: 3}
    total = 0.0
    for s, q in enumerate(phi):
        skipped = curves.loss_skipped[row, s, 1 + phi[coarser[s]] if s in coarser else 0]
        total += curves.loss[row, s, q] if q >= 0 else skipped
    return total


def bits_by_hand(curves: Curves, image_id: int, phi: tuple[int, ...]) -> float:
    row = IDS.tolist().index(image_id)
    return sum(curves.bits[row, s, q] for s, q in enumerate(phi) if q >= 0)


def test_the_additive_loss_is_the_sum_over_the_tree(curves):
    phi, rows = np.random.default_rng(1).integers(SKIPPED, K, (4 * N, 5)), np.repeat(np.arange(N), 4)
    found = additive_loss(curves.loss[rows], curves.loss_skipped[rows], phi)
    assert found == approx([by_hand(curves, i, tuple(p)) for i, p in zip(IDS[rows], phi, strict=True)])
    assert (phi == SKIPPED).any() and len(np.unique(found)) == 4 * N


def test_the_additive_loss_is_what_the_allocation_minimises(curves):
    rows = np.arange(N)
    for price in PRICES:
        for phi in (least_cost(curves.loss, curves.bits)(price), with_skipping(*curves[2:4], curves.bits, price)):
            cost = cost_of(IDS, np.full(N, price), curves, additive(curves))
            least = cost(phi.astype(int)[:, None])[:, 0]
            others = np.random.default_rng(2).integers(phi.min(), K, (N, 300, 5))
            assert (least[:, None] <= cost(others) + 1e-12).all()
    assert cost(others)[rows, 0] == approx(
        [by_hand(curves, i, p) + price * bits_by_hand(curves, i, p) for i, p in zip(IDS, others[:, 0], strict=True)]
    )


def test_descent_never_raises_the_cost_and_ends_where_no_neighbour_is_cheaper_or_its_sweeps_do(curves):
    price = np.full(N, 1e-3)
    cost = cost_of(IDS, price, curves, rugged)
    start = np.random.default_rng(3).integers(SKIPPED, K, (N, 5))
    end = descend(start, np.arange(SKIPPED, K), cost)
    before, after = cost(np.stack([start, end], 1)).T
    assert (after <= before).all() and (after < before).any()


def test_descent_stays_at_the_additive_optimum_of_additive_losses(curves):
    for price in PRICES:
        cost = cost_of(IDS, np.full(N, price), curves, additive(curves))
        for start, lowest in (
            (least_cost(curves.loss, curves.bits)(price), 0),
            (with_skipping(curves.loss, curves.loss_skipped, curves.bits, price), SKIPPED),
        ):
            assert np.array_equal(descend(start.astype(int), np.arange(lowest, K), cost), start)


def test_descent_finds_the_optimum_of_losses_that_are_convex_in_each_scale(curves):
    convex = curves._replace(
        loss=np.ones((N, 5, 1)) * [1.0, 0.5, 0.25, 0.125], bits=np.ones((N, 5, 1)) * [1.0, 2, 3, 4]
    )
    price = np.full(N, 0.3)
    cost = cost_of(IDS, price, convex, additive(convex))
    end = descend(np.full((N, 5), 3), np.arange(K), cost)
    assert np.array_equal(end, np.full((N, 5), 1))  # two steps down, one in each sweep


def test_descent_takes_only_what_is_offered(curves):
    options = np.array([SKIPPED, 1, 3])
    start = options[np.random.default_rng(4).integers(0, 3, (N, 5))]
    end = descend(start, options, cost_of(IDS, np.full(N, 1e-3), curves, rugged))
    assert np.isin(end, options).all() and not np.array_equal(start, end)


def test_points_descend_each_at_its_own_price_and_only_some_may_skip(curves):
    points = [(method, p) for method in ("oracle", "oracle_skip") for p in range(4)]
    price = np.tile(PRICES, 2)
    start = {int(i): np.full((8, 5), 1) for i in IDS}
    found = descend_points(Choices(points, start), price, IDS.tolist(), curves, rugged)
    for image_id, phi in found.items():
        for p, (method, _) in enumerate(points):
            lowest = SKIPPED if method == "oracle_skip" else 0
            cost = cost_of(np.array([image_id]), price[[p]], curves, rugged)
            assert np.array_equal(phi[[p]], descend(np.full((1, 5), 1), np.arange(lowest, K), cost))
    everything = np.stack(list(found.values()))
    assert everything[:, :4].min() == 0 and everything[:, 4:].min() == SKIPPED
    assert all((phi == 1).all() for phi in start.values())  # what was given is left alone


def test_choosing_on_additive_losses_is_the_oracle(curves):
    loss, skipped = (np.dstack([table, np.zeros((N, 5))]) for table in curves[2:4])  # quality K: uncoded
    alone = additive(curves._replace(loss=loss, loss_skipped=skipped))
    found = choose_on(alone, IDS[1:4].tolist(), PRICES, curves)
    for p, price in enumerate(PRICES):
        expected = least_cost(curves.loss[1:4], curves.bits[1:4])(price)
        assert np.array_equal([phi[p] for phi in found.values()], expected)
    assert list(found) == IDS[1:4].tolist()


def test_no_tuple_is_cheaper_than_the_optimum(curves):
    table = enumerate_tuples(IDS[1:3], PRICES, curves, rugged)
    assert table[["image_id", "lambda_prime"]].drop_duplicates().shape == (6, 2) and len(table) == 6
    assert (table["optimum"] <= table["descent"]).all() and (table["descent"] <= table["additive"]).all()
    assert (table["optimum"] < table["additive"]).any()
    for row in table.itertuples():
        cost = cost_of(np.array([row.image_id]), np.array([row.lambda_prime]), curves, rugged)
        tuples = np.array(np.meshgrid(*[[SKIPPED, 1, 3]] * 5)).reshape(5, -1).T[None]
        assert row.optimum == cost(tuples).min()


def test_the_additive_choice_is_the_optimum_of_additive_losses(curves):
    table = enumerate_tuples(IDS, PRICES, curves, additive(curves))
    assert table["additive"].to_numpy() == approx(table["optimum"].to_numpy(), abs=1e-12)
    assert (table["descent"] <= table["additive"]).all()


def test_random_tuples_are_of_their_kind():
    phi = np.concatenate([random_tuples(np.random.default_rng(seed), 6) for seed in range(50)]).reshape(
        50, 3, TUPLES, 5
    )
    independent, near, skipping = np.moveaxis(phi, 1, 0)
    assert len(KINDS) == 3 and phi.max() == 5 and set(np.unique(independent)) == set(np.unique(near)) == set(range(6))
    assert np.ptp(near, -1).max() <= 2 < np.ptp(independent, -1).max()
    assert 0.25 < (skipping == SKIPPED).mean() < 0.35


def test_additivity_of_a_batch_is_that_of_its_images(curves):
    table = additivity(IDS, curves, additive(curves), rugged, 7)
    assert len(table) == N * 3 * TUPLES and table["joint"].to_numpy() == approx(table["additive"].to_numpy())
    alone = additivity(IDS[2:3], curves, additive(curves), rugged, 7)
    assert table[table["image_id"] == 8].reset_index(drop=True).equals(alone)
    other = additivity(IDS[2:3], curves, additive(curves), rugged, 8)
    assert not other.equals(alone)
    for row in table.sample(20, random_state=0).itertuples():
        phi = tuple(getattr(row, f"phi_{scale}") for scale in SCALES)
        assert row.bits == bits_by_hand(curves, row.image_id, phi)
        assert row.additive == approx(by_hand(curves, row.image_id, phi))
