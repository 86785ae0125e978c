"""How fast the loss of one coded scale is measured, beside what the method's authors do; decoded features -> times.

    plain  for each quality and scale the whole detector on every image, one scale replaced; COCOeval of all images
    alike  `single_scale_losses` of the same: the heads see what differs; each image is matched alone
    ours   all of `uncoded_accuracies` and `single_scale_losses`: also scales that are not sent, and pseudo-labels

All three take pyramids that were decoded before.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from copy import copy
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from stages.lib import measuring
from stages.lib.accuracy import match_variants, results
from stages.lib.benchmarking import timings
from stages.lib.coco import image_path, load_split
from stages.lib.coding import load_codec
from stages.lib.features import Features, write_index, write_shard
from stages.lib.measuring import Pyramid, Truths, read_truths, single_scale_losses, truths, uncoded_accuracies
from stages.lib.models import DEVICE, build, load_model, pyramid_of, read_image
from stages.lib.params import ARCHITECTURES, COARSER, SCALES, TASKS
from stages.lib.prediction import Predictor
from stages.lib.prediction import load as load_predictor

KEY = ["task", "quality", "scale", "image_id"]
SPLIT = "test"
CLASSES, KEYPOINTS = 91, 17  # of torchvision's detectors
BACKGROUND = 10.0  # logit of it; those of the classes have a standard deviation of 2
TOLERANCE = 1e-3  # of accuracies and losses: images that pass a head together are rounded otherwise


class Case(NamedTuple):
    """What both measure."""

    detector: FasterRCNN
    features: Features  # uncoded
    images: dict[int, Tensor]  # id -> [3, H, W]
    decoded: dict[str, dict[int, Pyramid]]  # quality -> image id -> scale -> [1, C, H_s, W_s]
    predictor: Predictor
    truth: Truths

    def coded(self) -> Iterator[tuple[str, str]]:
        return product(self.decoded, SCALES)


def compare(case: Case, repetitions: int) -> dict[str, Any]:
    """Seconds of all three, and how far accuracies and losses are from those of the plain loop."""
    found: dict[str, Any] = {}
    runs = {name: partial(of, case) for name, of in (("ours", ours), ("alike", alike), ("plain", plain))}
    seconds = timings({name: (run, partial(found.__setitem__, name)) for name, run in runs.items()}, repetitions)
    found["plain"] = plain_losses(case, found["plain"][0])
    both = pd.concat([found["ours"], found["alike"]]).dropna(subset="clean")
    both = both.merge(found["plain"], "left", KEY, suffixes=("", "_plain"))
    differences = {name: (both[name] - both[f"{name}_plain"]).abs() for name in ("coded", "loss")}
    equal = (differences["coded"] < TOLERANCE) & (differences["loss"] < TOLERANCE)
    return {
        "repetitions": repetitions,
        "images": len(case.images),
        "tasks": list(case.truth.coco),
        "evaluations": 1 + len(list(case.coded())),  # of the plain loop
        "variants": 2 + len(SCALES) + (len(SCALES) + len(COARSER)) * len(case.decoded),  # ours
        "seconds": seconds,
        "times_plain": {name: seconds["plain"] / seconds[name] for name in ("ours", "alike")},
        "equal": float(equal.mean()),
        "largest_difference": {name: float(values.max()) for name, values in differences.items()},
    }


def ours(case: Case) -> pd.DataFrame:
    """The losses of `measure`, and those of `measure_uncoded` before."""
    truth, features = case.truth, _features_of(case)
    uncoded = uncoded_accuracies(case.detector, features, case.predictor, truth, features.image_ids)
    return _single_scale_losses(case, features, uncoded)


def alike(case: Case) -> pd.DataFrame:
    """What of them the plain loop finds, too: no scale is skipped, no object is a detection."""
    features = _features_of(case)
    uncoded = pd.DataFrame(product(case.truth.coco, [SPLIT], case.images, ["3"]), columns=measuring.KEY)
    uncoded[["loss_skipped", "pseudo_loss_skipped"]] = np.nan
    no_objects = measuring.pseudo_labels([], [], [], case.truth)

    def match_objects(labels: COCO, variants: list, image_ids: list[int], *rest: Any) -> list:
        no_match = SimpleNamespace(utility=np.zeros(len(image_ids)))
        return match_variants(labels, variants, image_ids, *rest) if labels.anns else [no_match] * len(variants)

    with (
        patch.object(measuring, "COARSER", {}),
        patch.object(measuring, "pseudo_labels", lambda *_: no_objects),
        patch.object(measuring, "match_variants", match_objects),
    ):
        return _single_scale_losses(case, features, uncoded)


def _features_of(case: Case) -> Features:
    """A split of the case's images alone."""
    features = copy(case.features)
    features.image_ids = list(case.images)
    return features


