"""Uncoded detections as pseudo-labels -> the losses that a sender expects who decodes its codings and runs the heads.

What the heads find in the uncoded pyramid stands for the objects, each with its score for the chance that it is one.
So an image tells its own loss of every choice without a label, with the very coding errors of its bitstreams; how much
of that is true, `fit` tells. The price: every quality is coded and decoded, and the heads see each scale's choices.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from stages.lib.accuracy import CHANCE, results
from stages.lib.allocation import Importance, column
from stages.lib.coding import FeatureCodec, load_codec
from stages.lib.features import Features, Shard
from stages.lib.files import read_csv, write_csv
from stages.lib.heads import detect_variants
from stages.lib.loss_rate import FOLDS, Curves
from stages.lib.measuring import Pyramid, Truths, decoder, image_accuracies, read_truths, variants_of, without
from stages.lib.models import load_model
from stages.lib.params import COARSER, SCALES
from stages.lib.prediction import Predictor
from stages.lib.prediction import load as load_predictor

LEAST_SCORE = 0.1  # of a detection that stands for an object
COLUMNS = ["split", "image_id", "scale", "choice", "loss"]


def load_measurer(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    codec: Path,
    coded: Path,
    described: dict[str, Any],
    qualities: list[str],
    task: str,
) -> Callable[[Shard, Path], None]:
    """What writes the `own_losses` of a shard, as rows of COLUMNS."""
    parts = load_model(weights, described), load_predictor(prediction), load_codec(codec)
    measures = {}
    for split in ("fit", "test"):
        truth = read_truths(splits, split, [task])
        measures[split] = own_losses(*parts, Features(features, split), coded, qualities, truth, task)

    def measure(shard: Shard, path: Path) -> None:
        rows = [
            (shard.split, shard.image_ids[n], SCALES[s], choice, loss)
            for (n, s, choice), loss in np.ndenumerate(measures[shard.split](shard.image_ids))
        ]
        write_csv(path, pd.DataFrame(rows, columns=COLUMNS))

    return measure


def own_losses(
    detector: FasterRCNN,
    predictor: Predictor,
    feature_codec: FeatureCodec,
    features: Features,
    coded: Path,
    qualities: list[str],
    truth: Truths,
    task: str,
) -> Callable[[list[int]], np.ndarray]:
    """Image ids -> what each image loses by its own pseudo-labels, [n, 5, 2 K + 1], in objects.

    Of a scale, the others being clean: coded at each of K qualities; neither it nor its coarser one sent; not sent, but
    predicted from its coarser one at the K qualities (scale 3, which has none: as with nothing). `truth`: as there.
    """
    decode = decoder(features, coded, qualities, feature_codec)

    def of_batch(image_ids: list[int]) -> np.ndarray:
        *decoded, clean = decode(image_ids)
        choices = []
        for scale in SCALES:
            nothing, coarser = without(clean, scale, predictor), COARSER.get(scale)
            choices += [*(clean | {scale: maps[scale]} for maps in decoded), nothing]
            choices += [clean | {scale: predictor(scale, m[coarser])} if coarser else nothing for m in decoded]
        pseudo = pseudo_labels(detector, clean, image_ids, features, truth, task)
        _, (before, *after) = image_accuracies(detector, [clean, *choices], image_ids, features, pseudo)[task]
        return (before - np.stack(after)).reshape(len(SCALES), -1, len(image_ids)).transpose(2, 0, 1)

    return lambda image_ids: np.concatenate([of_batch(batch) for batch in features.batches(image_ids)])


def pseudo_labels(
    detector: FasterRCNN, clean: Pyramid, image_ids: list[int], features: Features, truth: Truths, task: str
) -> Truths:
    """What is found in uncoded pyramids with a score of LEAST_SCORE or more, as ground truth of one task.

    Of `truth` only the categories are read, never an annotation. An object's area, a part of OKS, is that of its box.
    """
    sizes = [features.sizes(i) for i in image_ids]
    found = detect_variants(detector, variants_of([clean]), sizes, [{task: None}] * len(image_ids))
    annotations: list[dict[str, Any]] = []
    for image_id, detection in zip(image_ids, found, strict=True):
        annotations += _objects(image_id, detection, task, truth.person_ids)
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": i, "height": size.original[0], "width": size.original[1]}
            for i, size in zip(image_ids, sizes, strict=True)
        ],
        "categories": truth.coco[task].dataset["categories"],
        "annotations": [item | {"id": k} for k, item in enumerate(annotations, 1)],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return Truths({task: coco}, truth.person_ids)


def _objects(image_id: int, detection: dict[str, Tensor], task: str, person_ids: set[int]) -> list[dict[str, Any]]:
    """One image's detections -> annotations as COCO has them, without ids."""
    labels = detection["labels"].tolist()
    chosen = person_ids if task == "keypoints" else set(labels)
    boxes = [box for box, label in zip(detection["boxes"].tolist(), labels, strict=True) if label in chosen]
    objects = []
    for (x1, y1, x2, y2), item in zip(boxes, results(image_id, detection, task, person_ids), strict=True):
        if (chance := item.pop("score")) >= LEAST_SCORE:
            size = x2 - x1, y2 - y1
            item |= {"bbox": [x1, y1, *size], "area": size[0] * size[1], "iscrowd": 0, CHANCE: chance}
            if task == "keypoints":
                item["num_keypoints"] = len(item["keypoints"]) // 3
            objects.append(item)
    return objects


