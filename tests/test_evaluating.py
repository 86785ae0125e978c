"""What is evaluated is the accuracy of what was decoded, and what it costs are the bytes of the files."""

from pathlib import Path
from tempfile import TemporaryDirectory

import coded_shapes
import h5py
import numpy as np
import pandas as pd
import pytest
from artifacts import evaluate
from coded_shapes import (
    QUALITIES,
    SIDE,
    change_record,
    clean_pyramids,
    copy_of,
    decoded_pyramids,
    found_in,
    reference_ap,
    seeded_predictor,
)
from pytest import approx

from stages.lib import models
from stages.lib.accuracy import average_precision, match, merge
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.evaluating import bits_of, choices_of, tabulate
from stages.lib.files import read_csv, write_csv
from stages.lib.measuring import truths
from stages.lib.params import SCALES, SKIPPED
from stages.lib.schema import InputError

root, image_ids, features = coded_shapes.root, coded_shapes.image_ids, coded_shapes.features  # fixtures
predictor, feature_codec = coded_shapes.predictor, coded_shapes.feature_codec
coded, seer = coded_shapes.coded, coded_shapes.seer


def allocation_of(image_ids: list[int], **methods: list) -> pd.DataFrame:
    """method -> a list of points, each a function of (position of the image, position of the scale)."""
    rows = [
        (method, point, 1.0, image_id, scale, float(phi(k, s)))
        for method, points in methods.items()
        for point, phi in enumerate(points)
        for k, image_id in enumerate(image_ids)
        for s, scale in enumerate(SCALES)
    ]
    return pd.DataFrame(rows, columns=["method", "point", "lambda_prime", "image_id", "scale", "phi"])


def test_choices_keep_the_tables_order_of_points_and_the_scales_own():
    table = allocation_of([30, 4], uniform=[lambda k, s: 0, lambda k, s: 1], best=[lambda k, s: 10 * k + s])
    shuffled = pd.concat([part.sample(frac=1, random_state=1) for _, part in table.groupby("method", sort=False)])
    for rows in (table, shuffled):
        choices = choices_of(rows)
        assert sorted(choices.points[:2]) == [("uniform", 0), ("uniform", 1)] and choices.points[2] == ("best", 0)
        at = [choices.points.index(p) for p in (("uniform", 0), ("uniform", 1), ("best", 0))]
        assert choices.phi[30][at].tolist() == [[0] * 5, [1] * 5, [0, 1, 2, 3, 4]]
        assert choices.phi[4][at].tolist() == [[0] * 5, [1] * 5, [10, 11, 12, 13, 14]]
    assert choices_of(table).points == [("uniform", 0), ("uniform", 1), ("best", 0)]


def test_an_allocation_without_a_choice_for_some_scale_is_refused():
    table = allocation_of([30, 4], uniform=[lambda k, s: 0])
    with pytest.raises(InputError, match="image 4.*uniform"):
        choices_of(table.iloc[:-1])


@pytest.fixture
def allocation(image_ids) -> pd.DataFrame:
    return allocation_of(
        image_ids,
        uniform=[lambda k, s, q=q: q for q in range(3)],
        mixed=[lambda k, s: (k + s) % 3, lambda k, s: 2 if s == 1 else 0],
        skipping=[lambda k, s: SKIPPED, lambda k, s: (k + s) % 4 + SKIPPED, lambda k, s: 1 if s == 3 else SKIPPED],
        copied=[lambda k, s: 1],
    )


def points_of(seer, features, feature_codec, coded, allocation, task, resamples=20):
    truth, predictor = truths({task: seer.coco[task]}), seeded_predictor()
    parts = coded, list(QUALITIES), feature_codec, predictor
    with TemporaryDirectory() as folder:
        evaluated = evaluate(Path(folder), features, {task: allocation}, seer, *parts, truth)
    choices, matches = evaluated[task]
    bits = bits_of(coded, list(QUALITIES), features)
    names = {"task": task, "codec": "elic"}
    return tabulate(choices, matches.items(), bits, features, names, resamples, 0)


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_points_are_those_of_pycocotools_and_of_the_files(
    seer, features, feature_codec, predictor, coded, allocation, task
):
    points, _ = points_of(seer, features, feature_codec, coded, allocation, task)
    assert points.columns.tolist() == [
        *("task", "codec", "method", "point", "n_images", "bits_per_image", "bpp"),
        *("accuracy", "accuracy_name", "split"),
    ]
    keys = [("none", 0), ("uniform", 0), ("uniform", 1), ("uniform", 2), ("mixed", 0), ("mixed", 1)]
    keys += [("skipping", 0), ("skipping", 1), ("skipping", 2), ("copied", 0)]
    assert list(zip(points["method"], points["point"], strict=True)) == keys
    assert (points["n_images"] == 6).all() and set(points["split"]) == {"test"}
    qualities = [decoded_pyramids(coded / q, features, feature_codec) for q in QUALITIES]
    clean, coco, ids = clean_pyramids(features), seer.coco[task], features.image_ids
    pixels = sum(SIDE * (SIDE + k) for k in range(6))
    bits = []
    for q in QUALITIES:
        with h5py.File(coded / q / "test-00000.h5") as file:
            assert file["image_ids"][:].tolist() == ids
            bits.append(8 * np.diff(file["offsets"][:]).reshape(6, 5))
    for _, line in points.iterrows():
        if line["method"] == "none":
            pyramids, sent = clean, 0
        else:
            table = allocation[(allocation["method"] == line["method"]) & (allocation["point"] == line["point"])]
            phi = table.pivot(index="image_id", columns="scale", values="phi").astype(int)
            pyramids, sent = {}, 6 * 8 * FRAME_BYTES
            for k, i in enumerate(ids):
                received = {s: qualities[phi.loc[i, s]][i][s][None] for s in SCALES if phi.loc[i, s] != SKIPPED}
                sent += sum(bits[phi.loc[i, s]][k, SCALES.index(s)] for s in received)
                whole = predictor.complete(received, (1, *clean[i]["3"].shape))
                pyramids[i] = {s: maps[0] for s, maps in whole.items()}
        assert line["bits_per_image"] == approx(sent / 6)
        assert line["bpp"] == approx(sent / pixels)
        assert line["accuracy"] == approx(reference_ap(coco, found_in(seer, pyramids, task), ids, task), abs=1e-12)
    accuracy = points.set_index(["method", "point"])["accuracy"]
    assert accuracy["none", 0] > accuracy["uniform", 2] > accuracy["uniform", 0] > 0


