"""Examples are chosen by a rule, at matched bits, and show what a receiver finds."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import coded_shapes
import numpy as np
import pandas as pd
import pytest
import torch
from coded_shapes import QUALITIES, Seer, clean_pyramids, decoded_pyramids, found_in
from PIL import Image, ImageDraw
from pytest import approx

from stages.lib import evaluating, examples, measuring
from stages.lib.accuracy import match
from stages.lib.allocation import Importance
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.evaluating import bits_of
from stages.lib.examples import KINDS, PER_KIND, Cell, Choices, illustrate, matched, outlines, ranked, savings
from stages.lib.files import write_csv
from stages.lib.loss_rate import fit_scales, read_curves
from stages.lib.measuring import decoder, single_scale_losses, truths, uncoded_accuracies
from stages.lib.params import SCALES, SKIPPED

root, image_ids, features = coded_shapes.root, coded_shapes.image_ids, coded_shapes.features  # fixtures
predictor, feature_codec, coded = coded_shapes.predictor, coded_shapes.feature_codec, coded_shapes.coded


# ---------------------------------------------------------------- the rule


def test_the_first_the_middle_and_the_last_of_the_ranking_are_shown() -> None:
    saving = np.random.default_rng(0).permutation(np.linspace(-80, 30, 21))
    saving[[3, 8]] = np.nan
    found, order = ranked(saving), np.sort(saving[np.isfinite(saving)])
    assert list(found) == list(KINDS)
    assert saving[found["best"]].tolist() == order[:3].tolist()
    assert saving[found["typical"]].tolist() == order[8:11].tolist() and np.median(order) == order[9]
    assert saving[found["worst"]].tolist() == order[-3:].tolist()


@pytest.mark.parametrize("n", range(12))
def test_no_image_is_shown_twice(n: int) -> None:
    rows = np.concatenate(list(ranked(np.arange(n, dtype=float)).values()))
    assert len(set(rows)) == len(rows) == 3 * min(PER_KIND, n // 3)


def test_half_the_bits_at_equal_loss_are_minus_50_percent() -> None:
    bits, loss = np.array([[1e3, 2e3, 4e3, 8e3]] * 3), np.array([[0.8, 0.5, 0.2, 0.1]] * 3)
    anchor = Choices(np.zeros((3, 4, 5), int), bits, loss)
    factor = np.array([[0.5], [1.0], [2.0]])
    assert savings(anchor, anchor._replace(bits=factor * bits)) == approx([-50, 0, 100])
    assert np.isnan(savings(anchor, anchor._replace(loss=loss + 5))).all()  # no loss in common


def test_the_matched_choice_has_the_most_bits_that_are_not_more() -> None:
    bits = np.array([500, 90, 300, 310, 700])
    assert matched(np.array([300, 309, 310, 10_000]), bits).tolist() == [2, 2, 3, 4]
    assert matched(np.array([80]), bits).tolist() == [1]  # all are more: the fewest


# ---------------------------------------------------------------- outlines and pictures


def area(outline: list[float]) -> float:
    x, y = np.array(outline).reshape(-1, 2).T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


@pytest.mark.parametrize("scale", [1, 7])
def test_an_outline_surrounds_its_mask(scale: int) -> None:
    picture = Image.new("1", (120 * scale, 90 * scale))
    ImageDraw.Draw(picture).ellipse([20 * scale, 10 * scale, 100 * scale, 70 * scale], fill=1)
    mask = np.asarray(picture).astype(np.uint8)
    (outline,) = outlines(mask)
    assert area(outline) == approx(mask.sum(), rel=0.05)
    x, y = np.array(outline).reshape(-1, 2).T / scale
    assert [x.min(), x.max(), y.min(), y.max()] == approx([20, 101, 10, 71], abs=2)
    assert len(outline) < 200


def test_a_mask_at_the_border_is_closed_and_an_empty_one_has_no_outline() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:, :20] = 1
    (outline,) = outlines(mask)
    assert area(outline) == approx(800, rel=0.03)
    assert outlines(np.zeros((40, 60), np.uint8)) == []


def test_a_picture_is_small_and_always_the_same(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    for name in ("a.webp", "b.webp"):
        examples.write_picture(tmp_path / "large.png", tmp_path / name)
    with Image.open(tmp_path / "a.webp") as picture:
        assert max(picture.size) == examples.LONGEST_SIDE and picture.size[0] / picture.size[1] == approx(9 / 7, 0.01)
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()


# ---------------------------------------------------------------- what is shown


TASKS = ("detection", "keypoints")


@pytest.fixture(scope="module")
def seer(root, features) -> Iterator[Seer]:
    with pytest.MonkeyPatch.context() as patch:
        found = Seer(root, features)
        for module in (evaluating, measuring):
            patch.setattr(module, "detect_variants", found.detect)
        patch.setattr(examples, "map_in_memory", lambda show, items, _: list(map(show, items)))  # in this process
        yield found


@pytest.fixture(scope="module")
def shown(seer, features, feature_codec, predictor, coded, tmp_path_factory):
    """`illustrate` of all images that have objects, and what it was given."""
    tmp_path = tmp_path_factory.mktemp("losses")
    truth = truths({task: seer.coco[task] for task in TASKS})
    own = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    write_csv(tmp_path / "uncoded.csv", own)
    measure = single_scale_losses(seer, features, coded, list(QUALITIES), feature_codec, predictor, truth, own)
    for quality, losses in measure(features.image_ids).groupby("quality"):
        write_csv(tmp_path / f"{quality}.csv", losses)
    cells, rng = {}, np.random.default_rng(1)
    for task in TASKS:
        curves = read_curves(coded, tmp_path, tmp_path / "uncoded.csv", list(QUALITIES), task, "test")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful fits
            fit = fit_scales(curves, 1)
        shape = len(curves.image_ids), len(SCALES)
        cells[task] = Cell(curves, fit, Importance(rng.dirichlet(np.ones(5), shape[0]), rng.gamma(2, 0.5, shape)))
    decode = decoder(features, coded, list(QUALITIES), feature_codec)
    return illustrate(seer, features, decode, predictor, cells, truth, 1), cells


def test_examples_are_ranked_by_their_own_saving(shown) -> None:
    for found, cell in zip(shown[0].values(), shown[1].values(), strict=True):
        anchor, method = examples.all_choices(cell, 1)
        saving = savings(anchor, method)
        rows = [row for part in ranked(saving).values() for row in part]
        assert len(rows) >= 3 and found["method"] == "mfiba_skip"
        assert [e["image_id"] for e in found["examples"]] == cell.curves.image_ids[rows].tolist()
        assert [e["saving"] for e in found["examples"]] == saving[rows].tolist()
        assert [e["kind"] for e in found["examples"]] == [k for k in KINDS for _ in range(len(rows) // 3)]


def test_the_bits_of_both_are_those_of_their_records_and_the_methods_are_never_more(shown, features, coded) -> None:
    bits, skipped, differ = bits_of(coded, list(QUALITIES), features), 0, 0
    for found in shown[0].values():
        for example in found["examples"]:
            for q, (uniform, method) in enumerate(zip(example["uniform"], example["mfiba_skip"], strict=True)):
                assert uniform["phi"] == [q] * 5
                for choice in (uniform, method):
                    ledger = bits[example["image_id"]]
                    sent = [0 if p == SKIPPED else ledger[s, p] for s, p in enumerate(choice["phi"])]
                    assert choice["bits"] == sent
                assert sum(method["bits"]) <= sum(uniform["bits"])
                skipped, differ = skipped + (SKIPPED in method["phi"]), differ + (method["phi"] != uniform["phi"])
    assert skipped and differ


def test_bits_of_the_ranking_are_those_of_whole_files(shown, features, coded) -> None:
    anchor, _ = examples.all_choices(shown[1]["detection"], 1)
    sent = [bits.sum(0) + 8 * FRAME_BYTES for _, bits in sorted(bits_of(coded, list(QUALITIES), features).items())]
    assert anchor.bits.tolist() == np.array(sent).tolist()


def test_detections_and_losses_are_those_of_the_decoded_pyramids(
    shown, seer, features, feature_codec, predictor, coded
) -> None:
    clean = clean_pyramids(features)
    decoded = [decoded_pyramids(coded / quality, features, feature_codec) for quality in QUALITIES]
    names, losses = {i: c["name"] for i, c in seer.coco["detection"].cats.items()}, []
    for task, found in shown[0].items():
        for example in found["examples"]:
            i, coco = example["image_id"], seer.coco[task]

            def pyramid(phi: list[int], i: int = i) -> dict[str, torch.Tensor]:
                sent = {s: decoded[p][i][s][None] for s, p in zip(SCALES, phi, strict=True) if p != SKIPPED}
                return {s: maps[0] for s, maps in predictor.complete(sent, (1, *clean[i]["3"].shape)).items()}

            results = found_in(seer, {i: clean[i]}, task)
            utility = match(coco, results, [i], task).utility.item()
            check_found(example["uncoded"]["found"], results, names, task)
            for choice in (*example["uniform"], *example["mfiba_skip"]):
                results = found_in(seer, {i: pyramid(choice["phi"])}, task)
                check_found(choice["found"], results, names, task)
                lost = utility - match(coco, results, [i], task).utility.item()
                assert choice["loss"] == approx(lost, abs=1e-9)
                losses.append(lost)
    assert np.ptp(losses) > 0.1


def test_masks_are_shown_of_wrong_detections_too(shown, seer) -> None:
    assert seer.asked and all(of_task is None for asked in seer.asked for of_task in asked.values())


def check_found(shapes: list[dict], results: list[dict], names: dict[int, str], task: str) -> None:
    kept = [r for r in results if r["score"] >= examples.LEAST_SCORE]
    assert [s["label"] for s in shapes] == [names[r["category_id"]] for r in kept]
    assert [s["score"] for s in shapes] == [round(r["score"], 2) for r in kept]
    for shape, result in zip(shapes, kept, strict=True):
        if task == "detection":
            assert shape["box"] == approx(result["bbox"], abs=0.051)
        else:
            points = np.round(result["keypoints"], 1).reshape(-1, 3).tolist()
            assert shape["points"] == [[x, y] if seen else None for x, y, seen in points]


def test_the_truth_of_an_example_is_its_objects(shown, seer) -> None:
    for task, found in shown[0].items():
        for example in found["examples"]:
            objects = seer.coco[task].imgToAnns[example["image_id"]]
            assert len(example["truth"]) == sum(o.get("num_keypoints", 1) > 0 for o in objects) > 0
            image = seer.coco[task].imgs[example["image_id"]]
            assert (example["width"], example["height"]) == (image["width"], image["height"])
    people = shown[0]["keypoints"]
    assert set(people["skeletons"]) == {"person"}
    assert all(len(o["points"]) == 7 for e in people["examples"] for o in e["truth"])


def test_masks_of_annotations_and_results_have_the_same_outlines(seer) -> None:
    coco = seer.coco["segmentation"]
    for item in pd.Series(coco.anns).head(4):
        result = {"category_id": item["category_id"], "score": 0.5, "segmentation": coco.annToRLE(item)}
        shapes = [examples._shape(thing, coco, "segmentation") for thing in (item, result)]
        assert shapes[0]["outlines"] == shapes[1]["outlines"] != [] and shapes[1]["score"] == 0.5
