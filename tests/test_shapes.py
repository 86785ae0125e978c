"""The generated data set: deterministic, and true to COCO's conventions."""

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from stages.lib import shapes
from stages.lib.schema import InputError

SIZE = 96


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    shapes.generate(path, n_train=120, n_val=8, size=SIZE, seed=3)
    return path


@pytest.fixture(scope="module")
def instances(root) -> COCO:
    return COCO(root / "annotations" / "instances_train2017.json")


@pytest.fixture(scope="module")
def persons(root) -> COCO:
    return COCO(root / "annotations" / "person_keypoints_train2017.json")


def test_same_seed_gives_same_bytes_on_any_number_of_workers(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.os, "cpu_count", lambda: 1)
    shapes.generate(tmp_path, n_train=120, n_val=8, size=SIZE, seed=3)
    assert digests(tmp_path) == digests(root)


def test_a_killed_worker_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_scene", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="shapes: a worker was killed"):
        shapes.generate(tmp_path, n_train=2, n_val=2, size=SIZE, seed=3)


def test_images_do_not_depend_on_their_count(root, tmp_path):
    shapes.generate(tmp_path, n_train=3, n_val=2, size=SIZE, seed=3)
    few, many = digests(tmp_path), digests(root)
    names = [name for name in few if name.endswith(".jpg")]
    assert len(names) == 5
    assert all(few[name] == many[name] for name in names)
    contents = [json.loads((r / "annotations" / "instances_val2017.json").read_text()) for r in (tmp_path, root)]
    last_id = contents[0]["images"][-1]["id"]
    assert contents[0]["annotations"] == [a for a in contents[1]["annotations"] if a["image_id"] <= last_id]


def test_another_seed_gives_other_images(root, tmp_path):
    shapes.generate(tmp_path, n_train=2, n_val=1, size=SIZE, seed=4)
    assert not set(digests(tmp_path / "train2017").values()) & set(digests(root / "train2017").values())


def test_every_image_entry_has_its_file_and_size(root):
    for split in shapes.SPLITS:
        entries = COCO(root / "annotations" / f"instances_{split}.json").dataset["images"]
        assert {entry["file_name"] for entry in entries} == {path.name for path in (root / split).iterdir()}
        for entry in entries[:8]:
            with Image.open(root / split / entry["file_name"]) as image:
                assert (image.width, image.height, image.mode) == (entry["width"], entry["height"], "RGB")


def test_ids_are_unique_over_both_splits_and_rise(root):
    for kind in ("instances", "person_keypoints"):
        contents = [json.loads((root / "annotations" / f"{kind}_{split}.json").read_text()) for split in shapes.SPLITS]
        for key in ("images", "annotations"):
            ids = [entry["id"] for content in contents for entry in content[key]]
            assert ids == sorted(set(ids))


def test_area_and_bbox_are_those_of_the_mask(instances):
    for entry in instances.dataset["annotations"]:
        mask = instances.annToMask(entry)
        assert entry["area"] == mask.sum() >= shapes.MIN_VISIBLE_PIXELS
        x, y, width, height = entry["bbox"]
        inside = mask[y : y + height, x : x + width]
        assert inside.sum() == mask.sum()  # encloses all
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # and no more


def test_visible_masks_of_an_image_are_disjoint(instances):
    for image_id in instances.getImgIds():
        masks = [instances.annToMask(a) for a in instances.loadAnns(instances.getAnnIds(image_id))]
        assert sum(masks).max() <= 1


def test_all_categories_occur_in_all_sizes(instances):
    annotations = instances.dataset["annotations"]
    assert {a["category_id"] for a in annotations} == set(instances.getCatIds()) == set(shapes.CATEGORIES.values())
    longest = np.array([max(a["bbox"][2:]) for a in annotations]) * 128 / SIZE
    assert longest.min() < 12 and longest.max() > 75
    share = np.mean([a["category_id"] == shapes.CATEGORIES["person"] for a in annotations])
    assert share == pytest.approx(shapes.PERSON_SHARE, abs=0.08)


