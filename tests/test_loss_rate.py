import json
import warnings

import numpy as np
import pandas as pd
import pytest
from pytest import approx

from stages.lib.files import write_csv
from stages.lib.loss_rate import (
    Curves,
    fit_power,
    fit_scales,
    importance_labels,
    mean_loss,
    predicted_bits,
    read_curves,
    read_table,
    rivals,
    sensitivity_labels,
)
from stages.lib.params import SCALES
from stages.lib.schema import InputError

LAMBDAS = ["q1", "q2", "q3"]
IDS = [3, 7, 12, 40]  # image 12 has no ground truth


def measured(image_id, s, q):
    """Any numbers that tell image, scale and quality apart."""
    return {"bits": 100 * image_id + 10 * s + q + 1, "pixels": 4 ** (5 - s), "mse": 1 / (image_id + s + q + 1)}


@pytest.fixture
def folders(tmp_path):
    coded, losses = tmp_path / "coded", tmp_path / "losses"
    for q, name in enumerate([*LAMBDAS, "q9"]):  # q9: a quality that params.yaml no longer has
        rows, drops = [], []
        for split in ("test", "fit"):
            for image_id in reversed(IDS):
                for s, scale in enumerate(SCALES):
                    head = {"split": split, "image_id": image_id + 100 * (split == "test"), "scale": scale}
                    rows.append(head | measured(image_id, s, q))
                    drop = {"clean": image_id / 50, "coded": 0, "drop": image_id + s / 10 + q / 100}
                    drop["loss"], drop["loss_skipped"] = 1 - drop["drop"], 2 - drop["drop"]
                    drop["pseudo_loss"], drop["pseudo_loss_skipped"] = 3 - drop["drop"], 4 - drop["drop"]
                    if image_id == 12:
                        drop |= {"clean": np.nan, "coded": np.nan, "drop": np.nan, "loss": 0, "loss_skipped": 0}
                    drops += [{"task": task, **head, **drop} for task in ("keypoints", "detection")]
        write_csv(coded / f"{name}.csv", pd.DataFrame(rows))
        write_csv(losses / f"{name}.csv", pd.DataFrame(drops))
    uncoded = pd.DataFrame(drops).assign(  # of the last quality's drops
        loss_skipped=lambda rows: (1000 + rows["drop"]).fillna(0), pseudo_loss_skipped=lambda rows: rows["image_id"]
    )
    write_csv(tmp_path / "uncoded.csv", uncoded)
    return coded, losses, tmp_path / "uncoded.csv"


def test_curves_hold_every_row_in_rising_image_id(folders):
    curves = read_curves(*folders, LAMBDAS, "detection", "fit")
    assert curves.image_ids.tolist() == IDS
    assert curves.bits.shape == curves.drop.shape == curves.loss.shape == curves.mse.shape == (4, 5, 3)
    for n, image_id in enumerate(IDS):
        for s in range(5):
            for q in range(3):
                expected = measured(image_id, s, q)
                assert curves.bits[n, s, q] == expected["bits"] and curves.pixels[n, s] == expected["pixels"]
                assert curves.mse[n, s, q] == expected["mse"]
                assert curves.bpp_plane[n, s, q] == expected["bits"] / expected["pixels"]
                if image_id != 12:
                    assert curves.drop[n, s, q] == image_id + s / 10 + q / 100
                    assert curves.loss[n, s, q] == 1 - curves.drop[n, s, q]
                    assert curves.loss_skipped[n, s, 1 + q] == 2 - curves.drop[n, s, q]
                    neither = approx(1000 + image_id + s / 10 + 0.03)  # nor the coarser one
                    assert curves.loss_skipped[n, s, 0] == neither
                    assert curves.pseudo_loss[n, s, q] == 3 - curves.drop[n, s, q]
                    assert curves.pseudo_loss[n, s, 4 + q] == 4 - curves.drop[n, s, q]
                assert curves.pseudo_loss[n, s, 3] == image_id


def test_images_without_ground_truth_keep_their_bits_and_have_nothing_to_lose(folders):
    curves = read_curves(*folders, LAMBDAS, "detection", "test")
    assert curves.labelled.tolist() == [True, True, False, True]
    assert np.isnan(curves.drop[2]).all() and np.isnan(curves.clean[2]) and np.isfinite(curves.bits[2]).all()
    for loss in (curves.loss, curves.loss_skipped):
        assert (loss[2] == 0).all() and np.isfinite(loss).all()


def change(file, **how):
    frame = pd.read_csv(file, dtype={"scale": str})
    write_csv(file, how["to"](frame))


