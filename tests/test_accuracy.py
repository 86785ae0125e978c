"""The AP is pycocotools' to the last digits, on any subset or multiset of the images."""

import copy
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pytest import approx

from stages.lib import accuracy
from stages.lib.accuracy import average_precision, bootstrap_weights, match, match_variants, merge, per_image, results
from stages.lib.params import TASKS
from stages.lib.schema import InputError

SIZE = 64
CATEGORIES = (3, 5, 18)  # of the data set; 4 is a label of the model only
EXACT = {"rel": 0, "abs": 1e-12, "nan_ok": True}


def coco_of(images, annotations, categories):
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def reference(truth, found, image_ids, task):
    """COCOeval from end to end."""
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), TASKS[task])
        evaluation.params.imgIds = image_ids
        if sigmas := truth.dataset["categories"][0].get("oks_sigmas"):  # it has one list for all categories
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.nan if evaluation.stats[0] == -1 else evaluation.stats[0]


def random_boxes(rng, n):
    corner, side = rng.uniform(0, SIZE / 2, (n, 2)), rng.uniform(6, SIZE / 2, (n, 2))
    return np.concatenate([corner, corner + side], axis=1)


def random_keypoints(rng, boxes, count):
    """[n, 4] -> [n, count, 3], the last number a visibility."""
    place = rng.uniform(boxes[:, None, :2], boxes[:, None, 2:], (len(boxes), count, 2))
    return np.concatenate([place, rng.integers(0, 3, (len(boxes), count, 1))], axis=2)


def random_masks(boxes):
    """A box of high probability [n, 1, H, W] in each."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    x1, y1, x2, y2 = boxes.T[:, :, None, None]
    return (0.9 * ((x > x1) & (x < x2) & (y > y1) & (y < y2)))[:, None]


def objects_of(rng, image_id, boxes, keypoints):
    """Annotations with crowds, objects without visible keypoints, polygons and run-length codes."""
    for box, points in zip(boxes, keypoints, strict=True):
        x1, y1, x2, y2 = box.tolist()
        crowd = rng.random() < 0.2
        polygon = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        code = rle.encode(np.asfortranarray(random_masks(box[None])[0, 0] > 0.5, dtype=np.uint8))
        points[:, 2] *= rng.random() < 0.8
        yield {
            "image_id": image_id,
            "category_id": int(rng.choice(CATEGORIES)),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(crowd),
            "segmentation": code if crowd else polygon,
            "keypoints": points.ravel().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }


def detections_of(rng, boxes, keypoints, objects):
    """torchvision's dict: some objects found more or less well, some invented; many scores are equal."""
    some = rng.random(len(boxes)) < 0.8
    near, invented = boxes[some] + rng.normal(0, 1.5, (some.sum(), 4)), random_boxes(rng, 3)
    boxes = np.concatenate([near, invented, near[:1]])  # the first one twice
    count = keypoints.shape[1]
    near_points = keypoints[some] + rng.normal(0, 1, (some.sum(), count, 3))
    points = np.concatenate([near_points, random_keypoints(rng, invented, count), near_points[:1]])
    labels = np.array([item["category_id"] for item in objects], dtype=int)[some]
    labels = np.concatenate([labels, rng.choice((*CATEGORIES, 4), 3), labels[:1]])
    scores = rng.uniform(0, 1, len(boxes)).round(1)
    values = {"boxes": boxes, "scores": scores, "masks": random_masks(boxes), "keypoints": points}
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()} | {
        "labels": torch.tensor(labels)
    }


def data_set(task, seed=0, n_images=12, n_keypoints=7):
    """Random ground truth and the COCO dicts of random detections; the last two images have no ground truth."""
    rng = np.random.default_rng(seed)
    images, annotations, found = [], [], []
    for image_id in range(100, 100 + n_images):
        images.append({"id": image_id, "height": SIZE, "width": SIZE})
        boxes = random_boxes(rng, rng.integers(1, 7) if image_id < 98 + n_images else 0)
        keypoints = random_keypoints(rng, boxes, n_keypoints)
        objects = list(objects_of(rng, image_id, boxes, keypoints))
        annotations += objects
        found += results(image_id, detections_of(rng, boxes, keypoints, objects), task, set(CATEGORIES))
    for number, item in enumerate(annotations, start=1):
        item["id"] = number
    sigmas = {} if n_keypoints == 17 else {"oks_sigmas": rng.uniform(0.05, 0.2, n_keypoints).tolist()}
    names = {"keypoints": [f"k{i}" for i in range(n_keypoints)]} | sigmas
    return coco_of(images, annotations, [{"id": c, "name": str(c)} | names for c in CATEGORIES]), found