def test_crowds_are_flagged_and_rare(instances):
    crowds = instances.loadAnns(instances.getAnnIds(iscrowd=True))
    assert 0 < len(crowds) < 0.15 * len(instances.getImgIds())
    assert {crowd["category_id"] for crowd in crowds} == {shapes.CATEGORIES["disk"]}


def test_persons_are_the_same_annotations_in_both_files(instances, persons):
    ids = instances.getAnnIds(catIds=[shapes.CATEGORIES["person"]])
    assert [a["id"] for a in persons.dataset["annotations"]] == ids
    keys = ("image_id", "bbox", "area", "segmentation", "iscrowd")
    for entry in persons.dataset["annotations"]:
        assert all(entry[key] == instances.anns[entry["id"]][key] for key in keys)


def test_keypoints_follow_cocos_visibility(persons):
    (category,) = persons.dataset["categories"]
    count = len(category["keypoints"])
    assert count == len(category["oks_sigmas"]) == 7
    assert all(1 <= joint <= count for bone in category["skeleton"] for joint in bone)
    seen = set()
    for entry in persons.dataset["annotations"]:
        keypoints = np.array(entry["keypoints"]).reshape(count, 3)
        x, y, v = keypoints.T
        seen |= set(v)
        assert entry["num_keypoints"] == (v > 0).sum()
        assert np.all((x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE))
        assert np.all(keypoints[v == 0] == 0)
    assert seen == {0, 1, 2}


def test_visible_keypoints_lie_on_the_person(persons):
    on_person = []
    for entry in persons.dataset["annotations"]:
        mask = persons.annToMask(entry)
        on_person += [mask[int(y), int(x)] for x, y, v in np.array(entry["keypoints"]).reshape(-1, 3) if v == 2]
    assert np.mean(on_person) > 0.95  # thin limbs of tiny figures may cover less than half a pixel


def test_left_is_on_the_viewers_right():
    for seed in range(200):
        keypoints = shapes.person(np.random.default_rng(seed), 50.0).keypoints
        point = dict(zip(shapes.KEYPOINTS, keypoints, strict=True))
        down = point["hip"] - point["neck"]
        for part in ("hand", "foot"):
            for side, sign in (("left", 1), ("right", -1)):
                offset = point[f"{side}_{part}"] - point["neck"]
                # the cross product with the body axis is positive on the viewer's right
                assert sign * (down[1] * offset[0] - down[0] * offset[1]) > 0


def test_flipping_swaps_left_and_right_names():
    swap = {"left": "right", "right": "left"}
    flipped = ["_".join(swap.get(part, part) for part in name.split("_")) for name in shapes.KEYPOINTS]
    assert sorted(flipped) == sorted(shapes.KEYPOINTS)
    assert flipped != list(shapes.KEYPOINTS)


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_noise_power_falls_with_twice_the_exponent(exponent):
    size = 128
    rng = np.random.default_rng(0)
    noise = np.stack([shapes.power_law_noise(rng, size, size, exponent) for _ in range(16)])
    assert radial_slope(noise) == pytest.approx(-2 * exponent, abs=0.1)


def test_backgrounds_look_like_natural_images():
    rng = np.random.default_rng(1)
    planes = np.concatenate([shapes.background(rng, 128).transpose(2, 0, 1) for _ in range(16)])
    assert -2.6 < radial_slope(planes) < -1.4  # clipping at 0 and 255 flattens it a little


def radial_slope(planes: np.ndarray) -> float:
    """Slope of log mean power over log frequency, from 3 to 50 cycles per image width."""
    size = planes.shape[-1]
    power = (np.abs(np.fft.fft2(planes)) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(size, 1 / size)] * 2))
    rings = np.arange(3, 50)
    means = [power[np.round(frequency) == ring].mean() for ring in rings]
    return np.polyfit(np.log(rings), np.log(means), 1)[0]


@pytest.mark.parametrize("arguments", [(0, 0, 128, 0), (2_000_000, 1, 128, 0), (4, 4, 16, 0)])
def test_impossible_requests_are_refused_before_any_work(tmp_path, arguments):
    with pytest.raises(ValueError, match="images of"):
        shapes.generate(tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()
