"""The loss of a coded or skipped scale is that of its image alone, and changed files are refused."""

from pathlib import Path
from types import SimpleNamespace

import coded_shapes
import numpy as np
import pandas as pd
import pytest
import torch
from coded_shapes import (
    QUALITIES,
    change_record,
    clean_pyramids,
    copy_of,
    decoded_pyramids,
    found_in,
    reference_ap,
    seeded_predictor,
)
from pytest import approx

from stages.lib import measuring
from stages.lib.accuracy import match, match_variants, per_image
from stages.lib.files import read_csv, write_csv
from stages.lib.measuring import single_scale_losses, truths, uncoded_accuracies
from stages.lib.params import COARSER, SCALES
from stages.lib.schema import InputError

root, image_ids, features = coded_shapes.root, coded_shapes.image_ids, coded_shapes.features  # fixtures
predictor, feature_codec = coded_shapes.predictor, coded_shapes.feature_codec
coded, seer = coded_shapes.coded, coded_shapes.seer


def fake_ledger(path: Path, errors: dict[tuple[int, str], float]) -> None:
    rows = [("test", image_id, scale, error) for (image_id, scale), error in errors.items()]
    write_csv(path, pd.DataFrame(rows, columns=["split", "image_id", "scale", "mse_feature"]))


def test_features_decoded_without_error_lose_nothing(seer, features, predictor, tmp_path, monkeypatch):
    without_error = SimpleNamespace(decode=lambda image_ids, _: features.pyramids(image_ids))
    monkeypatch.setattr(measuring, "CodedSplit", lambda path, features: without_error)
    fake_ledger(tmp_path / "q.csv", {(i, s): 0.0 for i in features.image_ids for s in SCALES})
    truth = truths({task: seer.coco[task] for task in ("detection", "keypoints")})
    uncoded = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    of_images = single_scale_losses(seer, features, tmp_path, ["q"], None, predictor, truth, uncoded)
    losses = of_images(features.image_ids)
    labelled = losses[losses["clean"].notna()]
    assert (losses[["loss", "pseudo_loss"]] == 0).all(axis=None) and (labelled["drop"] == 0).all()
    assert (labelled["clean"] == labelled["coded"]).all() and len(labelled) < len(losses)
    assert losses["clean"].between(0.05, 0.999).any()  # a detector that is neither blind nor perfect


KEY = ["task", "image_id", "scale"]


def test_each_drop_and_loss_is_that_of_the_image_alone(seer, features, feature_codec, predictor, coded):
    truth = truths({task: seer.coco[task] for task in ("detection", "keypoints")})
    own = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    assert own.columns.tolist() == [
        "task",
        "split",
        "image_id",
        "scale",
        "clean",
        "loss_skipped",
        "pseudo_loss_skipped",
    ]
    parts = coded, list(QUALITIES), feature_codec, predictor
    losses = single_scale_losses(seer, features, *parts, truth, own)(features.image_ids)
    assert losses["quality"].unique().tolist() == list(QUALITIES)
    losses = losses[losses["quality"] == "q1"]
    measured = ["clean", "coded", "drop", "loss", "loss_skipped", "pseudo_loss", "pseudo_loss_skipped"]
    assert losses.columns.tolist() == ["quality", "task", "split", "image_id", "scale", *measured]
    assert losses["scale"].map(type).eq(str).all()
    clean, decoded = clean_pyramids(features), decoded_pyramids(coded / "q1", features, feature_codec)
    lines, own_lines = losses.set_index(KEY), own.set_index(KEY)
    left_out = 0
    for task, coco in truth.coco.items():
        for i in features.image_ids:

            def found(**changed: torch.Tensor) -> list[dict]:
                return found_in(seer, {i: clean[i] | changed}, task)  # noqa: B023

            def utility(**changed: torch.Tensor) -> float:
                return match(coco, found(**changed), [i], task).utility.item()  # noqa: B023

            uncoded = reference_ap(coco, found(), [i], task)
            if np.isnan(uncoded):
                left_out += 1
                of_image, own_of_image = lines.loc[(task, i)], own_lines.loc[(task, i)]
                assert of_image[["clean", "coded", "drop"]].isna().all(axis=None) and own_of_image["clean"].isna().all()
                assert (of_image[["loss", "loss_skipped"]] == 0).all(axis=None) and len(of_image) == len(SCALES)
                assert (own_of_image["loss_skipped"] == 0).all()
                continue
            for scale in SCALES:
                value = reference_ap(coco, found(**{scale: decoded[i][scale]}), [i], task)
                line, own_line = lines.loc[(task, i, scale)], own_lines.loc[(task, i, scale)]
                assert (line["clean"], line["coded"]) == approx((uncoded, value), abs=1e-12)
                assert line["drop"] == line["clean"] - line["coded"]
                assert line["loss"] == approx(utility() - utility(**{scale: decoded[i][scale]}), abs=1e-12)
                assert own_line["clean"] == approx(uncoded, abs=1e-12)
                if scale == "3":
                    nothing = utility(**{"3": torch.zeros_like(clean[i]["3"])})
                    assert line["loss_skipped"] == own_line["loss_skipped"] == approx(utility() - nothing, abs=1e-12)
                    continue
                coarser = COARSER[scale]
                of_decoded = predictor(scale, decoded[i][coarser][None])[0]
                assert line["loss_skipped"] == approx(utility() - utility(**{scale: of_decoded}), abs=1e-12)
                nothing = torch.zeros_like(clean[i]["3"][None])
                guess = nothing if coarser == "3" else predictor(coarser, clean[i][COARSER[coarser]][None])
                without = utility(**{scale: predictor(scale, guess)[0]})
                assert own_line["loss_skipped"] == approx(utility() - without, abs=1e-12)
    assert left_out > 0 and len(lines) == len(own) == len(SCALES) * 2 * len(features.image_ids)
    assert losses[["drop", "loss", "loss_skipped"]].abs().max().min() > 0.05 and set(losses["split"]) == {"test"}


