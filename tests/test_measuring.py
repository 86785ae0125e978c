"""What is measured is the accuracy of what was decoded, and what it costs are the bytes of the files."""

import io
import shutil
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import evaluate, write_coded, write_features
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pytest import approx

from stages.lib import evaluating, measuring, models, shapes
from stages.lib.accuracy import average_precision, match, merge, results
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.coding import CodedSplit, FeatureCodec, pyramid_shapes
from stages.lib.evaluating import bits_of, choices_of, tabulate
from stages.lib.features import Features
from stages.lib.files import read_csv, write_csv
from stages.lib.learned import Coded
from stages.lib.measuring import single_scale_losses, truths, uncoded_accuracies
from stages.lib.models import Sizes
from stages.lib.params import COARSER, SCALES, SKIPPED, TASKS
from stages.lib.planes import Packing
from stages.lib.prediction import Predictor
from stages.lib.schema import InputError

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

    def encode(self, planes: torch.Tensor, level: int) -> list[Coded]:
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

    def detect(self, detector, variants, sizes, tasks) -> list[dict[str, torch.Tensor]]:
        assert detector is self and len(sizes) == len(tasks)
        self.passes += len(sizes)
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


# ---- one coded scale at a time


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
    assert (losses[["drop", "loss"]] == 0).all(axis=None) and (losses["clean"] == losses["coded"]).all()
    assert losses["clean"].between(0.05, 0.999).any()  # a detector that is neither blind nor perfect


KEY = ["task", "image_id", "scale"]


def test_each_drop_and_loss_is_that_of_the_image_alone(seer, features, feature_codec, predictor, coded):
    truth = truths({task: seer.coco[task] for task in ("detection", "keypoints")})
    own = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    assert own.columns.tolist() == ["task", "split", "image_id", "scale", "clean", "utility", "loss_skipped"]
    parts = coded, list(QUALITIES), feature_codec, predictor
    losses = single_scale_losses(seer, features, *parts, truth, own)(features.image_ids)
    assert losses["quality"].unique().tolist() == list(QUALITIES)
    losses = losses[losses["quality"] == "q1"]
    measured = ["clean", "coded", "drop", "loss", "loss_skipped"]
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
                assert (task, i) not in lines.index.droplevel("scale")
                continue
            for scale in SCALES:
                value = reference_ap(coco, found(**{scale: decoded[i][scale]}), [i], task)
                line, own_line = lines.loc[(task, i, scale)], own_lines.loc[(task, i, scale)]
                assert (line["clean"], line["coded"]) == approx((uncoded, value), abs=1e-12)
                assert line["drop"] == line["clean"] - line["coded"]
                assert line["loss"] == approx(utility() - utility(**{scale: decoded[i][scale]}), abs=1e-12)
                assert own_line[["clean", "utility"]].tolist() == approx([uncoded, utility()], abs=1e-12)
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
    assert left_out > 0 and len(lines) == len(SCALES) * (2 * len(features.image_ids) - left_out)
    assert losses[["drop", "loss", "loss_skipped"]].abs().max().min() > 0.05 and set(losses["split"]) == {"test"}


def test_qualities_measured_together_have_the_losses_that_each_has_alone(seer, features, feature_codec, coded):
    together = measure(seer, features, feature_codec, coded, list(QUALITIES))
    alone = [measure(seer, features, feature_codec, coded, [quality]) for quality in QUALITIES]
    pd.testing.assert_frame_equal(together, pd.concat(alone, ignore_index=True))
    assert together.groupby("quality")["loss"].sum().is_monotonic_decreasing


def test_maps_that_variants_have_in_common_pass_the_heads_once(seer, features, feature_codec, coded):
    uncoded_maps = (1 + 1) * len(SCALES)  # of each image: clean, and predicted, or nothing
    coded_maps = len(SCALES) + len(QUALITIES) * (len(SCALES) + len(COARSER))
    measure(seer, features, feature_codec, coded, list(QUALITIES))
    assert seer.maps == len(features.image_ids) * (uncoded_maps + coded_maps)


def copy_of(coded: Path, folder: Path, quality: str = "q1") -> tuple[Path, Path]:
    shutil.copytree(coded / quality, folder / quality)
    shutil.copy(coded / f"{quality}.csv", folder)
    return folder / quality / "test-00000.h5", folder / f"{quality}.csv"


def measure(seer, features, feature_codec, folder, qualities=("q1",)):
    truth, predictor = truths({"detection": seer.coco["detection"]}), seeded_predictor()
    uncoded = uncoded_accuracies(seer, features, predictor, truth, features.image_ids)
    parts = folder, list(qualities), feature_codec, predictor, truth, uncoded
    return single_scale_losses(seer, features, *parts)(features.image_ids)


def change_record(path: Path) -> None:
    """As an encoder that errs would write it, checksums included."""
    with h5py.File(path, "r+") as file:
        at = file["offsets"][5]  # of the second image's first record
        file["data"][at + 4] = file["data"][at + 4] ^ 4  # doubles the upper end of the range, or halves it


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


