"""Variants lack the part that their row names and nothing else; no label reaches those that may not see one."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pytest import approx

from stages.lib import ablation, ablation_tables, figures, results, sizes, tables
from stages.lib.ablation import ROWS, SEES_LABELS, Senses, rate_control, variants
from stages.lib.allocation import (
    Importance,
    allocate,
    allocation_table,
    column,
    mean_bits_per_image,
    operating_points,
    rate_targets,
)
from stages.lib.files import read_csv, write_csv
from stages.lib.loss_rate import Curves, fit_scales, mean_loss, predicted_bits
from stages.lib.params import SCALES, SKIPPED, check_params
from stages.lib.schema import InputError

K, PRECODE, SEED = 4, 1, 3
PRICES = 10.0 ** np.linspace(-9, 7, 65)  # those of the authors' algorithm are the highest
MIDDLES = (np.arange(50) + 0.5) / 50
POOL = SCALES.index("pool")
PARAMS = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())


def make_curves(seed: int, n: int = 24) -> Curves:
    """Images whose losses fall with quality, the more the higher their sensitivity; bits with a rate model."""
    rng = np.random.default_rng(seed)
    pixels = np.tile([65536.0, 16384, 4096, 1024, 256], (n, 1))
    rate = np.geomspace(0.2, 3, K) * rng.uniform(0.6, 1.6, (n, 5, 1))
    rate *= np.exp(rng.normal(0, 0.1, rate.shape))  # beyond what one precoding tells
    sensitivity = rng.gamma(2, 0.5, (n, 5, 1))
    loss = np.array([0.5, 0.4, 0.3, 0.2, 0.1])[:, None] * np.geomspace(1, 0.05, K) * sensitivity
    loss += rng.normal(0, 0.005, loss.shape)
    skipped = np.concatenate([2 * loss.max(2, keepdims=True), np.repeat(1.5 * loss.max(2, keepdims=True), K, 2)], 2)
    drop = loss / 3 + rng.normal(0, 0.02, loss.shape)
    bits = np.round(rate * pixels[:, :, None])
    pseudo = np.concatenate([loss, skipped], 2) * rng.uniform(0.5, 1.5, (n, 5, 1))
    return Curves(np.arange(n) + 5, drop, loss, skipped, rng.uniform(0.3, 0.9, n), bits, pixels, rate**-1.0, pseudo)


@pytest.fixture(scope="module")
def fit() -> Curves:
    return make_curves(0, 60)


@pytest.fixture(scope="module")
def test() -> Curves:
    return make_curves(1)


@pytest.fixture(scope="module")
def model(fit) -> dict:
    return fit_scales(fit, PRECODE)


@pytest.fixture(scope="module")
def importance(test) -> Importance:
    rng = np.random.default_rng(2)
    return Importance(rng.dirichlet(np.ones(5), len(test.bits)), rng.uniform(0.1, 3, test.pixels.shape))


@pytest.fixture(scope="module")
def of_fit(fit) -> Importance:
    rng = np.random.default_rng(6)
    return Importance(rng.dirichlet(np.ones(5), len(fit.bits)), rng.uniform(0.1, 3, fit.pixels.shape))


@pytest.fixture(scope="module")
def senses(fit, test) -> Senses:
    rng = np.random.default_rng(4)
    learned = {name: rng.uniform(0.1, 3, test.pixels.shape) for name in ("channels", "objectness", "ap")}
    activity = {
        name: (rng.uniform(0.1, 3, fit.pixels.shape), rng.uniform(0.1, 3, test.pixels.shape))
        for name in ("variance", "gradient")
    }
    return Senses(learned, activity)


@pytest.fixture(scope="module")
def methods(fit, test, model, importance, of_fit, senses) -> dict:
    return variants(fit, test, model, importance, of_fit, senses, PRECODE, SEED)


def chosen(choose) -> np.ndarray:
    return np.stack([choose(price) for price in PRICES])  # [prices, n, 5]


def test_every_row_has_a_method_once(methods):
    names = [name for part in ROWS.values() for name in part]
    assert list(methods) == names and len(set(names)) == len(names)
    described = ablation.described_rows()
    assert described["method"].tolist() == names
    assert set(described.loc[described["sees_labels"], "method"]) == SEES_LABELS < set(names)


def test_the_main_methods_are_those_of_allocate(methods, test, model, importance):
    main = allocate(test, model, importance, PRECODE, 6)
    names = list(dict.fromkeys(main["method"]))[1:]
    table = allocation_table({name: methods[name] for name in names}, test, 6)
    assert set(names) <= set(methods)
    for name in names:
        wanted, found = (frame[frame["method"] == name].reset_index(drop=True) for frame in (main, table))
        pd.testing.assert_frame_equal(wanted, found)


def test_labels_of_test_reach_only_those_that_say_so(fit, test, model, importance, of_fit, senses, methods):
    strangers = make_curves(9)  # not the same ones in another order: that would leave their means
    names = ("drop", "loss", "loss_skipped", "clean")
    relabelled = test._replace(**{name: getattr(strangers, name) for name in names})
    others = variants(fit, relabelled, model, importance, of_fit, senses, PRECODE, SEED)
    changed = {name for name in methods if not np.array_equal(chosen(methods[name]), chosen(others[name]))}
    assert changed == SEES_LABELS


def test_real_bits_and_a_perfect_predictor_are_a_direct_argmin(fit, test, model, of_fit, senses):
    mean = mean_loss(fit.loss)
    k = ablation.measured(test, model)
    known = variants(fit, test, model, Importance(np.full(k.shape, 0.2), k), of_fit, senses, PRECODE, SEED)
    for price in PRICES:
        direct = (k[:, :, None] * mean + price * test.bits).argmin(2)
        assert np.array_equal(known["bits_real"](price), direct)
    two = ablation.predicted_from(fit.bits, test.bits, [0, 2])
    others = [1, 3]
    assert np.array_equal(two[:, :, [0, 2]], test.bits[:, :, [0, 2]]) and not np.array_equal(two, test.bits)
    assert np.array_equal(ablation.predicted_from(fit.bits, test.bits, list(range(K))), test.bits)
    one = predicted_bits(test.bits[:, :, 0], fit_scales(fit, 0)["rate"], 0)
    errors = [np.abs(np.log(found / test.bits))[:, :, others].mean() for found in (two, one)]
    assert errors[0] < errors[1]  # two tell more than one
    assert np.array_equal(chosen(known["mfiba"]), chosen(known["sensitivity_measured"]))
    assert np.array_equal(chosen(known["mfiba_skip"]), chosen(known["measured_skip"]))


def test_without_precoding_all_images_of_one_sensitivity_get_one_vector(fit, test, model, of_fit, senses, methods):
    alike = Importance(np.full(test.pixels.shape, 0.2), np.ones(test.pixels.shape))
    known = variants(fit, test, model, alike, of_fit, senses, PRECODE, SEED)
    phi = chosen(known["bits_mean"])
    assert (phi == phi[:, :1]).all() and np.array_equal(phi, chosen(known["static_smooth"]))
    assert np.array_equal(chosen(known["mfiba"]), chosen(methods["sensitivity_one"]))
    assert np.array_equal(chosen(known["mfiba_closed_form"]), chosen(methods["closed_form_equal"]))
    phi = chosen(methods["sensitivity_one"])
    assert (phi != phi[:, :1]).any()  # the bits are the image's


def test_means_of_fit_are_a_fixed_sensitivity_and_weights_and_shares_of_mean_1(
    fit, test, model, of_fit, senses, methods
):
    fixed = of_fit._replace(sensitivity=np.broadcast_to([1.5, 0.5, 0.2, 2.0, 1.0], fit.pixels.shape))
    shares = Importance(np.full(test.pixels.shape, 0.2), np.broadcast_to(fixed.sensitivity[0], test.pixels.shape))
    known = variants(fit, test, model, shares, fixed, senses, PRECODE, SEED)
    assert np.array_equal(chosen(known["sensitivity_mean"]), chosen(known["mfiba"]))
    even = variants(
        fit, test, model, shares, fixed._replace(weights=np.full(fit.pixels.shape, 0.2)), senses, PRECODE, 1
    )
    assert np.array_equal(chosen(even["sensitivity_weight"]), chosen(methods["sensitivity_one"]))
    assert np.array_equal(chosen(even["sensitivity_share"]), chosen(methods["sensitivity_one"]))


def test_a_share_keeps_the_scales_of_an_image_and_forgets_how_much_it_loses(
    fit, test, model, importance, of_fit, senses, methods
):
    times = np.random.default_rng(0).uniform(0.5, 2, (len(test.image_ids), 1))
    louder = importance._replace(sensitivity=importance.sensitivity * times)
    known = variants(fit, test, model, louder, of_fit, senses, PRECODE, SEED)
    assert np.array_equal(chosen(known["sensitivity_share"]), chosen(methods["sensitivity_share"]))
    assert not np.array_equal(chosen(known["mfiba"]), chosen(methods["mfiba"]))


def test_every_other_sensitivity_changes_the_choice(methods):
    found = {name: chosen(methods[name]).tobytes() for part in ROWS.values() for name in part}
    assert len(set(found.values())) == len(found)


def test_random_variants_follow_the_seed(fit, test, model, importance, of_fit, senses, methods):
    again, other = (variants(fit, test, model, importance, of_fit, senses, PRECODE, seed) for seed in (SEED, SEED + 1))
    different = {n for n in methods if not np.array_equal(chosen(methods[n]), chosen(other[n]))}
    assert different == {"closed_form_random", "sensitivity_permuted"}
    assert all(np.array_equal(chosen(methods[n]), chosen(again[n])) for n in methods)


def test_no_image_keeps_its_own_sensitivity():
    values = np.arange(35.0).reshape(7, 5)
    shuffled = ablation.of_another_image(values, 0)
    assert (shuffled != values).all()
    assert np.array_equal(np.sort(shuffled[:, 0]), values[:, 0])
    assert np.array_equal(np.diff(shuffled, axis=1), np.ones((7, 4)))  # rows stay whole


def test_relative_is_one_on_the_average_of_fit():
    fit = np.array([[1.0, 0, 2], [3, 0, 4]])
    assert ablation.relative(fit, fit).mean(0) == approx([1, 1, 1])
    assert ablation.relative(fit, np.array([[4.0, 0, 1.5]])) == approx(np.array([[2, 1, 0.5]]))


def test_pool_is_always_skipped_or_never(methods, test, model, importance):
    pool, fine = chosen(methods["pool_skip"]), chosen(methods["coded_pool_skip"])
    others = np.arange(5) != POOL
    assert (pool[..., POOL] == SKIPPED).all() and (pool[..., others] != SKIPPED).all()
    assert (fine[..., POOL] != SKIPPED).all() and (fine[..., others] == SKIPPED).any()
    # The least cost of all K**4 choices of an image, by hand.
    k, price, image = importance.sensitivity[0], PRICES[10], 0
    loss, skipped = (k[:, None] * column(model, "mean", name) for name in ("loss", "loss_skipped"))
    bits = predicted_bits(test.bits[:, :, PRECODE], model["rate"], PRECODE)[image]
    costs = {
        phi: sum(loss[s, q] + price * bits[s, q] for s, q in enumerate(phi)) + skipped[POOL, 1 + phi[3]]
        for phi in np.ndindex(*(K,) * 4)
    }
    assert tuple(methods["pool_skip"](price)[image, others].astype(int)) == min(costs, key=costs.get)


def test_a_power_law_of_the_image_is_found_and_decides():
    test = make_curves(5, 6)
    a, b = np.full((6, 5), 0.1), np.full((6, 5), -1.0)
    a[0] *= 8
    test = test._replace(drop=a[:, :, None] * test.bpp_plane ** b[:, :, None], bits=np.tile(test.bits[:1], (6, 1, 1)))
    test = test._replace(drop=a[:, :, None] * test.bpp_plane ** b[:, :, None])
    test.clean[5] = 0
    phi = chosen(ablation.upstream_image(test))
    assert (phi[:, 0] >= phi[:, 1]).all() and (phi[:, 0] > phi[:, 1]).any()
    assert np.array_equal(phi[:, 1], phi[:, 2])
    assert (phi[:, 5] == 0).all()


def test_weights_fall_into_fifty_bins(fit, of_fit, model):
    assert ablation.weight_bins(np.array([0, 0.019, 0.021, 0.5, 0.979, 0.981, 1])).tolist() == [0, 0, 1, 25, 48, 49, 49]
    assert np.array_equal(ablation.weight_bins(MIDDLES), np.arange(50))
    c = ablation.calibrate(fit, of_fit.weights, model)
    seen = np.unique(ablation.weight_bins(of_fit.weights))
    assert c.shape == (50,) and not np.array_equal(c, MIDDLES)
    assert np.array_equal(np.delete(c, seen), np.delete(MIDDLES, seen))
    steps = (c - MIDDLES) / 0.01
    assert steps == approx(np.rint(steps), abs=1e-9)


def test_calibration_moves_bits_to_the_scale_that_loses(fit, model):
    """Scale 0 loses alone and has the least weight; what is learned on fit must hold for other images, too."""
    weights = np.tile([0.05, 0.2375, 0.2375, 0.2375, 0.2375], (60, 1))
    fit, other = (c._replace(drop=c.drop * (np.arange(5) == 0)[:, None]) for c in (fit, make_curves(7, 60)))
    c = ablation.calibrate(fit, weights, model)
    bins = ablation.weight_bins(weights)
    low, high = bins[0, :2]
    assert c[low] >= MIDDLES[low] and c[high] < MIDDLES[high] - 0.05
    for curves in (fit, other):
        targets, images = rate_targets(curves.bits, 6), np.arange(60)
        lost = [
            [curves.drop[images, 0, point.phi[:, 0].astype(int)].mean() for point in points[1:-1]]
            for w in (MIDDLES, c)
            for points in [operating_points(ablation.upstream_with(w[bins], curves, model), curves.bits, targets)]
        ]
        assert (np.array(lost[1]) < lost[0]).all()


def test_calibration_keeps_no_nudge_without_a_gain(fit, of_fit, model):
    lossless = fit._replace(drop=np.zeros_like(fit.drop))  # all chords are level, so is every nudge
    ends = [0, K - 1]  # two points: no chord
    two = fit._replace(bits=fit.bits[:, :, ends], drop=fit.drop[:, :, ends])
    for curves in (lossless, two):
        assert np.array_equal(ablation.calibrate(curves, of_fit.weights, model), MIDDLES)


def test_calibration_asks_no_image_without_label_for_a_drop(fit, of_fit, model):
    clean, drop = fit.clean.copy(), fit.drop.copy()
    clean[::3], drop[::3] = np.nan, np.nan
    unlabelled = fit._replace(clean=clean, drop=drop)
    nothing_lost = fit._replace(drop=np.nan_to_num(drop))
    found, wanted = (ablation.calibrate(curves, of_fit.weights, model) for curves in (unlabelled, nothing_lost))
    assert np.array_equal(found, wanted) and np.isfinite(found).all()


def test_calibration_sees_no_label_of_test(fit, test, model, importance, of_fit, senses, methods):
    order = np.roll(np.arange(len(test.bits)), 1)
    permuted = test._replace(drop=test.drop[order], clean=test.clean[order])
    again = variants(fit, permuted, model, importance, of_fit, senses, PRECODE, SEED)
    found, same = (chosen(names["upstream_calibrated"]) for names in (methods, again))
    assert np.array_equal(found, same)
    weights = ablation.calibrate(fit, of_fit.weights, model)[ablation.weight_bins(importance.weights)]
    assert np.array_equal(found, chosen(ablation.upstream_with(weights, test, model)))
    assert not np.array_equal(chosen(methods["upstream_measured"]), chosen(again["upstream_measured"]))


def test_asked_bits_are_reached_exactly_where_they_are_known(test, model):
    exact = copy.deepcopy(model)
    ratio = test.bits.mean(0) / test.bits.mean(0)[:, PRECODE, None]  # [5, K]
    for s, scale in enumerate(SCALES):
        exact["rate"][scale] |= {"slope": [1.0] * K, "offset": np.log(ratio[s]).tolist()}
    bits = test.bits[:, :, PRECODE, None] * ratio
    sensitivity = np.random.default_rng(0).uniform(0.5, 2, test.pixels.shape)
    found = rate_control(bits, exact, sensitivity, PRECODE, 6, 100)
    by_bits = {name: rows.drop(columns="bits").reset_index(drop=True) for name, rows in found.groupby("bits")}
    pd.testing.assert_frame_equal(by_bits["predicted"], by_bits["real"])
    assert found["error"].between(-0.05, 1e-9).all()
    lowest, highest = (100 + mean_bits_per_image(np.full(test.pixels.shape, q), bits) for q in (0, K - 1))
    assert found["asked"].between(lowest, highest, inclusive="neither").all()
    assert (found["reached"] / found["asked"] - 1).to_numpy() == approx(found["error"].to_numpy())
    halved = rate_control(bits * np.where(np.arange(K) == PRECODE, 1, 2), exact, sensitivity, PRECODE, 6, 100)
    assert halved.loc[halved["bits"] == "predicted", "error"].abs().max() > 0.2  # a wrong rate model shows


# ---- report ----


def evaluation() -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    points, resamples = [], []
    bits = np.geomspace(1e3, 1e4, 6)
    for method, factor in {"none": 0, "uniform": 1, **{name: 0.7 for part in ROWS.values() for name in part}}.items():
        factor = 0.5 if method == "mfiba" else factor
        for point, b in enumerate(bits[:1] if method == "none" else bits):
            accuracy = 0.6 * (1 - (500 / b) ** 0.9)
            points.append(("detection", "elic", method, point, 9, factor * b, 1.0, accuracy, "box AP", "test"))
            noise = rng.normal(0, 1e-4, 8)
            resamples += [(method, point, r, factor * b, accuracy + noise[r]) for r in range(8)]
    return pd.DataFrame(points, columns=results.RD_POINTS), pd.DataFrame(resamples, columns=results.RESAMPLES)


def size_rows() -> pd.DataFrame:
    rows = []
    for n, size in enumerate(sizes.SIZES):
        about = size, 40, 0.01 * n, 0.01 * n + 0.01
        rows += [(*about, "bd_rate", m, -20.0 - n, -25, -15) for m in sizes.METHODS]
        rows += [(*about, q, s, 0.2 + n, np.nan, np.nan) for q in ("weight", "sensitivity") for s in SCALES]
    return pd.DataFrame(rows, columns=results.ABLATION["sizes"])


def test_the_report_says_of_each_variant_what_it_is_saves_and_lacks(tmp_path, test, model):
    table = ablation_tables.ablation(*evaluation(), ablation.described_rows())
    assert table["method"].tolist() == [name for part in ROWS.values() for name in part]
    found = table.set_index("method")
    assert found.loc["bits_mean", "bd_rate_pchip"] == approx(-30) and found.loc["mfiba", "bd_rate_pchip"] == approx(-50)
    assert found.loc["bits_mean", "difference"] == approx(-20) and np.isnan(found.loc["mfiba", "difference"])
    assert found.loc["coded_pool_skip", "difference"] == approx(0)  # of mfiba_skip, which is no better
    assert found.loc["mfiba_skip", "difference"] == approx(-20)
    path = tmp_path / "rate_control.csv"
    write_csv(path, rate_control(test.bits, model, np.ones(test.pixels.shape), PRECODE, 6, 0))
    rates = read_csv(path, results.ABLATION["rate_control"])
    written = ablation_tables.ablation_tables(table, {"detection-elic": size_rows()}, {"detection-elic": rates})
    markdown, latex = tables.markdown(written), tables.latex(written, "ablation")
    for part, names in ROWS.items():
        assert f"| {part}:" in markdown
        for name, text in names.items():
            star = " *" if name in SEES_LABELS else " "
            assert f"| {name}{star}" in markdown and text in markdown
    assert latex.count(r"\begin{table*}") == len(written) == 1 + 3 + 1
    for name in ("a", "b"):
        figures.size_figure(tmp_path / name, "detection-elic", size_rows())
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


# ---- params ----


@pytest.mark.parametrize(
    ("studies", "says"),
    [
        ({"detection-vvc": {}}, "studies.detection-vvc.*not in cells"),
        ({"detection-elic": PARAMS["cells"]["detection-tcm"]}, r"studies.detection-elic.*\*detection-elic"),
        (["detection-elic"], "studies.*a mapping"),
    ],
)
def test_a_study_is_one_of_the_cells(studies, says):
    with pytest.raises(InputError, match=says):
        check_params(PARAMS | {"studies": studies})
    check_params(PARAMS | {"studies": {}})
