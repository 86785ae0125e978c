"""What the stages may rely on once splits.json is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.cocoeval import COCOeval

from stages.lib.coco import COCO_KEYPOINTS, ground_truth, image_path, load_split, make_splits
from stages.lib.files import disk_check, read_json, write_json
from stages.lib.params import TASKS
from stages.lib.schema import InputError

COUNTS = {"train": 2, "fit": 2, "test": 2}
COCO_MINI = Path(__file__).parents[2] / "shared" / "coco_mini"


def edit(root: Path, kind: str, folder: str, change: Callable[[Any], Any]) -> None:
    path = root / "annotations" / f"{kind}_{folder}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def written(splits: dict[str, Any], tmp_path: Path) -> Path:
    write_json(tmp_path / "splits.json", splits)
    return tmp_path / "splits.json"


def test_splits_follow_the_file_names(coco_root: Path) -> None:
    splits = make_splits(coco_root, COUNTS, TASKS)
    assert list(splits) == ["train", "fit", "test"]
    assert {name: split["image_ids"] for name, split in splits.items()} == {
        "train": [1, 2],
        "fit": [7, 8],
        "test": [5, 6],
    }


def test_another_image_or_annotation_makes_other_splits(coco_root: Path) -> None:
    """DVC measures again what it sees a change of: splits.json, as the data set itself may lie anywhere."""
    found = [make_splits(coco_root, COUNTS, TASKS)]
    edit(coco_root, "person_keypoints", "val2017", lambda data: data["annotations"][0].update(area=1.5))
    found.append(make_splits(coco_root, COUNTS, TASKS))
    file = coco_root / "val2017" / "0008.png"
    Image.eval(Image.open(file), lambda value: 255 - value).save(file)
    found.append(make_splits(coco_root, COUNTS, TASKS))
    digests = {split: [splits[split]["sha256"] for splits in found] for split in COUNTS}
    assert {split: len(set(values)) for split, values in digests.items()} == {"train": 1, "test": 2, "fit": 3}
    assert make_splits(coco_root, COUNTS, TASKS) == found[-1]


def test_no_image_is_in_two_splits(coco_root: Path, tmp_path: Path) -> None:
    path = written(make_splits(coco_root, COUNTS, TASKS), tmp_path)
    splits = [load_split(path, name) for name in COUNTS]
    files = [image_path(split, image_id).resolve() for split in splits for image_id in split.image_ids]
    assert len(set(files)) == len(files) == sum(COUNTS.values())
    assert all(file.is_file() for file in files)
    assert all(split.instances.is_file() and split.person_keypoints.is_file() for split in splits)


def test_a_link_to_an_image_of_another_split_is_found(coco_root: Path) -> None:
    (coco_root / "val2017" / "0008.png").unlink()
    (coco_root / "val2017" / "0008.png").symlink_to("0005.png")
    edit(coco_root, "instances", "val2017", lambda data: data["images"][0].update(width=21, height=19))
    with pytest.raises(InputError, match=r"test \(image 5\) and fit \(image 8\)"):
        make_splits(coco_root, COUNTS, {"detection"})


def test_relative_paths_stay_relative(coco_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(coco_root.parent)
    assert make_splits(Path("coco"), COUNTS, TASKS)["fit"]["images"] == "coco/val2017"
    seen_as = make_splits(Path("coco"), COUNTS, TASKS, seen_as=Path("data/dataset"))["fit"]
    assert seen_as["person_keypoints"] == "data/dataset/annotations/person_keypoints_val2017.json"


def test_keypoint_files_are_read_only_when_needed(coco_root: Path, tmp_path: Path) -> None:
    for path in coco_root.glob("annotations/person_keypoints_*"):
        path.unlink()
    path = written(make_splits(coco_root, COUNTS, {"detection", "segmentation"}), tmp_path)
    split = load_split(path, "test")
    assert split.person_keypoints is None
    with pytest.raises(InputError, match="person_keypoints"):
        ground_truth(split, "keypoints")


@pytest.mark.parametrize("task", TASKS)
def test_ground_truth_holds_the_images_of_the_split_only(coco_root: Path, tmp_path: Path, task: str, capfd) -> None:
    edit(coco_root, "person_keypoints", "val2017", lambda data: data["images"].pop())  # image 5
    edit(coco_root, "person_keypoints", "val2017", lambda data: data["annotations"].pop(0))
    split = load_split(written(make_splits(coco_root, COUNTS, TASKS), tmp_path), "test")
    truth = ground_truth(split, task)
    assert truth.getImgIds() == split.image_ids == [5, 6]
    assert truth.imgs[5]["width"] == 21
    assert {item["image_id"] for item in truth.anns.values()} == ({6} if task == "keypoints" else {5, 6})
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("task", "iou_type"), TASKS.items())
def test_ground_truth_as_detections_scores_one(coco_root: Path, tmp_path: Path, task: str, iou_type: str) -> None:
    split = load_split(written(make_splits(coco_root, COUNTS, TASKS), tmp_path), "fit")
    truth = ground_truth(split, task)
    found = [item | {"score": 0.9} for item in truth.anns.values() if not item["iscrowd"]]
    evaluation = COCOeval(truth, truth.loadRes(found), iou_type)
    if task == "keypoints":
        evaluation.params.kpt_oks_sigmas = evaluation.params.kpt_oks_sigmas[:2]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    assert precision[precision > -1].mean() == pytest.approx(1)


def first(section: str, **values: Any) -> Callable[[Any], Any]:
    """Changes an item of the first image in file-name order (the images are listed in reverse)."""
    return lambda data: data[section][-1 if section == "images" else 0].update(values)


def rings(*rings: Any) -> dict[str, Any]:
    return {"segmentation": list(rings)}


NAN = float("nan")
BAD = [  # kind, change, what the line must name
    ("instances", lambda data: data.pop("annotations"), "annotations is missing"),
    ("instances", lambda data: data.update(images=3), "images is missing or not a list"),
    ("instances", lambda data: data.update(images=[3]), "images is missing or not a list"),
    ("instances", lambda data: data["images"][-1].pop("width"), "images, id 1: width is missing"),
    ("instances", first("images", id="1"), "id is '1'"),
    ("instances", first("images", width=17.5), "width is 17.5"),
    ("instances", first("images", id=2), "images, id 2: id is 2: another"),
    ("instances", first("images", file_name="0002.png"), "file_name is '0002.png': another"),
    ("instances", first("images", file_name="0000.png"), r"train2017/0000.png: no such image"),
    ("instances", first("images", file_name="/etc/hostname"), "file_name is '/etc/hostname'"),
    ("instances", first("images", file_name="../train2017/0001.png"), r"file_name is '\.\./train2017"),
    ("instances", first("annotations", id=11), "annotations, id 11: id is 11: another"),
    ("instances", first("annotations", id=0), "annotations, id 0: id is 0"),
    ("instances", first("annotations", image_id=99), "annotations, id 10: image_id is 99: it is not in images"),
    ("instances", first("annotations", category_id=5), "category_id is 5: it is not in categories"),
    ("instances", first("categories", id=0), "categories, id 0: id is 0"),
    ("instances", first("annotations", bbox=[1, 2, 3]), r"annotations, id 10: bbox is \[1, 2, 3\]"),
    ("instances", first("annotations", bbox=[1, 2, NAN, 3]), "bbox is .*nan"),
    ("instances", first("annotations", bbox=[1, 2, -3, 3]), "bbox is .*-3"),
    ("instances", first("annotations", bbox="1 2 3 4"), "bbox is '1 2 3 4'"),
    ("instances", first("annotations", area=None), "area is None"),
    ("instances", lambda data: data["annotations"][0].pop("iscrowd"), "iscrowd is missing"),
    ("instances", first("annotations", segmentation=None), "segmentation is None"),
    ("instances", first("annotations", **rings()), r"segmentation is \[\]"),
    ("instances", first("annotations", **rings([1, 2, 3, 4])), "polygons of at least 3 points"),
    ("instances", first("annotations", **rings([1, 2, 3, 4, 5, 6, 7])), "polygons of at least 3 points"),
    ("instances", first("annotations", segmentation={"size": [9, 9], "counts": [81]}), r"of size \[23, 17\]"),
    ("instances", first("annotations", segmentation={"size": [23, 17], "counts": [5]}), "run-length code"),
    ("instances", first("annotations", segmentation={"size": [23, 17], "counts": "z" * 40}), "run-length code"),
    (
        "instances",
        lambda data: [item.update(iscrowd=1) for item in data["annotations"]],
        "0 of the 2 images of the split train are annotated, 1",
    ),
    ("person_keypoints", first("images", file_name="9.png"), "file_name is '9.png'"),
    ("person_keypoints", first("annotations", keypoints=[1, 2, 2]), r"keypoints is \[1, 2, 2\]: its category has 2"),
    ("person_keypoints", first("annotations", keypoints=[1, 2, 2, 1, NAN, 2]), "keypoints is .*nan"),
    ("person_keypoints", first("annotations", keypoints=[1, 2, 2, 1, 2, 3]), "v in 0, 1, 2"),
    ("person_keypoints", lambda data: data["annotations"][0].pop("num_keypoints"), "num_keypoints is missing"),
    ("person_keypoints", lambda data: data["categories"][0].pop("keypoints"), "keypoints is missing"),
    ("person_keypoints", first("categories", keypoints=["head", 3]), r"keypoints is \['head', 3\]: .* keypoint names"),
    ("person_keypoints", lambda data: data["categories"][0].pop("oks_sigmas"), "oks_sigmas is missing"),
    ("person_keypoints", first("categories", oks_sigmas=[0.1]), r"oks_sigmas is \[0.1\]"),
    (
        "person_keypoints",
        lambda data: data["categories"].append(data["categories"][0] | {"id": 2, "keypoints": ["head"]}),
        "the same number",
    ),
    (
        "person_keypoints",
        lambda data: [item.update(num_keypoints=0) for item in data["annotations"]],
        "0 of the 2 images of the split train are annotated, 1 needed",
    ),
]


def test_without_the_task_segmentation_no_polygon_is_needed(coco_root: Path, tmp_path: Path) -> None:
    """What `prepare` accepts, the stages that read the ground truth do."""
    for folder in ("train2017", "val2017"):
        edit(coco_root, "instances", folder, lambda data: [item.pop("segmentation") for item in data["annotations"]])
    path = written(make_splits(coco_root, COUNTS, {"detection"}), tmp_path)
    assert ground_truth(load_split(path, "test"), "detection").anns
    with pytest.raises(InputError, match="segmentation is missing"):
        ground_truth(load_split(path, "test"), "segmentation")


@pytest.mark.parametrize("name", ["../train2017/0001.png", "/etc/hostname", "link.png"])
def test_an_image_that_splits_json_seeks_elsewhere_is_refused(coco_root: Path, tmp_path: Path, name: str) -> None:
    splits = make_splits(coco_root, COUNTS, TASKS)
    (coco_root / "val2017/link.png").symlink_to(coco_root / "train2017/0001.png")
    splits["test"]["file_names"][0] = name
    split = load_split(written(splits, tmp_path), "test")
    with pytest.raises(InputError, match=f"{name}: image 5 of splits.json does not lie in .*val2017; run prepare"):
        image_path(split, 5)
    assert image_path(split, 6) == coco_root / "val2017/0006.png"


def one_line(error: pytest.ExceptionInfo[InputError], *names: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for name in names:
        assert re.search(name, message), message


@pytest.mark.parametrize(("kind", "change", "names"), BAD, ids=[f"{kind}-{names}" for kind, _, names in BAD])
def test_bad_annotations_are_named(coco_root: Path, kind: str, change: Callable[[Any], Any], names: str) -> None:
    edit(coco_root, kind, "train2017", change)
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, "train2017", names)


@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
def test_an_unreadable_annotation_file_is_named(coco_root: Path, kind: str) -> None:
    path = coco_root / "annotations" / f"{kind}_val2017.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, path.name, "not valid JSON")
    path.unlink()
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, path.name, "no such file")


def test_an_undecodable_image_is_named(coco_root: Path) -> None:
    path = coco_root / "val2017" / "0006.png"
    path.write_text("not an image")
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, str(path), "cannot be decoded")


def test_an_image_of_another_size_is_named(coco_root: Path) -> None:
    path = coco_root / "train2017" / "0001.png"
    Image.new("L", (23, 17)).save(path)
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, str(path), "is 23 x 17 pixels, but its annotation file says 17 x 23")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_named(coco_root: Path, suffix: str) -> None:
    path = coco_root / "train2017" / f"0001.{suffix}"
    Image.effect_noise((17, 23), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for kind in ("instances", "person_keypoints"):
        edit(coco_root, kind, "train2017", first("images", file_name=path.name))
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, str(path), "cannot be decoded")


def test_an_image_outside_the_folder_is_refused(coco_root: Path, tmp_path: Path) -> None:
    path = coco_root / "train2017" / "0001.png"
    path.rename(tmp_path / "elsewhere.png")
    path.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS, TASKS)
    one_line(error, "0001.png", "must lie in")


def test_images_that_are_not_chosen_need_not_exist(coco_root: Path) -> None:
    (coco_root / "train2017" / "0003.png").unlink()
    assert make_splits(coco_root, COUNTS, TASKS)["train"]["image_ids"] == [1, 2]


def test_splits_larger_than_the_data_name_the_numbers(coco_root: Path) -> None:
    with pytest.raises(InputError) as error:
        make_splits(coco_root, COUNTS | {"fit": 3}, TASKS)
    one_line(error, "instances_val2017.json", "has 4 images", "test: 2", "fit: 3")


def test_a_full_disk_is_named_before_the_work(tmp_path: Path) -> None:
    disk_check(tmp_path / "not" / "yet" / "made", 1)
    with pytest.raises(InputError) as error:
        disk_check(tmp_path, 1e18)
    one_line(error, str(tmp_path), "1000000000.00 GB are needed", "GB free")


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no real COCO images in {COCO_MINI}")
def test_real_coco_images_are_accepted(tmp_path: Path) -> None:
    splits = make_splits(COCO_MINI, {"train": 80, "fit": 40, "test": 39}, TASKS)
    path = written(splits, tmp_path)
    for task in TASKS:
        truth = ground_truth(load_split(path, "test"), task)
        assert len(truth.imgs) == 39 and len(truth.anns) > 39
    assert read_json(path) == splits
    assert len(truth.cats[1]["keypoints"]) == COCO_KEYPOINTS
