"""Training data, and training, of detectors."""

import math
from pathlib import Path

import pytest
import torch
from artifacts import assert_same
from pycocotools.coco import COCO
from pytest import approx
from test_models import CLASSES, KEYPOINTS, PARAMS

from stages import train_model
from stages.lib import detector_training, shapes
from stages.lib.coco import Split
from stages.lib.detector_training import DetectionDataset, mirrored_order
from stages.lib.models import build
from stages.lib.schema import InputError

TRAIN_IMAGES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    shapes.generate(path, n_train=TRAIN_IMAGES, n_val=1, size=64, seed=5)
    return path


def ground_truth(root: Path, kind: str) -> COCO:
    return COCO(root / "annotations" / f"{kind}_train2017.json")


def files_of(root: Path, instances: COCO) -> dict[int, Path]:
    return {image_id: root / "train2017" / image["file_name"] for image_id, image in instances.imgs.items()}


@pytest.fixture
def data(root) -> DetectionDataset:
    instances, persons = ground_truth(root, "instances"), ground_truth(root, "person_keypoints")
    return DetectionDataset(instances, persons, files_of(root, instances), masks=True)


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
    data = DetectionDataset(instances, None, files_of(root, instances), masks=False)
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
    data = DetectionDataset(instances, None, files_of(root, instances), masks=False)
    assert empty not in data.image_ids and len(data) == TRAIN_IMAGES - 1


def test_a_keypoint_model_is_trained_on_persons_only(root):
    instances, persons = ground_truth(root, "instances"), ground_truth(root, "person_keypoints")
    data = DetectionDataset(instances, persons, files_of(root, instances), masks=False)
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


def untrained() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(PARAMS | {"image_size": {"min": 64, "max": 64}}, CLASSES, KEYPOINTS)


def trained(model: torch.nn.Module, data: DetectionDataset, checkpoint: Path | None = None) -> list[dict]:
    return detector_training.train(model, data, steps=5, batch=2, lr=1e-3, seed=0, checkpoint=checkpoint)


def killed_in(step: int, monkeypatch) -> list[int]:
    """The next training is; what it and later ones do is counted in the list that comes back."""
    average, taken = torch.nn.utils.clip_grad_norm_, []

    def clip_until_killed(*args):
        taken.append(len(taken) + 1)
        if len(taken) == step:
            raise KeyboardInterrupt
        return average(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_until_killed)
    return taken


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_training_goes_on_and_ends_with_the_same_weights(data, tmp_path, monkeypatch, step):
    """Flips, order of the images and samples of boxes, all drawn at random, are those of an undisturbed training."""
    monkeypatch.setattr(detector_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    undisturbed, fresh, checkpoint = untrained(), untrained(), tmp_path / "training.pt"
    log = trained(undisturbed, data)
    taken = killed_in(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trained(untrained(), data, checkpoint)
    assert trained(fresh, data, checkpoint) == log
    assert len(taken) == 1 + 5  # no step was taken twice
    assert_same(undisturbed.state_dict(), fresh.state_dict())


def test_a_killed_stage_finds_its_training_again(root, tmp_path, monkeypatch):
    described = PARAMS | {"tasks": ["detection"], "weights": None, "steps": 3, "batch": 1, "lr": 1e-3}
    names = {int(path.stem): path.name for path in (root / "train2017").iterdir()}
    split = Split(root / "train2017", root / "annotations/instances_train2017.json", None, [*names], names)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_model, "load_params", lambda: {"seed": 0, "models": {"m": described}})
    monkeypatch.setattr(train_model, "load_split", lambda *_: split)
    monkeypatch.setattr(detector_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    Path("splits.json").write_text("{}")

    def stage(out: str) -> dict[str, torch.Tensor]:
        train_model.main(Path("splits.json"), "m", Path(out))
        return torch.load(out, weights_only=True)["state"]

    wanted = stage("undisturbed.pt")
    taken = killed_in(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        stage("m.pt")
    assert not Path("m.pt").exists()
    assert_same(stage("m.pt"), wanted)
    assert len(taken) == 1 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "splits.json", "undisturbed.pt"]


def test_a_loss_that_is_not_finite_ends_the_training_and_is_in_no_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    model, checkpoint = untrained(), tmp_path / "training.pt"
    with torch.no_grad():
        model.rpn.head.cls_logits.bias.fill_(math.nan)
    with pytest.raises(InputError, match=r"^train detector: the loss .* not finite in step 1; lower models\.\*\.lr"):
        trained(model, data, checkpoint)
    assert not checkpoint.exists()


def test_a_head_without_targets_is_left_out_and_stays_as_it_is(root):
    instances = ground_truth(root, "instances")
    data = DetectionDataset(instances, None, files_of(root, instances), masks=False)
    model = untrained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (losses,) = trained(model, data)
    assert not {"loss_mask", "loss_keypoint"} & set(losses)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("box_head" in name for name in changed)
    assert not [name for name in changed if "mask" in name or "keypoint" in name]
    assert model.roi_heads.has_mask() and model.roi_heads.has_keypoint()