def test_evaluate_refuses_a_changed_coded_file(seer, features, feature_codec, coded, allocation, tmp_path):
    for quality in QUALITIES:
        copy_of(coded, tmp_path, quality)
    change_record(tmp_path / "q2" / "test-00000.h5")
    with pytest.raises(InputError, match=f"q2.*image {features.image_ids[1]}, scale 0"):
        points_of(seer, features, feature_codec, tmp_path, allocation, "detection")


def test_a_ledger_of_other_images_is_refused(seer, features, feature_codec, coded, tmp_path):
    _, ledger = copy_of(coded, tmp_path)
    write_csv(ledger, read_csv(ledger).iloc[:-1])
    with pytest.raises(InputError, match="q1"):
        measure(seer, features, feature_codec, tmp_path)


# ---- allocations


def allocation_of(image_ids: list[int], **methods: list) -> pd.DataFrame:
    """method -> a list of points, each a function of (position of the image, position of the scale)."""
    rows = [
        (method, point, 1.0, image_id, scale, float(phi(k, s)))
        for method, points in methods.items()
        for point, phi in enumerate(points)
        for k, image_id in enumerate(image_ids)
        for s, scale in enumerate(SCALES)
    ]
    return pd.DataFrame(rows, columns=["method", "point", "lambda_prime", "image_id", "scale", "phi"])


def test_choices_keep_the_tables_order_of_points_and_the_scales_own():
    table = allocation_of([30, 4], uniform=[lambda k, s: 0, lambda k, s: 1], best=[lambda k, s: 10 * k + s])
    shuffled = pd.concat([part.sample(frac=1, random_state=1) for _, part in table.groupby("method", sort=False)])
    for rows in (table, shuffled):
        choices = choices_of(rows)
        assert sorted(choices.points[:2]) == [("uniform", 0), ("uniform", 1)] and choices.points[2] == ("best", 0)
        at = [choices.points.index(p) for p in (("uniform", 0), ("uniform", 1), ("best", 0))]
        assert choices.phi[30][at].tolist() == [[0] * 5, [1] * 5, [0, 1, 2, 3, 4]]
        assert choices.phi[4][at].tolist() == [[0] * 5, [1] * 5, [10, 11, 12, 13, 14]]
    assert choices_of(table).points == [("uniform", 0), ("uniform", 1), ("best", 0)]


def test_an_allocation_without_a_choice_for_some_scale_is_refused():
    table = allocation_of([30, 4], uniform=[lambda k, s: 0])
    with pytest.raises(InputError, match="image 4.*uniform"):
        choices_of(table.iloc[:-1])


@pytest.fixture
def allocation(image_ids) -> pd.DataFrame:
    return allocation_of(
        image_ids,
        uniform=[lambda k, s, q=q: q for q in range(3)],
        mixed=[lambda k, s: (k + s) % 3, lambda k, s: 2 if s == 1 else 0],
        skipping=[lambda k, s: SKIPPED, lambda k, s: (k + s) % 4 + SKIPPED, lambda k, s: 1 if s == 3 else SKIPPED],
        copied=[lambda k, s: 1],
    )


def points_of(seer, features, feature_codec, coded, allocation, task, resamples=20):
    truth, predictor = truths({task: seer.coco[task]}), seeded_predictor()
    parts = coded, list(QUALITIES), feature_codec, predictor
    with TemporaryDirectory() as folder:
        evaluated = evaluate(Path(folder), features, {task: allocation}, seer, *parts, truth)
    choices, matches = evaluated[task]
    bits = bits_of(coded, list(QUALITIES), features)
    names = {"task": task, "codec": "elic"}
    return tabulate(choices, matches.items(), bits, features, names, resamples, 0)


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_points_are_those_of_pycocotools_and_of_the_files(
    seer, features, feature_codec, predictor, coded, allocation, task
):
    points, _ = points_of(seer, features, feature_codec, coded, allocation, task)
    assert points.columns.tolist() == [
        *("task", "codec", "method", "point", "n_images", "bits_per_image", "bpp"),
        *("accuracy", "accuracy_name", "split"),
    ]
    keys = [("none", 0), ("uniform", 0), ("uniform", 1), ("uniform", 2), ("mixed", 0), ("mixed", 1)]
    keys += [("skipping", 0), ("skipping", 1), ("skipping", 2), ("copied", 0)]
    assert list(zip(points["method"], points["point"], strict=True)) == keys
    assert (points["n_images"] == 6).all() and set(points["split"]) == {"test"}
    qualities = [decoded_pyramids(coded / q, features, feature_codec) for q in QUALITIES]
    clean, coco, ids = clean_pyramids(features), seer.coco[task], features.image_ids
    pixels = sum(SIDE * (SIDE + k) for k in range(6))
    bits = []
    for q in QUALITIES:
        with h5py.File(coded / q / "test-00000.h5") as file:
            assert file["image_ids"][:].tolist() == ids
            bits.append(8 * np.diff(file["offsets"][:]).reshape(6, 5))
    for _, line in points.iterrows():
        if line["method"] == "none":
            pyramids, sent = clean, 0
        else:
            table = allocation[(allocation["method"] == line["method"]) & (allocation["point"] == line["point"])]
            phi = table.pivot(index="image_id", columns="scale", values="phi").astype(int)
            pyramids, sent = {}, 6 * 8 * FRAME_BYTES
            for k, i in enumerate(ids):
                received = {s: qualities[phi.loc[i, s]][i][s][None] for s in SCALES if phi.loc[i, s] != SKIPPED}
                sent += sum(bits[phi.loc[i, s]][k, SCALES.index(s)] for s in received)
                whole = predictor.complete(received, (1, *clean[i]["3"].shape))
                pyramids[i] = {s: maps[0] for s, maps in whole.items()}
        assert line["bits_per_image"] == approx(sent / 6)
        assert line["bpp"] == approx(sent / pixels)
        assert line["accuracy"] == approx(reference_ap(coco, found_in(seer, pyramids, task), ids, task), abs=1e-12)
    accuracy = points.set_index(["method", "point"])["accuracy"]
    assert accuracy["none", 0] > accuracy["uniform", 2] > accuracy["uniform", 0] > 0


