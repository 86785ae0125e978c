"""Decoded pyramids + heads -> accuracies: of one coded scale at a time, and of whole allocations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from stages.lib.accuracy import Matches, average_precision, bootstrap_weights, match_variants, merge, per_image, results
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.coding import CodedSplit, FeatureCodec
from stages.lib.features import Features
from stages.lib.files import read_csv
from stages.lib.models import DEVICE, Asked, Variants, detect_variants, images_per_pass
from stages.lib.params import COARSE_TO_FINE, COARSER, SCALES, SKIPPED, InputError
from stages.lib.prediction import NOTHING, Predictor
from stages.lib.progress import progress
from stages.lib.shards import map_shards

ACCURACY_NAMES = {"detection": "box AP", "segmentation": "mask AP", "keypoints": "keypoint AP"}
Pyramid = dict[str, Tensor]  # scale -> [N, C, H_s, W_s]
Variant = tuple[int, tuple[int, ...]]  # image, and phi of each scale


class Truths(NamedTuple):
    """Ground truth of one split: task -> COCO object, and the categories that have keypoints."""

    coco: dict[str, COCO]
    person_ids: set[int]

    def labels(self, image_id: int) -> Asked:
        """Task -> the labels of the image's objects: of other labels a detection is wrong, whatever its mask."""
        return {task: {a["category_id"] for a in coco.imgToAnns[image_id]} for task, coco in self.coco.items()}


def truths(coco: dict[str, COCO]) -> Truths:
    people = coco["keypoints"].cats.items() if "keypoints" in coco else ()
    return Truths(coco, {category_id for category_id, category in people if "keypoints" in category})


def uncoded_accuracies(detector: nn.Module, features: Features, predictor: Predictor, truth: Truths) -> pd.DataFrame:
    """Uncoded features -> rows task, split, image_id, scale, clean, utility, loss_skipped.

    clean, utility: the image's own COCO AP and utility, of all scales; loss_skipped: the utility it loses where neither
    this scale nor its coarser one is sent, the others being clean. Images without ground truth of a task have no row.
    """

    def measure(image_ids: list[int]) -> list[tuple]:
        clean = _on_device(features.pyramids(image_ids))
        variants, rows = [clean], []
        for scale in SCALES:
            sent = {s: maps for s, maps in clean.items() if s not in (scale, COARSER.get(scale))}
            variants.append(clean | {scale: predictor.complete(sent, clean["3"].shape)[scale]})
        for task, (accuracies, utilities) in _own(detector, variants, image_ids, features, truth).items():
            for image_id, value, (utility, *left) in zip(image_ids, accuracies[0], utilities.T, strict=True):
                if not np.isnan(value):
                    key = task, features.split, image_id
                    rows += [(*key, s, value, utility, utility - u) for s, u in zip(SCALES, left, strict=True)]
        return rows

    rows = [row for part in over_batches(measure, features, f"measure uncoded {features.split}") for row in part]
    columns = ["task", "split", "image_id", "scale", "clean", "utility", "loss_skipped"]
    return pd.DataFrame(rows, columns=columns).sort_values(
        ["task", "image_id", "scale"], kind="stable", ignore_index=True
    )


