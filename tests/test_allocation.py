"""Operating points of the methods, and the table of what they choose."""

from itertools import product
from pathlib import Path

import curves
import numpy as np
import pandas as pd
import pytest
import yaml
from curves import PRECODE, K, N
from pytest import approx

from stages import allocate as allocate_stage
from stages import fit_loss_rate
from stages.lib import allocation
from stages.lib.allocation import (
    allocate,
    label_aware,
    operating_points,
    pseudo_labelled,
    rate_targets,
    targets_below,
)
from stages.lib.files import read_csv, write_csv, write_json
from stages.lib.loss_rate import read_fit
from stages.lib.params import SCALES, SKIPPED
from stages.lib.schema import InputError

evaluated, fit, importance = curves.evaluated, curves.fit, curves.importance  # fixtures
METHODS = [
    *("uniform", "static", "upstream_predicted", "mfiba_closed_form", "mfiba", "static_skip", "mfiba_skip"),
    *("mfiba_pseudo", "mfiba_pseudo_skip", "upstream_measured", "oracle", "oracle_skip"),
]


def test_targets_span_uniform_lowest_to_highest(evaluated):
    targets = rate_targets(evaluated.bits, 5)
    assert targets[[0, -1]] == approx(evaluated.bits.sum(1).mean(0)[[0, -1]])
    assert np.diff(np.log(targets)) == approx(np.log(targets[-1] / targets[0]) / 4)


@pytest.mark.parametrize("method, size", [("mfiba", 1e-12), ("mfiba_closed_form", 1.0), ("mfiba", 1e12)])
def test_points_are_the_most_bits_not_above_the_target(evaluated, fit, importance, method, size):
    choose = allocation.label_free(evaluated.bits, evaluated.pixels, fit, importance, PRECODE)[method]
    targets = rate_targets(evaluated.bits, 6)
    found = operating_points(lambda lambda_prime: choose(lambda_prime / size), evaluated.bits, targets)
    reached = [allocation.mean_bits_per_image(point.phi, evaluated.bits) for point in found]
    tried = [
        allocation.mean_bits_per_image(choose(lambda_prime), evaluated.bits)
        for lambda_prime in 10.0 ** np.arange(-15, 5, 0.005)
    ]
    assert len(reached) == len(targets)
    for bits, target in zip(reached, targets * (1 + 1e-9), strict=True):
        assert max(other for other in tried if other <= target) <= bits <= target
    assert [0.0] * 5 in found[0].phi.tolist() and (found[-1].phi == K - 1).all()


def test_a_skipped_scale_has_no_bits(evaluated):
    phi = np.zeros((N, 5))
    phi[:, 0] = SKIPPED
    assert allocation.mean_bits_per_image(phi, evaluated.bits) == approx(evaluated.bits[:, 1:, 0].sum(1).mean())


def test_targets_below_go_on_at_the_same_ratio():
    assert targets_below(np.array([8.0, 16, 32])) == approx(np.array([0.5, 1, 2, 4, 8, 16, 32]))


def test_a_method_that_saturates_gives_its_nearest_end_once(evaluated):
    bits = evaluated.bits
    middle = lambda lambda_prime: np.full((N, 5), 1.0 if lambda_prime > 7e-4 else 2.0)  # noqa: E731
    found = operating_points(middle, bits, rate_targets(bits, 8))
    assert [point.phi[0, 0] for point in found] == [1, 2]
    assert found[0].lambda_prime > 7e-4 >= found[1].lambda_prime


@pytest.fixture(scope="module")
def table(evaluated, fit, importance):
    return allocate(evaluated, fit, importance, PRECODE, 6)


