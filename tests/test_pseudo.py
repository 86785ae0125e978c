"""What a sender finds in its own uncoded features stands for labels, and no label is read."""

from itertools import product

import coded_shapes
import numpy as np
import pytest
import torch
from coded_shapes import QUALITIES, clean_pyramids, decoded_pyramids
from curves import K, make_curves
from pytest import approx

from stages.lib.loss_rate import fit_scales
from stages.lib.measuring import LEAST_SCORE, pseudo_labels, single_scale_losses, truths, uncoded_accuracies
from stages.lib.params import COARSER, SCALES

root, image_ids, features = coded_shapes.root, coded_shapes.image_ids, coded_shapes.features  # fixtures
predictor, feature_codec = coded_shapes.predictor, coded_shapes.feature_codec
coded, seer = coded_shapes.coded, coded_shapes.seer


def labels_without_objects(seer, task):
    """The truth of a data set that nobody has annotated."""
    coco = type(seer.coco[task])()
    coco.dataset = seer.coco[task].dataset | {"annotations": []}
    coco.createIndex()
    return truths({task: coco})


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_labels_are_what_is_found_in_uncoded_features_with_its_score(seer, features, task):
    ids, sizes = features.image_ids, [features.sizes(i) for i in features.image_ids]
    found = {i: seer._detect(pyramid, features.sizes(i)) for i, pyramid in clean_pyramids(features).items()}
    labels = pseudo_labels(list(found.values()), ids, sizes, labels_without_objects(seer, task))
    worths = [
        approx(score**2)
        for i in ids
        for score, label in zip(found[i]["scores"].tolist(), found[i]["labels"].tolist(), strict=True)
        if score >= LEAST_SCORE and (task == "detection" or label == coded_shapes.PERSON)
    ]
    annotations = labels.coco[task].dataset["annotations"]
    assert [a["worth"] for a in annotations] == worths and len(worths) > 0
    assert sum(len(found[i]["scores"]) for i in ids) > len(worths)  # some are left out


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_a_choice_loses_what_is_no_longer_found_times_its_worth(seer, features, feature_codec, predictor, coded, task):
    truth = labels_without_objects(seer, task)
    own = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    parts = coded, list(QUALITIES), feature_codec, predictor
    lines = single_scale_losses(seer, features, *parts, truth, own)(features.image_ids)
    assert lines[["clean", "drop"]].isna().all(axis=None) and (lines["loss"] == 0).all()
    names = ["pseudo_loss", "pseudo_loss_skipped"]
    assert (lines.groupby("quality")[names].mean().diff().dropna()["pseudo_loss"] < 0).all()  # by rising quality
    some = single_scale_losses(seer, features, *parts, truth, own)(features.image_ids[2:4])
    again = some.merge(lines, on=["quality", "image_id", "scale"])
    assert (again[[f"{n}_x" for n in names]].to_numpy() == again[[f"{n}_y" for n in names]].to_numpy()).all()
    if task == "keypoints":
        return
    clean = clean_pyramids(features)
    lines, own = lines.set_index(["quality", "image_id", "scale"]), own.set_index(["image_id", "scale"])

    def lost(i, **changed):
        before, after = (seer._detect(clean[i] | maps, features.sizes(i)) for maps in ({}, changed))
        return approx(worth(before, before) - worth(before, after), abs=1e-9)

    nothing = {i: torch.zeros_like(clean[i]["3"]) for i in clean}
    for q in QUALITIES:
        decoded = decoded_pyramids(coded / q, features, feature_codec)
        for i, scale in product(features.image_ids, SCALES):
            line, coarser = lines.loc[(q, i, scale)], COARSER.get(scale)
            predicted = predictor(scale, decoded[i][coarser][None])[0] if coarser else nothing[i]
            assert line["pseudo_loss"] == lost(i, **{scale: decoded[i][scale]})
            assert line["pseudo_loss_skipped"] == lost(i, **{scale: predicted})
    for i in features.image_ids:
        assert own.loc[(i, "3"), "pseudo_loss_skipped"] == lost(i, **{"3": nothing[i]})
        of_nothing = predictor("pool", nothing[i][None])[0]
        assert own.loc[(i, "pool"), "pseudo_loss_skipped"] == lost(i, pool=of_nothing)


def worth(labels: dict, found: dict) -> float:
    """sum over pseudo-objects of their score^2 * max over detections of score * (IoU - 0.25) / 0.75."""
    total = 0.0
    for box, label, own in zip(labels["boxes"], labels["labels"], labels["scores"].tolist(), strict=True):
        if own >= LEAST_SCORE:
            best = 0.0
            for other, of_label, score in zip(found["boxes"], found["labels"], found["scores"].tolist(), strict=True):
                inner = (torch.minimum(box[2:], other[2:]) - torch.maximum(box[:2], other[:2])).clamp(min=0).prod()
                union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - inner
                if of_label == label:
                    best = max(best, score * ((inner / union).item() - 0.25) / 0.75)
            total += own**2 * best
    return total


def test_a_factor_brings_the_mean_pseudo_loss_of_a_scale_to_the_mean_loss():
    rng = np.random.default_rng(2)
    loss, pseudo = rng.uniform(0, 2, (20, 5, K)), rng.uniform(0, 2, (20, 5, 2 * K + 1))
    loss[:, 3] *= -1  # coding makes it better: there is nothing to scale by
    pseudo[:, 4] = 0
    skipped = np.repeat(loss[:, :, :1], K + 1, 2)
    curves = make_curves(1, 20)._replace(loss=loss, loss_skipped=skipped, pseudo_loss=pseudo)
    found = fit_scales(curves, 0)["pseudo"]
    every = np.concatenate([loss, skipped], 2)
    expected = [every[:, s].sum() / pseudo[:, s].sum() for s in range(3)]
    assert [found[scale]["factor"] for scale in SCALES] == approx([*expected, 1, 1])
