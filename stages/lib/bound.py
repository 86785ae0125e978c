"""Allocations and decoded pyramids of test -> the least joint cost that can be found, and what an additive one misses.

cost(phi) = loss(phi) + lambda' * sum_s bits_s(phi_s), per image; the joint loss is the utility that the image loses
against its uncoded pyramid with all scales at their phi at once. `oracle` takes it for the sum of single-scale losses:

    oracle --descend-> oracle_joint               the same prices, on the joint loss itself
    few qualities -> the costs of all tuples      how far both are from the least of all
    random tuples -> joint and additive loss      the assumption itself

All of it needs the labels of the evaluated images: bounds, not methods. And a bound chooses on the very coding errors
that it is scored with, which no predictor knows that does not decode. Therefore the feature maps are coded a second
time, mirrored: the images, objects and qualities are the same, the errors others. Every choice is scored on these too,
and `oracle_mirrored` is the additive choice on them, scored on the files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torchvision.models.detection import FasterRCNN

from stages.lib.accuracy import Matches, match_variants, merge
from stages.lib.allocation import least_cost, with_skipping
from stages.lib.coding import FeatureCodec
from stages.lib.evaluating import (
    Choices,
    Evaluation,
    Variant,
    bits_of,
    choices_of,
    joint_matches,
    joint_results,
    tabulate,
)
from stages.lib.features import Features
from stages.lib.loss_rate import Curves
from stages.lib.measuring import Pyramid, Truths, decoder
from stages.lib.models import DEVICE
from stages.lib.params import COARSER, SCALES, SKIPPED
from stages.lib.planes import pack, unpack
from stages.lib.prediction import Predictor
from stages.lib.shards import map_in_memory

STARTS = {"oracle_joint": "oracle", "oracle_skip_joint": "oracle_skip"}  # what descends -> from which additive choice
PRICES = STARTS | {"oracle_mirrored": "oracle"}  # bound -> the method whose lambda' it takes
BESIDE = (
    "uniform",
    "mfiba",
    "mfiba_skip",
    "mfiba_pseudo",
    "mfiba_pseudo_skip",
    *STARTS.values(),
)  # methods of the same tables
SWEEPS = 2  # over the scales
KINDS = ("any", "near", "skipping")  # of `random_tuples`
TUPLES = 6  # of each kind, for each image
SKIPPED_SHARE = 0.3  # of the scales of the last kind
ENUMERATED = 12  # images of which all tuples are measured

Loss = Callable[[np.ndarray, np.ndarray], np.ndarray]  # image ids [...], phi [..., 5] -> joint loss [...], in objects
Cost = Callable[[np.ndarray], np.ndarray]  # phi [m, t, 5] -> [m, t]: t tuples of each of m problems


class Bound(NamedTuple):
    allocation: pd.DataFrame  # of BESIDE and of the bounds; columns as `allocate`'s
    evaluation: Evaluation
    mirrored: Evaluation  # of the same choices, at the same bits
    additivity: pd.DataFrame  # image_id, kind, phi_0 .. phi_pool, bits, joint, mirrored, additive: losses, in objects
    enumeration: pd.DataFrame  # image_id, lambda_prime, additive, descent, optimum: costs, in objects


class _Part(NamedTuple):
    """What one batch of images gives; matches are of the uncoded pyramid, then of each point."""

    phi: dict[int, np.ndarray]  # image id -> [points, 5]
    matches: list[Matches]
    mirrored: list[Matches]
    additivity: pd.DataFrame
    enumeration: pd.DataFrame


def bound(
    detector: FasterRCNN,
    features: Features,
    coded: Path,
    lambdas: dict[str, float],
    feature_codec: FeatureCodec,
    predictor: Predictor,
    allocation: pd.DataFrame,
    curves: Curves,
    truth: Truths,
    names: dict[str, str],
    resamples: int,
    seed: int,
) -> Bound:
    """Allocation and curves of the split of `features` -> all that this module measures. `names`: task, codec."""
    task, decode = names["task"], decoder(features, coded, list(lambdas), feature_codec)
    levels = [feature_codec.codec.level(lmbda) for lmbda in lambdas.values()]
    beside = allocation[allocation["method"].isin(BESIDE)]
    choices = choices_of(beside)
    price = beside.groupby(["method", "point"])["lambda_prime"].first()[choices.points].to_numpy()
    bounds = [(name, p) for name, method in PRICES.items() for p in points_of(choices, method)]
    points = [*choices.points, *((name, choices.points[p][1]) for name, p in bounds)]
    all_prices = np.concatenate([price, price[[p for _, p in bounds]]])
    labelled = curves.image_ids[curves.labelled]  # the others have nothing to lose
    enumerated = labelled[:: -(-len(labelled) // ENUMERATED)]

    def study(image_ids: list[int]) -> _Part:
        decoded = decode(image_ids)
        mirrored = [*(coded_mirrored(decoded[-1], level, feature_codec) for level in levels), decoded[-1]]
        args = predictor, image_ids, features, truth

        def passes(pyramids: list[Pyramid], variants: list[Variant]) -> dict[Variant, list[dict]]:
            return joint_results(detector, pyramids, *args, dict.fromkeys(variants, {task}))[task]

        loss, loss_mirrored = (
            joint_loss(partial(passes, pyramids), truth, task, len(levels)) for pyramids in (decoded, mirrored)
        )
        joint = descend_points(choices, price, image_ids, curves, loss)
        other = choose_on(loss_mirrored, image_ids, price[points_of(choices, "oracle")], curves)
        phi = {i: np.concatenate([choices.phi[i], joint[i], other[i]]) for i in image_ids}
        matches, matches_mirrored = (
            joint_matches(detector, maps, *args, {task: Choices(points, phi)})[task] for maps in (decoded, mirrored)
        )
        return _Part(
            phi,
            matches,
            matches_mirrored,
            additivity(np.intersect1d(image_ids, labelled), curves, loss, loss_mirrored, seed),
            enumerate_tuples(np.intersect1d(image_ids, enumerated), all_prices[len(price) :], curves, loss),
        )

    parts = map_in_memory(study, list(features.batches()), f"bound {task}")
    phi = {i: of_image for part in parts for i, of_image in part.phi.items()}
    bits = bits_of(coded, list(lambdas), features)

    def evaluated(matches: list[list[Matches]]) -> Evaluation:
        merged = [merge(list(point)) for point in zip(*matches, strict=True)]
        by_point = dict(zip([("none", 0), *points], merged, strict=True))
        return tabulate(Choices(points, phi), by_point.items(), bits, features, names, resamples, seed)

    return Bound(
        allocation_of(points, all_prices, phi),
        evaluated([part.matches for part in parts]),
        evaluated([part.mirrored for part in parts]),
        pd.concat([part.additivity for part in parts]).sort_values("image_id", kind="stable"),
        pd.concat([part.enumeration for part in parts]).sort_values("image_id", kind="stable"),
    )


def coded_mirrored(clean: Pyramid, level: int, feature_codec: FeatureCodec) -> Pyramid:
    """What a receiver would have, were every feature map turned upside down before coding and back after decoding.

    Of all turns this one changes the error of the learned codecs least, which have seen no turned maps.
    """
    codec, packing, channels = feature_codec
    received = {}
    for scale, maps in clean.items():
        planes, ranges = zip(*(pack(turned, scale, packing) for turned in maps.flip(2).cpu()), strict=True)
        coded = codec.encode(torch.stack(planes).to(DEVICE), level)
        turned = [unpack(c.plane.cpu(), r, scale, channels, packing) for c, r in zip(coded, ranges, strict=True)]
        received[scale] = torch.stack(turned).flip(2).to(DEVICE)
    return received


def joint_loss(
    passes: Callable[[list[Variant]], dict[Variant, list[dict]]], truth: Truths, task: str, uncoded: int
) -> Loss:
    """`joint_results` of a batch of images -> their joint loss at any phi; each variant passes the heads once.

    loss(phi) = utility(uncoded, ..., uncoded) - utility(phi); below 0 where coding helps, by chance.
    """
    known: dict[Variant, float] = {}  # utilities

    def measure(variants: set[Variant]) -> None:
        unknown = sorted(variants - known.keys())
        found = passes(unknown) if unknown else {}
        for image_id in {image_id for image_id, _ in found}:
            mine = [variant for variant in found if variant[0] == image_id]
            matches = match_variants(truth.coco[task], [found[variant] for variant in mine], [image_id], task)
            known.update({variant: match.utility.item() for variant, match in zip(mine, matches, strict=True)})

    def loss(image_ids: np.ndarray, phi: np.ndarray) -> np.ndarray:
        ids, tuples = image_ids.ravel().tolist(), phi.reshape(-1, len(SCALES)).tolist()
        coded = [(i, tuple(chosen)) for i, chosen in zip(ids, tuples, strict=True)]
        clean = [(i, (uncoded,) * len(SCALES)) for i in ids]
        measure({*coded, *clean})
        lost = [known[before] - known[after] for before, after in zip(clean, coded, strict=True)]
        return np.array(lost).reshape(image_ids.shape)

    return loss


def cost_of(image_ids: np.ndarray, price: np.ndarray, curves: Curves, loss: Loss) -> Cost:
    """m problems, each an image and the price of a bit, [m] and [m] -> cost = loss + price * bits of their tuples."""
    bits = curves.bits[_rows(curves, image_ids)]

    def cost(phi: np.ndarray) -> np.ndarray:
        ids = np.broadcast_to(image_ids[:, None], phi.shape[:2])
        return loss(ids, phi) + price[:, None] * bits_at(bits, phi)

    return cost


def descend(start: np.ndarray, options: np.ndarray, cost: Cost) -> np.ndarray:
    """phi [m, 5] -> phi [m, 5] of no higher cost, by coordinate descent, all problems at once: full passes.

    Scale after scale takes the cheapest of its phi, the two next to it in `options` (rising) and the lowest of them,
    the others as they are; SWEEPS times over the scales, or until nothing changes. Of equal costs phi stays.
    """
    phi = start
    for _ in range(SWEEPS):
        before = phi
        for s in range(len(SCALES)):
            rank = np.searchsorted(options, phi[:, s])[:, None] + [0, -1, 1, -len(options)]
            trials = np.repeat(phi[:, None], 4, 1)  # [m, 4, 5]
            trials[:, :, s] = options[rank.clip(0, len(options) - 1)]
            phi = trials[np.arange(len(phi)), cost(trials).argmin(1)]
        if (phi == before).all():
            break
    return phi


def descend_points(
    choices: Choices, price: np.ndarray, image_ids: list[int], curves: Curves, loss: Loss
) -> dict[int, np.ndarray]:
    """Choices of these images and lambda' at all points -> image id -> phi of the points of STARTS, [points, 5]."""
    k, found = curves.bits.shape[2], []
    for name in STARTS.values():
        at = points_of(choices, name)
        cost = cost_of(np.repeat(image_ids, len(at)), np.tile(price[at], len(image_ids)), curves, loss)
        start = np.concatenate([choices.phi[i][at] for i in image_ids])
        options = np.arange(SKIPPED if name.endswith("_skip") else 0, k)
        found.append(descend(start, options, cost).reshape(len(image_ids), len(at), len(SCALES)))
    return dict(zip(image_ids, np.concatenate(found, 1), strict=True))


