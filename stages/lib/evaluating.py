"""Allocations + decoded pyramids + heads -> rates and accuracies of whole allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import torch
from torchvision.models.detection import FasterRCNN

from stages.lib.accuracy import Matches, average_precision, bootstrap_weights, match_variants, merge, results
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.coding import FeatureCodec, load_codec
from stages.lib.features import Features, Shard
from stages.lib.files import create_h5, open_h5, read_csv, write_array
from stages.lib.heads import Variants, detect_variants
from stages.lib.measuring import Pyramid, Truths, decoder, ledger_column, objects_of, read_truths
from stages.lib.models import load_model
from stages.lib.params import COARSE_TO_FINE, COARSER, SCALES, SKIPPED
from stages.lib.prediction import NOTHING, Predictor
from stages.lib.prediction import load as load_predictor
from stages.lib.schema import InputError

ACCURACY_NAMES = {"detection": "box AP", "segmentation": "mask AP", "keypoints": "keypoint AP"}
POINTS_PER_READ = 16  # of Matches: few reads, flat memory
OF_DETECTIONS = ("image", "category", "score", "matched", "ignored")  # fields of Matches, with a row for each
Point = tuple[str, int]  # method, number
Variant = tuple[int, tuple[int, ...]]  # image, and phi of each scale


class Choices(NamedTuple):
    """An allocation table as arrays."""

    points: list[Point]  # in the table's order
    phi: dict[int, np.ndarray]  # image id -> quality of each scale [points, 5], SKIPPED where it is not sent


def read_allocation(file: Path, k: int) -> pd.DataFrame:
    """What `allocate` wrote for k qualities; InputError that names the file where it does not say what is sent."""
    table = read_csv(file, ["method", "point", "lambda_prime", "image_id", "scale", "phi"])
    odd = ~table["phi"].isin(range(SKIPPED, k))
    if odd.any():
        line = int(odd.argmax())
        raise InputError(
            f"{file}: line {line + 2}: phi is {table['phi'][line]}: it must be a whole number from {SKIPPED} to "
            f"{k - 1}; run allocate again"
        )
    choices_of(table, str(file))
    return table


def choices_of(allocation: pd.DataFrame, name: str = "allocation") -> Choices:
    """Raises InputError, with the name, where an image lacks a scale in a point."""
    points = list(dict.fromkeys(zip(allocation["method"], allocation["point"], strict=True)))
    number = {point: i for i, point in enumerate(points)}
    ids = allocation["image_id"].unique()
    row = {image_id: i for i, image_id in enumerate(ids)}
    scale = {name: i for i, name in enumerate(SCALES)}
    missing = SKIPPED - 1
    phi = np.full((len(ids), len(points), len(SCALES)), missing)
    at = (
        allocation["image_id"].map(row),
        [number[p] for p in zip(allocation["method"], allocation["point"], strict=True)],
        allocation["scale"].map(scale),
    )
    phi[at] = allocation["phi"].astype(int)
    for image, point, s in np.argwhere(phi == missing)[:1]:
        method = " ".join(map(str, points[point]))
        raise InputError(f"{name}: image {ids[image]}, scale {SCALES[s]} has no phi in {method}; allocate again")
    return Choices(points, {int(image_id): phi[i] for image_id, i in row.items()})


class Evaluation(NamedTuple):
    """`points` has the columns of rd_points.csv; `bootstrap` the same points for resamples of the images."""

    points: pd.DataFrame
    bootstrap: pd.DataFrame


def evaluator(
    detector: FasterRCNN,
    features: Features,
    coded: Path,
    qualities: list[str],
    feature_codec: FeatureCodec,
    predictor: Predictor,
    choices: dict[str, Choices],
    truth: Truths,
) -> Callable[[list[int], Path], None]:
    """What writes a file of Matches for some images: of every operating point, from jointly decoded pyramids.

    Each image is decoded once at every quality, and every scale taken at the quality that the method chose, or
    predicted; equal choices of several methods pass the heads once. Point ("none", 0) is the uncoded pyramid.
    """
    decode = decoder(features, coded, qualities, feature_codec)

    def measure(image_ids: list[int], path: Path) -> None:
        parts = [
            joint_matches(detector, decode(batch), predictor, batch, features, truth, choices)
            for batch in features.batches(image_ids)
        ]
        with create_h5(path) as file:
            for task in choices:
                points = [merge(list(point)) for point in zip(*(part[task] for part in parts), strict=True)]
                write_matches(file.create_group(task), points)

    return measure


def load_evaluator(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    codec: Path,
    coded: Path,
    described: dict[str, Any],
    qualities: list[str],
    choices: dict[str, Choices],
) -> Callable[[Shard, Path], None]:
    """`evaluator` of a shard, from files: `described` is models.<name> of params.yaml."""
    evaluate = evaluator(
        load_model(weights, described),
        Features(features, "test"),
        coded,
        qualities,
        load_codec(codec),
        load_predictor(prediction),
        choices,
        read_truths(splits, "test", list(choices)),
    )
    return lambda shard, path: evaluate(shard.image_ids, path)


def write_matches(group: h5py.Group, points: list[Matches]) -> None:
    """Matches of the same images at every point -> arrays of all points, one behind the other."""
    write_array(group, "image_ids", points[0].image_ids)
    write_array(group, "n_positive", points[0].n_positive)
    write_array(group, "utility", np.stack([point.utility for point in points]))
    offsets = np.cumsum([0, *(len(point.image) for point in points)])
    write_array(group, "offsets", offsets)
    rows = max(1, POINTS_PER_READ * int(offsets[-1]) // len(points))  # about what one read takes
    for name in OF_DETECTIONS:
        write_array(group, name, np.concatenate([getattr(point, name) for point in points]), rows)


def read_matches(
    paths: list[Path], task: str, points: list[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], Matches]]:
    """Files of `evaluator` -> every point with the matches of all images, one point after the other."""
    points = [("none", 0), *points]
    for numbers in _chunks(list(range(len(points))), POINTS_PER_READ):
        parts = [_read_points(path, task, numbers) for path in paths]
        for number, *of_point in zip(numbers, *parts, strict=True):
            yield points[number], merge(of_point)


def _read_points(path: Path, task: str, numbers: list[int]) -> list[Matches]:
    first, last = numbers[0], numbers[-1] + 1
    with open_h5(path, "evaluate") as file:
        group = file[task]
        offsets, utility = group["offsets"][first : last + 1], group["utility"][first:last]
        of_detections = {name: group[name][offsets[0] : offsets[-1]] for name in OF_DETECTIONS}
        image_ids, n_positive = group["image_ids"][:], group["n_positive"][:]
    of_points = (
        {name: values[start:end] for name, values in of_detections.items()}
        for start, end in pairwise(offsets - offsets[0])
    )
    return [
        Matches(image_ids=image_ids, n_positive=n_positive, utility=of_point, **found)
        for found, of_point in zip(of_points, utility, strict=True)
    ]


def joint_matches(
    detector: FasterRCNN,
    decoded: list[Pyramid],
    predictor: Predictor,
    image_ids: list[int],
    features: Features,
    truth: Truths,
    choices: dict[str, Choices],
) -> dict[str, list[Matches]]:
    """Pyramids of some images at every quality, then uncoded -> task -> matches of ("none", 0) and of every point."""
    uncoded = (len(decoded) - 1,) * len(SCALES)
    wanted: dict[Variant, set[str]] = {}
    variants: dict[str, list[list[Variant]]] = {}  # of each point, of each image
    for task, chosen in choices.items():
        tuples = {i: [uncoded, *map(tuple, chosen.phi[i].tolist())] for i in image_ids}
        variants[task] = [[(i, tuples[i][p]) for i in image_ids] for p in range(len(chosen.points) + 1)]
        for variant in chain(*variants[task]):
            wanted.setdefault(variant, set()).add(task)
    found = joint_results(detector, decoded, predictor, image_ids, features, truth, wanted)
    return {
        task: match_variants(
            truth.coco[task],
            [[r for variant in point for r in found[task][variant]] for point in points],
            image_ids,
            task,
        )
        for task, points in variants.items()
    }


def joint_results(
    detector: FasterRCNN,
    decoded: list[Pyramid],
    predictor: Predictor,
    image_ids: list[int],
    features: Features,
    truth: Truths,
    wanted: dict[Variant, set[str]],
    every_mask: bool = False,
) -> dict[str, dict[Variant, list[dict[str, Any]]]]:
    """Pyramids of the images `image_ids` at every quality -> task -> COCO's results of the variants wanted for it.

    every_mask: also those masks and keypoints that are wrong in any case (`objects_of`), else zeros.
    """
    place = {i: row for row, i in enumerate(image_ids)}
    objects = {i: dict.fromkeys(truth.coco) if every_mask else objects_of(i, truth) for i in image_ids}
    variants = _assemble(decoded, predictor, [(place[i], phi) for i, phi in wanted])
    asked = [{task: objects[i][task] for task in tasks} for (i, _), tasks in wanted.items()]
    detections = detect_variants(detector, variants, [features.sizes(i) for i, _ in wanted], asked)
    found: dict[str, dict[Variant, list[dict]]] = {task: {} for task in truth.coco}
    for (variant, tasks), detection in zip(wanted.items(), detections, strict=True):
        for task in tasks:
            found[task][variant] = results(variant[0], detection, task, truth.person_ids)
    return found


def _assemble(decoded: list[Pyramid], predictor: Predictor, wanted: list[Variant]) -> Variants:
    """Pyramids at every quality, (image, phi of each scale) -> these variants; a skipped scale is predicted."""
    maps: Pyramid = {}
    at: dict[str, list[int]] = {}
    for scale in COARSE_TO_FINE:
        s, coarser = SCALES.index(scale), COARSER.get(scale)
        # A map is an image's at a quality, or what is predicted from one of the coarser scale's.
        origins = [
            (k, phi[s], at[coarser][n] if coarser and phi[s] == SKIPPED else 0) for n, (k, phi) in enumerate(wanted)
        ]
        number = {origin: m for m, origin in enumerate(dict.fromkeys(origins))}
        # Any quality's maps hold the place of a skipped scale's.
        maps[scale] = torch.stack([decoded[max(quality, 0)][scale][k] for k, quality, _ in number])
        skipped = [m for (_, quality, _), m in number.items() if quality == SKIPPED]
        if skipped:
            sources = [source for _, quality, source in number if quality == SKIPPED]
            maps[scale][skipped] = predictor(scale, maps[coarser][sources]) if coarser else NOTHING
        at[scale] = [number[origin] for origin in origins]
    return Variants({s: maps[s] for s in SCALES}, {s: at[s] for s in SCALES})


def tabulate(
    choices: Choices,
    matches: Iterable[tuple[Point, Matches]],
    bits: dict[int, np.ndarray],
    features: Features,
    names: dict[str, str],
    resamples: int,
    seed: int,
) -> Evaluation:
    """Matches of every operating point and bits of every record -> rates, accuracies and their bootstrap.

    All points are resampled with the same images, so that differences between methods are paired. `names`: task, codec.
    """
    matches = iter(matches)
    first = next(matches)
    order = first[1].image_ids.tolist()
    weights = bootstrap_weights(len(order), resamples, seed)
    pixels = sum(np.prod(features.sizes(i).original) for i in order)
    scales, header = np.arange(len(SCALES)), 8 * FRAME_BYTES
    nothing = np.zeros(len(order))
    none = np.zeros((len(SCALES), 1))  # bits of a scale that is not sent
    with_skipped = {i: np.hstack([none, bits[i]]) for i in order}
    sent_at = [
        [with_skipped[i][scales, choices.phi[i][row] - SKIPPED].sum() + header for i in order]
        for row in range(len(choices.points))
    ]
    rows, resampled = [], []
    for ((method, point), match), sent in zip(
        chain([first], matches), [nothing, *np.array(sent_at, float)], strict=True
    ):
        key = {"method": method, "point": point}
        rows.append(
            names
            | key
            | {
                "n_images": len(order),
                "bits_per_image": sent.mean(),
                "bpp": sent.sum() / pixels,
                "accuracy": average_precision(match)[0],
                "accuracy_name": ACCURACY_NAMES[names["task"]],
                "split": features.split,
            }
        )
        rates, accuracies = weights @ sent / len(order), average_precision(match, weights)
        resampled.append(
            pd.DataFrame(key | {"resample": np.arange(resamples), "bits_per_image": rates, "accuracy": accuracies})
        )
    return Evaluation(pd.DataFrame(rows), pd.concat(resampled, ignore_index=True))


def bits_of(coded: Path, qualities: list[str], features: Features) -> dict[int, np.ndarray]:
    """Image id -> bits of its records [5, K], from the ledgers."""
    lines = [ledger_column(coded / f"{quality}.csv", features, "bits") for quality in qualities]
    return {i: np.stack([part.loc[i].to_numpy() for part in lines], 1) for i in features.image_ids}


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