def test_tasks_evaluated_together_have_the_points_that_each_has_alone(
    seer, features, feature_codec, coded, allocation, tmp_path
):
    tasks = ("detection", "keypoints")
    fewer = {"detection": allocation, "keypoints": allocation[allocation["method"] != "mixed"]}
    truth = truths({task: seer.coco[task] for task in tasks})
    parts = seer, coded, list(QUALITIES), feature_codec, seeded_predictor()
    together = evaluate(tmp_path, features, fewer, *parts, truth)
    for task in tasks:
        alone = evaluate(tmp_path, features, {task: fewer[task]}, *parts, truths({task: seer.coco[task]}))
        assert together[task][0].points == alone[task][0].points
        for point, matches in alone[task][1].items():
            for mine, other in zip(together[task][1][point], matches, strict=True):
                assert np.array_equal(mine, other)


def test_resamples_of_equal_choices_are_equal(seer, features, feature_codec, coded, allocation):
    points, bootstrap = points_of(seer, features, feature_codec, coded, allocation, "detection")
    assert bootstrap.columns.tolist() == ["method", "point", "resample", "bits_per_image", "accuracy"]
    parts = {key: rows.reset_index(drop=True) for key, rows in bootstrap.groupby(["method", "point"])}
    assert len(parts) == len(points) and all(p["resample"].tolist() == list(range(20)) for p in parts.values())
    columns = ["bits_per_image", "accuracy"]
    assert parts["uniform", 1][columns].equals(parts["copied", 0][columns])  # the same images were drawn
    assert (parts["none", 0]["bits_per_image"] == 0).all()
    for _, line in points.iterrows():
        rows = parts[line["method"], line["point"]]
        assert rows["bits_per_image"].min() <= line["bits_per_image"] <= rows["bits_per_image"].max()


def test_equal_choices_pass_the_heads_once(seer, features, feature_codec, coded, image_ids):
    table = allocation_of(image_ids, uniform=[lambda k, s: 1], copied=[lambda k, s: 1] * 3)
    points_of(seer, features, feature_codec, coded, table, "detection")
    assert seer.passes == 2 * len(image_ids)  # uncoded and q2


def test_passes_of_any_size_give_the_same_points(seer, features, feature_codec, coded, allocation, monkeypatch):
    expected, _ = points_of(seer, features, feature_codec, coded, allocation, "detection")
    monkeypatch.setattr(models, "PIXELS_PER_PASS", 4 * SIDE**2)
    pd.testing.assert_frame_equal(points_of(seer, features, feature_codec, coded, allocation, "detection")[0], expected)


def test_bits_of_other_images_than_the_features_are_refused(features, coded, tmp_path):
    for quality in QUALITIES:
        copy_of(coded, tmp_path, quality)
    write_csv(tmp_path / "q2.csv", read_csv(coded / "q2.csv").iloc[:-5])
    with pytest.raises(InputError, match="q2.csv"):
        bits_of(tmp_path, list(QUALITIES), features)


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_merged_matches_are_those_of_one_call(seer, features, image_ids, task):
    coco = seer.coco[task]
    order = [image_ids[k] for k in (4, 0, 5, 2, 1, 3)]
    clean = clean_pyramids(features)
    found = found_in(seer, {i: clean[i] for i in order}, task)
    parts = [match(coco, found, part, task) for part in (order[:1], order[1:4], order[4:])]
    merged, whole = merge(parts), match(coco, found, order, task)
    for name in whole._fields:
        assert np.array_equal(getattr(merged, name), getattr(whole, name)), name
    assert average_precision(merged)[0] == average_precision(whole)[0] > 0