def duplicated(truth, found, image_ids, counts):
    """The data set in which image i stands counts[i] times, its copies one after the other."""
    images, annotations, detections = [], [], []
    for image_id, count in zip(image_ids, counts, strict=True):
        for new_id in range(100 * image_id, 100 * image_id + count):
            images.append(truth.imgs[image_id] | {"id": new_id})
            copies = [item | {"image_id": new_id} for item in truth.imgToAnns[image_id]]
            annotations += [item | {"id": len(annotations) + i} for i, item in enumerate(copies, start=1)]
            detections += [item | {"image_id": new_id} for item in found if item["image_id"] == image_id]
    return coco_of(images, annotations, truth.dataset["categories"]), detections


CASES = [("detection", 7), ("segmentation", 7), ("keypoints", 7), ("keypoints", 17)]


@pytest.fixture(params=CASES, ids=[f"{task}-{count}" for task, count in CASES])
def case(request):
    """task, ground truth, detections, image ids in no order."""
    task, n_keypoints = request.param
    truth, found = data_set(task, n_keypoints=n_keypoints)
    return task, truth, found, np.random.default_rng(1).permutation(list(truth.imgs)).tolist()


def test_full_set_equals_pycocotools(case):
    task, truth, found, image_ids = case
    (ap,) = average_precision(match(truth, found, image_ids, task))
    assert 0.1 < ap < 0.9
    assert ap == approx(reference(truth, found, image_ids, task), **EXACT)


def test_a_subset_of_the_images_equals_pycocotools(case):
    task, truth, found, image_ids = case
    (ap,) = average_precision(match(truth, found, image_ids[:5], task))
    assert ap == approx(reference(truth, found, image_ids[:5], task), **EXACT)


def test_an_images_own_ap_equals_pycocotools_on_it_alone(case):
    task, truth, found, image_ids = case
    alone = [reference(truth, found, [image_id], task) for image_id in image_ids]
    assert per_image(match(truth, found, image_ids, task)) == approx(np.array(alone), **EXACT)
    assert [per_image(match(truth, found, [image_id], task))[0] for image_id in image_ids] == approx(alone, **EXACT)
    assert np.isnan(alone).sum() >= 2 and len(set(alone)) > 6


def test_weights_equal_pycocotools_on_duplicated_images(case):
    task, truth, found, image_ids = case
    weights = bootstrap_weights(len(image_ids), 3, seed=2)
    ap = average_precision(match(truth, found, image_ids, task), weights)
    for counts, value in zip(weights, ap, strict=True):
        multiset, detections = duplicated(truth, found, image_ids, counts)
        assert value == approx(reference(multiset, detections, list(multiset.imgs), task), **EXACT)


def test_weights_of_one_image_give_its_own_ap(case):
    task, truth, found, image_ids = case
    matches = match(truth, found, image_ids, task)
    assert average_precision(matches, np.eye(len(image_ids))) == approx(per_image(matches), **EXACT)


