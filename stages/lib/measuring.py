"""Decoded pyramids + heads -> what each image loses with one scale coded, or not sent, and the others clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from stages.lib.accuracy import match_variants, per_image, results
from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import CodedSplit, FeatureCodec
from stages.lib.features import Features
from stages.lib.files import read_csv
from stages.lib.heads import Asked, Variants, detect_variants
from stages.lib.models import DEVICE
from stages.lib.params import COARSER, SCALES
from stages.lib.prediction import Predictor
from stages.lib.schema import InputError

UNCODED = ["task", "split", "image_id", "scale", "clean", "utility", "loss_skipped"]
LOSSES = ["task", "split", "image_id", "scale", "clean", "coded", "drop", "loss", "loss_skipped"]
Pyramid = dict[str, Tensor]  # scale -> [N, C, H_s, W_s]


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
    detector: FasterRCNN, features: Features, predictor: Predictor, truth: Truths, image_ids: list[int]
) -> pd.DataFrame:
    """Uncoded features of some images -> rows of UNCODED.

    clean, utility: the image's own COCO AP and utility, of all scales; loss_skipped: the utility it loses where neither
    this scale nor its coarser one is sent, the others being clean. Images without ground truth of a task have no row.
    """
    rows = []
    for batch in features.batches(image_ids):
        clean = _on_device(features.pyramids(batch))
        variants = [clean]
        variants += [without(clean, scale, predictor) for scale in SCALES]
        for task, (accuracies, utilities) in image_accuracies(detector, variants, batch, features, truth).items():
            for image_id, value, (utility, *left) in zip(batch, accuracies[0], utilities.T, strict=True):
                if not np.isnan(value):
                    key = task, features.split, image_id
                    rows += [(*key, s, value, utility, utility - u) for s, u in zip(SCALES, left, strict=True)]
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
        for task, measured in image_accuracies(detector, variants, image_ids, features, truth).items():
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


def without(clean: Pyramid, scale: str, predictor: Predictor) -> Pyramid:
    """The pyramid as a receiver has it to whom neither this scale nor its coarser one is sent, this one predicted."""
    sent = {s: maps for s, maps in clean.items() if s not in (scale, COARSER.get(scale))}
    return clean | {scale: predictor.complete(sent, clean["3"].shape)[scale]}


def image_accuracies(
    detector: FasterRCNN, variants: list[Pyramid], image_ids: list[int], features: Features, truth: Truths
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Variants of the pyramids of some images -> task -> each image's own AP, NaN without truth, and utility.

    Both are [variants, images].
    """
    keys = [(v, i) for v in range(len(variants)) for i in image_ids]
    sizes, asked = [features.sizes(i) for _, i in keys], [truth.labels(i) for _, i in keys]
    found: dict[str, list[list[dict]]] = {task: [[] for _ in variants] for task in truth.coco}
    for (v, i), detection in zip(keys, detect_variants(detector, variants_of(variants), sizes, asked), strict=True):
        for task in truth.coco:
            found[task][v] += results(i, detection, task, truth.person_ids)
    accuracies = {}
    for task, coco in truth.coco.items():
        matches = match_variants(coco, found[task], image_ids, task)
        accuracies[task] = np.stack([per_image(m) for m in matches]), np.stack([m.utility for m in matches])
    return accuracies


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
