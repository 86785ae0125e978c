"""Curves and predictions of test -> the images on which the method saves most, typically and least, and what is found.

    every price of a bit -> choices of each image -> its own saving -> the best, the typical, the worst images
                                    |
    bits of `uniform` at each quality --matched--> choice of no more bits --decoder, heads--> detections of both

Which images are shown is a rule, not a taste: their saving is their own BD-rate, in bits over the measured losses of
the single scales, and the ranking has a first, a middle and a last part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import contourpy
import numpy as np
from matplotlib.path import Path as Polygon
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.models.detection import FasterRCNN

from stages.lib.ablation import measured
from stages.lib.accuracy import match_variants
from stages.lib.allocation import Choose, Importance, mfiba_skip, uniform
from stages.lib.bd_rate import Curve, bd_rate
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.bound import additive_loss, bits_at
from stages.lib.evaluating import joint_results
from stages.lib.features import Features
from stages.lib.loss_rate import Curves, importance_labels
from stages.lib.measuring import Pyramid, Truths
from stages.lib.params import SCALES
from stages.lib.prediction import Predictor
from stages.lib.shards import map_in_memory

METHOD = "mfiba_skip"  # what is shown beside uniform
KINDS = ("best", "typical", "worst")
PER_KIND = 3  # images
PRICES = np.logspace(-9, 0, 181)  # of a bit, in objects: from all scales at the best quality to next to nothing
LEAST_SCORE = 0.5  # of a detection that is shown
LONGEST_SIDE = 320  # px, of a picture
SIMPLIFIED = 1.5  # px of the picture that an outline may be beside that of the mask


class Cell(NamedTuple):
    """What is known of one task before anything is decoded."""

    curves: Curves  # of test
    fit: dict  # of `fit_scales`
    importance: Importance  # predicted, of the images of `curves`


class Choices(NamedTuple):
    """P ways to code each of n images."""

    phi: np.ndarray  # [n, P, 5]
    bits: np.ndarray  # [n, P] of the file
    loss: np.ndarray  # [n, P] sum of the losses of the single scales, in objects


def choices_at(phi: np.ndarray, curves: Curves) -> Choices:
    """phi [n, P, 5] of the images of `curves` -> their bits and losses."""
    n, p, _ = phi.shape
    rows = np.repeat(np.arange(n), p)
    loss = additive_loss(curves.loss[rows], curves.loss_skipped[rows], phi.reshape(n * p, -1))
    return Choices(phi, bits_at(curves.bits, phi) + 8 * FRAME_BYTES, loss.reshape(n, p))


def all_choices(cell: Cell, precode: int) -> tuple[Choices, Choices]:
    """`uniform` at every quality, and METHOD at every price, from the cheapest bit to the dearest."""
    curves = cell.curves
    n, _, k = curves.bits.shape
    choose: Choose = mfiba_skip(cell.importance.sensitivity, curves.bits[:, :, precode], cell.fit, precode)
    of_method = np.stack([choose(price) for price in PRICES], 1).astype(int)
    of_uniform = np.stack([uniform(q, n) for q in range(k)], 1).astype(int)
    return choices_at(of_uniform, curves), choices_at(of_method, curves)


def savings(anchor: Choices, method: Choices) -> np.ndarray:
    """[n] BD-rate of each image alone, percent, negative is a saving; NaN where its curves share no loss."""
    curves = zip(anchor.bits, -anchor.loss, method.bits, -method.loss, strict=True)
    return np.array([bd_rate(Curve(b0, a0), Curve(b1, a1)).pchip for b0, a0, b1, a1 in curves])


def ranked(saving: np.ndarray) -> dict[str, np.ndarray]:
    """[n] -> the rows of the images of each kind: the first, the middle and the last of those that have a saving."""
    order = np.argsort(saving, kind="stable")[: np.isfinite(saving).sum()]  # NaN is last
    count = min(PER_KIND, len(order) // len(KINDS))
    middle = (len(order) - count) // 2
    starts = 0, middle, len(order) - count
    return {kind: order[start : start + count] for kind, start in zip(KINDS, starts, strict=True)}


def matched(anchor_bits: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Bits [K] of the anchor, [P] of the method -> for each of the first the method's choice of the most bits that are
    not more, [K]: where bits differ, it is the anchor that has more. The fewest, where all are more."""
    below = np.where(bits <= anchor_bits[:, None], bits, -1)
    return np.where(below.max(1) < 0, bits.argmin(), below.argmax(1))