def single_scale_losses(
    detector: nn.Module,
    features: Features,
    coded: Path,
    qualities: list[str],
    feature_codec: FeatureCodec,
    predictor: Predictor,
    truth: Truths,
    uncoded: pd.DataFrame,
) -> pd.DataFrame:
    """One scale coded -> rows quality, task, split, image_id, scale, clean, coded, drop, loss, loss_skipped.

    clean (of `uncoded`), coded: the image's own COCO AP, drop their difference; loss: the utility (`accuracy`) that the
    image's detections lose, in objects, the smooth task loss; loss_skipped: the same where the scale is not sent, but
    predicted from its coarser one coded at this quality (scale 3, which has none: as in `uncoded`). Images without
    ground truth of a task have no row. All variants of a batch of images, of all qualities, pass the heads together.
    """
    decode = decoder(features, coded, qualities, feature_codec)
    of_scale_3 = uncoded[(uncoded["split"] == features.split) & (uncoded["scale"] == "3")]
    of_scale_3 = of_scale_3.set_index(["task", "image_id"])[["clean", "utility", "loss_skipped"]]
    own = dict(zip(of_scale_3.index, of_scale_3.to_numpy().tolist(), strict=True))

    def measure(image_ids: list[int]) -> list[tuple]:
        *decoded, clean = decode(image_ids)
        variants, rows = [], []
        for maps in decoded:
            variants += [clean | {scale: maps[scale]} for scale in SCALES]
            variants += [clean | {scale: predictor(scale, maps[coarser])} for scale, coarser in COARSER.items()]
        for task, measured in _own(detector, variants, image_ids, features, truth).items():
            parts = (np.split(values, len(qualities)) for values in measured)
            for quality, accuracies, utilities in zip(qualities, *parts, strict=True):
                for image_id, values, worth in zip(image_ids, accuracies.T, utilities.T, strict=True):
                    if (task, image_id) in own:
                        key, (before, utility, without_3) = (
                            (quality, task, features.split, image_id),
                            own[task, image_id],
                        )
                        of_coded, of_skipped = np.split(utility - worth, [len(SCALES)])
                        losses = {"3": without_3} | dict(zip(COARSER, of_skipped, strict=True))
                        rows += [
                            (*key, scale, before, value, before - value, loss, losses[scale])
                            for scale, value, loss in zip(SCALES, values[: len(SCALES)], of_coded, strict=True)
                        ]
        return rows

    rows = [row for part in over_batches(measure, features, f"measure {features.split}") for row in part]
    columns = ["quality", "task", "split", "image_id", "scale", "clean", "coded", "drop", "loss", "loss_skipped"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(["quality", "task", "image_id", "scale"], kind="stable", ignore_index=True)


def _own(
    detector: nn.Module, variants: list[Pyramid], image_ids: list[int], features: Features, truth: Truths
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Variants of the pyramids of some images -> task -> each image's own AP, NaN without truth, and utility.

    Both are [variants, images].
    """
    keys = [(v, i) for v in range(len(variants)) for i in image_ids]
    sizes, asked = ([of(i) for _, i in keys] for of in (features.sizes, truth.labels))
    found: dict[str, list[list[dict]]] = {task: [[] for _ in variants] for task in truth.coco}
    for (v, i), detection in zip(keys, detect_variants(detector, _shared(variants), sizes, asked), strict=True):
        for task in truth.coco:
            found[task][v] += results(i, detection, task, truth.person_ids)
    accuracies = {}
    for task, coco in truth.coco.items():
        matches = match_variants(coco, found[task], image_ids, task)
        accuracies[task] = np.stack([per_image(m) for m in matches]), np.stack([m.utility for m in matches])
    return accuracies


class Choices(NamedTuple):
    """An allocation table as arrays."""

    points: list[tuple[str, int]]  # (method, number), in the table's order
    phi: dict[int, np.ndarray]  # image id -> quality of each scale [points, 5], SKIPPED where it is not sent


def choices_of(allocation: pd.DataFrame) -> Choices:
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
        raise InputError(f"allocation: image {ids[image]}, scale {SCALES[s]} has no phi in {method}; allocate again")
    return Choices(points, {int(image_id): phi[i] for image_id, i in row.items()})


class Evaluation(NamedTuple):
    """`points` has the columns of rd_points.csv; `bootstrap` the same points for resamples of the images."""

    points: pd.DataFrame
    bootstrap: pd.DataFrame


def evaluate(
    detector: nn.Module,
    features: Features,
    coded: Path,
    qualities: list[str],
    feature_codec: FeatureCodec,
    predictor: Predictor,
    allocations: dict[str, pd.DataFrame],
    truth: Truths,
) -> dict[str, tuple[Choices, dict[tuple[str, int], Matches]]]:
    """Task -> what the detections of every operating point are worth, from jointly decoded pyramids.

    Each image is decoded once at every quality, and every scale taken at the quality that the method chose, or
    predicted; equal choices of several methods pass the heads once. Point ("none", 0) is the uncoded pyramid.
    """
    choices = {task: choices_of(allocation) for task, allocation in allocations.items()}
    decode = decoder(features, coded, qualities, feature_codec)

    def measure(image_ids: list[int]) -> dict[str, list[Matches]]:
        return joint_matches(detector, decode(image_ids), predictor, image_ids, features, truth, choices)

    parts = over_batches(measure, features, f"evaluate {' '.join(choices)}")
    merged = {task: [merge(list(point)) for point in zip(*(p[task] for p in parts), strict=True)] for task in choices}
    return {
        task: (chosen, dict(zip([("none", 0), *chosen.points], merged[task], strict=True)))
        for task, chosen in choices.items()
    }


def decoder(
    features: Features, coded: Path, qualities: list[str], feature_codec: FeatureCodec
) -> Callable[[list[int]], list[Pyramid]]:
    """Image ids of one batch -> their pyramids at every quality, checked against the ledgers, then uncoded."""
    files = [coded / f"{quality}.h5" for quality in qualities]
    records = [CodedSplit(file, features.split) for file in files]
    expected = [_lines(file.with_suffix(".csv"), features, "mse_feature") for file in files]

    def decode(image_ids: list[int]) -> list[Pyramid]:
        clean = _on_device(features.pyramids(image_ids))
        decoded = [part.decode(image_ids, feature_codec) for part in records]
        for file, pyramid, lines in zip(files, decoded, expected, strict=True):
            _check_decoded(file, image_ids, clean, pyramid, lines)
        return [*decoded, clean]

    return decode


def joint_matches(
    detector: nn.Module,
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
    detector: nn.Module,
    decoded: list[Pyramid],
    predictor: Predictor,
    image_ids: list[int],
    features: Features,
    truth: Truths,
    wanted: dict[Variant, set[str]],
) -> dict[str, dict[Variant, list[dict[str, Any]]]]:
    """Pyramids of the images `image_ids` at every quality -> task -> COCO's results of the variants wanted for it."""
    place, sizes, labels = ({i: of(i) for i in image_ids} for of in (image_ids.index, features.sizes, truth.labels))
    variants = _assemble(decoded, predictor, [(place[i], phi) for i, phi in wanted])
    asked = [{task: labels[i][task] for task in tasks} for (i, _), tasks in wanted.items()]
    detections = detect_variants(detector, variants, [sizes[i] for i, _ in wanted], asked)
    found: dict[str, dict[Variant, list[dict]]] = {task: {} for task in truth.coco}
    for (variant, tasks), detection in zip(wanted.items(), detections, strict=True):
        for task in tasks:
            found[task][variant] = results(variant[0], detection, task, truth.person_ids)
    return found


def _assemble(decoded: list[Pyramid], predictor: Predictor, wanted: list[Variant]) -> Variants:
    """Pyramids at every quality, (image, phi of each scale) -> these variants; a skipped scale is predicted."""
    maps, at = {}, {}
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
    matches: dict[tuple[str, int], Matches],
    bits: dict[int, np.ndarray],
    features: Features,
    names: dict[str, str],
    resamples: int,
    seed: int,
) -> Evaluation:
    """Matches of every operating point and bits of every record -> rates, accuracies and their bootstrap.

    All points are resampled with the same images, so that differences between methods are paired. `names`: task, codec.
    """
    order = matches["none", 0].image_ids.tolist()
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
    for ((method, point), match), sent in zip(matches.items(), [nothing, *np.array(sent_at, float)], strict=True):
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
    lines = [_lines(coded / f"{quality}.csv", features, "bits") for quality in qualities]
    return {i: np.stack([part.loc[i].to_numpy() for part in lines], 1) for i in features.image_ids}


def over_batches(function: Callable[[list[int]], Any], features: Features, name: str) -> list[Any]:
    """What `function` makes of each batch of images, in order; all variants of an image are in one."""
    total, batches = len(features.image_ids), []
    for batch in features.batches():
        size = images_per_pass(features.sizes(batch[0]))
        batches += [batch[start : start + size] for start in range(0, len(batch), size)]
    found = zip(map_shards(function, batches), batches, strict=True)
    return [result for result, _ in progress(found, name, total, lambda part: len(part[1]))]


def _lines(ledger: Path, features: Features, column: str) -> pd.DataFrame:
    """One column of the ledger for the features' split: a row for each image, a column for each scale."""
    lines = read_csv(ledger)
    lines = lines[lines["split"] == features.split]
    wanted = [(image_id, scale) for image_id in features.image_ids for scale in SCALES]
    if sorted(zip(lines["image_id"], lines["scale"], strict=True)) != sorted(wanted):
        raise InputError(f"{ledger}: lists other images than {features.path}; run `compress` again")
    return lines.pivot(index="image_id", columns="scale", values=column)[list(SCALES)]


def _check_decoded(coded: Path, image_ids: list[int], clean: Pyramid, decoded: Pyramid, expected: pd.DataFrame) -> None:
    for scale in SCALES:
        mse = (decoded[scale] - clean[scale]).square().flatten(1).mean(1).tolist()
        for image_id, value in zip(image_ids, mse, strict=True):
            if not np.isclose(value, expected.loc[image_id, scale], rtol=1e-3, atol=1e-9):
                raise InputError(
                    f"{coded}: image {image_id}, scale {scale} decodes to an MSE of {value:.4g} where its encoder had "
                    f"{expected.loc[image_id, scale]:.4g}; the file or the codec was changed: run `compress` again"
                )


def _shared(pyramids: list[Pyramid]) -> Variants:
    """Pyramids of the same n images, in many of which a scale is the same tensor -> variants, pyramid by pyramid."""
    maps, at = {}, {}
    for scale in SCALES:
        distinct = {id(p[scale]): p[scale] for p in pyramids}
        first = {tensor: k * len(pyramids[0][scale]) for k, tensor in enumerate(distinct)}
        maps[scale] = torch.cat(list(distinct.values()))
        at[scale] = [first[id(p[scale])] + k for p in pyramids for k in range(len(p[scale]))]
    return Variants(maps, at)


def _on_device(pyramid: Pyramid) -> Pyramid:
    return {scale: value.to(DEVICE) for scale, value in pyramid.items()}
