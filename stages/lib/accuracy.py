"""Detections + ground truth -> COCO AP, per image, of a split and of its bootstrap resamples, from one matching pass.

    detections --results--> COCO dicts --match--> Matches --per_image, utility-> [n_images]
                                                     |-----average_precision---> [resamples] <-- bootstrap_weights

The metric is `stats[0]` of pycocotools.cocoeval.COCOeval. Which detection belongs to which object is decided by its own
methods (area range "all", its largest maxDets); only the sum over detections is done here, in arrays, because
COCOeval.accumulate would have to run once per image and once per resample.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from stages.lib.params import TASKS
from stages.lib.schema import InputError

if TYPE_CHECKING:  # only annotations need torch: resampling must start at once
    from torch import Tensor

WORTH = "worth"  # of an annotation that may be no object: what its utility counts times; 1 where it is missing
LEAST_OVERLAP = 0.5  # of a detection that is worth something: COCO's lowest threshold
RECALLS = Params("bbox").recThrs  # [101], the same for every task
CHUNK = 2**17  # numbers in one array [resamples, detections]: 1 MB stays in the cache, whatever the data set


class Matches(NamedTuple):
    """What COCOeval.evaluate found out; D detections at T IoU thresholds.

    Detections lie in COCOeval's order, by category, then image id, then falling score: it decides between equal scores.
    """

    image_ids: np.ndarray  # [n_images], as given
    image: np.ndarray  # [D] index into image_ids
    category: np.ndarray  # [D] index into the sorted category ids of the ground truth
    score: np.ndarray  # [D]
    matched: np.ndarray  # [D, T] bool
    ignored: np.ndarray  # [D, T] bool: belongs to a crowd or to an object without keypoints, counts as nothing
    n_positive: np.ndarray  # [n_images, n_categories] objects to be found: ground truth that is not ignored
    utility: np.ndarray  # [n_images] what the detections are worth, see `_utility`


def results(
    image_id: int, detection: dict[str, Tensor], task: str, person_ids: set[int] | None
) -> list[dict[str, Any]]:
    """One image's detections as torchvision gives them -> COCO's result dicts.

    boxes [n, 4] (x1, y1, x2, y2), labels [n], scores [n], masks [n, 1, H, W] in [0, 1] or the n run_lengths of what is
    above 0.5, keypoints [n, K, 3] (x, y, 1).
    Keypoints are kept for the categories `person_ids` only (None: for all).
    """
    if task == "segmentation":
        codes = detection["run_lengths"] if "run_lengths" in detection else _run_lengths(detection["masks"])
        key, values = "segmentation", codes
    elif task == "keypoints":
        key, values = "keypoints", detection["keypoints"].flatten(1).tolist()
    else:
        boxes = detection["boxes"].cpu().numpy().astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        key, values = "bbox", boxes.tolist()
    chosen = person_ids if task == "keypoints" else None
    return [
        {"image_id": image_id, "category_id": label, "score": score, key: value}
        for label, score, value in zip(detection["labels"].tolist(), detection["scores"].tolist(), values, strict=True)
        if chosen is None or label in chosen
    ]


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """[n, 1, H, W] -> n run-length codes."""
    columns_first = (masks[:, 0] > 0.5).byte().transpose(1, 2).contiguous()  # [n, W, H]
    return rle.encode(columns_first.cpu().numpy().T)  # [H, W, n] in Fortran's order, as it demands


def match(truth: COCO, found: list[dict[str, Any]], image_ids: list[int], task: str) -> Matches:
    """Which of the detections `found` in the images are right; others are left out, as COCOeval does."""
    return match_variants(truth, [found], image_ids, task)[0]


def match_variants(
    truth: COCO,
    variants: list[list[dict[str, Any]]],
    image_ids: list[int],
    task: str,
    least_overlap: float = LEAST_OVERLAP,
) -> list[Matches]:
    """`match` for several sets of detections in the same images; the ground truth is prepared once.

    least_overlap: in [0, 1), of `_utility`; the matching keeps to COCO's.
    COCOeval leaves its ignore flags and run-length codes in the annotations of `truth`; a second call finds the same.
    """
    evaluation = COCOeval(truth, COCO(), TASKS[task])
    evaluation.params.imgIds = image_ids
    evaluation._prepare()  # fills _gts: (image id, category id) -> annotations with ignore flags and run-length codes
    sigmas = _oks_sigmas(truth, evaluation.params) if task == "keypoints" else {}
    image_index = {image_id: index for index, image_id in enumerate(image_ids)}
    category_index = {category_id: index for index, category_id in enumerate(evaluation.params.catIds)}
    n_positive = np.zeros((len(image_ids), len(category_index)), dtype=np.int64)
    for (image_id, category_id), objects in evaluation._gts.items():
        n_positive[image_index[image_id], category_index[category_id]] = sum(not item["ignore"] for item in objects)

    matches = []
    known: dict[str, tuple[dict[str, Any], float]] = {}  # variants have many detections in common
    for found in variants:
        evaluation._dts = _by_pair(found, image_index, category_index)
        pairs = sorted(evaluation._dts, key=lambda pair: pair[::-1])  # by category, then image, as COCOeval
        evaluated, utility = [], np.zeros(len(image_ids))
        for pair in pairs:
            key = repr(evaluation._dts[pair])
            if key not in known:
                matched = _evaluate(evaluation, pair, sigmas)
                known[key] = matched, _utility(evaluation, pair, matched["dtScores"], least_overlap)
            evaluated.append(known[key][0])
            utility[image_index[pair[0]]] += known[key][1]
        counts = [len(each["dtScores"]) for each in evaluated]
        nothing = np.zeros((len(evaluation.params.iouThrs), 0))
        matches.append(
            Matches(
                image_ids=np.array(image_ids),
                image=np.repeat(np.array([image_index[image_id] for image_id, _ in pairs], dtype=np.int64), counts),
                category=np.repeat(np.array([category_index[c] for _, c in pairs], dtype=np.int64), counts),
                score=np.array([score for each in evaluated for score in each["dtScores"]], dtype=np.float64),
                matched=np.concatenate([nothing, *(each["dtMatches"] for each in evaluated)], axis=1).T > 0,
                ignored=np.concatenate([nothing, *(each["dtIgnore"] for each in evaluated)], axis=1).T > 0,
                n_positive=n_positive,
                utility=utility,
            )
        )
    return matches


def merge(parts: list[Matches]) -> Matches:
    """Matches of separate images, of one ground truth -> those of all of them, as one call of `match` would give."""
    image_ids, category, score, matched, ignored, n_positive, utility = (
        np.concatenate([getattr(part, name) for part in parts]) for name in Matches._fields if name != "image"
    )
    shift = np.cumsum([0, *(len(part.image_ids) for part in parts[:-1])])
    image = np.concatenate([part.image + by for part, by in zip(parts, shift, strict=True)])
    order = np.lexsort((image_ids[image], category))  # stable: the falling scores of an image stay as they are
    of_detections = image[order], category[order], score[order], matched[order], ignored[order]
    return Matches(image_ids, *of_detections, n_positive, utility)


def _by_pair(
    found: list[dict[str, Any]], image_ids: dict[int, int], category_ids: dict[int, int]
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(image id, category id) -> its detections, with the fields that COCO.loadRes adds."""
    pairs: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for item in found:
        if item["image_id"] in image_ids and item["category_id"] in category_ids:
            same = pairs[item["image_id"], item["category_id"]]
            # id 0 would mean "no match"; no detection's area is outside the range "all", so it need not be known.
            same.append({**item, "id": len(same) + 1, "area": 0.0})
    return pairs


