"""Pyramid + rate control -> records of the five scales, and back; the bit ledger; files of coded splits.

A record is what `bitstream` describes. An image's bits are those of its `.mfb` file: five records and FRAME_BYTES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.models.utils import remap_old_keys
from torch import Tensor

from stages.lib import bitstream
from stages.lib.elic import Elic
from stages.lib.features import Features, SplitFile, batches_by_size, sizes_from
from stages.lib.files import atomic, write_csv
from stages.lib.hevc import Hevc
from stages.lib.learned import Family, LearnedCodec
from stages.lib.models import DEVICE, load_weights, published_state, read_checkpoint
from stages.lib.params import SCALES, InputError
from stages.lib.planes import Packing, Range, pack, plane_shape, unpack
from stages.lib.progress import progress
from stages.lib.shards import map_shards
from stages.lib.tcm import LicTcm

RANGE_BYTES = 4  # of a record
Codec = LearnedCodec | Family | Hevc


class FeatureCodec(NamedTuple):
    """An image codec and the packing that its weights were made for. `channels` of the pyramids it takes."""

    codec: Codec
    packing: Packing
    channels: int


class Record(NamedTuple):
    """One coded scale of one image, and its line of the ledger."""

    data: bytes
    bytes_hyper: int
    bytes_latent: int
    estimated_bits: float
    mse: float  # of the plane, in units of its range
    mse_feature: float


def save_codec(path: Path, feature_codec: FeatureCodec, config: dict) -> None:
    """Weights as float16 where they are matrices: half the bytes; what is saved is what codes."""
    state = {
        name: value.half() if value.ndim > 1 and "gain" not in name and "inverse" not in name else value
        for name, value in feature_codec.codec.state_dict().items()
        if not _is_table(name)
    }
    with atomic(path) as scratch:
        torch.save(
            {
                "state": state,
                "config": config,
                "packing": feature_codec.packing._asdict(),
                "channels": feature_codec.channels,
            },
            scratch,
        )


def _learned(network: type[Elic | LicTcm]) -> Callable[[dict], LearnedCodec | Family]:
    def build(config: dict) -> LearnedCodec | Family:
        def net() -> Elic | LicTcm:
            return network(3 if config["packing"] == "tile" else 1, **config["network"])

        M = config["network"]["M"]
        if "lambdas" in config:
            return Family([net() for _ in config["lambdas"]], M, config["lambdas"])
        return LearnedCodec(net(), M, config["lambda_range"], config["gains"])

    return build


CODECS = {"elic": _learned(Elic), "tcm": _learned(LicTcm), "hevc": lambda config: Hevc()}  # params.yaml: codecs


def build_codec(config: dict) -> Codec:
    """The codec that `codecs.<name>` of params.yaml describes, untrained. config["codec"] is its name."""
    return CODECS[config["codec"]](config)


def load_codec(path: Path) -> FeatureCodec:
    """A codec written by `train_codec`, ready to code, on DEVICE."""
    checkpoint = read_checkpoint(path, "config", "packing", "channels")
    codec = build_codec(checkpoint["config"])
    load_codec_weights(codec, checkpoint["state"], str(path))
    codec = codec.eval().to(DEVICE).to(memory_format=torch.channels_last).update()
    return FeatureCodec(codec, Packing(**checkpoint["packing"]), checkpoint["channels"])


def load_codec_weights(codec: Codec, state: dict[str, Tensor], source: str) -> None:
    """The weights of `save_codec`, strictly; raises InputError that names a layer that does not fit."""
    tables = {name: value for name, value in codec.state_dict().items() if _is_table(name)}
    load_weights(codec, state | tables, source)


def load_published(family: Family, files: list[str]) -> None:
    """Weights as others publish them, one file for each network of the family, into it.

    A file holds a state dict, or one under "state_dict", with the names of compressai's Elic2022Official or of the
    authors' TCM. Raises InputError that names a layer that does not fit.
    """
    for member, file in zip(family.members, files, strict=True):
        state = published_state(Path(file))
        own = {name: value for name, value in member.net.state_dict().items() if _is_table(name)}
        weights = member.net.from_published(state)
        for name, module in member.net.named_modules():
            if isinstance(module, EntropyBottleneck):
                weights = remap_old_keys(name, weights)  # older compressai named them otherwise
        weights = {name: value for name, value in weights.items() if not _is_table(name)}
        load_weights(member.net, weights | own, file)


def _is_table(name: str) -> bool:
    """What follows from the weights and the architecture: coder tables, and the masks of the checkerboard."""
    return name.split(".")[-1] in ("_offset", "_quantized_cdf", "_cdf_length", "scale_table", "mask")


def encode_scale(features: Tensor, scale: str, level: int, feature_codec: FeatureCodec) -> list[Record]:
    """Feature maps of one scale [N, C, H, W] -> N records."""
    codec, packing, channels = feature_codec
    planes, ranges = zip(*(pack(f, scale, packing) for f in features), strict=True)
    records = []
    for f, plane, value_range, coded in zip(
        features, planes, ranges, codec.encode(torch.stack(planes).to(DEVICE), level), strict=True
    ):
        data = bitstream.pack_record(bitstream.Record(level, *value_range, coded.string))
        received = coded.plane.cpu()
        mse = (received - plane).square().mean().item()
        # A tile without a channel is a part of the plane, but not of what the receiver unpacks.
        mse_feature = (unpack(received, value_range, scale, channels, packing) - f).square().mean().item()
        records.append(
            Record(
                data, coded.bytes_hyper, len(coded.string) - coded.bytes_hyper, coded.estimated_bits, mse, mse_feature
            )
        )
    return records


def decode_scale(records: list[bytes], scale: str, shape: tuple[int, int], feature_codec: FeatureCodec) -> Tensor:
    """N records of one scale and rate control, feature maps of H, W = shape -> [N, C, H, W] on DEVICE."""
    codec, packing, channels = feature_codec
    parsed = [bitstream.parse_record(record)[0] for record in records]
    level = parsed[0].level
    if any(record.level != level for record in parsed):
        raise InputError(f"scale {scale}: records of several rate controls in one call; decode each level alone")
    shape_of_plane = plane_shape(channels, *shape, packing)
    planes = codec.decode([record.payload for record in parsed], level, shape_of_plane).cpu()
    ranges = [Range(record.low, record.high) for record in parsed]
    maps = [unpack(plane, r, scale, channels, packing) for plane, r in zip(planes, ranges, strict=True)]
    return torch.stack(maps).to(DEVICE)


def pyramid_shapes(padded: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of every scale for a padded image size (a multiple of 32): what a receiver derives."""
    shapes = {scale: (padded[0] // 2 ** (i + 2), padded[1] // 2 ** (i + 2)) for i, scale in enumerate(SCALES[:4])}
    height, width = shapes["3"]
    return shapes | {"pool": (-(-height // 2), -(-width // 2))}  # max_pool2d(kernel 1, stride 2)


class Line(NamedTuple):
    """One coded scale of one image, and the pixels of its plane."""

    scale: str
    pixels: int
    record: Record


def compress_split(
    features: Features, feature_codec: FeatureCodec, lmbda: float
) -> Iterator[tuple[list[int], list[list[Line]]]]:
    """Every image of a split, in the order of `batches` -> (image ids, lines of each image), batch by batch."""
    level = feature_codec.codec.level(lmbda)

    def code(image_ids: list[int]) -> tuple[list[int], list[list[Line]]]:
        lines: list[list[Line]] = [[] for _ in image_ids]
        for scale, maps in features.pyramids(image_ids).items():
            _, height, width = plane_shape(feature_codec.channels, *maps.shape[2:], feature_codec.packing)
            for line, record in zip(lines, encode_scale(maps, scale, level, feature_codec), strict=True):
                line.append(Line(scale, height * width, record))
        return image_ids, lines

    batches, total = map_shards(code, features.batches()), len(features.image_ids)
    return progress(batches, f"compress {features.split}", total, lambda batch: len(batch[0]))


def write_coded(
    path: Path, ledger_path: Path, splits: list[Features], feature_codec: FeatureCodec, lmbda: float
) -> None:
    """Splits -> a file of records and the ledger, one line per image and scale.

    HDF5: /<split>/image_ids [n], sizes [n, 6], offsets [5 n + 1] and data: the records of an image, scale by scale.
    """
    rows = []
    with atomic(path) as scratch:
        with h5py.File(scratch, "w") as file:
            for features in splits:
                image_ids, lengths, chunks = [], [], []
                for batch, coded in compress_split(features, feature_codec, lmbda):
                    image_ids += batch
                    for image_id, lines in zip(batch, coded, strict=True):
                        for scale, pixels, record in lines:
                            lengths.append(len(record.data))
                            chunks.append(record.data)
                            key = {"split": features.split, "image_id": image_id, "scale": scale}
                            rows.append(key | _ledger_line(record, pixels))
                group = file.create_group(features.split)
                group["image_ids"] = np.array(image_ids, dtype=np.int64)
                group["sizes"] = np.array([features.sizes(i) for i in image_ids], dtype=np.int32).reshape(-1, 6)
                group["offsets"] = np.cumsum([0, *lengths], dtype=np.int64)
                group["data"] = np.frombuffer(b"".join(chunks), dtype=np.uint8)
        write_csv(ledger_path, pd.DataFrame(rows))


def _ledger_line(record: Record, pixels: int) -> dict[str, float]:
    return {
        "pixels": pixels,
        "bytes_latent": record.bytes_latent,
        "bytes_hyper": record.bytes_hyper,
        "bytes_header": len(record.data) - RANGE_BYTES - record.bytes_hyper - record.bytes_latent,
        "bytes_range": RANGE_BYTES,
        "bits": 8 * len(record.data),
        "estimated_bits": round(record.estimated_bits, 1),
        "mse": record.mse,
        "mse_feature": record.mse_feature,
    }


class CodedSplit(SplitFile):
    """Reader of one split of a file of records."""

    def __init__(self, path: Path, split: str):
        super().__init__(path, split, "compress")
        group = self.group
        self.image_ids, self._offsets = group["image_ids"][:].tolist(), group["offsets"][:]
        self._row = {image_id: i for i, image_id in enumerate(self.image_ids)}
        sizes = group["sizes"][:].tolist()
        self._sizes = {i: sizes_from(numbers) for i, numbers in zip(self.image_ids, sizes, strict=True)}

    def batches(self) -> Iterator[list[int]]:
        """Image ids in batches of one padded size, as `decode` takes them."""
        return batches_by_size(self._sizes)

    def decode(self, image_ids: list[int], feature_codec: FeatureCodec) -> dict[str, Tensor]:
        """Decoded pyramids of images of one padded size: scale -> [N, C, H, W] on DEVICE."""
        shapes = pyramid_shapes(self._sizes[image_ids[0]].padded)
        data, pyramid = self.group["data"], {}
        for s, scale in enumerate(SCALES):
            at = [self._row[image_id] * len(SCALES) + s for image_id in image_ids]
            records = [data[self._offsets[k] : self._offsets[k + 1]].tobytes() for k in at]
            pyramid[scale] = decode_scale(records, scale, shapes[scale], feature_codec)
        return pyramid