@pytest.mark.parametrize(
    "folder, name, to",
    [
        (0, "q2.csv", lambda f: f.drop(columns="bits")),
        (0, "q1.csv", lambda f: f[f.split != "fit"]),
        (0, "q2.csv", lambda f: f.drop(index=f.index[f.split == "fit"][4])),
        (0, "q3.csv", lambda f: pd.concat([f, f.iloc[-1:]])),
        (0, "q3.csv", lambda f: f.assign(bits=f.bits.where(f.bits != f.bits[f.split == "fit"].min(), 0))),
        (0, "q2.csv", lambda f: f.assign(mse=np.nan)),
        (1, "q2.csv", lambda f: f.drop(columns="drop")),
        (1, "q2.csv", lambda f: f.drop(columns="loss")),
        (1, "q3.csv", lambda f: f.assign(loss=np.nan)),
        (1, "q1.csv", lambda f: f.assign(loss_skipped=np.nan)),
        (1, "q1.csv", lambda f: f.assign(pseudo_loss=np.nan)),
        (1, "", lambda f: f.assign(drop=f["drop"].fillna(0))),
        (2, "", lambda f: f[f.image_id != 7]),
        (2, "", lambda f: f.drop(columns="pseudo_loss_skipped")),
        (1, "q3.csv", lambda f: f[f.task != "detection"]),
        (1, "q2.csv", lambda f: f[f.scale != "pool"]),
        (1, "q3.csv", lambda f: f[f.image_id != 7]),
        (1, "q1.csv", lambda f: f.assign(image_id=f.image_id.replace(7, 8))),
    ],
)
def test_a_bad_table_is_named(folders, folder, name, to):
    for file in [folders[folder] / name] if name or folder == 2 else (folders[folder] / f"{q}.csv" for q in LAMBDAS):
        change(file, to=to)
    with pytest.raises(InputError, match=f"{folders[folder].name}/?{name}"):
        read_curves(*folders, LAMBDAS, "detection", "fit")


def test_read_table_takes_one_split(folders):
    values = read_table(folders[0] / "q1.csv", "pixels", np.array(IDS), split="fit")
    assert values.shape == (4, 5) and values[0].tolist() == [1024, 256, 64, 16, 4]


def test_labels_of_a_small_example():
    drop = np.zeros((1, 5, 2))
    drop[0, :, 0] = [0.4, 0.2, 0.1, 0.0, -0.1]  # -> 1, .6, .4, .2, 0
    drop[0, :, 1] = 0.3  # all equal -> 1 each
    assert importance_labels(drop)[0] == approx(np.array([2, 1.6, 1.4, 1.2, 1]) / 7.2)


def test_labels_against_plain_loops():
    drop = np.round(np.random.default_rng(0).normal(0, 0.1, (20, 5, 6)), 1)
    drop[3] = 0
    for image, got in zip(drop, importance_labels(drop), strict=True):
        score = [0.0] * 5
        for q in range(6):
            values = [image[s, q] for s in range(5)]
            for s in range(5):
                score[s] += 1 if max(values) == min(values) else (values[s] - min(values)) / (max(values) - min(values))
        assert got == approx(np.array(score) / sum(score))
        assert got.sum() == approx(1) and (got >= 0).all()