def _evaluate(evaluation: COCOeval, pair: tuple[int, int], sigmas: dict[int, np.ndarray]) -> dict[str, Any]:
    """COCOeval's matching of one (image id, category id)."""
    params = evaluation.params
    if sigmas:
        params.kpt_oks_sigmas = sigmas[pair[1]]
    similarity = evaluation.computeOks if sigmas else evaluation.computeIoU
    evaluation.ious = {pair: similarity(*pair)}
    return evaluation.evaluateImg(*pair, params.areaRng[0], params.maxDets[-1])


def _utility(evaluation: COCOeval, pair: tuple[int, int], scores: list[float], least: float) -> float:
    """Sum over the objects of one (image id, category id) of the best detection's  score * (overlap - least) / (1 -
    least), times the object's worth, 1 of those of the ground truth.

    Overlap: IoU of boxes or masks, OKS of keypoints, that `_evaluate` has left; below `least` nothing is found. Unlike
    AP it is smooth in scores and overlaps, and an object counts alike in every image, as it does in the AP of a split.
    """
    overlaps = np.asarray(evaluation.ious[pair]).reshape(len(scores), -1)  # [D, G], by falling score
    objects = evaluation._gts[pair] if overlaps.shape[1] else []
    counted = [not item["ignore"] for item in objects]
    worth = np.array([item.get(WORTH, 1.0) for item in objects])[counted]
    found = np.clip((overlaps[:, counted] - least) / (1 - least), 0, None)
    return float(((np.array(scores)[:, None] * found).max(0, initial=0) * worth).sum())


