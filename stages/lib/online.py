"""The method on one image. Sender: image -> bytes of a `.mfb` file. Receiver: these bytes -> detections.

                             .-> MFIP -> sensitivity -.
    image -> backbone -> pyramid -> precoding -> bits -> allocation -> phi -> records -> file -> ...
                                                             ^
                                            lambda', or the size of the file
    ... file -> decoded scales -> prediction of the skipped ones -> heads -> detections

Both sides run on one thread, as the workers of `shards`: there the same sums are made in the same order, so that one
image has one file, and what was coded decodes on a machine with another number of cores.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from stages.lib import mfip
from stages.lib.accuracy import results
from stages.lib.allocation import mfiba_skip, uniform
from stages.lib.bitstream import (
    FRAME_BYTES,
    Bitstream,
    BitstreamError,
    check_identity,
    identity,
    pack,
    pack_record,
    parse_record,
)
from stages.lib.coding import FeatureCodec, decode_scale, encode_scale, load_codec, pyramid_shapes
from stages.lib.files import picture
from stages.lib.heads import Variants, detect_variants
from stages.lib.loss_rate import read_fit
from stages.lib.models import DEVICE, Sizes, load_model, pyramid_of, read_image
from stages.lib.nearest import nearest_in_size
from stages.lib.params import MAX_SIDE, SCALES, SKIPPED, load_params, precode_of, read_yaml
from stages.lib.prediction import Predictor
from stages.lib.prediction import load as load_predictor
from stages.lib.schema import InputError, is_out_of_memory

MISTAKES = (AssertionError, AttributeError, ImportError, NameError, TypeError)  # of a program, not of what it reads
SHOWN = 0.5  # least score of a detection that is drawn
COLORS = ("lime", "cyan", "magenta", "orange", "deepskyblue")  # of boxes and masks, in turn; keypoints are yellow
INSTANCES = {  # stage -> its instance for a cell, as dvc.yaml's `foreach` and `matrix` call it
    "train_model": "{model}",
    "fit_prediction": "{model}",
    "train_codec": "{model}-{codec}",
    "fit_loss_rate": "{name}",
    "train_mfip": "{model}-{codec}",
}


class Cell(NamedTuple):
    """One of `cells` in params.yaml."""

    name: str
    task: str
    model: str
    codec: str
    params: dict[str, Any]  # all of params.yaml

    @property
    def image_size(self) -> dict[str, int]:
        return self.params["models"][self.model]["image_size"]

    def made_by(self, stage: str) -> Path:
        """What a stage of dvc.yaml makes for this cell, a file; InputError says how to make one that is missing."""
        definition = read_yaml(Path("dvc.yaml"))["stages"][stage]
        values = {"key": self.model, "item.task": self.task, "item.model": self.model, "item.codec": self.codec}
        template = definition.get("do", definition)["outs"][0]
        path = Path(re.sub(r"\$\{([a-z.]+)}", lambda match: values[match[1]], template))
        if stage == "train_mfip":  # a folder for all tasks
            path /= f"{self.task}.pt"
        if not path.is_file():
            target = f"{stage}@{INSTANCES[stage].format(**self._asdict())}"
            raise InputError(f"{path}: no such file; make it with `dvc repro {target}`")
        return path


class Networks(NamedTuple):
    """What both sides have, and the `identity` of their files."""

    detector: FasterRCNN
    feature_codec: FeatureCodec
    predictor: Predictor
    model_id: bytes
    codec_id: bytes


class Encoded(NamedTuple):
    data: bytes  # the file
    bpp: float  # of the whole file; pixels are those of the image as it was given
    wanted_bpp: float | None  # None where lambda' or phi was given
    sensitivity: np.ndarray | None  # [5]; None where phi was given
    phi: np.ndarray  # [5], SKIPPED where nothing is sent
    scale_bits: np.ndarray  # [5], of the records
    seconds: dict[str, float]  # of each step


class Stopwatch:
    """Seconds of named steps, in their order."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if DEVICE.type == "cuda":  # which works on, while Python is elsewhere
            torch.cuda.synchronize()
        self.seconds[step] = time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_cell(name: str) -> Cell:
    """A cell of the profile in the working folder."""
    params = load_params()
    return Cell(name, params=params, **params["cells"][name])


@one_thread()  # on several a sum, and with it a table of the entropy coder, may differ in the last bit
def load_networks(cell: Cell) -> Networks:
    model, codec, prediction = map(cell.made_by, ("train_model", "train_codec", "fit_prediction"))
    detector, feature_codec = load_model(model, cell.params["models"][cell.model]), load_codec(codec)
    predictor = load_predictor(prediction)
    channels = detector.backbone.out_channels
    for path, made_for, stage in (
        (codec, feature_codec.channels, "train_codec"),
        (prediction, predictor.channels, "fit_prediction"),
    ):
        if made_for != channels:
            raise InputError(
                f"{path}: made for pyramids of {made_for} channels, {model} has {channels}; run {stage} again"
            )
    return Networks(detector, feature_codec, predictor, identity(model), identity(codec, prediction))


