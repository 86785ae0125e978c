"""Decoded pyramids + heads -> what each image loses with one scale coded, or not sent, and the others clean.

Twice: against the ground truth, and against pseudo-labels, what the heads find in the uncoded pyramid. These a sender
has, too: its image tells it the loss of every choice without a label, with the very coding errors of its bitstreams.
What is assumed of them (LEAST_SCORE, LEAST_LIKENESS, PART_OF_BOX, the square of a score) was chosen on `fit` alone, by
the bits that decisions made with them take at equal loss.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from stages.lib.accuracy import LEAST_OVERLAP, WORTH, match_variants, merge, per_image, results
from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import CodedSplit, FeatureCodec
from stages.lib.features import Features
from stages.lib.files import read_csv
from stages.lib.heads import Asked, Variants, detect_variants
from stages.lib.models import DEVICE, Sizes
from stages.lib.params import COARSER, MAX_SIDE, SCALES
from stages.lib.prediction import Predictor
from stages.lib.schema import InputError

KEY = ["task", "split", "image_id", "scale"]
UNCODED = [*KEY, "clean", "loss_skipped", "pseudo_loss_skipped"]
LOSSES = [*KEY, "clean", "coded", "drop", "loss", "loss_skipped", "pseudo_loss", "pseudo_loss_skipped"]
LEAST_SCORE = 0.1  # of a detection that stands for an object
LEAST_LIKENESS = 0.25  # overlap with it that is worth something: the object itself lies elsewhere, perhaps nearer
PART_OF_BOX = 0.5  # that an object fills
EVERYWHERE = -MAX_SIDE, -MAX_SIDE, 3 * MAX_SIDE, 3 * MAX_SIDE  # x, y, width, height: around every image
Pyramid = dict[str, Tensor]  # scale -> [N, C, H_s, W_s]


class Truths(NamedTuple):
    """Ground truth of one split: task -> COCO object, and the categories that have keypoints."""

    coco: dict[str, COCO]
    person_ids: set[int]


def objects_of(image_id: int, *known: Truths) -> Asked:
    """What of an image's detections can be right: of other labels, and elsewhere, they are wrong, whatever their mask.

    Keypoints are near objects that their box does not meet, too: their overlap, OKS, has no end.
    """
    asked: Asked = {}
    for task in known[0].coco:
        rows = []
        for coco in (labels.coco[task] for labels in known):
            for item in coco.imgToAnns[image_id]:
                x, y, width, height = rle.toBbox(coco.annToRLE(item)) if task == "segmentation" else EVERYWHERE
                rows.append([item["category_id"], x, y, x + width, y + height])
        asked[task] = torch.tensor(rows, dtype=torch.float32, device=DEVICE).view(-1, 5)
    return asked


def truths(coco: dict[str, COCO]) -> Truths:
    people = coco["keypoints"].cats.items() if "keypoints" in coco else ()
    return Truths(coco, {category_id for category_id, category in people if "keypoints" in category})


def read_truths(splits: Path, split: str, tasks: list[str]) -> Truths:
    part = load_split(splits, split)
    return truths({task: ground_truth(part, task) for task in tasks})


class Measured(NamedTuple):
    """What variants of the pyramids of some images are worth for one task; [variants, images], the first is uncoded."""

    accuracy: np.ndarray  # each image's own COCO AP, NaN without ground truth
    loss: np.ndarray  # the utility (`accuracy`) that it loses, in objects: the smooth task loss; 0 without ground truth
    pseudo_loss: np.ndarray  # the same with `pseudo_labels` for the objects


def uncoded_accuracies(
    detector: FasterRCNN, features: Features, predictor: Predictor, truth: Truths, image_ids: list[int]
) -> pd.DataFrame:
    """Uncoded features of some images -> rows of UNCODED.

    clean: the image's own COCO AP, of all scales, NaN without ground truth; loss_skipped, pseudo_loss_skipped: what it
    loses (`Measured`) where neither this scale nor its coarser one is sent, the others being clean.
    """
    rows = []
    for batch in features.batches(image_ids):
        clean = _on_device(features.pyramids(batch))
        variants = [clean, *(without(clean, scale, predictor) for scale in SCALES)]
        for task, (accuracy, *losses) in measure_variants(detector, variants, batch, features, truth).items():
            for n, image_id in enumerate(batch):
                key = task, features.split, image_id
                rows += [
                    (*key, scale, accuracy[0, n], *(loss[v, n] for loss in losses)) for v, scale in enumerate(SCALES, 1)
                ]
    return pd.DataFrame(rows, columns=UNCODED)


def single_scale_losses(
    detector: FasterRCNN,
    features: Features,
    coded: Path,
    qualities: list[str],
    feature_codec: FeatureCodec,
    predictor: Predictor,
    truth: Truths,
    uncoded: pd.DataFrame,
) -> Callable[[list[int]], pd.DataFrame]:
    """One scale coded, the others clean: what tells it of some images, as rows of LOSSES.

    clean, coded: the image's own COCO AP, drop their difference, NaN without ground truth; loss, pseudo_loss: what it
    loses (`Measured`); loss_skipped, pseudo_loss_skipped: the same where the scale is not sent, but predicted from its
    coarser one coded at this quality (scale 3, which has none: as in `uncoded`). All variants of a batch of images, of
    all qualities, pass the heads together. Decoding is checked against the encoder, see `decoder`.
    """
    decode = decoder(features, coded, qualities, feature_codec)
    of_scale_3 = uncoded[(uncoded["split"] == features.split) & (uncoded["scale"] == "3")]
    of_scale_3 = of_scale_3.set_index(["task", "image_id"])[["loss_skipped", "pseudo_loss_skipped"]]
    without_3 = dict(zip(of_scale_3.index, of_scale_3.to_numpy().tolist(), strict=True))
    if missing := {*product(truth.coco, features.image_ids)} - without_3.keys():
        task, image_id = min(missing)
        raise InputError(f"losses of uncoded features lack image {image_id}, {task}; run `measure_uncoded` again")

    def of_batch(image_ids: list[int]) -> Iterator[tuple]:
        *decoded, clean = decode(image_ids)
        variants, coded_at, skipped_at = [clean], {}, {}
        for quality, maps in zip(qualities, decoded, strict=True):
            for scale in SCALES:
                coded_at[quality, scale] = len(variants)
                variants.append(clean | {scale: maps[scale]})
            for scale, coarser in COARSER.items():
                skipped_at[quality, scale] = len(variants)
                variants.append(clean | {scale: predictor(scale, maps[coarser])})
        for task, found in measure_variants(detector, variants, image_ids, features, truth).items():
            for ((quality, scale), v), (n, image_id) in product(coded_at.items(), enumerate(image_ids)):
                before, after = found.accuracy[[0, v], n]
                loss_skipped, pseudo_skipped = without_3[task, image_id]
                if scale in COARSER:
                    predicted = skipped_at[quality, scale]
                    loss_skipped, pseudo_skipped = found.loss[predicted, n], found.pseudo_loss[predicted, n]
                losses = found.loss[v, n], loss_skipped, found.pseudo_loss[v, n], pseudo_skipped
                yield quality, task, features.split, image_id, scale, before, after, before - after, *losses

    def measure(image_ids: list[int]) -> pd.DataFrame:
        rows = [row for batch in features.batches(image_ids) for row in of_batch(batch)]
        return pd.DataFrame(rows, columns=["quality", *LOSSES])

    return measure


def without(clean: Pyramid, scale: str, predictor: Predictor) -> Pyramid:
    """The pyramid as a receiver has it to whom neither this scale nor its coarser one is sent, this one predicted."""
    sent = {s: maps for s, maps in clean.items() if s not in (scale, COARSER.get(scale))}
    return clean | {scale: predictor.complete(sent, clean["3"].shape)[scale]}


def measure_variants(
    detector: FasterRCNN, variants: list[Pyramid], image_ids: list[int], features: Features, truth: Truths
) -> dict[str, Measured]:
    """Variants of the pyramids of some images, the first one uncoded -> what they are worth for each task."""
    sizes, others = [features.sizes(i) for i in image_ids], len(variants) - 1
    everything: Asked = dict.fromkeys(truth.coco)
    detections = detect_variants(detector, variants_of(variants[:1]), sizes, [everything] * len(image_ids))
    pseudo = pseudo_labels(detections, image_ids, sizes, truth)
    asked = [objects_of(i, truth, pseudo) for i in image_ids]
    detections += detect_variants(detector, variants_of(variants[1:]), sizes * others, asked * others)
    measured = {}
    for task in truth.coco:
        found: list[list[dict[str, Any]]] = [[] for _ in variants]
        for k, detection in enumerate(detections):
            v, n = divmod(k, len(image_ids))
            found[v] += results(image_ids[n], detection, task, truth.person_ids)
        matches, own = (
            match_variants(labels.coco[task], _of_labels(found, labels.coco[task], image_ids), image_ids, task, least)
            for labels, least in ((truth, LEAST_OVERLAP), (pseudo, LEAST_LIKENESS))
        )
        utilities, own_utilities = (np.stack([m.utility for m in of]) for of in (matches, own))
        accuracy = per_image(merge(matches)).reshape(utilities.shape)  # as of so many images
        measured[task] = Measured(accuracy, utilities[0] - utilities, own_utilities[0] - own_utilities)
    return measured


def _of_labels(found: list[list[dict[str, Any]]], labels: COCO, image_ids: list[int]) -> list[list[dict[str, Any]]]:
    """Without the detections whose label no object of their image has: they change neither its AP nor its utility."""
    known = {(i, item["category_id"]) for i in image_ids for item in labels.imgToAnns[i]}
    return [[item for item in of if (item["image_id"], item["category_id"]) in known] for of in found]


def pseudo_labels(detections: list[dict[str, Any]], image_ids: list[int], sizes: list[Sizes], truth: Truths) -> Truths:
    """What is found in uncoded pyramids with a score of LEAST_SCORE or more, as ground truth; it is worth score^2.

    Of `truth` only tasks and categories are read, never an annotation. An object's area, which OKS asks for, is
    PART_OF_BOX of its box.
    """
    images = [
        {"id": i, "height": size.original[0], "width": size.original[1]}
        for i, size in zip(image_ids, sizes, strict=True)
    ]
    found = {}
    for task, labelled in truth.coco.items():
        annotations: list[dict[str, Any]] = []
        for image_id, detection in zip(image_ids, detections, strict=True):
            annotations += _objects(image_id, detection, task, truth.person_ids)
        found[task] = COCO()
        found[task].dataset = {
            "images": images,
            "categories": labelled.dataset["categories"],
            "annotations": [item | {"id": k} for k, item in enumerate(annotations, 1)],
        }
        with redirect_stdout(io.StringIO()):
            found[task].createIndex()
    return Truths(found, truth.person_ids)


def _objects(image_id: int, detection: dict[str, Any], task: str, person_ids: set[int]) -> list[dict[str, Any]]:
    """One image's detections -> annotations as COCO has them, without ids."""
    labels = detection["labels"].tolist()
    chosen = person_ids if task == "keypoints" else set(labels)
    boxes = [box for box, label in zip(detection["boxes"].tolist(), labels, strict=True) if label in chosen]
    objects = []
    for (x1, y1, x2, y2), item in zip(boxes, results(image_id, detection, task, person_ids), strict=True):
        if (score := item.pop("score")) >= LEAST_SCORE:
            size = x2 - x1, y2 - y1
            area = PART_OF_BOX * size[0] * size[1]
            item |= {"bbox": [x1, y1, *size], "area": area, "iscrowd": 0, WORTH: score**2}
            if task == "keypoints":
                item["num_keypoints"] = len(item["keypoints"]) // 3
            objects.append(item)
    return objects


def decoder(
    features: Features, coded: Path, qualities: list[str], feature_codec: FeatureCodec
) -> Callable[[list[int]], list[Pyramid]]:
    """Image ids of one batch -> their pyramids at every quality, checked against the ledgers, then uncoded."""
    folders = [coded / quality for quality in qualities]
    records = [CodedSplit(folder, features) for folder in folders]
    expected = [ledger_column(coded / f"{quality}.csv", features, "mse_feature") for quality in qualities]

    def decode(image_ids: list[int]) -> list[Pyramid]:
        clean = _on_device(features.pyramids(image_ids))
        decoded = [part.decode(image_ids, feature_codec) for part in records]
        for folder, pyramid, lines in zip(folders, decoded, expected, strict=True):
            _check_decoded(folder, image_ids, clean, pyramid, lines)
        return [*decoded, clean]

    return decode


def ledger_column(ledger: Path, features: Features, column: str) -> pd.DataFrame:
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


def variants_of(pyramids: list[Pyramid]) -> Variants:
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