def _oks_sigmas(truth: COCO, params: Params) -> dict[int, np.ndarray]:
    """Category id -> the sigmas of its keypoints: its own, else COCO's 17."""
    sigmas = {}
    for category_id, category in truth.cats.items():
        count = len(category["keypoints"])
        if "oks_sigmas" not in category and count != len(params.kpt_oks_sigmas):
            raise InputError(
                f"person_keypoints: category {category['name']!r} has {count} keypoints and no oks_sigmas; "
                f"add a list of {count} numbers (only COCO's {len(params.kpt_oks_sigmas)} keypoints have known ones)"
            )
        sigmas[category_id] = np.array(category.get("oks_sigmas", params.kpt_oks_sigmas))
    return sigmas


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """AP of the data set in which image i stands weights[b, i] times (whole numbers; None: once): [B, n_images] -> [B].

    AP = mean over categories k and IoU thresholds t of 1/101 sum_r max {precision_kt(d) : recall_kt(d) >= r}, where d
    runs over the detections by falling score and r over 0, 0.01, ..., 1 (COCOeval.accumulate); categories without an
    object in the resample are left out; without any the AP is NaN. It equals COCOeval's on a data set in which the
    copies of an image follow one another.

    One position per detection is enough for its w copies: between them precision only rises (true) or falls (false),
    so the maximum is found at the last.
    """
    if weights is None:
        weights = np.ones((1, len(matches.image_ids)))
    weights = weights.astype(np.float64)  # exact for counts
    positive = weights @ matches.n_positive  # [B, n_categories]
    ap = np.zeros_like(positive)
    for category in np.unique(matches.category):
        chosen = matches.category == category
        order = np.flatnonzero(chosen)[np.argsort(-matches.score[chosen], kind="stable")]
        order, copy = _spread_ties(order, matches, int(weights.max()))
        kept = ~matches.ignored[order]  # [D, T]
        true = matches.matched[order] & kept
        rows = max(1, CHUNK // max(1, len(order)))
        for start in range(0, len(weights), rows):
            part = slice(start, start + rows)
            count = weights[part][:, matches.image[order]]  # [rows, D]
            count = np.where(copy < 0, count, count > copy)
            ap[part, category] = _category_ap(count, true, kept, np.maximum(positive[part, category], 1))
    return _mean_over_categories(ap, positive > 0)


def _spread_ties(order: np.ndarray, matches: Matches, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted detections [D] -> the same with ties repeated [D'], and the copy of the image each belongs to (-1: all).

    Detections x, y of one image with equal scores come as x y x y from two copies of it, not as x x y y.
    """
    image, score = matches.image[order], matches.score[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (image[1:] != image[:-1]) | (score[1:] != score[:-1])
    group = np.cumsum(new) - 1
    tied = np.bincount(group)[group] > 1
    once, more = np.flatnonzero(~tied), np.flatnonzero(tied)
    position = np.concatenate([once, np.tile(more, copies)])
    copy = np.concatenate([np.full(len(once), -1), np.repeat(np.arange(copies), len(more))])
    sorting = np.lexsort((position, copy, group[position]))
    return order[position[sorting]], copy[sorting]


def _category_ap(count: np.ndarray, true: np.ndarray, kept: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """How often each detection stands in each resample [B, D], true and kept [D, T], positive [B] -> AP [B]."""
    ap = np.zeros(len(count))
    for hits, counted in zip(true.T, kept.T, strict=True):
        seen = np.cumsum(count * counted, axis=1)[:, hits]  # precision rises, and recall moves, at hits only
        ap += _interpolated(np.cumsum(count[:, hits], axis=1), seen, positive)
    return ap / true.shape[1]


def per_image(matches: Matches) -> np.ndarray:
    """Each image's own AP, [n_images]: what COCOeval says of the image alone; NaN where nothing is to be found."""
    useful = matches.n_positive[matches.image, matches.category] > 0  # [D]
    image, category = matches.image[useful], matches.category[useful]
    kept = ~matches.ignored[useful]
    true = matches.matched[useful] & kept
    new = np.ones(len(image), dtype=bool)
    new[1:] = (image[1:] != image[:-1]) | (category[1:] != category[:-1])
    first = np.flatnonzero(new)
    pair = np.cumsum(new) - 1  # [D] which (image, category)
    rank = np.arange(len(image)) - first[pair]  # [D]
    image, category = image[first], category[first]
    positive = matches.n_positive[image, category]  # [pairs]
    shape = (len(first), rank.max(initial=0) + 1)
    total = np.zeros(len(first))
    for hits, counted in zip(true.T, kept.T, strict=True):
        hits_padded, counted_padded = np.zeros(shape), np.zeros(shape)  # [pairs, longest]
        hits_padded[pair, rank], counted_padded[pair, rank] = hits, counted
        total += _interpolated(np.cumsum(hits_padded, axis=1), np.cumsum(counted_padded, axis=1), positive)
    ap = np.zeros(matches.n_positive.shape)
    ap[image, category] = total / true.shape[1]
    return _mean_over_categories(ap, matches.n_positive > 0)


def _interpolated(true: np.ndarray, seen: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """1/101 sum_r max {true(d) / seen(d) : true(d) / positive >= r}; numbers so far [B, D], objects [B] -> [B]."""
    precision = true / (seen + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # from d on
    reached = np.searchsorted(RECALLS, true / positive[:, None], side="right")  # thresholds r reached by d
    return (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)


def _mean_over_categories(ap: np.ndarray, present: np.ndarray) -> np.ndarray:
    """[B, n_categories], [B, n_categories] bool -> [B], NaN where none is present."""
    count = present.sum(axis=1)
    return np.divide((ap * present).sum(axis=1), count, out=np.full(len(ap), np.nan), where=count > 0)


def bootstrap_weights(n_images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn, [resamples, n_images], in n_images draws with replacement."""
    return np.random.default_rng(seed).multinomial(n_images, np.full(n_images, 1 / n_images), size=resamples)