# ---------------------------------------------------------------- sender


@one_thread()
@torch.inference_mode()
def encode(
    path: Path, cell: Cell, phi: float | None = None, lambda_prime: float | None = None, bpp: float | None = None
) -> Encoded:
    """An image file -> its feature bitstream. At most one of the last three is given:

    phi: one quality for all scales, whole or not. lambda_prime: the price of a bit in the allocation `mfiba_skip`, as
    in `allocate`. bpp: bits of the file per pixel of the image, met within 5 % where the qualities reach that far, else
    as nearly as they do. With none, the bpp that the precoding alone would have.
    """
    lambdas, precode = cell.params["lambdas"], precode_of(cell.params)
    _check_choice(len(lambdas), phi, lambda_prime, bpp)
    image = _read(path, cell)
    networks = load_networks(cell)
    importance: Any = None  # the models that choose phi
    if phi is None:
        fit = read_fit(cell.made_by("fit_loss_rate"), len(lambdas), "mean", "rate")
        importance = fit, mfip.load(cell.made_by("train_mfip"))
    feature_codec, clock = networks.feature_codec, Stopwatch()

    with clock("backbone"):
        pyramid, sizes = pyramid_of(networks.detector, image)
    pixels = sizes.original[0] * sizes.original[1]

    @cache
    def record(scale: str, level: int) -> bytes:
        return encode_scale(pyramid[scale].cpu(), scale, level, feature_codec)[0].data

    def records(phi: np.ndarray) -> dict[str, bytes]:
        """phi [5], below 0: not sent, else whole or not: between two lambdas the logarithm is interpolated."""
        between = np.exp(np.interp(phi, np.arange(len(lambdas)), np.log(list(lambdas.values()))))
        levels = [feature_codec.codec.level(lmbda) for lmbda in between]
        return {
            scale: record(scale, level) for scale, value, level in zip(SCALES, phi, levels, strict=True) if value >= 0
        }

    def bits(phi: np.ndarray) -> int:
        return 8 * (FRAME_BYTES + sum(map(len, records(phi).values())))

    sensitivity = wanted = None
    if phi is not None:
        chosen = np.full(len(SCALES), float(phi))
    else:
        fit, predictor = importance
        with clock("precoding"):
            (precoded,) = uniform(precode, 1)
            precoded_bits = np.array([[8.0 * len(data) for data in records(precoded).values()]])
        with clock("MFIP"):
            statistics = mfip.describe(pyramid, networks.detector.rpn.head).cpu()
            sensitivity = predictor(statistics)[1].double().numpy()  # [1, 5]
        with clock("allocation"):
            of_all = mfiba_skip(sensitivity, precoded_bits, fit, precode)

            def choose(lambda_prime: float) -> np.ndarray:
                return of_all(lambda_prime)[0]

            if lambda_prime is not None:
                chosen = choose(lambda_prime)
            else:
                wanted = bits(precoded) if bpp is None else bpp * pixels
                chosen = nearest_in_size(choose, bits, wanted, len(lambdas) - 1)
    with clock("coding"):  # what precoding and allocation have not coded yet
        coded = records(chosen)
    with clock("writing"):
        data = pack(
            Bitstream(
                networks.model_id,
                networks.codec_id,
                sizes.original,
                sizes.resized,
                {scale: parse_record(data)[0] for scale, data in coded.items()},
            )
        )
    return Encoded(
        data,
        8 * len(data) / pixels,
        None if wanted is None else wanted / pixels,
        None if sensitivity is None else sensitivity[0],
        np.where(chosen < 0, SKIPPED, chosen),
        np.array([8 * len(coded.get(scale, b"")) for scale in SCALES]),
        clock.seconds,
    )


def _check_choice(k: int, phi: float | None, lambda_prime: float | None, bpp: float | None) -> None:
    if phi is not None and not 0 <= phi <= k - 1:
        raise InputError(f"--phi is {phi:g}: params.yaml has {k} lambdas; choose 0 to {k - 1}")
    for name, value in (("--lambda-prime", lambda_prime), ("--bpp", bpp)):
        if value is not None and not 0 < value < inf:
            raise InputError(f"{name} is {value}: it must be a number above 0")


