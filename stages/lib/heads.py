"""Pyramids -> detections: torchvision's proposals and heads, for many variants of a pyramid at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import (
    expand_boxes,
    expand_masks,
    keypointrcnn_inference,
    maskrcnn_inference,
    paste_mask_in_image,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align

from stages.lib.models import DEVICE, Sizes, images_per_pass

# Of a head: on a CPU larger maps leave its caches, and malloc asks for them anew.
REGIONS_PER_PASS = 512 if DEVICE.type == "cuda" else 64
MASK_SIDE = 28  # of torchvision's masks, whatever their boxes
# Task -> the objects that masks or keypoints are needed of, [G, 5]: label, x1, y1, x2, y2 in the original image, all
# pixels of a mask between these. A detection of no object's label, or too far from all, needs none. None: all need one.
Asked = dict[str, Tensor | None]


class Variants(NamedTuple):
    """N pyramids of images of one padded size that have most of their maps in common."""

    maps: dict[str, Tensor]  # scale -> [M_s, C, H_s, W_s], distinct; each is of one image
    at: dict[str, list[int]]  # scale -> [N], the map that each variant takes


@torch.inference_mode()
def detect_variants(
    model: FasterRCNN, variants: Variants, sizes: list[Sizes], tasks: list[Asked]
) -> list[dict[str, Any]]:
    """Variants, each with its image's sizes and tasks -> torchvision's detections in original coordinates.

    Only the heads that its tasks need are run, that of boxes always; what follows from equal maps is computed once.
    In place of `masks` as large as the image, gigabytes at COCO's size, stand their `run_lengths`. Masks and keypoints
    that a task does not ask for are zeros.
    """
    found = _run_heads(model, variants, sizes, tasks)
    masks = [of_variant.pop("masks", None) for of_variant in found]
    found = model.transform.postprocess(found, [s.resized for s in sizes], [s.original for s in sizes])
    for of_variant, of_boxes, size in zip(found, masks, sizes, strict=True):
        if of_boxes is not None:
            of_variant["run_lengths"] = run_lengths(of_boxes, of_variant["boxes"], size.original)
    return found


def _run_heads(
    model: FasterRCNN, variants: Variants, sizes: list[Sizes], tasks: list[Asked]
) -> list[dict[str, Tensor]]:
    """torchvision's detections before its `postprocess`: in the resized image, masks [n, 1, 28, 28] in their boxes."""
    heads, shapes = model.roi_heads, [s.resized for s in sizes]

    def box_head(regions: Tensor, *_: Tensor) -> Tensor:
        return torch.cat(heads.box_predictor(heads.box_head(regions)), 1)

    def mask_head(regions: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        return maskrcnn_inference(heads.mask_predictor(heads.mask_head(regions)), [labels])[0]

    def keypoint_head(regions: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        return keypointrcnn_inference(heads.keypoint_predictor(heads.keypoint_head(regions)), [boxes])[0][0]

    proposals = _proposals(model.rpn, variants, sizes)
    unlabelled = [torch.zeros(len(p), dtype=torch.int64, device=p.device) for p in proposals]
    outputs = _of_regions(heads.box_roi_pool, box_head, variants, proposals, unlabelled, shapes)
    found = []
    for proposed, output, shape in zip(proposals, outputs, shapes, strict=True):
        classes = output.shape[1] // 5  # a score and four coordinates of each
        boxes, scores, labels = heads.postprocess_detections(
            *output.split([classes, 4 * classes], 1), [proposed], [shape]
        )
        found.append({"boxes": boxes[0], "scores": scores[0], "labels": labels[0]})
    for task, key, pool, head in (
        ("segmentation", "masks", heads.mask_roi_pool, mask_head),
        ("keypoints", "keypoints", heads.keypoint_roi_pool, keypoint_head),
    ):
        if not any(task in asked for asked in tasks):
            continue
        chosen = [
            _may_meet(d["labels"], d["boxes"], asked[task], size) if task in asked else d["labels"] < 0
            for d, asked, size in zip(found, tasks, sizes, strict=True)
        ]
        boxes, labels = ([d[k][c] for d, c in zip(found, chosen, strict=True)] for k in ("boxes", "labels"))
        outputs = _of_regions(pool, head, variants, boxes, labels, shapes)
        for of_variant, asked, c, output in zip(found, tasks, chosen, outputs, strict=True):
            if task in asked:
                of_variant[key] = output.new_zeros(len(c), *output.shape[1:])
                of_variant[key][c] = output
    return found


def _may_meet(labels: Tensor, boxes: Tensor, objects: Tensor | None, size: Sizes) -> Tensor:
    """Which detections, labels [n] and boxes [n, 4] in the resized image, may share a pixel with one of their label
    among the objects [G, 5] (see `Asked`), [n] bool. A mask exceeds its box: `run_lengths` widens and rounds it."""
    if objects is None:
        return torch.ones_like(labels, dtype=torch.bool)
    (height, width), (resized_height, resized_width) = size.original, size.resized
    low, high = (boxes * boxes.new_tensor([width / resized_width, height / resized_height] * 2)).split(2, 1)
    beyond = (high - low) / MASK_SIDE + 2
    meets = ((low - beyond)[:, None] <= objects[:, 3:]) & ((high + beyond)[:, None] >= objects[:, 1:3])
    return (meets.all(2) & (labels[:, None] == objects[:, 0])).any(1)


def _proposals(rpn: RegionProposalNetwork, variants: Variants, sizes: list[Sizes]) -> list[Tensor]:
    """torchvision's proposals of each variant, N times [n, 4], by falling score.

    Until it chooses the best of all scales torchvision treats each for itself: so every map is seen once.
    """
    height, width = sizes[0].padded
    # Of the images it reads only the shapes.
    images = ImageList(variants.maps["0"].new_zeros(()).expand(1, 3, height, width), [sizes[0].resized])
    (anchors,) = rpn.anchor_generator(images, list(variants.maps.values()))
    places = rpn.anchor_generator.num_anchors_per_location()
    counts = [n * maps[0, 0].numel() for n, maps in zip(places, variants.maps.values(), strict=True)]
    at_once = images_per_pass(sizes[0])
    best: dict[str, list[tuple[Tensor, Tensor]]] = {}  # scale -> boxes and scores of each map
    for (scale, maps), of_scale in zip(variants.maps.items(), anchors.split(counts), strict=True):
        size_of = dict(zip(variants.at[scale], sizes, strict=True))
        shapes = [size_of[m].resized for m in range(len(maps))]
        best[scale] = []
        for start in range(0, len(maps), at_once):
            part = slice(start, start + at_once)
            logits, deltas = concat_box_prediction_layers(*rpn.head([maps[part]]))
            boxes = rpn.box_coder.decode(deltas, [of_scale] * len(maps[part])).view(-1, len(of_scale), 4)
            best[scale] += zip(*rpn.filter_proposals(boxes, logits, shapes[part], [len(of_scale)]), strict=True)
    proposals = []
    for n in range(len(sizes)):
        boxes, scores = map(torch.cat, zip(*(best[s][at[n]] for s, at in variants.at.items()), strict=True))
        proposals.append(boxes[scores.argsort(descending=True, stable=True)[: rpn.post_nms_top_n()]])
    return proposals


def _of_regions(
    pool: MultiScaleRoIAlign,
    head: Callable[[Tensor, Tensor, Tensor], Tensor],
    variants: Variants,
    boxes: list[Tensor],
    labels: list[Tensor],
    shapes: list[tuple[int, int]],
) -> list[Tensor]:
    """`head` of regions [R, C, h, w], their boxes and labels -> what it gives for the boxes of each variant.

    Equal boxes of one label, pooled from one map, are computed once.
    """
    maps = [variants.maps[scale].contiguous() for scale in pool.featmap_names]  # RoIAlign would copy them in each pass
    if pool.map_levels is None:
        pool(variants.maps, [boxes[0][:0]], shapes)  # infers it, and its scales, when it first pools
    levels, counts = pool.map_levels(boxes), torch.tensor([len(b) for b in boxes])
    at = torch.tensor([variants.at[scale] for scale in pool.featmap_names]).repeat_interleave(counts, 1)  # [levels, R]
    map_of = at.to(levels.device).gather(0, levels[None])[0]
    keys = torch.cat([levels[:, None], map_of[:, None], torch.cat(boxes), torch.cat(labels)[:, None]], 1)
    distinct, index = keys.unique(dim=0, return_inverse=True)
    outputs = []
    for part in distinct.split(REGIONS_PER_PASS):
        regions = [  # in the order of `part`, which is sorted by level
            roi_align(maps[k], part[part[:, 0] == k, 1:6], pool.output_size, scale, pool.sampling_ratio)
            for k, scale in enumerate(pool.scales)
        ]
        outputs.append(head(torch.cat(regions), part[:, 2:6], part[:, 6].long()))
    output = torch.cat(outputs)
    return [output[rows] for rows in index.split(counts.tolist())]


def run_lengths(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Masks [n, 1, 28, 28] in boxes [n, 4] of an image of this height and width -> their n run-length codes.

    What torchvision pastes into the image, where it is above 0.5, without an image of floats for each.
    """
    padded, factor = expand_masks(masks.cpu(), padding=1)
    corners = expand_boxes(boxes.cpu(), factor).long()
    corners[~padded.flatten(1).any(1)] = 0  # nothing is nothing in any box
    pasted = zip(padded, corners.tolist(), strict=True)
    return [{"size": list(size), "counts": _counts(m.numpy().tobytes(), *corner, *size)} for m, corner in pasted]


@lru_cache(maxsize=4096)  # variants have many masks in common
def _counts(mask: bytes, x1: int, y1: int, x2: int, y2: int, height: int, width: int) -> bytes:
    """One mask [30, 30] in its box, corners included -> the counts of its run-length code."""
    side = math.isqrt(len(mask) // 4)
    values = torch.frombuffer(bytearray(mask), dtype=torch.float32).view(side, side)
    top, left = max(y1, 0), max(x1, 0)
    bottom, right = max(min(y2 + 1, height), top), max(min(x2 + 1, width), left)
    box = torch.tensor([x1 - left, y1 - top, x2 - left, y2 - top])
    whole = np.zeros((height, width, 1), dtype=np.uint8, order="F")
    whole[top:bottom, left:right, 0] = paste_mask_in_image(values, box, bottom - top, right - left) > 0.5
    return rle.encode(whole)[0]["counts"]
