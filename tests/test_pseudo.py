"""What a sender finds in its own uncoded features stands for labels, and no label is read."""

import coded_shapes
import numpy as np
import pytest
import torch
from coded_shapes import QUALITIES, clean_pyramids, decoded_pyramids
from pytest import approx

from stages.lib import pseudo
from stages.lib.measuring import truths
from stages.lib.params import COARSER, SCALES
from stages.lib.pseudo import LEAST_SCORE, mix, own_losses, pseudo_labels

root, image_ids, features = coded_shapes.root, coded_shapes.image_ids, coded_shapes.features  # fixtures
predictor, feature_codec = coded_shapes.predictor, coded_shapes.feature_codec
coded = coded_shapes.coded


@pytest.fixture
def seer(root, features, monkeypatch):
    seer = coded_shapes.Seer(root, features)
    for module in (coded_shapes.measuring, pseudo):
        monkeypatch.setattr(module, "detect_variants", seer.detect)
    return seer


def labels_without_objects(seer, task):
    """The truth of a data set that nobody has annotated."""
    coco = type(seer.coco[task])()
    coco.dataset = seer.coco[task].dataset | {"annotations": []}
    coco.createIndex()
    return truths({task: coco})


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_labels_are_what_is_found_in_uncoded_features_with_its_score(seer, features, task):
    ids = features.image_ids
    labels = pseudo_labels(seer, features.pyramids(ids), ids, features, labels_without_objects(seer, task), task)
    found = {i: seer._detect(pyramid, features.sizes(i)) for i, pyramid in clean_pyramids(features).items()}
    chances = [
        score
        for i in ids
        for score, label in zip(found[i]["scores"].tolist(), found[i]["labels"].tolist(), strict=True)
        if score >= LEAST_SCORE and (task == "detection" or label == coded_shapes.PERSON)
    ]
    annotations = labels.coco[task].dataset["annotations"]
    assert [a["chance"] for a in annotations] == chances and len(chances) > 0
    assert sum(len(found[i]["scores"]) for i in ids) > len(chances)  # some are left out


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_a_choice_loses_what_is_no_longer_found_times_the_chance_that_it_was_there(
    seer, features, feature_codec, predictor, coded, task
):
    truth = labels_without_objects(seer, task)
    losses = own_losses(seer, predictor, feature_codec, features, coded, list(QUALITIES), truth, task)
    found = losses(features.image_ids)
    k = len(QUALITIES)
    assert found.shape == (len(features.image_ids), 5, 2 * k + 1)
    assert (found[:, :, :k].mean((0, 1))[:-1] > found[:, :, :k].mean((0, 1))[1:]).all()  # by rising quality
    assert np.array_equal(losses(features.image_ids[2:4]), found[2:4])
    if task == "keypoints":
        return
    clean = clean_pyramids(features)
    for q, quality in enumerate(QUALITIES):
        decoded = decoded_pyramids(coded / quality, features, feature_codec)
        for n, i in enumerate(features.image_ids):
            for s, scale in enumerate(SCALES):
                coarser = COARSER.get(scale)
                predicted = (
                    predictor(scale, decoded[i][coarser][None])[0] if coarser else torch.zeros_like(clean[i]["3"])
                )
                for choice, maps in ((q, decoded[i][scale]), (k + 1 + q, predicted)):
                    before, after = (
                        seer._detect(pyramid, features.sizes(i)) for pyramid in (clean[i], clean[i] | {scale: maps})
                    )
                    expected = worth(before, before) - worth(before, after)
                    assert found[n, s, choice] == approx(expected, abs=1e-9)


def worth(labels: dict, found: dict) -> float:
    """sum over pseudo-objects of chance * max over detections of score * (IoU - 0.5) / 0.5."""
    total = 0.0
    for box, label, chance in zip(labels["boxes"], labels["labels"], labels["scores"].tolist(), strict=True):
        if chance >= LEAST_SCORE:
            best = 0.0
            for other, of_label, score in zip(found["boxes"], found["labels"], found["scores"].tolist(), strict=True):
                inner = (torch.minimum(box[2:], other[2:]) - torch.maximum(box[:2], other[:2])).clamp(min=0).prod()
                union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - inner
                if of_label == label:
                    best = max(best, score * ((inner / union).item() - 0.5) / 0.5)
            total += chance * best
    return total


def test_a_mix_is_of_each_choice_and_only_where_it_helps():
    rng = np.random.default_rng(0)
    fit, test = rng.uniform(0, 1, (2, 60, 5, 3)), rng.uniform(0, 1, (2, 20, 5, 3))
    factors = rng.uniform(0.2, 2, (2, 5, 3))
    loss = (factors[:, None] * fit).sum(0)
    loss[:, 4] = fit[1, :, 4] + rng.normal(0, 0.5, (60, 3))  # the first guess tells nothing of the last scale
    found = mix(tuple(fit), loss, tuple(test))
    assert found[:, :4] == approx((factors[:, None] * test).sum(0)[:, :4])
    assert np.array_equal(found[:, 4], test[1, :, 4])
