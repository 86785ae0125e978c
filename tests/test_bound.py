"""The bound of coded images: the loss of all scales together, evaluated as any allocation."""

import io
import zlib
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import evaluate, write_coded, write_features
from pycocotools.coco import COCO
from pytest import approx

from stages.lib import bound as module
from stages.lib import evaluating, measuring
from stages.lib.accuracy import match
from stages.lib.bound import STARTS, allocation_of, bits_at, bound, coded_mirrored, joint_loss
from stages.lib.coding import FeatureCodec, pyramid_shapes
from stages.lib.evaluating import bits_of, tabulate
from stages.lib.features import Features
from stages.lib.learned import Coded
from stages.lib.loss_rate import Curves
from stages.lib.measuring import truths
from stages.lib.models import Sizes
from stages.lib.params import SCALES
from stages.lib.planes import Packing

BOXES = {3: [[4.0, 4, 20, 20], [30, 30, 16, 24]], 4: [[10, 8, 30, 30]], 8: [[2, 2, 8, 8], [20, 20, 30, 12]], 10: []}
PADDED, CHANNELS = (64, 64), 4
LAMBDAS = {"q1": 3.0, "q2": 10.0, "q3": 60.0}
K = 4  # the phi that stands for uncoded in the test of the joint loss


@pytest.fixture(scope="module")
def truth() -> measuring.Truths:
    coco = COCO()
    boxes = [(image_id, box) for image_id, found in BOXES.items() for box in found]
    coco.dataset = {
        "images": [{"id": image_id, "height": 64, "width": 64} for image_id in BOXES],
        "categories": [{"id": 1, "name": "kite"}],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, box) in enumerate(boxes)
        ],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return truths({"detection": coco})


def seen(image_id: int, blur: float) -> list[dict]:
    """The objects of an image, each displaced by `blur`."""
    return [
        {"image_id": image_id, "category_id": 1, "score": 0.9, "bbox": [x + blur, y, width, height]}
        for x, y, width, height in BOXES[image_id]
    ]


def test_the_joint_loss_is_the_utility_lost_and_each_variant_passes_once(truth):
    passed = []

    def passes(variants):
        passed.extend(variants)
        return {(i, phi): seen(i, 0.1 * sum(phi) - 0.5 * K) for i, phi in variants}  # phi K: in place

    loss = joint_loss(passes, truth, "detection", K)
    ids, phi = np.array([[3, 3], [8, 10]]), np.array([[[K] * 5, [0] * 5], [[0, 1, 2, 1, 0], [1] * 5]])
    found = loss(ids, phi)
    for i, chosen, value in zip(ids.ravel(), phi.reshape(-1, 5), found.ravel(), strict=True):
        blurred, clean = (
            match(truth.coco["detection"], seen(int(i), 0.1 * sum(p) - 0.5 * K), [int(i)], "detection").utility.item()
            for p in (chosen, [K] * 5)
        )
        assert value == approx(clean - blurred)
    assert found[0, 0] == 0 == found[1, 1] and found[0, 1] > 0 < found[1, 0]
    assert np.array_equal(loss(ids, phi), found) and len(passed) == len(set(passed)) == 6