def test_unlabelled_images_have_no_label():
    drop = np.random.default_rng(0).normal(size=(3, 5, 2))
    drop[1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = importance_labels(drop)
    assert np.isnan(labels[1]).all() and np.isfinite(labels[[0, 2]]).all()


def test_the_mean_loss_is_never_below_0_nor_rises_in_quality():
    loss = np.zeros((2, 5, 4))
    loss[:, 0] = [[5, 1, 3, 0], [3, 1, 1, 0]]  # mean 4, 1, 2, 0
    loss[:, 1] = [[1, -3, 0, -1], [1, 1, 0, 0]]  # mean 1, -1, 0, -0.5
    assert mean_loss(loss)[:2].tolist() == [[4, 2, 2, 0], [1, 0, 0, 0]]
    mean = mean_loss(np.random.default_rng(0).normal(0.1, 1, (9, 5, 6)))
    assert (mean >= 0).all() and (np.diff(mean) <= 0).all() and (mean > 0).any()


def test_sensitivities_are_how_many_times_the_mean_an_image_loses():
    rng = np.random.default_rng(0)
    k = rng.uniform(-0.5, 3, (30, 5))
    k /= k.mean(0)
    shape = np.sort(rng.uniform(0, 1, (5, 4)))[:, ::-1]
    loss = k[:, :, None] * shape
    skipped = 2 * loss[:, :, :3]
    assert sensitivity_labels(loss, skipped) == approx(k)
    loss[:, 3] = skipped[:, 3] = 0  # nothing is lost on average
    assert sensitivity_labels(loss, skipped)[:, [2, 3]] == approx(np.stack([k[:, 2], np.ones(30)], 1))

    loss += rng.normal(0, 0.2, loss.shape)
    skipped += rng.normal(0, 0.2, skipped.shape)
    found = sensitivity_labels(loss, skipped)
    mean, both = np.hstack([mean_loss(loss), mean_loss(skipped)]), np.concatenate([loss, skipped], 2)
    for n, s in ((0, 0), (7, 3)):
        slope, *_ = np.linalg.lstsq(mean[s][:, None], both[n, s], rcond=None)
        assert found[n, s] == approx(slope.item())


def rates_only(bits):
    """Curves of [n, 5, K] bits on planes of one pixel, with drops and losses that no fit finds doubtful."""
    n = len(bits)
    return Curves(np.arange(n), *[1 / bits] * 3, np.ones(n), bits, np.ones((n, 5)), *[1 / bits] * 2)


def test_bits_that_are_a_power_of_the_precodings_are_predicted_exactly():
    rng = np.random.default_rng(0)
    precode, known = 1, rng.uniform(200, 5000, (40, 5))
    slope = np.array([0.9, 1, 1.05, 1.1]) + 0.02 * np.arange(5)[:, None] * (np.arange(4) != precode)
    gain = np.array([0.2, 1, 2, 4])
    bits = gain * known[:, :, None] ** slope
    rate = fit_scales(rates_only(bits), precode)["rate"]
    for s, scale in enumerate(SCALES):
        assert rate[scale]["slope"] == approx(slope[s]) and rate[scale]["offset"] == approx(np.log(gain), abs=1e-9)
        assert rate[scale]["error"] == approx(np.zeros(4), abs=1e-9)
    new = rng.uniform(200, 5000, (10, 5))
    predicted = predicted_bits(new, rate, precode)
    assert predicted == approx(gain * new[:, :, None] ** slope)
    assert (predicted[:, :, precode] == new).all()


def test_predicted_bits_never_fall_in_quality():
    rate = dict.fromkeys(SCALES, {"slope": [1, 1, 0.5, 1], "offset": np.log([0.5, 1, 20, 1.5]).tolist()})
    predicted = predicted_bits(np.array([[100.0] * 5, [1e4] * 5]), rate, 1)
    assert predicted[0, 0] == approx([50, 100, 200, 200]) and predicted[1, 4] == approx([5e3, 1e4, 1e4, 1.5e4])


def test_the_error_of_predicted_bits_is_held_out():
    rng = np.random.default_rng(1)
    bits = np.exp(rng.normal(7, 1, (23, 1)) + [0, 1, 2] + rng.normal(0, 0.1, (23, 3)))
    rate = fit_scales(rates_only(np.tile(bits[:, None], (1, 5, 1))), 0)["rate"]["2"]
    errors = np.zeros((23, 3))
    for n in range(23):
        others = np.arange(23) % 5 != n % 5
        for q in range(3):
            line = np.polyfit(np.log(bits[others, 0]), np.log(bits[others, q]), 1)
            errors[n, q] = np.exp(np.polyval(line, np.log(bits[n, 0]))) / bits[n, q] - 1
    assert rate["error"] == approx(np.abs(errors).mean(0), abs=1e-9) and rate["error"][0] == approx(0, abs=1e-9)


@pytest.mark.parametrize("model", ["power", "power_offset", "exponential", "mse", "quality", "quality_sensitivity"])
def test_each_rival_wins_on_data_of_its_own(model):
    rng = np.random.default_rng(0)
    rate = rng.uniform(0.8, 1.25, (60, 5, 1)) * np.geomspace(0.1, 3, 6)
    mse = rng.uniform(0.5, 2, rate.shape) / rate
    steps = np.array([9.0, 7, 6.5, 3, 2.9, 1])
    loss = {
        "power": 2 * rate**-0.7,
        "power_offset": 0.5 * rate**-0.7 + 3,
        "exponential": 2 * np.exp(-0.8 * rate),
        "mse": 0.3 * mse,
        "quality": steps + 0 * rate,
        "quality_sensitivity": steps * rng.uniform(0.2, 2, (60, 1, 1)) + 0 * rate,
    }[model]
    drop = np.full(rate.shape, np.nan)  # not read
    found = rivals(
        Curves(np.arange(60), drop, loss, loss, np.ones(60), rate * 64, np.full((60, 5), 64.0), mse, loss), 1
    )
    assert found[model] > 0.98
    equal = {model, "quality_sensitivity"} | ({"power_offset"} if model == "power" else set())  # it knows the image
    assert all(r2 < found[model] - 0.01 for other, r2 in found.items() if other not in equal)


def test_rivals_are_held_out():
    loss = np.zeros((10, 5, 2))
    loss[:, 1] = np.random.default_rng(0).normal(3, 1, (10, 2))
    ones = np.ones(loss.shape)
    curves = Curves(np.arange(10), ones, loss, loss, np.ones(10), ones, np.ones((10, 5)), ones, loss)
    left = np.array([loss[np.arange(10) % 5 != n % 5, 1].mean(0) for n in range(10)])
    expected = 1 - ((loss[:, 1] - left) ** 2).mean() / loss[:, 1].var()
    assert rivals(curves, 1)["quality"] == approx(expected)
    assert set(rivals(curves, 0).values()) == {None}  # nothing to explain


def test_a_measured_sensitivity_does_not_explain_the_noise_it_was_measured_with():
    loss, skipped = np.random.default_rng(0).normal(3, 1, (2, 200, 5, 4))
    ones = np.ones(loss.shape)
    curves = Curves(np.arange(200), ones, loss, skipped, np.ones(200), ones, np.ones((200, 5)), ones, loss)
    assert rivals(curves, 1)["quality_sensitivity"] < 0


def power_data(alpha, beta, noise=0.0, n=60):
    rng = np.random.default_rng(2)
    weight = rng.uniform(0.05, 0.6, n)
    rate = rng.uniform(0.6, 1.6, (n, 1)) * np.geomspace(0.05, 3, 6)
    drop = weight[:, None] * alpha * rate**beta
    return weight, drop + rng.normal(0, noise, drop.shape), rate


@pytest.mark.parametrize("alpha, beta", [(0.08, -0.7), (2.0, -0.1), (1e-4, -3.0), (14.92, -0.652)])
def test_power_fit_recovers_what_made_the_data(alpha, beta):
    fit = fit_power(*power_data(alpha, beta))
    assert (fit.alpha, fit.beta) == (approx(alpha, rel=1e-4), approx(beta, rel=1e-4))
    assert fit.r2 == approx(1) and fit.r2_in_sample == approx(1) and fit.rmse < 1e-4 * alpha * 0.05**beta
    assert fit.flags == []


def test_power_fit_lives_with_negative_drops_and_missing_images():
    weight, drop, rate = power_data(0.1, -0.8, noise=0.02)
    assert (drop < 0).any()
    drop[5], weight[9] = np.nan, np.nan
    fit = fit_power(weight, drop, rate)
    assert fit.alpha == approx(0.1, rel=0.15) and fit.beta == approx(-0.8, rel=0.1) and fit.flags == []
    kept = [n for n in range(60) if n not in (5, 9)]
    assert fit == fit_power(weight[kept], drop[kept], rate[kept])


def test_power_fit_is_the_least_squares_one():
    weight, drop, rate = power_data(0.1, -0.8, noise=0.05)
    fit = fit_power(weight, drop, rate)
    best = ((weight[:, None] * fit.alpha * rate**fit.beta - drop) ** 2).sum()
    for a in fit.alpha * np.linspace(0.5, 1.5, 41):
        for b in np.linspace(-2, -0.1, 41):
            assert ((weight[:, None] * a * rate**b - drop) ** 2).sum() >= best - 1e-12


def test_held_out_error_is_that_of_fits_to_the_other_folds():
    weight, drop, rate = power_data(0.1, -0.8, noise=0.05, n=23)
    fit = fit_power(weight, drop, rate)
    errors = []
    for k in range(5):
        left = np.arange(23) % 5 == k
        other = fit_power(weight[~left], drop[~left], rate[~left])
        errors.append(drop[left] - weight[left, None] * other.alpha * rate[left] ** other.beta)
    errors = np.concatenate(errors)
    assert fit.rmse == approx(np.sqrt((errors**2).mean()), rel=1e-6)
    assert fit.r2 == approx(1 - (errors**2).sum() / ((drop - drop.mean()) ** 2).sum(), rel=1e-6)
    assert fit.rmse_in_sample < fit.rmse


@pytest.mark.parametrize(
    "weight, drop, flags",
    [
        (np.ones(20), np.zeros((20, 3)), ["failed"]),
        (np.ones(20), -np.ones((20, 3)), ["failed"]),
        (np.ones(20), np.full((20, 3), np.nan), ["failed", "too_few_images"]),
        (np.ones(0), np.zeros((0, 3)), ["failed", "too_few_images"]),
        (np.ones(1), np.array([[0.4, 0.2, 0.1]]), ["negative_r2", "too_few_images"]),
        (np.ones(20), np.tile([0.1, 0.2, 0.3], (20, 1)), ["beta_at_bound", "negative_r2"]),
    ],
)
def test_a_doubtful_fit_is_flagged_and_still_usable(weight, drop, flags):
    rate = np.tile([0.1, 0.2, 0.4], (len(weight), 1))
    fit = fit_power(weight, drop, rate)
    assert fit.alpha > 0 and -5 <= fit.beta < 0 and np.isfinite([fit.alpha, fit.beta]).all()
    assert fit.flags == flags


@pytest.fixture
def curves():
    rng = np.random.default_rng(5)
    n, k = 40, 6
    pixels = np.tile([4096.0, 1024, 256, 64, 16], (n, 1))
    phi = np.arange(k)
    slope, offset = np.array([0.5, 0.6, 0.7, 0.9, 1.1]), np.array([0.1, 0.2, 0.2, 0.3, 0.4])
    rate = slope[:, None] * phi + offset[:, None] + np.zeros((n, 5, k))
    mse = np.array([10.0, 11, 22, 25, 9])[:, None] * rate ** np.array([-0.5, -0.7, -0.6, -0.8, -0.7])[:, None] / 255**2
    sensitivity = rng.dirichlet(np.ones(5), n)
    drop = sensitivity[:, :, None] * 0.1 * rate**-0.8 + rng.normal(0, 0.001, rate.shape)
    clean = rng.uniform(0.2, 0.9, n)
    loss = 10 * drop
    skipped = np.concatenate([loss[:, :, :1] + 2, loss + 1], 2)
    skipped[[4, 8]] = 0
    drop[[4, 8]], clean[[4, 8]], loss[[4, 8]] = np.nan, np.nan, 0
    return Curves(
        np.arange(n),
        drop,
        loss,
        skipped,
        clean,
        rate * pixels[:, :, None],
        pixels,
        mse,
        np.concatenate([loss, skipped], 2),
    )


def test_scales_are_fitted_to_what_made_them(curves):
    fit = fit_scales(curves, 2)
    assert (fit["n_images"], fit["n_labelled"]) == (40, 38)
    column = {model: {k: [fit[model][s][k] for s in SCALES] for k in "ab"} for model in ("upstream", "rate_phi")}
    assert column["upstream"]["a"] == approx([10, 11, 22, 25, 9], rel=1e-4)
    assert column["upstream"]["b"] == approx([-0.5, -0.7, -0.6, -0.8, -0.7], rel=1e-4)
    assert column["rate_phi"]["a"] == approx([0.5, 0.6, 0.7, 0.9, 1.1])
    assert column["rate_phi"]["b"] == approx([0.1, 0.2, 0.2, 0.3, 0.4])
    assert all(fit["power"][s]["r2"] > 0.5 and -1.5 < fit["power"][s]["beta"] < -0.3 for s in SCALES)
    assert sum(fit["label"][s]["mean"] for s in SCALES) == approx(1)
    assert fit["mean"]["2"]["drop"] == approx(np.nanmean(curves.drop[:, 2], 0))
    assert fit["mean"]["pool"]["bits"] == approx(curves.bits[:, 4].mean(0))
    assert fit["mean"]["2"]["loss"] == approx(np.nanmean(10 * curves.drop[:, 2], 0) * 38 / 40)
    skipped = np.nanmean(10 * curves.drop[:, 2], 0)[[0, *range(6)]] + [2, 1, 1, 1, 1, 1, 1]
    assert fit["mean"]["2"]["loss_skipped"] == approx(skipped * 38 / 40)
    assert fit["rivals"]["2"] == rivals(curves, 2)


def test_the_fit_is_valid_json_and_loud(curves):
    flat = curves._replace(drop=curves.drop * 0, loss=curves.loss * 0, bits=np.full_like(curves.bits, 8.0))
    with pytest.warns(UserWarning) as caught:
        fit = fit_scales(flat, 2)
    json.loads(json.dumps(fit), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    lines = [str(warning.message) for warning in caught]
    for scale in SCALES:
        assert "failed" in fit["power"][scale]["flags"] and "not_rising" in fit["rate_phi"][scale]["flags"]
        assert sum(f"scale {scale!r}" in line and "\n" not in line for line in lines) >= 2