def _read(path: Path, cell: Cell) -> Tensor:
    with picture(path) as image:
        width, height = image.size
    short, long = sorted((width, height))
    longest = cell.image_size["max"]
    if long > MAX_SIDE or long >= short * longest:  # at `longest` px the short side would have none
        raise InputError(
            f"{path}: is {width} x {height} px, the long side must be at most {MAX_SIDE} px and "
            f"less than {longest} times the short one; crop or scale the image"
        )
    return read_image(path)


# ---------------------------------------------------------------- receiver


@one_thread()
def decode(bitstream: Bitstream, cell: Cell, networks: Networks, clock: Stopwatch | None = None) -> dict[str, Tensor]:
    """A file that `parse` accepts -> torchvision's detections for the cell's task, in pixels of the original image.

    In place of masks, gigabytes of a photograph of 12 megapixels, stand their `run_lengths`. clock: is told what
    decoding, with the prediction of skipped scales, and the heads take. Raises BitstreamError for a file that is
    forged, or meant for other weights.
    """
    check_identity(bitstream, networks.model_id, networks.codec_id)
    _check_sizes(bitstream, cell)
    clock = clock or Stopwatch()
    with clock("decoding"):
        pyramid = decode_pyramid(bitstream, networks.feature_codec, networks.predictor)
    sizes = Sizes(bitstream.original, bitstream.resized, bitstream.padded)
    with clock("heads"):
        one = Variants(pyramid, {scale: [0] for scale in pyramid})
        (detection,) = detect_variants(networks.detector, one, [sizes], [{cell.task: None}])
    return detection


def _check_sizes(bitstream: Bitstream, cell: Cell) -> None:
    """Raises BitstreamError for a size of the backbone's image that torchvision's transform does not make.

    Memory depends on nothing else in a file, so that a forged one cannot ask for more than an image would.
    """
    least, most = cell.image_size["min"], cell.image_size["max"]
    share = min(least / min(bitstream.original), most / max(bitstream.original))
    height, width = (int(side * share) for side in bitstream.original)  # in this order, or it rounds otherwise
    if bitstream.resized != (height, width):
        raise BitstreamError(
            f"size {bitstream.resized[0]} x {bitstream.resized[1]} px as the backbone saw it: models.{cell.model}."
            f"image_size {least} x {most} makes {height} x {width} of this image; take the params.yaml that it was "
            "coded with"
        )


def decode_pyramid(bitstream: Bitstream, feature_codec: FeatureCodec, predictor: Predictor) -> dict[str, Tensor]:
    """Records -> scale -> [1, C, H_s, W_s], finite; scales without a record are predicted.

    Raises BitstreamError for a payload that a codec refuses, or stumbles over. Memory that ends, and what no payload
    can cause, keep their own kind.
    """
    shapes, received = pyramid_shapes(bitstream.padded), {}
    for scale, record in bitstream.records.items():
        try:
            received[scale] = decode_scale([pack_record(record)], scale, shapes[scale], feature_codec)
        except InputError as error:
            raise BitstreamError(f"scale {scale}: {error}") from error
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, MISTAKES):
                raise
            kind = type(error).__name__
            raise BitstreamError(f"scale {scale} cannot be decoded ({kind}: {error}); code the image again") from error
    pyramid = predictor.complete(received, (1, feature_codec.channels, *shapes["3"]))
    for scale, maps in pyramid.items():
        if not maps.isfinite().all():
            raise BitstreamError(f"scale {scale} decodes to features that are not finite; code the image again")
    return pyramid


def coco_results(image_id: int, detection: dict[str, Tensor], task: str) -> list[dict[str, Any]]:
    """One image's detections -> COCO's results as JSON holds them; keypoints for all labels."""
    found = results(image_id, detection, task, person_ids=None)
    for item in found:
        if task == "segmentation":
            item["segmentation"]["counts"] = item["segmentation"]["counts"].decode()
    return found


def draw(image: Tensor, detection: dict[str, Tensor], task: str) -> Tensor:
    """Image [3, H, W] in [0, 1] -> the same with the detections of score 0.5 and more."""
    shown = (detection["scores"] >= SHOWN).nonzero()[:, 0].tolist()
    if not shown:
        return image
    labels = [f"{detection['labels'][k]} {detection['scores'][k]:.2f}" for k in shown]
    colors = [COLORS[i % len(COLORS)] for i in range(len(shown))]
    if task == "segmentation":
        masks = torch.from_numpy(rle.decode([detection["run_lengths"][k] for k in shown])).permute(2, 0, 1)
        image = draw_segmentation_masks(image, masks.bool(), colors=colors)
    image = draw_bounding_boxes(image, detection["boxes"][shown].cpu(), labels, colors)
    if task == "keypoints":
        image = draw_keypoints(image, detection["keypoints"][shown, :, :2].cpu(), colors="yellow")
    return image
