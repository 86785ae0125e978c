"""Training data, and training, of detectors."""

from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pytest import approx
from test_models import CLASSES, KEYPOINTS, PARAMS

from stages.lib import detector_training, shapes
from stages.lib.detector_training import DetectionDataset, mirrored_order
from stages.lib.models import (
    build,
)

TRAIN_IMAGES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    shapes.generate(path, n_train=TRAIN_IMAGES, n_val=1, size=64, seed=5)
    return path


def ground_truth(root: Path, kind: str) -> COCO:
    return COCO(root / "annotations" / f"{kind}_train2017.json")


@pytest.fixture
def data(root) -> DetectionDataset:
    instances, persons = ground_truth(root, "instances"), ground_truth(root, "person_keypoints")
    return DetectionDataset(instances, persons, instances.getImgIds(), root / "train2017", masks=True)


def unflipped(data: DetectionDataset, index: int, monkeypatch, number: float = 0.9):
    with monkeypatch.context() as patch:
        patch.setattr(detector_training.torch, "rand", lambda *_: torch.tensor(number))
        return data[index]


def test_targets_are_cocos_annotations(data, monkeypatch):
    for index, image_id in enumerate(data.image_ids):
        picture, target = unflipped(data, index, monkeypatch)
        objects = [a for a in data.instances.imgToAnns[image_id] if not a["iscrowd"]]
        assert picture.shape == (3, 64, 64) and picture.min() >= 0 and picture.max() <= 1
        assert target["labels"].tolist() == [a["category_id"] for a in objects]
        for a, box, mask, points in zip(objects, target["boxes"], target["masks"], target["keypoints"], strict=True):
            x, y, w, h = a["bbox"]
            assert box.tolist() == [x, y, x + w, y + h]
            assert mask.sum() == a["area"]
            ys, xs = torch.nonzero(mask, as_tuple=True)
            assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box.tolist()
            person = a["category_id"] == shapes.CATEGORIES["person"]
            assert points.shape == (KEYPOINTS, 3) and (person or not points.any())
            if person:
                assert points.flatten().tolist() == approx(data.keypoints[a["id"]])


def test_flipping_twice_changes_nothing(data, monkeypatch):
    for index in range(len(data)):
        picture, target = unflipped(data, index, monkeypatch)
        twice, flipped_twice = data._flip(*data._flip(picture, dict(target)))
        assert torch.equal(twice, picture)
        assert all(torch.allclose(flipped_twice[key], target[key], atol=1e-5) for key in target)


def test_a_flip_mirrors_boxes_with_their_masks(data, monkeypatch):
    picture, target = unflipped(data, 0, monkeypatch, 0.1)
    plain, _ = unflipped(data, 0, monkeypatch)
    assert torch.equal(picture, plain.flip(-1))
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        ys, xs = torch.nonzero(mask, as_tuple=True)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box.tolist()


def test_a_flip_makes_left_right(data):
    names = list(shapes.KEYPOINTS)
    points = torch.tensor([[[10.0 + i, 20.0 + i, 2.0] for i in range(KEYPOINTS)]])
    points[0, names.index("hip")] = 0  # unknown
    target = {"boxes": torch.tensor([[8.0, 18.0, 20.0, 30.0]]), "keypoints": points}
    _, flipped = data._flip(torch.zeros(3, 64, 64), dict(target))
    (mirrored,) = flipped["keypoints"]
    for name in ("hand", "foot"):
        left, right = names.index(f"left_{name}"), names.index(f"right_{name}")
        assert mirrored[left].tolist() == [64 - points[0, right, 0], points[0, right, 1], 2]
        assert mirrored[right].tolist() == [64 - points[0, left, 0], points[0, left, 1], 2]
    assert mirrored[names.index("head")].tolist() == [64 - 10, 20, 2]
    assert mirrored[names.index("hip")].tolist() == [0, 0, 0]


def test_mirrored_order_of_cocos_names():
    assert mirrored_order(["nose", "left_eye", "right_eye", "left_ear", "right_ear"]) == [0, 2, 1, 4, 3]


def edited(root: Path, edit) -> COCO:
    instances = ground_truth(root, "instances")
    edit(instances.dataset["annotations"])
    instances.createIndex()
    return instances


def test_crowds_and_slivers_are_left_out(root):
    def edit(annotations):
        annotations[0]["iscrowd"], annotations[1]["bbox"][2] = 1, 1

    instances = edited(root, edit)
    dropped = [a["id"] for a in instances.dataset["annotations"][:2]]
    data = DetectionDataset(instances, None, instances.getImgIds(), root / "train2017", masks=False)
    kept = [a["id"] for image_id in data.image_ids for a in data._annotations(image_id)]
    crowds = sum(a["iscrowd"] for a in instances.dataset["annotations"])
    assert not set(dropped) & set(kept)
    assert len(kept) == len(instances.dataset["annotations"]) - crowds - 1
    boxes = torch.cat([data[i][1]["boxes"] for i in range(len(data))])
    assert (boxes[:, 2:] > boxes[:, :2] + 1).all() and boxes.min() >= 0 and boxes.max() <= 64


def test_images_without_annotations_are_skipped(root):
    empty = ground_truth(root, "instances").getImgIds()[2]
    instances = edited(
        root, lambda entries: entries.__setitem__(slice(None), [a for a in entries if a["image_id"] != empty])
    )
    data = DetectionDataset(instances, None, instances.getImgIds(), root / "train2017", masks=False)
    assert empty not in data.image_ids and len(data) == TRAIN_IMAGES - 1


def test_a_keypoint_model_is_trained_on_persons_only(root):
    instances, persons = ground_truth(root, "instances"), ground_truth(root, "person_keypoints")
    data = DetectionDataset(instances, persons, instances.getImgIds(), root / "train2017", masks=False)
    assert {label for i in range(len(data)) for label in data[i][1]["labels"].tolist()} == {1}


def test_training_reduces_the_loss(data, monkeypatch):
    data.image_ids = data.image_ids[:2]
    torch.manual_seed(0)
    model = build(PARAMS | {"image_size": {"min": 64, "max": 64}}, CLASSES, KEYPOINTS)
    pictures, targets = zip(*(unflipped(data, i, monkeypatch) for i in range(2)), strict=True)

    def loss() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return sum(v.item() for v in model.train()(list(pictures), [dict(t) for t in targets]).values())

    before = loss()
    log = detector_training.train(model, data, steps=5, batch=2, lr=1e-3, seed=0)
    assert not model.training
    assert [line["step"] for line in log] == [5]
    assert log[0].keys() >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_keypoint", "loss_objectness"}
    assert loss() < 0.95 * before