def choose_on(loss: Loss, image_ids: list[int], price: np.ndarray, curves: Curves) -> dict[int, np.ndarray]:
    """`least_cost` on this loss of single scales, the others uncoded -> image id -> phi at each price [points, 5]."""
    n, _, k = len(image_ids), *curves.bits.shape[1:]
    single = np.full((len(SCALES), k, len(SCALES)), k)
    for s in range(len(SCALES)):
        single[s, :, s] = np.arange(k)
    ids = np.broadcast_to(np.array(image_ids)[:, None, None], (n, len(SCALES), k))
    losses, bits = loss(ids, np.broadcast_to(single, (n, *single.shape))), curves.bits[_rows(curves, image_ids)]
    choose = least_cost(losses, bits)
    phi = np.stack([choose(p) for p in price], 1).astype(int)  # [n, points, 5]
    return dict(zip(image_ids, phi, strict=True))


def enumerate_tuples(image_ids: np.ndarray, price: np.ndarray, curves: Curves, loss: Loss) -> pd.DataFrame:
    """The costs of all tuples of three options: the least, and those of the additive choice and the descent from it.

    Options: SKIPPED and two qualities; prices: three of those given. Columns as in `Bound`.
    """
    k, prices = curves.bits.shape[2], np.unique(price)
    options = np.array([SKIPPED, k // 4, 3 * k // 4])
    tuples = np.array(list(product(options, repeat=len(SCALES))))  # [243, 5]
    few = prices[len(prices) * np.arange(1, 4) // 4]
    ids, price = np.repeat(image_ids, len(few)), np.tile(few, len(image_ids))
    rows, sent = _rows(curves, ids), options[1:]
    restricted = (
        curves.loss[rows][..., sent],
        curves.loss_skipped[rows][..., options - SKIPPED],
        curves.bits[rows][..., sent],
    )
    start = options[with_skipping(*restricted, price[:, None, None]).astype(int) - SKIPPED]
    cost = cost_of(ids, price, curves, loss)
    additive, descent = (cost(phi[:, None])[:, 0] for phi in (start, descend(start, options, cost)))
    optimum = cost(np.broadcast_to(tuples, (len(ids), *tuples.shape))).min(1)
    return pd.DataFrame(
        {"image_id": ids, "lambda_prime": price, "additive": additive, "descent": descent, "optimum": optimum}
    )


def additivity(image_ids: np.ndarray, curves: Curves, loss: Loss, mirrored: Loss, seed: int) -> pd.DataFrame:
    """Random tuples of each image -> joint losses beside the sum of single-scale losses. Columns as in `Bound`."""
    k, n = curves.bits.shape[2], len(image_ids)
    rngs = [np.random.default_rng([seed, image_id]) for image_id in image_ids]  # whatever the batch
    phi = np.array([random_tuples(rng, k) for rng in rngs], int).reshape(-1, len(SCALES))
    ids = np.repeat(image_ids, len(KINDS) * TUPLES)
    rows = _rows(curves, ids)
    return pd.DataFrame(
        {"image_id": ids, "kind": np.tile(np.repeat(KINDS, TUPLES), n)}
        | {f"phi_{scale}": phi[:, s] for s, scale in enumerate(SCALES)}
        | {
            "bits": bits_at(curves.bits[rows], phi),
            "joint": loss(ids, phi),
            "mirrored": mirrored(ids, phi),
            "additive": additive_loss(curves.loss[rows], curves.loss_skipped[rows], phi),
        }
    )


def random_tuples(rng: np.random.Generator, k: int) -> np.ndarray:
    """TUPLES of each kind, [kinds * TUPLES, 5]: independent qualities; neighbours of one; the same, some not sent."""
    shape = TUPLES, len(SCALES)
    near, other = (rng.integers(0, k, (2, TUPLES, 1)) + rng.integers(-1, 2, (2, *shape))).clip(0, k - 1)
    skipping = np.where(rng.random(shape) < SKIPPED_SHARE, SKIPPED, other)
    return np.concatenate([rng.integers(0, k, shape), near, skipping])


def additive_loss(loss: np.ndarray, loss_skipped: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """sum_s loss_s(phi_s) of m tuples [m, 5], as `with_skipping` has it; loss [m, 5, K], loss_skipped [m, 5, 1 + K]."""
    total, at = np.zeros(len(phi)), np.arange(len(phi))
    for s, scale in enumerate(SCALES):
        coarser = phi[:, SCALES.index(COARSER.get(scale, scale))]  # scale 3 has none, and one loss if it is skipped
        total += np.where(phi[:, s] == SKIPPED, loss_skipped[at, s, coarser - SKIPPED], loss[at, s, phi[:, s]])
    return total


def bits_at(bits: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Bits [m, 5, K] of the records, phi [m, ..., 5] -> bits of the tuples [m, ...]; a skipped scale has none."""
    at = np.arange(len(phi)).reshape(-1, *[1] * (phi.ndim - 1))
    return np.where(phi == SKIPPED, 0, bits[at, np.arange(len(SCALES)), phi]).sum(-1)


def allocation_of(points: list[tuple[str, int]], price: np.ndarray, phi: dict[int, np.ndarray]) -> pd.DataFrame:
    """Choices at every point -> the table that `allocate` would write."""
    chosen = np.stack(list(phi.values()), 1)  # [points, n, 5]
    methods, numbers = zip(*points, strict=True)
    of_point: dict[str, Any] = {"method": methods, "point": numbers, "lambda_prime": price}
    return pd.DataFrame(
        {name: np.repeat(values, chosen[0].size) for name, values in of_point.items()}
        | {"image_id": np.tile(np.repeat(list(phi), len(SCALES)), len(points))}
        | {"scale": np.tile(SCALES, len(points) * len(phi)), "phi": chosen.ravel()}
    )


def points_of(choices: Choices, method: str) -> list[int]:
    return [p for p, (name, _) in enumerate(choices.points) if name == method]


def _rows(curves: Curves, image_ids: np.ndarray | list[int]) -> np.ndarray:
    return np.searchsorted(curves.image_ids, image_ids)  # rising
