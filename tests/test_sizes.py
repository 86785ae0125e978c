"""Images by the size of their objects."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
from pycocotools.coco import COCO
from pytest import approx

from stages.lib import sizes
from stages.lib.accuracy import Matches, average_precision, merge
from stages.lib.evaluating import Choices


def random_matches(n: int, seed: int) -> Matches:
    rng = np.random.default_rng(seed)
    image, category = rng.integers(0, n, 80), rng.integers(0, 3, 80)
    order = np.lexsort((image, category))
    return Matches(
        np.arange(n) * 2,
        image[order],
        category[order],
        rng.permutation(80) / 80,
        rng.random((80, 10)) < 0.5,
        rng.random((80, 10)) < 0.1,
        rng.integers(0, 5, (n, 3)),
        rng.random(n),
    )


def test_images_of_a_mask_count_as_if_the_others_had_weight_zero():
    matches = random_matches(12, 0)
    keep = np.arange(12) % 3 == 1
    part, rest = sizes.of_images(matches, keep), sizes.of_images(matches, ~keep)
    assert part.image_ids.tolist() == [2, 8, 14, 20]
    assert average_precision(part) == approx(average_precision(matches, keep[None]))
    assert average_precision(merge([part, rest])) == approx(average_precision(matches))


def test_sizes_are_terciles_of_the_median_area():
    truth = COCO()
    areas = [[10, 30, 20], [], [50], [1, 3], [40, 40], [90], [60]]
    truth.dataset = {
        "images": [{"id": i, "height": 10, "width": 20} for i in range(len(areas))],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": 100 * i + k, "image_id": i, "category_id": 1, "area": area, "iscrowd": 0}
            for i, found in enumerate(areas)
            for k, area in enumerate(found)
        ]
        + [{"id": 999, "image_id": 1, "category_id": 1, "area": 150, "iscrowd": 1}],
    }
    truth.createIndex()
    found = sizes.object_areas(truth, np.arange(len(areas)))
    assert found == approx(np.array([20, np.nan, 50, 2, 40, 90, 60]) / 200, nan_ok=True)
    groups = {name: np.flatnonzero(mask).tolist() for name, mask in sizes.by_size(found).items()}
    assert groups == {"small": [0, 3], "medium": [2, 4], "large": [5, 6]}


def test_each_size_has_its_own_images_and_a_method_like_uniform_saves_nothing():
    """Methods that choose as uniform does, but at half the bits where objects are large."""
    n, k = 12, 6
    areas = np.append(np.linspace(0.3, 0.01, n - 1), np.nan)
    rng = np.random.default_rng(0)
    luck, shared = rng.random((80, 10)), random_matches(n, 0)
    by_quality = [shared._replace(matched=luck < 0.2 + 0.12 * q, ignored=np.zeros((80, 10), bool)) for q in range(k)]
    names = ["uniform", *sizes.METHODS]
    points = [(name, q) for name in names for q in range(k)]
    levels = np.array([q + (k if name == "oracle" else 0) for name, q in points])
    phi = {i: np.repeat(levels[:, None], 5, 1) for i in shared.image_ids.tolist()}
    cost = np.geomspace(1e4, 1e6, k)
    bits = {
        i: np.tile(np.append(cost, cost * (0.5 if area > 0.23 else 1)), (5, 1))
        for i, area in zip(shared.image_ids.tolist(), areas, strict=True)
    }
    features = SimpleNamespace(sizes=lambda i: SimpleNamespace(original=(64, 64)), split="test")
    matches = {("none", 0): by_quality[-1]} | {
        point: by_quality[q % k] for point, q in zip(points, levels, strict=True)
    }
    worth = {"weight": np.tile(areas[:, None], (1, 5))}
    key = {"task": "detection", "codec": "elic"}
    args = bits, features, key, 20, 0, areas, worth
    found = sizes.size_table(Choices(points, phi), matches, *args)
    assert found.groupby("size", sort=False)["n_images"].first().to_dict() == {"small": 4, "medium": 4, "large": 3}
    rates = found[found["quantity"] == "bd_rate"].pivot(index="name", columns="size", values="value")
    assert list(found["name"].unique()[: len(sizes.METHODS)]) == list(sizes.METHODS)
    assert rates.drop("oracle").to_numpy() == approx(0, abs=1e-9)
    assert rates.loc["oracle"].to_dict() == approx({"small": 0, "medium": 0, "large": -50}, abs=0.1)
    means = found[found["quantity"] == "weight"].groupby("size")["value"].mean()
    assert means["small"] == approx(areas[7:11].mean()) and means["large"] == approx(areas[:3].mean())
    # Batches are of images of one padded size: a split's images may come in another order.
    turned = {
        p: merge([sizes.of_images(m, np.arange(n) >= 5), sizes.of_images(m, np.arange(n) < 5)])
        for p, m in matches.items()
    }
    assert turned["none", 0].image_ids.tolist() != shared.image_ids.tolist()
    again = sizes.size_table(Choices(points, phi), turned, *args)
    exact = ["size", "n_images", "area_low", "area_high", "quantity", "name"]
    pd.testing.assert_frame_equal(again[exact], found[exact])
    assert again["value"].to_numpy() == approx(found["value"].to_numpy(), abs=1e-9)