def test_qualities_measured_together_have_the_losses_that_each_has_alone(seer, features, feature_codec, coded):
    together = measure(seer, features, feature_codec, coded, list(QUALITIES))
    alone = [measure(seer, features, feature_codec, coded, [quality]) for quality in QUALITIES]
    pd.testing.assert_frame_equal(together, pd.concat(alone, ignore_index=True))
    assert together.groupby("quality")["loss"].sum().is_monotonic_decreasing


def test_maps_that_variants_have_in_common_pass_the_heads_once(seer, features, feature_codec, coded):
    uncoded_maps = (1 + 1 + 1 + 1) * len(SCALES)  # of each image: clean, again with predicted, or nothing; clean
    coded_maps = len(SCALES) + len(QUALITIES) * (len(SCALES) + len(COARSER))
    measure(seer, features, feature_codec, coded, list(QUALITIES))
    assert seer.maps == len(features.image_ids) * (uncoded_maps + coded_maps)


def test_detections_of_labels_without_an_object_change_neither_accuracy_nor_utility(seer, features):
    coco, ids, rng = seer.coco["detection"], features.image_ids, np.random.default_rng(0)
    found = found_in(seer, clean_pyramids(features), "detection")
    found += [item | {"category_id": int(rng.integers(1, 7)), "score": rng.uniform()} for item in found]
    (kept,) = measuring._of_labels([found], coco, ids)
    of_all, of_kept = match_variants(coco, [found, kept], ids, "detection")
    assert 0 < len(of_kept.score) < len(of_all.score)
    assert np.array_equal(per_image(of_all), per_image(of_kept), equal_nan=True) and per_image(of_all).any()
    assert (of_all.utility == of_kept.utility).all()


def measure(seer, features, feature_codec, folder, qualities=("q1",)):
    truth, predictor = truths({"detection": seer.coco["detection"]}), seeded_predictor()
    uncoded = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    parts = folder, list(qualities), feature_codec, predictor, truth, uncoded
    return single_scale_losses(seer, features, *parts)(features.image_ids)


def test_a_changed_coded_file_is_refused(seer, features, feature_codec, coded, tmp_path):
    path, _ = copy_of(coded, tmp_path)
    change_record(path)
    with pytest.raises(InputError, match=f"q1.*image {features.image_ids[1]}, scale 0"):
        measure(seer, features, feature_codec, tmp_path)


def test_a_changed_ledger_is_refused(seer, features, feature_codec, coded, tmp_path):
    _, ledger = copy_of(coded, tmp_path)
    lines = read_csv(ledger)
    write_csv(ledger, lines.assign(mse_feature=lines["mse_feature"] * np.where(lines.index == 8, 1.005, 1)))
    with pytest.raises(InputError, match=f"q1.*image {features.image_ids[1]}, scale 3"):
        measure(seer, features, feature_codec, tmp_path)


def test_a_ledger_of_other_images_is_refused(seer, features, feature_codec, coded, tmp_path):
    _, ledger = copy_of(coded, tmp_path)
    write_csv(ledger, read_csv(ledger).iloc[:-1])
    with pytest.raises(InputError, match="q1"):
        measure(seer, features, feature_codec, tmp_path)