class Rounding:
    """The interface of Elic: a plane is rounded to as many steps as the level says, up or down by the row."""

    def level(self, lmbda: float) -> int:
        return int(lmbda)

    def encode(self, planes: torch.Tensor, level: int, reconstruct: bool = True) -> list[Coded]:
        rows = torch.arange(planes.shape[2])[:, None] // 2 % 2  # of feature maps: quilts of 2 x 2 channels
        symbols = (planes * level + 0.8 * rows).floor().clip(0, level).byte()
        strings = [zlib.compress(s.numpy().tobytes()) for s in symbols]
        return [Coded(string, 1, 0.0, s / level) for string, s in zip(strings, symbols, strict=True)]

    def decode(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> torch.Tensor:
        symbols = [np.frombuffer(zlib.decompress(string), dtype=np.uint8).reshape(shape) for string in strings]
        return torch.from_numpy(np.stack(symbols)) / level


class UpperHalf(Rounding):
    """Loses all of a plane but its upper half."""

    def encode(self, planes: torch.Tensor, level: int) -> list[Coded]:
        kept = planes.clone()
        kept[:, :, planes.shape[2] // 2 :] = 0
        return [Coded(b"", 0, 0.0, plane) for plane in kept]


def feature_codec(codec: Rounding) -> FeatureCodec:
    packing = Packing("quilt", {s: torch.eye(CHANNELS) for s in SCALES}, {s: torch.zeros(CHANNELS) for s in SCALES})
    return FeatureCodec(codec, packing, CHANNELS)


def test_mirrored_coding_loses_the_other_half_and_turns_the_rest_back():
    torch.manual_seed(0)
    clean = {s: torch.rand(2, CHANNELS, 8, 6) + 1 for s in SCALES}
    for scale, maps in coded_mirrored(clean, 3, feature_codec(UpperHalf())).items():
        assert torch.allclose(maps[:, :, 4:], clean[scale][:, :, 4:], atol=1e-2)
        assert (maps[:, :, :4] - clean[scale][:, :, :4]).abs().mean() > 0.2


@pytest.fixture
def world(tmp_path, truth, monkeypatch) -> SimpleNamespace:
    """Four coded images, a detector that sees the worse the more a pyramid differs, and allocations of three points."""
    torch.manual_seed(0)
    clean = {i: {s: torch.randn(1, CHANNELS, *shape) for s, shape in pyramid_shapes(PADDED).items()} for i in BOXES}
    items = [("test", i, pyramid, Sizes((64, 64 + i), PADDED, PADDED)) for i, pyramid in clean.items()]
    write_features(tmp_path / "f", items)
    features, codec = Features(tmp_path / "f", "test"), feature_codec(Rounding())
    for quality, lmbda in LAMBDAS.items():
        write_coded(tmp_path, quality, [features], codec, lmbda)

    def detect(detector, variants, sizes, tasks):
        found = []
        for k, size in enumerate(sizes):
            image_id = size.original[1] - 64
            pyramid = {s: maps[variants.at[s][k]] for s, maps in variants.maps.items()}
            blur = sum((pyramid[s] - clean[image_id][s][0]).abs().mean().item() for s in SCALES)
            results = seen(image_id, 2 * blur + 30 * pyramid["2"].mean().item() ** 2)
            boxes = torch.tensor([r["bbox"] for r in results]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            found.append(
                {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=int), "scores": torch.full((len(boxes),), 0.9)}
            )
        return found

    monkeypatch.setattr(evaluating, "detect_variants", detect)
    monkeypatch.setattr(module, "ENUMERATED", 2)
    rng = np.random.default_rng(0)
    bits = np.stack(list(bits_of(tmp_path, list(LAMBDAS), features).values())).astype(float)
    loss, skipped, nothing = rng.random((4, 5, 3)) * [1, 0.5, 0.2], rng.random((4, 5, 4)), np.zeros((4, 5, 3))
    labelled = np.array([1, 1, 1, np.nan])
    curves = Curves(
        np.array(list(BOXES)), nothing, loss, skipped, labelled, bits, np.ones((4, 5)), nothing, np.zeros((4, 5, 7))
    )
    points = [(m, p) for m in ("uniform", "static", "mfiba", "oracle", "oracle_skip") for p in range(3)]
    phi = {i: rng.integers(0, 3, (15, 5)) for i in BOXES}
    allocation = allocation_of(points, np.tile([1e-2, 1e-4, 1e-6], 5), phi)
    predictor = lambda scale, coarser: torch.zeros(  # noqa: E731
        len(coarser), CHANNELS, *pyramid_shapes(PADDED)[scale]
    )
    return SimpleNamespace(
        args=(None, features, tmp_path),
        codec=(codec, predictor),
        allocation=allocation,
        curves=curves,
        names={"task": "detection", "codec": "elic"},
    )


def run(world, truth):
    return bound(*world.args, LAMBDAS, *world.codec, world.allocation, world.curves, truth, world.names, 5, 0)


def test_bounds_are_evaluated_as_any_allocation_and_cost_no_more_than_their_starts(world, truth, tmp_path):
    found = run(world, truth)
    methods = found.allocation["method"].unique().tolist()
    assert methods == [
        "uniform",
        "mfiba",
        "oracle",
        "oracle_skip",
        "oracle_joint",
        "oracle_skip_joint",
        "oracle_mirrored",
    ]
    given = world.allocation[world.allocation["method"].isin(methods)]
    keys = ["method", "point", "image_id", "scale"]
    pd.testing.assert_frame_equal(
        found.allocation.merge(given[keys]), given.reset_index(drop=True)[list(found.allocation)]
    )

    features, coded = world.args[1:]
    evaluated = evaluate(
        tmp_path, features, {"detection": found.allocation}, None, coded, list(LAMBDAS), *world.codec, truth
    )
    choices, matches = evaluated["detection"]
    bits = bits_of(coded, list(LAMBDAS), features)
    expected = tabulate(choices, matches.items(), bits, features, world.names, 5, 0)
    for mine, other in zip(found.evaluation, expected, strict=True):
        pd.testing.assert_frame_equal(mine, other)

    price = found.allocation.groupby(["method", "point"])["lambda_prime"].first()
    saved = []
    for end, start in STARTS.items():
        for p in range(3):
            before, after = (
                -matches[name, p].utility
                + price[name, p]
                * bits_at(world.curves.bits, np.stack([choices.phi[i][choices.points.index((name, p))] for i in BOXES]))
                for name in (start, end)
            )
            assert (after <= before + 1e-9).all()
            saved.append((before - after).sum())
    assert min(saved) > 0


def test_what_bound_finds_is_the_same_again_and_differs_where_coding_errors_do(world, truth):
    one, other = run(world, truth), run(world, truth)
    for a, b in zip(
        (one.allocation, *one[1], *one[2], *one[3:]), (other.allocation, *other[1], *other[2], *other[3:]), strict=True
    ):
        pd.testing.assert_frame_equal(a, b)
    assert one.evaluation.points["bits_per_image"].equals(one.mirrored.points["bits_per_image"])
    accuracy, mirrored = one.evaluation.points["accuracy"], one.mirrored.points["accuracy"]
    assert accuracy[0] == mirrored[0] and not accuracy.equals(mirrored)  # uncoded, all
    assert set(one.additivity["image_id"]) == {3, 4, 8} and set(one.enumeration["image_id"]) == {3, 8}  # labelled
    assert not one.additivity["joint"].equals(one.additivity["mirrored"])