def illustrate(
    detector: FasterRCNN,
    features: Features,
    decode: Callable[[list[int]], list[Pyramid]],
    predictor: Predictor,
    cells: dict[str, Cell],
    truth: Truths,
    precode: int,
) -> dict[str, dict[str, Any]]:
    """Task -> `method`; `examples` (see `_example`), best first; `skeletons` (category -> pairs of points).

    decode: of `measuring.decoder`. Each image is decoded once for all tasks.
    """
    of_task = {task: all_choices(cell, precode) for task, cell in cells.items()}
    saving = {task: savings(*choices) for task, choices in of_task.items()}
    rows = {task: ranked(values) for task, values in saving.items()}
    wanted = sorted(
        {cells[t].curves.image_ids[r] for t, kinds in rows.items() for part in kinds.values() for r in part}
    )

    def show(image_id: int) -> dict[str, dict[str, Any]]:
        decoded, shown = decode([image_id]), {}
        for task, cell in cells.items():
            row = int(np.searchsorted(cell.curves.image_ids, image_id))
            if any(row in part for part in rows[task].values()):
                anchor, method = (Choices(*(table[row] for table in choices)) for choices in of_task[task])
                at = matched(anchor.bits, method.bits)
                phi = np.concatenate([np.full((1, len(SCALES)), len(anchor.bits)), anchor.phi, method.phi[at]])
                variants = [(image_id, tuple(p)) for p in phi.tolist()]
                args = detector, decoded, predictor, [image_id], features, truth, dict.fromkeys(variants, {task})
                found = joint_results(*args, every_mask=True)[task]
                shown[task] = _example(cell, row, phi, [found[v] for v in variants], truth.coco[task], task)
        return shown

    shown = dict(zip(wanted, map_in_memory(show, wanted, "illustrate"), strict=True))
    return {
        task: {
            "method": METHOD,
            "examples": [
                {"kind": kind, "saving": float(saving[task][row])} | shown[cell.curves.image_ids[row]][task]
                for kind, part in rows[task].items()
                for row in part
            ],
            "skeletons": {c["name"]: c["skeleton"] for c in truth.coco[task].cats.values() if "skeleton" in c},
        }
        for task, cell in cells.items()
    }


def _example(
    cell: Cell, row: int, phi: np.ndarray, found: list[list[dict[str, Any]]], truth: COCO, task: str
) -> dict[str, Any]:
    """Results of the uncoded pyramid, of uniform at each quality and of METHOD at the same bits -> what a page shows.

    image_id, width, height [px]; truth: objects; uncoded: {found}; uniform, METHOD: for each quality {phi: [5],
    bits: [5] of the records, loss: in objects, measured jointly, found}; weight, sensitivity: {predicted, measured:
    [5]}. Objects and those found are {label, score, box | outlines | points}, in pixels of the image.
    """
    curves, image_id = cell.curves, int(cell.curves.image_ids[row])
    utility = [match.utility.item() for match in match_variants(truth, found, [image_id], task)]
    k, s = curves.bits.shape[2], np.arange(len(SCALES))
    coded = [
        {
            "phi": chosen.tolist(),
            "bits": np.where(chosen < 0, 0, curves.bits[row, s, chosen]).astype(int).tolist(),
            "loss": utility[0] - worth,
            "found": [_shape(item, truth, task) for item in items if item["score"] >= LEAST_SCORE],
        }
        for chosen, worth, items in zip(phi[1:], utility[1:], found[1:], strict=True)
    ]
    image = truth.imgs[image_id]
    objects = [item for item in truth.imgToAnns[image_id] if not item["iscrowd"] and item.get("num_keypoints", 1)]
    return {
        "image_id": image_id,
        "width": image["width"],
        "height": image["height"],
        "truth": [_shape(item, truth, task) for item in objects],
        "uncoded": {"found": [_shape(item, truth, task) for item in found[0] if item["score"] >= LEAST_SCORE]},
        "uniform": coded[:k],
        METHOD: coded[k:],
        "weight": {
            "predicted": cell.importance.weights[row].tolist(),
            "measured": importance_labels(curves.drop)[row].tolist(),
        },
        "sensitivity": {
            "predicted": cell.importance.sensitivity[row].tolist(),
            "measured": measured(curves, cell.fit)[row].tolist(),
        },
    }


def _shape(item: dict[str, Any], truth: COCO, task: str) -> dict[str, Any]:
    """An annotation or a result of COCO -> its label, its score if it has one, and its geometry."""
    number = item["category_id"]  # of a detection it may be one of the numbers that COCO leaves out
    shape: dict[str, Any] = {"label": truth.cats[number]["name"] if number in truth.cats else str(number)}
    if "score" in item:
        shape["score"] = round(item["score"], 2)
    if task == "segmentation":
        is_result = "score" in item
        shape["outlines"] = outlines(rle.decode(item["segmentation"]) if is_result else truth.annToMask(item))
    elif task == "keypoints":
        points = np.round(item["keypoints"], 1).reshape(-1, 3).tolist()
        shape["points"] = [[x, y] if seen else None for x, y, seen in points]
    else:
        shape["box"] = np.round(item["bbox"], 1).tolist()
    return shape


def outlines(mask: np.ndarray) -> list[list[float]]:
    """Mask [H, W] of 0 and 1 -> its outlines, x, y, x, y, ... in pixels, no finer than a picture shows them."""
    step = -(-max(mask.shape) // LONGEST_SIDE)
    grid = np.pad(mask[::step, ::step], 1)  # outlines are closed at the image's border, too
    found = []
    for line in contourpy.contour_generator(z=grid.astype(float)).lines(0.5):
        path = Polygon(np.asarray(line))
        path.should_simplify, path.simplify_threshold = True, SIMPLIFIED
        vertices = np.asarray(path.cleaned(simplify=True).vertices)[:-1]  # after the last, (0, 0) marks the end
        found.append(np.round((vertices - 0.5) * step, 1).ravel().tolist())  # pixel centres are at 0.5
    return found


def write_picture(source: Path, out: Path) -> None:
    """An image file -> a small WebP."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    picture.save(out, "WEBP", quality=80, method=6)
