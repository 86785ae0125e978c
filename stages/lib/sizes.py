"""Evaluated methods + ground truth -> what they save, and what scales are worth, where objects are small or large."""

from __future__ import annotations

import numpy as np
import pandas as pd
from pycocotools.coco import COCO

from stages.lib.accuracy import Matches
from stages.lib.comparing import ANCHOR, UNCODED, compare
from stages.lib.evaluating import Choices, tabulate
from stages.lib.features import Features
from stages.lib.params import SCALES

SIZES = ("small", "medium", "large")
METHODS = ("static", "mfiba", "mfiba_pseudo", "mfiba_skip", "mfiba_pseudo_skip", "oracle")


def object_areas(truth: COCO, image_ids: np.ndarray) -> np.ndarray:
    """[n] median area of the objects of each image, as a share of the image; NaN without any. Crowds do not count."""
    areas = []
    for image in map(truth.imgs.get, image_ids.tolist()):
        found = [
            item["area"] / (image["height"] * image["width"])
            for item in truth.imgToAnns[image["id"]]
            if not item["iscrowd"] and item.get("num_keypoints", 1)
        ]
        areas.append(np.median(found) if found else np.nan)
    return np.array(areas)


def by_size(areas: np.ndarray) -> dict[str, np.ndarray]:
    """[n] areas -> a mask [n] for each of SIZES: the terciles of the images that have objects."""
    order = np.argsort(areas, kind="stable")[: np.isfinite(areas).sum()]  # NaN is last
    places = np.arange(len(areas))
    return {name: np.isin(places, part) for name, part in zip(SIZES, np.array_split(order, len(SIZES)), strict=True)}


def of_images(matches: Matches, keep: np.ndarray) -> Matches:
    """Matches of the images of the mask [n_images] alone: `accuracy.merge` the other way round."""
    there = keep[matches.image]
    position = np.cumsum(keep) - 1
    return Matches(
        matches.image_ids[keep],
        position[matches.image[there]],
        matches.category[there],
        matches.score[there],
        matches.matched[there],
        matches.ignored[there],
        n_positive=matches.n_positive[keep],
        utility=matches.utility[keep],
    )


def size_table(
    choices: Choices,
    matches: dict[tuple[str, int], Matches],
    bits: dict[int, np.ndarray],
    features: Features,
    names: dict[str, str],
    resamples: int,
    seed: int,
    areas: np.ndarray,
    importance: dict[str, np.ndarray],
) -> pd.DataFrame:
    """What `evaluate` gives, `object_areas` [n], images in rising id -> a row for each of SIZES, quantity and name.

    Columns size, n_images, area_low, area_high, quantity, name, value, ci_low, ci_high. Quantity bd_rate: of each of
    METHODS (name) against `uniform`, over these images alone; or one of `importance`, [n, 5], NaN where unknown: the
    mean of each scale (name), without interval.
    """
    wanted = [i for i, (method, _) in enumerate(choices.points) if method in (ANCHOR, *METHODS)]
    part = Choices([choices.points[i] for i in wanted], {i: phi[wanted] for i, phi in choices.phi.items()})
    rank = matches[UNCODED, 0].image_ids.argsort().argsort()  # a batch has images of one padded size: other orders
    areas, importance = areas[rank], {quantity: values[rank] for quantity, values in importance.items()}
    rows = []
    for size, keep in by_size(areas).items():
        if not keep.any():
            continue
        of_size = {point: of_images(matches[point], keep) for point in [(UNCODED, 0), *part.points]}
        about = size, int(keep.sum()), areas[keep].min(), areas[keep].max()
        compared = compare(*tabulate(part, of_size.items(), bits, features, names, resamples, seed))
        found = compared.bd.set_index("method")
        for method, *numbers in found.loc[list(METHODS), ["bd_rate_pchip", "ci_low", "ci_high"]].itertuples():
            rows.append((*about, "bd_rate", method, *numbers))
        for quantity, values in importance.items():
            for scale, value in zip(SCALES, np.nanmean(values[keep], 0), strict=True):
                rows.append((*about, quantity, scale, value, np.nan, np.nan))
    named = ["size", "n_images", "area_low", "area_high", "quantity", "name", "value", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=named)
