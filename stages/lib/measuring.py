"""Decoded pyramids + heads -> accuracies: of one coded scale at a time, and of whole allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import torch
from pycocotools.coco import COCO
from torch import Tensor, nn

from stages.lib.accuracy import Matches, average_precision, bootstrap_weights, match_variants, merge, per_image, results
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import CodedSplit, FeatureCodec, load_codec
from stages.lib.features import Features, Shard
from stages.lib.files import create_h5, open_h5, read_csv, write_array
from stages.lib.models import DEVICE, Asked, Variants, detect_variants, load_model
from stages.lib.params import COARSE_TO_FINE, COARSER, SCALES, SKIPPED, InputError
from stages.lib.prediction import NOTHING, Predictor
from stages.lib.prediction import load as load_predictor

ACCURACY_NAMES = {"detection": "box AP", "segmentation": "mask AP", "keypoints": "keypoint AP"}
LOSSES = ["task", "split", "image_id", "scale", "clean", "coded", "drop", "loss", "loss_skipped"]
UNCODED = ["task", "split", "image_id", "scale", "clean", "utility", "loss_skipped"]
POINTS_PER_READ = 16  # of Matches: few reads, flat memory
OF_DETECTIONS = ("image", "category", "score", "matched", "ignored")  # fields of Matches, with a row for each
Pyramid = dict[str, Tensor]  # scale -> [N, C, H_s, W_s]
Point = tuple[str, int]  # method, number
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


def read_truths(splits: Path, split: str, tasks: list[str]) -> Truths:
    part = load_split(splits, split)
    return truths({task: ground_truth(part, task) for task in tasks})


def uncoded_accuracies(
    detector: nn.Module, features: Features, predictor: Predictor, truth: Truths, image_ids: list[int]
) -> pd.DataFrame:
    """Uncoded features of some images -> rows task, split, image_id, scale, clean, utility, loss_skipped.

    clean, utility: the image's own COCO AP and utility, of all scales; loss_skipped: the utility it loses where neither
    this scale nor its coarser one is sent, the others being clean. Images without ground truth of a task have no row.
    """
    rows = []
    for batch in features.batches(image_ids):
        clean = _on_device(features.pyramids(batch))
        variants = [clean]
        for scale in SCALES:
            sent = {s: maps for s, maps in clean.items() if s not in (scale, COARSER.get(scale))}
            variants.append(clean | {scale: predictor.complete(sent, clean["3"].shape)[scale]})
        for task, (accuracies, utilities) in _own(detector, variants, batch, features, truth).items():
            for image_id, value, (utility, *left) in zip(batch, accuracies[0], utilities.T, strict=True):
                if not np.isnan(value):
                    key = task, features.split, image_id
                    rows += [(*key, s, value, utility, utility - u) for s, u in zip(SCALES, left, strict=True)]
    return pd.DataFrame(rows, columns=UNCODED)


def single_scale_losses(
    detector: nn.Module,
    features: Features,
    coded: Path,
    qualities: list[str],
    feature_codec: FeatureCodec,
    predictor: Predictor,
    truth: Truths,
    uncoded: pd.DataFrame,
) -> Callable[[list[int]], pd.DataFrame]:
    """One scale coded, the others clean: what tells it of some images, as rows of LOSSES.

    clean (of `uncoded`), coded: the image's own COCO AP, drop their difference; loss: the utility (`accuracy`) that the
    image's detections lose, in objects, the smooth task loss; loss_skipped: the same where the scale is not sent, but
    predicted from its coarser one coded at this quality (scale 3, which has none: as in `uncoded`). Images without
    ground truth of a task have no row. All variants of a batch of images, of all qualities, pass the heads together.
    Decoding is checked against the encoder, see `decoder`.
    """
    decode = decoder(features, coded, qualities, feature_codec)
    of_scale_3 = uncoded[(uncoded["split"] == features.split) & (uncoded["scale"] == "3")]
    of_scale_3 = of_scale_3.set_index(["task", "image_id"])[["clean", "utility", "loss_skipped"]]
    own = dict(zip(of_scale_3.index, of_scale_3.to_numpy().tolist(), strict=True))

    def of_batch(image_ids: list[int]) -> Iterator[tuple]:
        *decoded, clean = decode(image_ids)
        variants = []
        for maps in decoded:
            variants += [clean | {scale: maps[scale]} for scale in SCALES]
            variants += [clean | {scale: predictor(scale, maps[coarser])} for scale, coarser in COARSER.items()]
        for task, measured in _own(detector, variants, image_ids, features, truth).items():
            parts = (np.split(values, len(qualities)) for values in measured)
            for quality, accuracies, utilities in zip(qualities, *parts, strict=True):
                for image_id, values, worth in zip(image_ids, accuracies.T, utilities.T, strict=True):
                    if (task, image_id) in own:
                        before, utility, without_3 = own[task, image_id]
                        of_coded, of_skipped = np.split(utility - worth, [len(SCALES)])
                        losses = {"3": without_3} | dict(zip(COARSER, of_skipped, strict=True))
                        key = quality, task, features.split, image_id
                        for scale, value, loss in zip(SCALES, values[: len(SCALES)], of_coded, strict=True):
                            yield (*key, scale, before, value, before - value, loss, losses[scale])

    def measure(image_ids: list[int]) -> pd.DataFrame:
        rows = [row for batch in features.batches(image_ids) for row in of_batch(batch)]
        return pd.DataFrame(rows, columns=["quality", *LOSSES])

    return measure


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
    detector: nn.Module,
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
    write_array(group, "offsets", np.cumsum([0, *(len(point.image) for point in points)]))
    for name in OF_DETECTIONS:
        write_array(group, name, np.concatenate([getattr(point, name) for point in points]))


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
        of_detections = [group[name][offsets[0] : offsets[-1]] for name in OF_DETECTIONS]
        image_ids, n_positive = group["image_ids"][:], group["n_positive"][:]
    return [
        Matches(image_ids, *(values[start:end] for values in of_detections), n_positive=n_positive, utility=of_point)
        for (start, end), of_point in zip(pairwise(offsets - offsets[0]), utility, strict=True)
    ]


def decoder(
    features: Features, coded: Path, qualities: list[str], feature_codec: FeatureCodec
) -> Callable[[list[int]], list[Pyramid]]:
    """Image ids of one batch -> their pyramids at every quality, checked against the ledgers, then uncoded."""
    folders = [coded / quality for quality in qualities]
    records = [CodedSplit(folder, features) for folder in folders]
    expected = [_lines(coded / f"{quality}.csv", features, "mse_feature") for quality in qualities]

    def decode(image_ids: list[int]) -> list[Pyramid]:
        clean = _on_device(features.pyramids(image_ids))
        decoded = [part.decode(image_ids, feature_codec) for part in records]
        for folder, pyramid, lines in zip(folders, decoded, expected, strict=True):
            _check_decoded(folder, image_ids, clean, pyramid, lines)
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
    lines = [_lines(coded / f"{quality}.csv", features, "bits") for quality in qualities]
    return {i: np.stack([part.loc[i].to_numpy() for part in lines], 1) for i in features.image_ids}


def _lines(ledger: Path, features: Features, column: str) -> pd.DataFrame:
    """One column of the ledger for the features' split: a row for each image, a column for each scale."""
    lines = read_csv(ledger, ["split", "image_id", "scale", column])
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


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