def test_variants_are_matched_as_if_each_were_alone(case):
    task, truth, found, image_ids = case
    variants = [found, found[::2], [], found[1::3]]
    for variant, matches in zip(variants, match_variants(truth, variants, image_ids, task), strict=True):
        for value, expected in zip(matches, match(truth, variant, image_ids, task), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_merged_parts_are_one_match_of_all(case):
    task, truth, found, image_ids = case
    parts = [match(truth, found, ids, task) for ids in (image_ids[:5], image_ids[5:6], image_ids[6:])]
    for value, expected in zip(merge(parts), match(truth, found, image_ids, task), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_detections_are_not_changed(case):
    task, truth, found, image_ids = case
    before = copy.deepcopy(found)
    match(truth, found, image_ids, task)
    assert found == before


def test_chunks_change_nothing(monkeypatch):
    truth, found = data_set("detection", seed=3)
    matches = match(truth, found, list(truth.imgs), "detection")
    weights = bootstrap_weights(len(truth.imgs), 20, seed=0)
    whole = average_precision(matches, weights)
    monkeypatch.setattr(accuracy, "CHUNK", 60)
    np.testing.assert_array_equal(average_precision(matches, weights), whole)


def test_equal_scores_in_every_place():
    truth, found = data_set("detection", seed=4)
    found = [item | {"score": 0.5} for item in found]
    image_ids = list(truth.imgs)
    weights = bootstrap_weights(len(image_ids), 2, seed=5)
    for counts, value in zip(
        weights, average_precision(match(truth, found, image_ids, "detection"), weights), strict=True
    ):
        multiset, detections = duplicated(truth, found, image_ids, counts)
        assert value == approx(reference(multiset, detections, list(multiset.imgs), "detection"), **EXACT)


@pytest.mark.parametrize("task, most", [("detection", 100), ("keypoints", 20)])
def test_only_the_best_maxdets_of_a_category_count(task, most):
    truth, found = data_set(task, seed=6, n_images=4)
    crowded = [item | {"score": item["score"] / (1 + number)} for number in range(130) for item in found]
    image_ids = list(truth.imgs)
    matches = match(truth, crowded, image_ids, task)
    assert np.bincount(matches.image * len(CATEGORIES) + matches.category).max() == most
    assert average_precision(matches)[0] == approx(reference(truth, crowded, image_ids, task), **EXACT)


BOX = {"category_id": 1, "iscrowd": 0, "area": 100.0}


def one_image(objects):
    """Image 1 of category 1 and these boxes, image 2 without any."""
    annotations = [BOX | {"id": i, "image_id": 1, "bbox": box} for i, box in enumerate(objects, start=1)]
    return coco_of([{"id": 1}, {"id": 2}], annotations, [{"id": 1, "name": "thing"}])


def hit(image_id, box, score):
    return {"image_id": image_id, "category_id": 1, "bbox": box, "score": score}


def test_right_wrong_right_is_known():
    truth = one_image([[0, 0, 10, 10], [30, 30, 10, 10]])
    found = [hit(1, [0, 0, 10, 10], 0.9), hit(1, [50, 0, 9, 9], 0.8), hit(1, [30, 30, 10, 10], 0.7)]
    matches = match(truth, found, [1, 2], "detection")
    expected = (51 * 1 + 50 * 2 / 3) / 101  # recalls 0 ... 0.50 at precision 1, 0.51 ... 1 at 2/3
    assert average_precision(matches) == approx([expected], **EXACT)
    assert per_image(matches) == approx([expected, np.nan], **EXACT)
    assert matches.n_positive.tolist() == [[2], [0]]


def test_detections_in_an_image_without_objects_cost_precision():
    truth = one_image([[0, 0, 10, 10]])
    found = [hit(1, [0, 0, 10, 10], 0.6), hit(2, [0, 0, 10, 10], 0.7)]
    matches = match(truth, found, [1, 2], "detection")
    assert average_precision(matches) == approx([0.5], abs=1e-12)
    assert average_precision(matches, np.array([[1, 0], [1, 3], [0, 2]])) == approx([1, 0.25, np.nan], **EXACT)
    assert per_image(matches) == approx([1, np.nan], **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_no_detections_at_all_is_zero_where_objects_are(task):
    truth, _ = data_set(task)
    image_ids = list(truth.imgs)
    matches = match(truth, [], image_ids, task)
    assert matches.utility.tolist() == [0] * len(image_ids)
    some = matches.n_positive.any(axis=1)
    assert average_precision(matches) == approx([0.0])
    assert per_image(matches) == approx(np.where(some, 0, np.nan), nan_ok=True)
    assert average_precision(matches, np.zeros((2, len(image_ids)))) == approx([np.nan] * 2, nan_ok=True)


def shape_at(task, left, top, overlap=1.0):
    """Fields of a thing of 10 x 10 px at this corner, or of one that overlaps with it as much as said."""
    if task == "keypoints":
        distance = np.sqrt(8 * np.log(1 / overlap))  # of one point; OKS = exp(-d^2 / (2 area (2 sigma)^2)), sigma 0.1
        return {"keypoints": [left + distance, top, 2]}
    if task == "detection":
        return {"bbox": [left, top, 10, 10 * overlap]}
    mask = np.zeros((100, 100), np.uint8, order="F")
    mask[top : top + round(10 * overlap), left : left + 10] = 1
    return {"segmentation": rle.encode(mask)}


@pytest.mark.parametrize("task", TASKS)
def test_utility_of_a_small_example(task):
    corners = [(5, 5, 1, 0), (40, 40, 1, 0), (70, 5, 1, 0), (5, 70, 1, 1), (70, 70, 2, 0)]  # left, top, category, crowd
    objects = [
        {"id": i, "image_id": 1, "category_id": category, "iscrowd": crowd, "area": 100.0, "num_keypoints": 1}
        | {"bbox": [left, top, 10, 10]}
        | shape_at(task, left, top)
        for i, (left, top, category, crowd) in enumerate(corners, start=1)
    ]
    ignored = objects[2] | {"id": 6, "bbox": [40, 5, 10, 10], "num_keypoints": 0, "keypoints": [0, 0, 0]}
    objects += [ignored] if task == "keypoints" else []
    categories = [{"id": k, "name": str(k), "keypoints": ["k"], "oks_sigmas": [0.1]} for k in (1, 2)]
    truth = coco_of([{"id": i, "height": 100, "width": 100} for i in (1, 2, 3)], objects, categories)
    found = [
        (1, 1, 0.5, (5, 5)),  # 0.5 * 1
        (1, 1, 0.9, (5, 5, 0.8)),  # 0.9 * 0.6: the best of the first object, though neither surest nor nearest
        (1, 1, 1.0, (5, 5, 0.7)),  # 1 * 0.4
        (1, 1, 0.95, (40, 40, 0.4)),  # not found: below 0.5
        (1, 1, 0.25, (70, 5, 0.9)),  # 0.25 * 0.8
        (1, 1, 0.99, (5, 70)),  # the crowd
        (1, 1, 0.98, (40, 5)),  # nothing, or the object without keypoints
        (1, 1, 0.97, (70, 70)),  # an object of the other category
        (1, 2, 0.3, (70, 70)),  # 0.3 * 1
        (2, 1, 0.9, (5, 5)),  # an image without objects
    ]
    found = [{"image_id": i, "category_id": k, "score": score} | shape_at(task, *place) for i, k, score, place in found]
    assert match(truth, found, [3, 1, 2], task).utility == approx([0, 0.54 + 0.2 + 0.3, 0])


@pytest.mark.parametrize("task", TASKS)
def test_no_torchvision_detections_give_no_results(task):
    shapes = {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 8, 8), "keypoints": (0, 7, 3)}
    assert results(1, {key: torch.zeros(shape) for key, shape in shapes.items()}, task, None) == []


def test_results_are_cocos_dicts():
    masks = torch.rand(2, 1, 5, 9)
    detection = {
        "boxes": torch.tensor([[1.0, 2, 4, 8], [0, 0, 0.5, 3]]),
        "labels": torch.tensor([3, 5]),
        "scores": torch.tensor([0.75, 0.5]),
        "masks": masks,
        "keypoints": torch.arange(12.0).reshape(2, 2, 3),
    }
    assert results(7, detection, "detection", {3}) == [
        {"image_id": 7, "category_id": 3, "score": 0.75, "bbox": [1, 2, 3, 6]},
        {"image_id": 7, "category_id": 5, "score": 0.5, "bbox": [0, 0, 0.5, 3]},
    ]
    assert results(7, detection, "keypoints", {5}) == [
        {"image_id": 7, "category_id": 5, "score": 0.5, "keypoints": [6, 7, 8, 9, 10, 11]}
    ]
    for item, mask in zip(results(7, detection, "segmentation", None), masks, strict=True):
        np.testing.assert_array_equal(rle.decode(item["segmentation"]), mask[0].numpy() > 0.5)
    assert torch.equal(detection["boxes"][0], torch.tensor([1.0, 2, 4, 8]))  # not changed


def test_a_detection_of_a_label_without_object_is_wrong_whatever_its_mask():
    truth, found = data_set("segmentation")
    objects = {(a["image_id"], a["category_id"]) for a in truth.anns.values()}
    nothing = rle.encode(np.zeros((SIZE, SIZE), np.uint8, order="F"))
    alone = [(item["image_id"], item["category_id"]) not in objects for item in found]
    without = [item | {"segmentation": nothing} if a else item for item, a in zip(found, alone, strict=True)]
    assert 0 < sum(alone) < len(alone)
    one, other = (match(truth, items, sorted(truth.imgs), "segmentation") for items in (found, without))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_keypoints_without_known_sigmas_are_an_error():
    truth, found = data_set("keypoints")
    del truth.cats[5]["oks_sigmas"]
    with pytest.raises(InputError, match="category '5' has 7 keypoints and no oks_sigmas; add a list of 7 numbers"):
        match(truth, found, list(truth.imgs), "keypoints")


def test_each_category_has_its_own_sigmas():
    truth, found = data_set("keypoints")
    for category in truth.cats.values():
        category["oks_sigmas"] = [0.1] * 7
    truth.cats[3]["oks_sigmas"] = [1e-4] * 7  # nothing is near enough
    matches = match(truth, found, list(truth.imgs), "keypoints")
    true = matches.matched & ~matches.ignored
    hits = [true[matches.category == index].any() for index in range(3)]
    assert hits == [False, True, True]


def test_resamples_draw_as_many_images_as_there_are():
    weights = bootstrap_weights(40, 500, seed=1)
    assert weights.shape == (500, 40) and (weights.sum(axis=1) == 40).all()
    assert weights.mean(axis=0) == approx(np.ones(40), abs=0.25)
    np.testing.assert_array_equal(weights, bootstrap_weights(40, 500, seed=1))