def test_every_method_gives_every_image_and_scale_a_precoded_quality(table, evaluated):
    assert list(table.columns) == ["method", "point", "lambda_prime", "image_id", "scale", "phi"]
    assert list(dict.fromkeys(table["method"])) == METHODS
    skipping = table["method"].str.endswith("_skip")
    assert table.loc[~skipping, "phi"].isin(range(K)).all()
    assert set(table.loc[skipping, "phi"]) == {SKIPPED, *range(K)}
    for _, rows in table.groupby(["method", "point"]):
        assert rows["image_id"].tolist() == np.repeat(evaluated.image_ids, 5).tolist()
        assert rows["scale"].tolist() == list(SCALES) * N
        assert rows["lambda_prime"].nunique(dropna=False) == 1


def test_points_count_from_zero_in_rising_bits_and_differ(table, evaluated):
    for method, rows in table.groupby("method"):
        tables = [points["phi"].to_numpy().reshape(N, 5) for _, points in rows.groupby("point")]
        bits = [allocation.mean_bits_per_image(phi, evaluated.bits) for phi in tables]
        assert rows["point"].unique().tolist() == list(range(len(tables)))
        assert bits == sorted(bits) and len({phi.tobytes() for phi in tables}) == len(tables)
        assert len(tables) >= 3, method


def test_uniform_is_one_quality_per_point(table):
    rows = table[table["method"] == "uniform"]
    assert (rows["phi"] == rows["point"]).all() and rows["lambda_prime"].isna().all()


def rows_of(table, method):
    return table[table["method"] == method].reset_index(drop=True)


def changed(table, other):
    return [m for m in METHODS if not rows_of(table, m).equals(rows_of(other, m))]


def test_only_label_aware_methods_see_what_test_loses(evaluated, fit, importance, table):
    order = np.random.default_rng(0).permutation(N)
    measured = {name: getattr(evaluated, name)[order] for name in ("drop", "loss", "loss_skipped", "clean")}
    other = allocate(evaluated._replace(**measured), fit, importance, PRECODE, 6)
    assert changed(table, other) == ["upstream_measured", "oracle", "oracle_skip"]


@pytest.mark.parametrize(
    "what, methods",
    [
        ("weights", ["upstream_predicted", "mfiba_closed_form"]),
        ("sensitivity", ["mfiba", "mfiba_skip", "mfiba_pseudo", "mfiba_pseudo_skip"]),
    ],
)
def test_predictions_reach_only_the_methods_that_predict(what, methods, evaluated, fit, importance, table):
    other = importance._replace(**{what: getattr(importance, what)[::-1]})
    assert changed(table, allocate(evaluated, fit, other, PRECODE, 6)) == methods


def test_what_the_sender_loses_by_its_own_detections_reaches_two_methods(evaluated, fit, importance, table):
    other = evaluated._replace(pseudo_loss=evaluated.pseudo_loss[::-1])
    assert changed(table, allocate(other, fit, importance, PRECODE, 6)) == ["mfiba_pseudo", "mfiba_pseudo_skip"]


def test_a_sender_that_takes_its_own_losses_for_true_ones_and_is_right_is_the_oracle(evaluated, fit, importance):
    half = fit | {"pseudo": {scale: {"factor": 2.0} for scale in SCALES}}
    sender = pseudo_labelled(evaluated.bits, evaluated.every_loss / 2, half, importance, 1.0)
    best = label_aware(evaluated, fit)
    for price in (1e-5, 1e-4, 1e-3):
        for end in ("", "_skip"):
            assert (sender[f"mfiba_pseudo{end}"](price) == best[f"oracle{end}"](price)).all()


def test_a_sender_expects_the_mean_of_what_it_sees_and_what_is_predicted(evaluated, fit, importance):
    mean = [[*fit["mean"][scale]["loss"], *fit["mean"][scale]["loss_skipped"]] for scale in SCALES]
    factor = np.array([fit["pseudo"][scale]["factor"] for scale in SCALES])
    seen = factor[:, None] * evaluated.pseudo_loss
    expected = 0.7 * seen + 0.3 * importance.sensitivity[:, :, None] * np.array(mean)
    sender = pseudo_labelled(evaluated.bits, evaluated.pseudo_loss, fit, importance)
    for price in (1e-5, 1e-4, 1e-3):
        found = sender["mfiba_pseudo"](price)
        assert (found == (expected[:, :, :K] + price * evaluated.bits).argmin(2)).all()
    seeing = pseudo_labelled(evaluated.bits, evaluated.pseudo_loss, fit, importance, 1.0)
    assert (seeing["mfiba_pseudo"](1e-4) != sender["mfiba_pseudo"](1e-4)).any()