def _single_scale_losses(case: Case, features: Features, uncoded: pd.DataFrame) -> pd.DataFrame:
    """Decoded features come from memory."""

    def decode(image_ids: list[int]) -> list[Pyramid]:
        decoded = [{s: torch.cat([maps[i][s] for i in image_ids]) for s in SCALES} for maps in case.decoded.values()]
        return [*decoded, {s: maps.to(DEVICE) for s, maps in features.pyramids(image_ids).items()}]

    codec: Any = None  # nothing is decoded
    given = case.detector, features, Path(), list(case.decoded), codec, case.predictor, case.truth, uncoded
    with patch.object(measuring, "decoder", lambda *_: decode):
        return single_scale_losses(*given)(features.image_ids)


@torch.inference_mode()
def plain(case: Case) -> tuple[dict[str, list[list[dict]]], dict[str, list[float]]]:
    """Task -> COCO's results, and AP, of the uncoded features, then of each quality and scale."""
    found: dict[str, list[list[dict]]] = {task: [] for task in case.truth.coco}
    accuracies: dict[str, list[float]] = {task: [] for task in case.truth.coco}
    replaced: Pyramid = {}
    hook = case.detector.backbone.register_forward_hook(lambda *call: call[-1] | replaced)
    try:
        for coded in [None, *case.coded()]:
            of_images: dict[str, list[dict]] = {task: [] for task in found}
            for image_id, image in case.images.items():
                if coded:
                    quality, scale = coded
                    replaced = {scale: case.decoded[quality][image_id][scale]}
                (detection,) = case.detector([image.to(DEVICE)])
                for task in found:
                    of_images[task] += results(image_id, detection, task, case.truth.person_ids)
            for task, coco in case.truth.coco.items():
                found[task].append(of_images[task])
                accuracies[task].append(coco_ap(coco, of_images[task], list(case.images), task))
    finally:
        hook.remove()
    return found, accuracies


def coco_ap(truth: COCO, found: list[dict], image_ids: list[int], task: str) -> float:
    """COCOeval from end to end."""
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), TASKS[task])
        evaluation.params.imgIds = image_ids
        if sigmas := [category["oks_sigmas"] for category in truth.cats.values() if "oks_sigmas" in category]:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas[0])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def plain_losses(case: Case, found: dict[str, list[list[dict]]]) -> pd.DataFrame:
    """Results of the plain loop -> KEY, coded, loss: each image's own AP and the utility that it loses, as ours."""
    rows, image_ids = [], list(case.images)
    for task, coco in case.truth.coco.items():
        clean, *coded = match_variants(coco, found[task], image_ids, task)
        for (quality, scale), matches in zip(case.coded(), coded, strict=True):
            values = zip(image_ids, measuring.per_image(matches), clean.utility - matches.utility, strict=True)
            rows += [(task, quality, scale, *of_image) for of_image in values]
    return pd.DataFrame(rows, columns=[*KEY, "coded", "loss"])


# ---- cases


def profile_case(
    data: Path, model: str, codec: str, described: dict[str, Any], qualities: list[str], count: int
) -> tuple[Case, float]:
    """The first images of a profile's `test`, and the seconds that decoding them took."""
    splits, features = data / "dataset/splits.json", Features(data / "features" / model, "test")
    image_ids, part = features.image_ids[:count], load_split(splits, "test")
    decode = measuring.decoder(
        features, data / "coded" / model / codec, qualities, load_codec(data / "codecs" / model / f"{codec}.pt")
    )
    decoded: dict[str, dict[int, Pyramid]] = {quality: {} for quality in qualities}
    start = time.perf_counter()
    for batch in features.batches(image_ids):
        *pyramids, _ = decode(batch)
        for quality, pyramid in zip(qualities, pyramids, strict=True):
            decoded[quality] |= {i: {s: m[k : k + 1] for s, m in pyramid.items()} for k, i in enumerate(batch)}
    seconds = time.perf_counter() - start
    case = Case(
        load_model(data / "models" / f"{model}.pt", described),
        features,
        {i: read_image(image_path(part, i)) for i in image_ids},
        decoded,
        load_predictor(data / "predictions" / f"{model}.pt"),
        read_truths(splits, "test", described["tasks"]),
    )
    return case, seconds