def test_tasks_evaluated_together_have_the_points_that_each_has_alone(
    seer, features, feature_codec, coded, allocation, tmp_path
):
    tasks = ("detection", "keypoints")
    fewer = {"detection": allocation, "keypoints": allocation[allocation["method"] != "mixed"]}
    truth = truths({task: seer.coco[task] for task in tasks})
    parts = seer, coded, list(QUALITIES), feature_codec, seeded_predictor()
    together = evaluate(tmp_path, features, fewer, *parts, truth)
    for task in tasks:
        alone = evaluate(tmp_path, features, {task: fewer[task]}, *parts, truths({task: seer.coco[task]}))
        assert together[task][0].points == alone[task][0].points
        for point, matches in alone[task][1].items():
            for mine, other in zip(together[task][1][point], matches, strict=True):
                assert np.array_equal(mine, other)


def test_resamples_of_equal_choices_are_equal(seer, features, feature_codec, coded, allocation):
    points, bootstrap = points_of(seer, features, feature_codec, coded, allocation, "detection")
    assert bootstrap.columns.tolist() == ["method", "point", "resample", "bits_per_image", "accuracy"]
    parts = {key: rows.reset_index(drop=True) for key, rows in bootstrap.groupby(["method", "point"])}
    assert len(parts) == len(points) and all(p["resample"].tolist() == list(range(20)) for p in parts.values())
    columns = ["bits_per_image", "accuracy"]
    assert parts["uniform", 1][columns].equals(parts["copied", 0][columns])  # the same images were drawn
    assert (parts["none", 0]["bits_per_image"] == 0).all()
    for _, line in points.iterrows():
        rows = parts[line["method"], line["point"]]
        assert rows["bits_per_image"].min() <= line["bits_per_image"] <= rows["bits_per_image"].max()


def test_equal_choices_pass_the_heads_once(seer, features, feature_codec, coded, image_ids):
    table = allocation_of(image_ids, uniform=[lambda k, s: 1], copied=[lambda k, s: 1] * 3)
    points_of(seer, features, feature_codec, coded, table, "detection")
    assert seer.passes == 2 * len(image_ids)  # uncoded and q2


def test_passes_of_any_size_give_the_same_points(seer, features, feature_codec, coded, allocation, monkeypatch):
    expected, _ = points_of(seer, features, feature_codec, coded, allocation, "detection")
    monkeypatch.setattr(models, "PIXELS_PER_PASS", 4 * SIDE**2)
    pd.testing.assert_frame_equal(points_of(seer, features, feature_codec, coded, allocation, "detection")[0], expected)


def test_evaluate_refuses_a_changed_coded_file(seer, features, feature_codec, coded, allocation, tmp_path):
    for quality in QUALITIES:
        copy_of(coded, tmp_path, quality)
    change_record(tmp_path / "q2" / "test-00000.h5")
    with pytest.raises(InputError, match=f"q2.*image {features.image_ids[1]}, scale 0"):
        points_of(seer, features, feature_codec, tmp_path, allocation, "detection")


def test_bits_of_other_images_than_the_features_are_refused(features, coded, tmp_path):
    for quality in QUALITIES:
        copy_of(coded, tmp_path, quality)
    write_csv(tmp_path / "q2.csv", read_csv(coded / "q2.csv").iloc[:-5])
    with pytest.raises(InputError, match="q2.csv"):
        bits_of(tmp_path, list(QUALITIES), features)


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_merged_matches_are_those_of_one_call(seer, features, image_ids, task):
    coco = seer.coco[task]
    order = [image_ids[k] for k in (4, 0, 5, 2, 1, 3)]
    clean = clean_pyramids(features)
    found = found_in(seer, {i: clean[i] for i in order}, task)
    parts = [match(coco, found, part, task) for part in (order[:1], order[1:4], order[4:])]
    merged, whole = merge(parts), match(coco, found, order, task)
    for name in whole._fields:
        assert np.array_equal(getattr(merged, name), getattr(whole, name)), name
    assert average_precision(merged)[0] == average_precision(whole)[0] > 0
