"""The plain loop beside measuring runs whole detectors and COCOeval, and finds the same numbers. No times here."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pytest import approx

from stages.lib import plain_measuring, shapes
from stages.lib.accuracy import average_precision, match
from stages.lib.models import pyramid_of
from stages.lib.params import SCALES
from stages.lib.plain_measuring import Case, alike, coco_ap, compare, ours, plain, plain_losses, random_case

STEPS = {"q1": 1.0, "q2": 0.1}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """Three images of noise, a small detector with boxes and masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plain_measuring.ARCHITECTURES, "resnet10_fpn", ("detection", "segmentation"))
        patch.setattr(plain_measuring, "BACKGROUND", 6.0)
        return random_case(tmp_path_factory.mktemp("random"), "resnet10_fpn", (64, 90), 3, STEPS)


@pytest.fixture(scope="module")
def found(case) -> tuple[dict, dict]:
    return plain(case)


def test_both_find_the_same_accuracies_and_losses(case):
    report = compare(case, 1)
    assert report["equal"] == 1.0 and max(report["largest_difference"].values()) < 1e-4
    seconds = report["seconds"]
    assert report["times_plain"] == approx({name: seconds["plain"] / seconds[name] for name in ("ours", "alike")})
    assert (report["images"], report["evaluations"], report["variants"]) == (3, 1 + 10, 6 + 19)


def test_some_images_of_a_split_are_measured_as_among_all(case):
    some, every = ours(case._replace(images=dict(list(case.images.items())[:2]))), ours(case)
    known = every[every["image_id"].isin(some["image_id"])]
    assert some["image_id"].nunique() == 2 and len(some) == len(known)
    assert np.allclose(some["loss"], known["loss"], atol=1e-3)


def test_without_what_the_plain_loop_does_not_do_the_rest_is_the_same(case):
    whole, part = ours(case), alike(case)
    columns = ["clean", "coded", "loss"]
    assert np.allclose(part[columns], whole[columns], atol=1e-3, equal_nan=True)
    assert part["loss_skipped"].isna().all() and (part["pseudo_loss"] == 0).all()
    assert whole["loss_skipped"].gt(0).any() and whole["pseudo_loss"].gt(0).any()


def test_they_have_something_to_find(case, found):
    losses = ours(case)
    assert len(losses) == 2 * 2 * len(SCALES) * 3  # tasks, qualities, scales, images
    assert losses["clean"].min() > 0.5  # its own detections are the truth; a mask may be empty
    assert losses["coded"].between(0.05, 0.95).any()
    rough, fine = (losses[losses["quality"] == quality]["loss"].mean() for quality in STEPS)
    assert rough > fine > 0


def test_other_features_are_noticed(case, monkeypatch):
    swapped = dict(zip(STEPS, reversed(case.decoded.values()), strict=True))
    monkeypatch.setattr(plain_measuring, "plain", lambda case: plain(case._replace(decoded=swapped)))
    report = compare(case, 1)
    assert report["equal"] < 0.9 and report["largest_difference"]["loss"] > 0.1


def test_a_row_that_the_plain_loop_lacks_is_not_equal(case, found, monkeypatch):
    monkeypatch.setattr(plain_measuring, "plain", lambda case: found)
    monkeypatch.setattr(plain_measuring, "plain_losses", lambda *args: plain_losses(*args).iloc[1:])
    assert compare(case, 1)["equal"] == approx(59 / 60)  # in ours and in alike


def test_the_whole_detector_sees_every_image_for_each_evaluation(case):
    seen = []
    hook = case.detector.backbone.body.register_forward_hook(lambda *_: seen.append(1))
    before, _ = pyramid_of(case.detector, case.images[1])
    _, accuracies = plain(case)
    hook.remove()
    assert len(seen) == 1 + 3 * 11 and [len(values) for values in accuracies.values()] == [11, 11]
    after, _ = pyramid_of(case.detector, case.images[1])
    assert all(torch.equal(before[s], after[s]) for s in SCALES)  # no scale stays replaced


def test_accuracies_are_those_of_all_images_together(case, found):
    results, accuracies = found
    for task, truth in case.truth.coco.items():
        matches = [match(truth, of_variant, list(case.images), task) for of_variant in results[task]]
        assert accuracies[task] == approx([average_precision(m).item() for m in matches])
        assert accuracies[task][0] > 0.5 > min(accuracies[task])


def test_keypoints_are_judged_with_the_sigmas_of_the_data(tmp_path: Path):
    shapes.generate(tmp_path, n_train=1, n_val=8, size=64, seed=5)
    with redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "annotations/person_keypoints_val2017.json")
    rng = np.random.default_rng(0)
    found = [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "score": rng.uniform(),
            "keypoints": (np.array(item["keypoints"], float) + rng.normal(0, 1.5, len(item["keypoints"]))).tolist(),
        }
        for item in truth.anns.values()
    ]
    image_ids = sorted(truth.imgs)
    expected = average_precision(match(truth, found, image_ids, "keypoints")).item()
    assert 0.1 < expected < 0.95 and coco_ap(truth, found, image_ids, "keypoints") == approx(expected)


def test_nothing_found_is_no_accuracy(case):
    assert coco_ap(case.truth.coco["detection"], [], list(case.images), "detection") == 0