def random_case(folder: Path, architecture: str, size: tuple[int, int], count: int, steps: dict[str, float]) -> Case:
    """torchvision's detector with random weights, on noise; `folder` gets the features.

    steps: quality -> by how many standard deviations of its scale a decoded feature is quantised. What the detector
    finds with uncoded features is the ground truth: so accuracies tell something, and all masks are asked for.
    """
    torch.manual_seed(0)
    described = {"architecture": architecture, "image_size": {"min": min(size), "max": max(size)}}
    detector = build(described, CLASSES, KEYPOINTS).eval().to(DEVICE).to(memory_format=torch.channels_last)
    images = {image_id: torch.rand(3, *size) for image_id in range(1, 1 + count)}
    _as_if_trained(detector, images[1])
    pyramids = {image_id: pyramid_of(detector, image) for image_id, image in images.items()}
    write_shard(folder / f"{SPLIT}-00000.h5", ((i, *pyramid) for i, pyramid in pyramids.items()), "float32")
    write_index(folder)
    decoded = {
        quality: {i: {s: _quantised(maps, step) for s, maps in p.items()} for i, (p, _) in pyramids.items()}
        for quality, step in steps.items()
    }
    predictor = Predictor(len(pyramids[1][0]["0"][0])).eval().to(DEVICE)
    truth = truths({task: _found(detector, images, task) for task in ARCHITECTURES[architecture]})
    return Case(detector, Features(folder, SPLIT), images, decoded, predictor, truth)


@torch.inference_mode()
def _as_if_trained(detector: FasterRCNN, image: Tensor) -> None:
    """Random weights propose boxes of any size and are sure of all; let them stay near anchors, and be sure of few.

    The last layers are scaled so that what moves boxes has a standard deviation of 0.2 of their size, then 0.1, and a
    class's score is high in some places: 50 to 100 detections in an image, as many as trained ones have in full scenes.
    """
    images, _ = detector.transform([image.to(DEVICE)])
    pyramid = detector.backbone(images.tensors)
    rpn, heads = detector.rpn, detector.roi_heads
    logits, deltas = (torch.cat([of.flatten() for of in outputs]) for outputs in rpn.head(list(pyramid.values())))
    rpn.head.cls_logits.weight.mul_(2 / logits.std())
    rpn.head.bbox_pred.weight.mul_(0.2 / deltas.std())
    proposals, _ = rpn(images, pyramid)
    regions = heads.box_head(heads.box_roi_pool(pyramid, proposals, images.image_sizes))
    classes, boxes = heads.box_predictor.cls_score, heads.box_predictor.bbox_pred
    boxes.weight.mul_(1 / boxes(regions).std())  # in tenths of a region's size
    scores = classes(regions)
    classes.weight.mul_(2 / (scores - scores.mean(0)).std())
    classes.bias.sub_(classes(regions).mean(0))
    classes.bias[0] += BACKGROUND


def _quantised(maps: Tensor, step: float) -> Tensor:
    unit = step * maps.std()
    return (maps / unit).round() * unit


def _found(detector: FasterRCNN, images: dict[int, Tensor], task: str) -> COCO:
    """What a detector finds in images, as their ground truth."""
    annotations: list[dict] = []
    with torch.inference_mode():
        for image_id, image in images.items():
            (detection,) = detector([image.to(DEVICE)])
            annotations += results(image_id, detection, task, None)
    for number, item in enumerate(annotations, 1):
        item |= {"id": number, "iscrowd": 0, "area": 1.0}  # no object's area is outside the range "all"
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": image.shape[1], "width": image.shape[2]} for i, image in images.items()],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in range(1, CLASSES)],
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
