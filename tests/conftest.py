"""A valid data set in COCO's layout, small enough to be broken in every way."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import stages  # noqa: F401  what its environment must be is set before torch is imported

# Of the longest files, and a short one between: xdist gives each worker a file, then a second one to wait behind it.
FIRST = ("test_pipeline", "test_coco_profile", "test_bd_rate", "test_photographs")
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 7, "name": "kite"}]
PERSON = CATEGORIES[0] | {"keypoints": ["head", "foot"], "skeleton": [[1, 2]], "oks_sigmas": [0.05, 0.1]}


def write_folder(root: Path, folder: str, first_id: int, count: int) -> None:
    (root / folder).mkdir(parents=True)
    images, things, persons = [], [], []
    for image_id in range(first_id, first_id + count):
        width, height = 16 + image_id, 24 - image_id
        name = f"{image_id:04}.png"
        Image.new("RGB", (width, height), (image_id, 90, 200)).save(root / folder / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        box = {
            "image_id": image_id,
            "bbox": [2.0, 3.0, 6.0, 5.0],
            "area": 30.0,
            "iscrowd": 0,
            "segmentation": [[2.0, 3.0, 8.0, 3.0, 8.0, 8.0, 2.0, 8.0]],
        }
        person = box | {"id": 10 * image_id, "category_id": 1}
        crowd_code = {"size": [height, width], "counts": [height, 2 * height, height * (width - 3)]}
        crowd = {"segmentation": crowd_code, "iscrowd": 1, "bbox": [1.0, 0.0, 2.0, float(height)]}
        things += [
            person,
            box | {"id": 10 * image_id + 1, "category_id": 7},
            box | {"id": 10 * image_id + 2, "category_id": 7} | crowd,
        ]
        persons.append(person | {"num_keypoints": 1, "keypoints": [4, 4, 2, 0, 0, 0]})
    for kind, annotations, categories in (
        ("instances", things, CATEGORIES),
        ("person_keypoints", persons, [PERSON]),
    ):
        path = root / "annotations" / f"{kind}_{folder}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images[::-1], "annotations": annotations, "categories": categories}))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers that take the longest files first end together."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny networks gain nothing from a second thread; on busy cores they wait for it at every layer."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """3 + 4 images of different sizes; a person with keypoints, a kite and a crowd of kites in each."""
    root = tmp_path / "coco"
    write_folder(root, "train2017", 1, 3)
    write_folder(root, "val2017", 5, 4)
    return root
