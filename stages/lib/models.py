"""Detectors of torchvision, cut at the feature pyramid: how they are built, read and written; image -> pyramid."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import pil_to_tensor

from stages.lib.files import atomic, picture
from stages.lib.schema import InputError, is_out_of_memory

PUBLISHED = re.compile(r"-([0-9a-f]{8})\.pth")  # a file's name, as torchvision gives it: how its SHA-256 begins
NORM_EPSILON = "norm_epsilon"  # key of a detector's file
UNBUILT = "describes no network of this project"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.deterministic = True  # a receiver needs its sender's entropy parameters to the bit
torch.backends.cudnn.allow_tf32 = False  # for 10 bits of what is float32 here: losses of good qualities are as small
PIXELS_PER_PASS = 48 * 128**2  # of images whose maps pass a head together: enough to fill a GPU, flat in memory


@cache
def emulates_bfloat16() -> bool:
    """As GPUs before Ampere do, slower than float32. Asking begins CUDA, which no fork survives: no import does it."""
    return DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 0)


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


def build(params: dict, num_classes: int, num_keypoints: int) -> FasterRCNN:
    """The network that `models.<name>` of params.yaml describes, with random weights."""
    size = {"min_size": params["image_size"]["min"], "max_size": params["image_size"]["max"]}
    if params["architecture"] == "resnet10_fpn":
        return resnet10_fpn(num_classes, num_keypoints, **size)
    builder = getattr(detection, params["architecture"])
    counts = {"num_classes": num_classes}
    if params["architecture"].startswith("keypoint"):
        counts["num_keypoints"] = num_keypoints
    return builder(weights=None, weights_backbone=None, **counts, **size)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def set_norm_epsilon(model: nn.Module, checkpoint: dict) -> None:
    """What batch normalisation adds to a variance: no layer holds it, and detectors differ in it."""
    for norm in norms(model):
        norm.eps = float(checkpoint.get(NORM_EPSILON, norm.eps))


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


def downloaded(url: str) -> Path:
    """A published file in torch's cache, fetched if it is not there; `published_state` verifies what is there.

    Raises OSError or RuntimeError where it cannot be fetched whole.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        told = PUBLISHED.search(path.name)
        torch.hub.download_url_to_file(url, str(path), told and told[1])
    return path


def published_state(path: Path) -> dict[str, Tensor]:
    """A file with a state dict, alone or under "state_dict", as other projects publish weights; no code is run.

    A name like torchvision's, ...-<8 hex digits>.pth, tells how the SHA-256 of the file begins.
    """
    if not path.is_file():
        raise InputError(f"{path}: weights are missing; give an existing file")
    if told := PUBLISHED.search(path.name):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(told[1]):
            remedy = "remove it, and download it again"
            raise InputError(f"{path}: its SHA-256 begins with {digest[:8]}, not as its name says; {remedy}")
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
        if is_out_of_memory(error):  # of what the file says, or of what is left
            raise InputError(f"{path}: out of memory ({error}); close other programs, or give another file") from None
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


def load_model(path: Path, params: dict) -> FasterRCNN:
    """The detector of a file written by `train_model`, in eval mode on DEVICE."""
    checkpoint = read_checkpoint(path, "num_classes", "num_keypoints")
    with naming(path, UNBUILT):
        model = build(params, checkpoint["num_classes"], checkpoint["num_keypoints"])
    load_weights(model, checkpoint["state"], str(path))
    set_norm_epsilon(model, checkpoint)
    return model.eval().to(DEVICE).to(memory_format=torch.channels_last)  # twice as fast in the mask head on a CPU


def read_image(path: Path) -> Tensor:
    """An image file -> RGB tensor [3, H, W], float32 in [0, 1]."""
    with picture(path) as image:
        pixels = image.convert("RGB")
    return pil_to_tensor(pixels).float() / 255


@torch.inference_mode()
def pyramid_of(model: FasterRCNN, image: Tensor) -> tuple[dict[str, Tensor], Sizes]:
    """One image [3, H, W] in [0, 1] -> its pyramid, scale -> [1, C, H_s, W_s], and its sizes.

    One image at a time: in a batch torchvision pads all images to the largest one, and the features would depend on
    the company an image keeps.
    """
    images, _ = model.transform([image.to(DEVICE)])
    pyramid = model.backbone(images.tensors)
    (height, width), (rows, columns) = image.shape[-2:], images.tensors.shape[-2:]
    return dict(pyramid), Sizes((height, width), images.image_sizes[0], (rows, columns))


def save_model(path: Path, model: FasterRCNN, num_classes: int, num_keypoints: int, half: bool) -> None:
    """Write what `load_model` reads. `half`: matrices as float16, half the bytes; what is saved is what is measured."""
    state = {k: v.half() if half and v.ndim > 1 else v for k, v in model.state_dict().items()}
    with atomic(path) as scratch:
        about = {"num_classes": num_classes, "num_keypoints": num_keypoints, NORM_EPSILON: norms(model)[0].eps}
        torch.save({"state": state} | about, scratch)
