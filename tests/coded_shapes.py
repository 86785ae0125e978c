"""Random pyramids of drawn shapes, coded by rounding, and a detector that knows the truth."""

import io
import shutil
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from artifacts import write_coded, write_features
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stages.lib import evaluating, measuring, shapes
from stages.lib.accuracy import results
from stages.lib.coding import CodedSplit, FeatureCodec, pyramid_shapes
from stages.lib.features import Features
from stages.lib.heads import Asked
from stages.lib.learned import Coded
from stages.lib.models import Sizes
from stages.lib.params import SCALES, TASKS
from stages.lib.planes import Packing
from stages.lib.prediction import Predictor

CHANNELS, SIDE, PADDED = 4, 64, (64, 64)
QUALITIES = {"q1": 3, "q2": 10, "q3": 60}  # for `Rounding`
PERSON = shapes.CATEGORIES["person"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    shapes.generate(path, n_train=1, n_val=6, size=SIDE, seed=5)
    return path


def ground_truth(root: Path) -> dict[str, COCO]:
    with redirect_stdout(io.StringIO()):
        instances, persons = (
            COCO(root / "annotations" / f"{kind}_val2017.json") for kind in ("instances", "person_keypoints")
        )
    return {"detection": instances, "segmentation": instances, "keypoints": persons}


@pytest.fixture(scope="module")
def image_ids(root) -> list[int]:
    return sorted(ground_truth(root)["detection"].imgs)


@pytest.fixture(scope="module")
def features(image_ids, tmp_path_factory) -> Features:
    """Random pyramids; the original size tells the images apart."""
    path = tmp_path_factory.mktemp("features") / "f"
    torch.manual_seed(0)
    items = []
    for k, image_id in enumerate(image_ids):
        pyramid = {s: torch.randn(1, CHANNELS, *shape) for s, shape in pyramid_shapes(PADDED).items()}
        items.append(("test", image_id, pyramid, Sizes((SIDE, SIDE + k), PADDED, PADDED)))
    write_features(path, items)
    return Features(path, "test")


def seeded_predictor() -> Predictor:
    torch.manual_seed(2)
    return Predictor(CHANNELS).eval()


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return seeded_predictor()


class Rounding:
    """The interface of Elic: a plane is rounded to as many steps as the level says."""

    def level(self, lmbda: float) -> int:
        return int(lmbda)

    def encode(self, planes: torch.Tensor, level: int, reconstruct: bool = True) -> list[Coded]:
        symbols = (planes * level).round().byte()
        strings = [zlib.compress(s.numpy().tobytes()) for s in symbols]
        return [Coded(string, 1, 0.0, s / level) for string, s in zip(strings, symbols, strict=True)]

    def decode(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> torch.Tensor:
        symbols = [np.frombuffer(zlib.decompress(string), dtype=np.uint8).reshape(shape) for string in strings]
        return torch.from_numpy(np.stack(symbols)) / level


@pytest.fixture(scope="module")
def feature_codec() -> FeatureCodec:
    packing = Packing("pca", {s: torch.eye(CHANNELS) for s in SCALES}, {s: torch.zeros(CHANNELS) for s in SCALES})
    return FeatureCodec(Rounding(), packing, CHANNELS)


@pytest.fixture(scope="module")
def coded(features, feature_codec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    for quality, lmbda in QUALITIES.items():
        write_coded(folder, quality, [features], feature_codec, lmbda)
    return folder


class Seer:
    """A detector that knows the truth, and sees it the worse the more a pyramid differs from the clean one."""

    blur = dict(zip(SCALES, (2.0, 1.5, 3.0, 1.0, 0.5), strict=True))  # pixels per unit of error

    def __init__(self, root: Path, features: Features):
        self.coco, self.features = ground_truth(root), features
        self.passes = self.maps = 0
        self.asked: list[Asked] = []  # of the last call

    def detect(self, detector, variants, sizes, tasks) -> list[dict[str, torch.Tensor]]:
        assert detector is self and len(sizes) == len(tasks)
        self.passes, self.asked = self.passes + len(sizes), tasks
        self.maps += sum(len(maps) for maps in variants.maps.values())
        return [
            self._detect({s: maps[variants.at[s][k]] for s, maps in variants.maps.items()}, size)
            for k, size in enumerate(sizes)
        ]

    def _detect(self, pyramid, size) -> dict[str, torch.Tensor]:
        image_id = self.features.image_ids[size.original[1] - SIDE]
        error = sum(self.blur[s] * (pyramid[s] - self.features.scale(image_id, s)).abs().mean().item() for s in SCALES)
        rng = np.random.default_rng(image_id)
        objects = self.coco["detection"].imgToAnns[image_id]
        persons = {a["id"]: a["keypoints"] for a in self.coco["keypoints"].imgToAnns[image_id]}
        none = np.zeros(3 * len(shapes.KEYPOINTS))
        boxes = np.array([a["bbox"] for a in objects], dtype=float)
        boxes[:, 2:] += boxes[:, :2]
        boxes += rng.normal(size=boxes.shape) * (0.5 + error)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        points = np.array([persons.get(a["id"], none) for a in objects]).reshape(len(objects), -1, 3)
        points[..., :2] += rng.normal(size=points[..., :2].shape) * (0.5 + error)
        return {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor([a["category_id"] for a in objects]),
            "scores": torch.tensor(rng.uniform(size=len(objects))),
            "keypoints": torch.tensor(points),
        }


@pytest.fixture
def seer(root, features, monkeypatch) -> Seer:
    seer = Seer(root, features)
    for module in (evaluating, measuring):
        monkeypatch.setattr(module, "detect_variants", seer.detect)
    return seer


def reference_ap(coco: COCO, found: list[dict], image_ids: list[int], task: str) -> float:
    """COCOeval from end to end; NaN where nothing is to be found."""
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(found) if found else COCO(), TASKS[task])
        evaluation.params.imgIds = image_ids
        if task == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.array(shapes.OKS_SIGMAS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.nan if evaluation.stats[0] == -1 else evaluation.stats[0]


def found_in(seer: Seer, pyramids: dict[int, dict[str, torch.Tensor]], task: str) -> list[dict]:
    """Image id -> scale -> [C, H, W] to COCO's results, one image at a time."""
    return [
        result
        for image_id, pyramid in pyramids.items()
        for result in results(image_id, seer._detect(pyramid, seer.features.sizes(image_id)), task, {PERSON})
    ]


def clean_pyramids(features: Features) -> dict[int, dict[str, torch.Tensor]]:
    return {i: {s: features.scale(i, s) for s in SCALES} for i in features.image_ids}


def decoded_pyramids(path: Path, features: Features, feature_codec: FeatureCodec) -> dict[int, dict[str, torch.Tensor]]:
    records = CodedSplit(path, features)
    return {
        image_id: {s: p[k] for s, p in records.decode(ids, feature_codec).items()}
        for ids in features.batches()
        for k, image_id in enumerate(ids)
    }


def copy_of(coded: Path, folder: Path, quality: str = "q1") -> tuple[Path, Path]:
    shutil.copytree(coded / quality, folder / quality)
    shutil.copy(coded / f"{quality}.csv", folder)
    return folder / quality / "test-00000.h5", folder / f"{quality}.csv"


def change_record(path: Path) -> None:
    """As an encoder that errs would write it, checksums included."""
    with h5py.File(path, "r+") as file:
        at = file["offsets"][5]  # of the second image's first record
        file["data"][at + 4] = file["data"][at + 4] ^ 4  # doubles the upper end of the range, or halves it