def read_losses(files: list[Path], split: str) -> np.ndarray:
    """What `load_measurer`'s function wrote -> losses [n, 5, 2 K + 1] of a split, images in rising id."""
    rows = pd.concat([read_csv(file, COLUMNS) for file in files])
    rows = rows[rows["split"] == split].assign(scale=lambda r: r["scale"].map(SCALES.index))
    rows = rows.sort_values(["image_id", "scale", "choice"])
    return rows["loss"].to_numpy().reshape(rows["image_id"].nunique(), len(SCALES), -1)


def expected_losses(
    of_fit: np.ndarray,
    of_test: np.ndarray,
    fit: Curves,
    model: dict,
    predicted_of_fit: Importance,
    predicted: Importance,
) -> dict[str, np.ndarray]:
    """`read_losses` of both splits [m or n, 5, 2 K + 1], what is known of fit, MFIP's predictions, of fit out of fold.

    -> what a sender expects, [n, 5, 2 K + 1]: pseudo_alone, the former as they are; mfiba_pseudo, a mix with the losses
    that MFIP's sensitivity stands for (`mix`).
    """
    mean = np.concatenate([column(model, "mean", name) for name in ("loss", "loss_skipped")], 1)
    by_mfip = [importance.sensitivity[:, :, None] * mean for importance in (predicted_of_fit, predicted)]
    loss = np.concatenate([fit.loss, fit.loss_skipped], 2)
    return {"pseudo_alone": of_test, "mfiba_pseudo": mix((of_fit, by_mfip[0]), loss, (of_test, by_mfip[1]))}


def mix(fit: tuple[np.ndarray, np.ndarray], loss: np.ndarray, test: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Two guesses at the losses of fit [m, 5, Q], these losses, the same guesses of test [n, 5, Q] -> theirs [n, 5, Q].

    Each choice of each scale takes the least-squares mix of both guesses over the images of fit. A scale for which, by
    5-fold cross-validation (fold = index mod 5), the second guess alone is at least as near keeps that.
    """
    expected = test[1].copy()
    fold = np.arange(len(loss)) % FOLDS
    for s in range(len(SCALES)):
        of_fit, of_test = (np.stack([guess[:, s] for guess in guesses], 2) for guesses in (fit, test))  # [n, Q, 2]
        held_out = np.empty_like(loss[:, s])
        for k in np.unique(fold):
            held_out[fold == k] = _mixed(of_fit[fold != k], loss[fold != k, s], of_fit[fold == k])
        if ((held_out - loss[:, s]) ** 2).sum() < ((of_fit[:, :, 1] - loss[:, s]) ** 2).sum():
            expected[:, s] = _mixed(of_fit, loss[:, s], of_test)
    return expected


def _mixed(known: np.ndarray, loss: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Guesses [m, Q, 2], losses [m, Q], guesses of others [n, Q, 2] -> the others' losses [n, Q]."""
    factors = [np.linalg.lstsq(known[:, q], loss[:, q], rcond=None)[0] for q in range(loss.shape[1])]
    return np.einsum("nqg,qg->nq", wanted, np.stack(factors))