def test_a_loss_rate_model_of_other_qualities_is_refused(fit, tmp_path):
    write_json(tmp_path / "fit.json", fit)
    assert read_fit(tmp_path / "fit.json", 4) == fit
    with pytest.raises(InputError, match="fit.json: mean.0.drop.*params.yaml has 3 lambdas: run fit_loss_rate again"):
        read_fit(tmp_path / "fit.json", 3, "mean")


def test_importance_is_read_by_image_and_scale(tmp_path, importance):
    ids = np.arange(N) + 1
    frame = pd.DataFrame({"image_id": np.repeat(ids, 5), "split": "test", "scale": list(SCALES) * N})
    frame = frame.assign(weight=importance.weights.ravel(), sensitivity=importance.sensitivity.ravel())
    other = frame.assign(split="fit", weight=0.2, sensitivity=1)
    file = tmp_path / "mfip.csv"
    write_csv(file, pd.concat([other, frame.sample(frac=1, random_state=0)]))
    read = allocation.read_importance(file, "test", ids)
    assert (read.weights == importance.weights).all() and (read.sensitivity == importance.sensitivity).all()
    with pytest.raises(InputError, match="mfip.csv"):
        allocation.read_importance(file, "test", ids + 1)
    for column in ("weight", "sensitivity"):
        write_csv(file, frame.assign(**{column: -0.1}))
        with pytest.raises(InputError, match=f"mfip.csv.*{column}.*-0.1"):
            allocation.read_importance(file, "test", ids)
        write_csv(file, frame.drop(columns=column))
        with pytest.raises(InputError, match=f"mfip.csv.*{column}"):
            allocation.read_importance(file, "test", ids)


def test_the_stages_turn_tables_into_a_table(tmp_path, monkeypatch):
    params = Path("params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(7)
    head = pd.DataFrame(list(product(["fit", "test"], range(10), SCALES)), columns=["split", "image_id", "scale"])
    head["image_id"] += 10 * (head["split"] == "test")
    for q, name in enumerate(yaml.safe_load(params)["lambdas"]):
        rate = (q + 1) * rng.uniform(0.8, 1.2, len(head))
        write_csv(Path("coded", f"{name}.csv"), head.assign(bits=(64 * rate).round() + 8, pixels=64, mse=0.01 / rate))
        write_csv(
            Path("losses", f"{name}.csv"),
            head.assign(
                task="detection",
                clean=0.6,
                coded=0.6 - 0.1 / rate,
                drop=0.1 / rate,
                loss=0.2 / rate,
                loss_skipped=0.4 / rate,
                pseudo_loss=0.3 / rate,
                pseudo_loss_skipped=0.6 / rate,
            ),
        )
    write_csv(Path("uncoded.csv"), head.assign(task="detection", loss_skipped=0.5, pseudo_loss_skipped=0.7))
    write_csv(Path("mfip.csv"), head.assign(weight=0.2, sensitivity=1.0))
    measured = Path("coded"), Path("losses"), Path("uncoded.csv")
    fit_loss_rate.main(*measured, "detection", Path("fit.json"))
    models = Path("fit.json"), Path("mfip.csv")
    allocate_stage.main(*measured, *models, "detection", Path("allocations.csv"))
    table = read_csv(Path("allocations.csv"))
    assert list(dict.fromkeys(table["method"])) == METHODS and set(table["scale"]) == set(SCALES)
    assert set(table["image_id"]) == set(range(10, 20))
