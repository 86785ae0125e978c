"""A folder in COCO's layout -> checked splits; a split -> its images and ground truth."""

import hashlib
import io
import os
import reprlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from pycocotools import mask as rle
from pycocotools.coco import COCO

from stages.lib.files import picture, read_json
from stages.lib.params import MAX_SIDE
from stages.lib.schema import TEXT, TEXT_OR_NULL, Check, InputError, is_number, is_whole, whole

Item = dict[str, Any]  # one entry of `images`, `annotations` or `categories`

SECTIONS = ("images", "annotations", "categories")
COCO_KEYPOINTS = 17  # pycocotools knows the OKS sigmas of this many
FARTHEST = 2 * MAX_SIDE  # px; pycocotools draws polygons point by point, in C, however far they go


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(is_number(v) and abs(v) <= FARTHEST for v in value)


def _is_keypoints(value: Any) -> bool:
    return _is_numbers(value) and len(value) % 3 == 0 and set(value[2::3]) <= {0, 1, 2}


MOST = 2**53 - 1  # what every reader of JSON reads exactly
ID = whole(0, most=MOST)
ID_NOT_0 = whole(1, most=MOST)  # COCOeval takes id 0 for "no match"
SIDE = whole(1, most=MAX_SIDE)
IMAGE = {"id": ID, "file_name": TEXT, "width": SIDE, "height": SIDE}
CATEGORY = {"id": whole(1, most=9999), "name": TEXT}  # ids are the model's labels, and label 0 is its background
KEYPOINT_CATEGORY = CATEGORY | {
    "keypoints": Check(
        lambda value: isinstance(value, list) and len(value) > 0 and all(map(TEXT.accepts, value)),
        "a list of keypoint names",
    ),
}
REFERENCES = {"id": ID_NOT_0, "image_id": ID, "category_id": ID_NOT_0}
ANNOTATION = {
    "bbox": Check(
        lambda value: _is_numbers(value) and len(value) == 4 and min(value[2:]) >= 0,
        f"[x, y, width, height], finite and at most {FARTHEST}",
    ),
    "area": Check(lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "iscrowd": Check(lambda value: is_whole(value) and value in (0, 1), "0 or 1"),
}
KEYPOINT_ANNOTATION = ANNOTATION | {
    "num_keypoints": whole(0),
    "keypoints": Check(_is_keypoints, f"a list of x, y, v with v in 0, 1, 2, finite and at most {FARTHEST}"),
}
SPLIT = {
    "images": TEXT,
    "instances": TEXT,
    "person_keypoints": TEXT_OR_NULL,
    "image_ids": Check(
        lambda value: isinstance(value, list) and all(map(ID.accepts, value)) and len({*value}) == len(value) > 0,
        f"a list of ids, none twice, each {ID.wanted}",
    ),
    "file_names": Check(
        lambda value: isinstance(value, list) and all(map(TEXT.accepts, value)), "a list with a text for each image"
    ),
    "sha256": TEXT,  # of the split's images and annotation files: what DVC sees of a change in them
}


class Split(NamedTuple):
    """One entry of splits.json."""

    images: Path  # folder
    instances: Path
    person_keypoints: Path | None  # None when no model serves keypoints
    image_ids: list[int]  # in file-name order
    file_names: dict[int, str]


def load_split(splits_json: Path, split: str) -> Split:
    """Raises InputError that names splits.json where it is not as `prepare` wrote it, or what it tells is gone."""
    entry = read_json(splits_json, dict.fromkeys(("train", "fit", "test"), SPLIT))[split]
    for key in ("images", "instances", "person_keypoints"):
        if entry[key] is not None and not os.path.exists(entry[key]):
            raise InputError(f"{splits_json}: {split}.{key} is {entry[key]!r}, which is not there; run prepare again")
    keypoints, counts = entry["person_keypoints"], (len(entry["image_ids"]), len(entry["file_names"]))
    if counts[0] != counts[1]:
        raise InputError(f"{splits_json}: {split} has {counts[0]} image_ids, {counts[1]} file_names; run prepare again")
    return Split(
        images=Path(entry["images"]),
        instances=Path(entry["instances"]),
        person_keypoints=None if keypoints is None else Path(keypoints),
        image_ids=entry["image_ids"],
        file_names=dict(zip(entry["image_ids"], entry["file_names"], strict=True)),
    )


def image_path(split: Split, image_id: int) -> Path:
    """Raises InputError where the file lies elsewhere than `prepare` found it: splits.json may have been changed."""
    path = split.images / split.file_names[image_id]
    if not _lies_in(split.images, split.file_names[image_id]):
        raise InputError(f"{path}: image {image_id} of splits.json does not lie in {split.images}; run prepare again")
    return path


def ground_truth(split: Split, task: str) -> COCO:
    """The split's images, with and without annotations, and their annotations for the task."""
    path = split.person_keypoints if task == "keypoints" else split.instances
    if path is None:
        raise InputError("splits.json has no person_keypoints; add keypoints to a model's tasks and prepare again")
    data, chosen = _read(path, KEYPOINT_CATEGORY if task == "keypoints" else CATEGORY), set(split.image_ids)
    images = {image["id"]: image for image in data["images"]}
    if not images.keys() >= chosen:  # images without persons may be absent from person_keypoints
        path = split.instances
        images = {image["id"]: image for image in _read(path, CATEGORY)["images"]}
    if missing := chosen - images.keys():
        raise InputError(f"{path}: images: has no id {min(missing)}, which splits.json lists; run prepare again")
    annotations = [item for item in data["annotations"] if item["image_id"] in chosen]
    if task == "keypoints":
        _check_fields(path, "annotations", annotations, KEYPOINT_ANNOTATION)
        _check_keypoint_counts(path, annotations, _keypoint_count(path, data["categories"]))
    else:
        _check_fields(path, "annotations", annotations, ANNOTATION)
        for item in annotations if task == "segmentation" else ():
            _check_segmentation(path, item, images[item["image_id"]])
    coco = COCO()
    coco.dataset = {
        "images": [images[image_id] for image_id in split.image_ids],
        "annotations": annotations,
        "categories": data["categories"],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


# ---------------------------------------------------------------- choosing and checking


def make_splits(root: Path, counts: dict[str, int], tasks: Collection[str], seen_as: Path | None = None) -> Item:
    """The content of splits.json; its paths begin with `seen_as` where the data set will move there from `root`."""
    if not root.is_dir():
        wanted = "prepare.coco_root must hold train2017/, val2017/ and annotations/ (README, COCO 2017)"
        raise InputError(f"{root}: no such folder; {wanted}")
    splits = {}
    owner: dict[Path, str] = {}
    for folder, names in (("train2017", ("train",)), ("val2017", ("test", "fit"))):
        chosen = _choose(root, folder, {name: counts[name] for name in names}, tasks)
        for name, images in chosen.items():
            for image in images:
                path = (root / folder / image["file_name"]).resolve()
                first = owner.setdefault(path, f"{name} (image {image['id']})")
                if first != f"{name} (image {image['id']})":
                    raise InputError(f"{path}: in the splits {first} and {name} (image {image['id']}); keep one entry")
            splits[name] = _entry(root, folder, images, tasks, root if seen_as is None else seen_as)
    return {name: splits[name] for name in ("train", "fit", "test")}


def _entry(root: Path, folder: str, images: list[Item], tasks: Collection[str], seen_as: Path) -> Item:
    kinds = ["instances", "person_keypoints"] if "keypoints" in tasks else ["instances"]
    files = [_annotations(root, kind, folder) for kind in kinds]
    return {
        "images": str(seen_as / folder),
        **dict.fromkeys(("instances", "person_keypoints")),
        **{kind: str(_annotations(seen_as, kind, folder)) for kind in kinds},
        "image_ids": [image["id"] for image in images],
        "file_names": [image["file_name"] for image in images],
        "sha256": _digest([*files, *(root / folder / image["file_name"] for image in images)]),
    }


def _digest(files: Iterable[Path]) -> str:
    whole_split = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole_split.update(hashlib.file_digest(file, "sha256").digest())
    return whole_split.hexdigest()


def _annotations(root: Path, kind: str, folder: str) -> Path:
    return root / "annotations" / f"{kind}_{folder}.json"


def _choose(root: Path, folder: str, counts: dict[str, int], tasks: Collection[str]) -> dict[str, list[Item]]:
    """The first images in file-name order, dealt out as `counts` says, checked with all that belongs to them."""
    path = _annotations(root, "instances", folder)
    data = _read(path, CATEGORY)
    images = sorted(data["images"], key=lambda image: image["file_name"])
    if len(images) < sum(counts.values()):
        wanted = " + ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputError(f"{path}: has {len(images)} images, but prepare.images wants {wanted}; lower these numbers")
    chosen = {}
    start = 0
    for name, count in counts.items():
        chosen[name] = images[start : start + count]
        start += count
    by_id = {image["id"]: image for images in chosen.values() for image in images}
    _check_file_names(root / folder, path, by_id.values())
    annotations = [item for item in data["annotations"] if item["image_id"] in by_id]
    _check_fields(path, "annotations", annotations, ANNOTATION)
    if "segmentation" in tasks:
        for item in annotations:
            _check_segmentation(path, item, by_id[item["image_id"]])
    if {"detection", "segmentation"} & set(tasks):
        _check_not_empty(path, chosen, (item["image_id"] for item in annotations if not item["iscrowd"]))
    if "keypoints" in tasks:
        _check_keypoints(root, folder, data["images"], chosen)
    _decode_all(root / folder, by_id.values())
    return chosen


def _read(path: Path, category: dict[str, Check]) -> dict[str, list[Item]]:
    """A whole annotation file, its sections, ids and references checked."""
    if not path.is_file():
        wanted = "prepare.coco_root must hold COCO's annotations for each needed task (README, COCO 2017)"
        raise InputError(f"{path}: no such file; {wanted}")
    data = read_json(path)
    for section in SECTIONS:
        items = data.get(section) if isinstance(data, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise InputError(f"{path}: {section} is missing or not a list of objects; write it as COCO does")
    for section, fields in zip(SECTIONS, (IMAGE, REFERENCES, category), strict=True):
        _check_fields(path, section, data[section], fields)
        _check_unique(path, section, data[section], "id")
    _check_unique(path, "images", data["images"], "file_name")
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {item["id"] for item in data[section]}
        for item in data["annotations"]:
            if item[key] not in known:
                raise _bad(path, "annotations", item, key, f"it is not in {section}; add it there or remove the item")
    return data


def _check_keypoints(root: Path, folder: str, images: list[Item], chosen: dict[str, list[Item]]) -> None:
    path = _annotations(root, "person_keypoints", folder)
    data = _read(path, KEYPOINT_CATEGORY)
    names = {image["id"]: image["file_name"] for image in images}
    for image in data["images"]:
        if names.get(image["id"]) != image["file_name"]:
            raise _bad(path, "images", image, "file_name", "the instances file has no such image under this id")
    count = _keypoint_count(path, data["categories"])
    sigmas = Check(
        lambda value: _is_numbers(value) and len(value) == count and min(value) > 0,
        f"a list of {count} numbers above 0 (only COCO's {COCO_KEYPOINTS} keypoints have known sigmas)",
    )
    for category in data["categories"]:
        if count != COCO_KEYPOINTS or "oks_sigmas" in category:
            _check_fields(path, "categories", [category], {"oks_sigmas": sigmas})
    by_id = {image["id"] for images in chosen.values() for image in images}
    annotations = [item for item in data["annotations"] if item["image_id"] in by_id]
    _check_fields(path, "annotations", annotations, KEYPOINT_ANNOTATION)
    _check_keypoint_counts(path, annotations, count)
    _check_not_empty(
        path, chosen, (item["image_id"] for item in annotations if item["num_keypoints"] and not item["iscrowd"])
    )


def _keypoint_count(path: Path, categories: list[Item]) -> int:
    counts = {len(category["keypoints"]) for category in categories}
    if len(counts) != 1:
        wanted = "at least one is needed, and all with the same number"
        raise InputError(f"{path}: categories have {sorted(counts)} keypoints; {wanted}")
    return counts.pop()


def _check_keypoint_counts(path: Path, annotations: Iterable[Item], count: int) -> None:
    for item in annotations:
        if len(item["keypoints"]) != 3 * count:
            raise _bad(path, "annotations", item, "keypoints", f"its category has {count}: give {3 * count} numbers")


def _check_segmentation(path: Path, item: Item, image: Item) -> None:
    value = item.get("segmentation")
    if isinstance(value, list):
        good = value and all(_is_numbers(ring) and len(ring) >= 6 and len(ring) % 2 == 0 for ring in value)
        remedy = f"give polygons of at least 3 points [x, y, x, y, ...], finite and at most {FARTHEST}"
    else:
        good = isinstance(value, dict) and _is_rle(value, image["height"], image["width"])
        remedy = f"give polygons, or a run-length code of size [{image['height']}, {image['width']}]"
    if not good:
        raise _bad(path, "annotations", item, "segmentation", remedy)


def _is_rle(value: Item, height: int, width: int) -> bool:
    counts = value.get("counts")
    if value.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        return all(is_whole(count) and count >= 0 for count in counts) and sum(counts) == height * width
    try:
        rle.decode({"size": [height, width], "counts": counts})
    except (TypeError, ValueError):
        return False
    return True


def _check_not_empty(path: Path, chosen: dict[str, list[Item]], annotated: Iterable[int]) -> None:
    ids = set(annotated)
    for name, images in chosen.items():
        needed = 2 if name == "fit" else 1  # one to learn from, one to validate
        found = sum(image["id"] in ids for image in images)
        if found < needed:
            raise InputError(
                f"{path}: {found} of the {len(images)} images of the split {name} are annotated, {needed} needed; "
                f"raise prepare.images.{name}, or remove the task from the models"
            )


def _check_file_names(folder: Path, path: Path, images: Iterable[Item]) -> None:
    for image in images:
        name = image["file_name"]
        if not _lies_in(folder, name):
            raise _bad(path, "images", image, "file_name", f"it must lie in {folder}")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such image, but {path} lists it; add the file")


def _lies_in(folder: Path, name: str) -> bool:
    inside = ".." not in PurePath(name).parts and not PurePath(name).is_absolute()
    place, home = os.path.realpath(folder / name), os.path.realpath(folder)  # its links may form a loop
    return inside and Path(place).is_relative_to(home)


def _decode_all(folder: Path, images: Collection[Item]) -> None:
    """A truncated image is found now, not hours later."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the interpreter's lock
        list(pool.map(lambda image: _decode(folder / image["file_name"], image["width"], image["height"]), images))


def _decode(path: Path, width: int, height: int) -> None:
    with picture(path) as image:
        if image.size != (width, height):  # before memory for a wrong one is taken
            is_now = " x ".join(map(str, image.size))
            raise InputError(
                f"{path}: is {is_now} pixels, but its annotation file says {width} x {height}; correct one of them"
            )
        image.load()


def _check_fields(path: Path, section: str, items: Iterable[Item], fields: dict[str, Check]) -> None:
    for item in items:
        for key, check in fields.items():
            if not check.accepts(item.get(key)):
                raise _bad(path, section, item, key, f"it must be {check.wanted}")


def _check_unique(path: Path, section: str, items: list[Item], key: str) -> None:
    seen: set[int | str] = set()
    for item in items:
        if item[key] in seen:
            raise _bad(path, section, item, key, "another item has it too; give each its own")
        seen.add(item[key])


def _bad(path: Path, section: str, item: Item, key: str, remedy: str) -> InputError:
    value = reprlib.repr(item[key]) if key in item else "missing"
    return InputError(f"{path}: {section}, id {item.get('id')}: {key} is {value}: {remedy}")
