"""Detectors of torchvision, cut at the feature pyramid: image -> pyramid (sender), pyramid -> detections (receiver)."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision.models import detection, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    expand_boxes,
    expand_masks,
    keypointrcnn_inference,
    maskrcnn_inference,
    paste_mask_in_image,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.transforms.functional import pil_to_tensor

from stages.lib.files import atomic, picture
from stages.lib.params import InputError

UNBUILT = "describes no network of this project"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PIXELS_PER_PASS = 48 * 128**2  # of images whose maps pass a head together: enough to fill a GPU, flat in memory
# Of a head: on a CPU larger maps leave its caches, and malloc asks for them anew.
REGIONS_PER_PASS = 512 if DEVICE.type == "cuda" else 64


class Sizes(NamedTuple):
    """Height and width of one image: as stored in the data set, as the backbone saw it, and padded."""

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]


def images_per_pass(sizes: Sizes) -> int:
    """How many images of this size, or maps of one scale, pass the heads together."""
    return max(1, PIXELS_PER_PASS // math.prod(sizes.padded))


def resnet10_fpn(num_classes: int, num_keypoints: int, min_size: int, max_size: int) -> FasterRCNN:
    """A small Faster/Mask/Keypoint R-CNN in one: ResNet-10, FPN of 32 channels, the three heads of torchvision, narrow.

    Anchors start at 8 px and proposals are few: the model is made for images of about 128 px.
    """
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    channels = 32
    backbone = BackboneWithFPN(
        body, {f"layer{i + 1}": str(i) for i in range(4)}, in_channels_list=[64, 128, 256, 512], out_channels=channels
    )

    def pool(output_size: int) -> MultiScaleRoIAlign:
        # torchvision's scale 2 is for boxes around 224 px, of images of 800; here 56 px, or all would go to scale 0.
        return MultiScaleRoIAlign(["0", "1", "2", "3"], output_size, sampling_ratio=2, canonical_scale=56)

    model = FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((size,) for size in (8, 16, 32, 64, 128)), aspect_ratios=((0.5, 1.0, 2.0),) * 5
        ),
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=128,
        box_roi_pool=pool(7),
        box_head=TwoMLPHead(channels * 7**2, 256),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(256, num_classes),
        box_batch_size_per_image=64,
        box_detections_per_img=15,
    )
    heads = model.roi_heads
    heads.mask_roi_pool = pool(14)
    heads.mask_head = MaskRCNNHeads(channels, (64,) * 4, dilation=1)
    heads.mask_predictor = MaskRCNNPredictor(64, 64, num_classes)
    heads.keypoint_roi_pool = pool(14)
    heads.keypoint_head = KeypointRCNNHeads(channels, (64,) * 4)
    heads.keypoint_predictor = KeypointRCNNPredictor(64, num_keypoints)
    return model


def build(params: dict, num_classes: int, num_keypoints: int) -> nn.Module:
    """The network that `models.<name>` of params.yaml describes, with random weights."""
    size = {"min_size": params["image_size"]["min"], "max_size": params["image_size"]["max"]}
    if params["architecture"] == "resnet10_fpn":
        return resnet10_fpn(num_classes, num_keypoints, **size)
    builder = getattr(detection, params["architecture"])
    counts = {"num_classes": num_classes}
    if params["architecture"].startswith("keypoint"):
        counts["num_keypoints"] = num_keypoints
    return builder(weights=None, weights_backbone=None, **counts, **size)


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load `state` strictly; raises InputError that names the first layer that does not fit.

    Layers may have the older names that torchvision's own still know: its published files do.
    """
    other = "the file belongs to another network"
    own = module.state_dict()
    for name, value in state.items():
        if name in own and own[name].shape != value.shape:
            raise InputError(
                f"{source}: layer {name!r} has shape {tuple(value.shape)}, the network needs "
                f"{tuple(own[name].shape)}; {other} or data set"
            )
    try:
        missing, unknown = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # an older name, and another shape
        raise InputError(f"{source}: {error}; {other}") from None
    for name in missing:
        raise InputError(f"{source}: has no weights for layer {name!r}; {other}")
    for name in unknown:
        raise InputError(f"{source}: layer {name!r} is unknown to the network; {other}")


def read_checkpoint(path: Path, *needed: str) -> dict:
    """A checkpoint of this project: `{"state": layer -> tensor, ...plain values}`; tensors come back as float32.

    `needed`: the plain values that the caller reads; a detector's file has others than a codec's.
    """
    if not path.is_file():
        raise InputError(f"{path}: weights are missing; give an existing file, or null to train from the start")
    with naming(path, "is no weights file of this project"):
        checkpoint = _load(path)
        checkpoint["state"] = _floats(checkpoint["state"], path)
        missing = [key for key in needed if key not in checkpoint]
    if missing:
        raise InputError(f"{path}: has no {missing[0]!r}; the file belongs to another network")
    return checkpoint


def published_state(path: Path) -> dict[str, Tensor]:
    """A file with a state dict, alone or under "state_dict", as other projects publish weights; no code is run.

    A name like torchvision's, ...-<8 hex digits>.pth, tells how the SHA-256 of the file begins.
    """
    if not path.is_file():
        raise InputError(f"{path}: weights are missing; give an existing file")
    if told := re.search(r"-([0-9a-f]{8})\.pth", path.name):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(told[1]):
            raise InputError(f"{path}: its SHA-256 begins with {digest[:8]}, not as its name says; download it again")
    with naming(path, "holds no state dict of tensors"):
        loaded = _load(path)
        state = _floats(loaded.get("state_dict", loaded), path)
        return {name.removeprefix("module."): value for name, value in state.items()}


@contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """What a file's content raises where it is not as it should be, of many types, becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {what} ({type(error).__name__}); give another file") from error


def _load(path: Path) -> Any:
    """What torch.save wrote; nothing that runs code. Raises InputError for damage, which torch.load does not see."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                raise InputError(f"{path}: claims to hold more bytes than it has; give another file")
            if damaged := file.testzip():
                raise InputError(f"{path}: {damaged} is damaged (wrong CRC); copy the file again")
    return torch.load(path, map_location="cpu", weights_only=True)


def _floats(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Layer -> tensor, its numbers finite, float32 unless whole."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: layer {name!r} holds numbers that are not finite; train it again")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def load_model(path: Path, params: dict) -> nn.Module:
    """The detector of a file written by `train_model`, in eval mode on DEVICE."""
    checkpoint = read_checkpoint(path, "num_classes", "num_keypoints")
    with naming(path, UNBUILT):
        model = build(params, checkpoint["num_classes"], checkpoint["num_keypoints"])
    load_weights(model, checkpoint["state"], str(path))
    return model.eval().to(DEVICE).to(memory_format=torch.channels_last)  # twice as fast in the mask head on a CPU


def read_image(path: Path) -> Tensor:
    """An image file -> RGB tensor [3, H, W], float32 in [0, 1]."""
    with picture(path) as image:
        pixels = image.convert("RGB")
    return pil_to_tensor(pixels).float() / 255


@torch.inference_mode()
def pyramid_of(model: nn.Module, image: Tensor) -> tuple[dict[str, Tensor], Sizes]:
    """One image [3, H, W] in [0, 1] -> its pyramid, scale -> [1, C, H_s, W_s], and its sizes.

    One image at a time: in a batch torchvision pads all images to the largest one, and the features would depend on
    the company an image keeps.
    """
    images, _ = model.transform([image.to(DEVICE)])
    pyramid = model.backbone(images.tensors)
    return dict(pyramid), Sizes(tuple(image.shape[-2:]), images.image_sizes[0], tuple(images.tensors.shape[-2:]))


Asked = dict[str, set[int] | None]  # task -> the labels whose masks or keypoints it needs; None: all


class Variants(NamedTuple):
    """N pyramids of images of one padded size that have most of their maps in common."""

    maps: dict[str, Tensor]  # scale -> [M_s, C, H_s, W_s], distinct; each is of one image
    at: dict[str, list[int]]  # scale -> [N], the map that each variant takes


@torch.inference_mode()
def detect(
    model: nn.Module,
    pyramid: dict[str, Tensor],
    sizes: list[Sizes],
    tasks: set[str],
    person_ids: set[int] | None = None,
) -> list[dict[str, Tensor]]:
    """Pyramids [N, C, H_s, W_s] of images of one padded size -> torchvision's detections in original coordinates.

    Only the heads that `tasks` need are run, that of boxes always. The keypoint head sees the boxes of the labels
    `person_ids` (None: all boxes); the keypoints of other boxes are zeros.
    """
    each = Variants(pyramid, {scale: list(range(len(sizes))) for scale in pyramid})
    labels = dict.fromkeys(tasks) | ({"keypoints": person_ids} if "keypoints" in tasks else {})
    found = _run_heads(model, each, sizes, [labels] * len(sizes))
    return model.transform.postprocess(found, [s.resized for s in sizes], [s.original for s in sizes])


@torch.inference_mode()
def detect_variants(
    model: nn.Module, variants: Variants, sizes: list[Sizes], tasks: list[Asked]
) -> list[dict[str, Any]]:
    """`detect`, each variant for tasks of its own; what follows from equal maps is computed once.

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


def _run_heads(model: nn.Module, variants: Variants, sizes: list[Sizes], tasks: list[Asked]) -> list[dict[str, Tensor]]:
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
        chosen = [_among(d["labels"], asked.get(task, set())) for d, asked in zip(found, tasks, strict=True)]
        boxes, labels = ([d[k][c] for d, c in zip(found, chosen, strict=True)] for k in ("boxes", "labels"))
        outputs = _of_regions(pool, head, variants, boxes, labels, shapes)
        for of_variant, asked, c, output in zip(found, tasks, chosen, outputs, strict=True):
            if task in asked:
                of_variant[key] = output.new_zeros(len(c), *output.shape[1:])
                of_variant[key][c] = output
    return found


def _among(labels: Tensor, ids: set[int] | None) -> Tensor:
    """Which of the labels [n] are in `ids` (None: all), [n] bool."""
    if ids is None:
        return torch.ones_like(labels, dtype=torch.bool)
    return torch.isin(labels, torch.tensor(sorted(ids), dtype=labels.dtype, device=labels.device))


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


def save_model(path: Path, model: nn.Module, num_classes: int, num_keypoints: int, half: bool) -> None:
    """Write what `load_model` reads. `half`: matrices as float16, half the bytes; what is saved is what is measured."""
    state = {k: v.half() if half and v.ndim > 1 else v for k, v in model.state_dict().items()}
    with atomic(path) as scratch:
        torch.save({"state": state, "num_classes": num_classes, "num_keypoints": num_keypoints}, scratch)
