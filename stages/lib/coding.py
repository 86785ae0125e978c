"""Pyramid + rate control -> records of the five scales, and back; the bit ledger; files of coded splits.

A record is what `bitstream` describes. An image's bits are those of its `.mfb` file: five records and FRAME_BYTES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.models.utils import remap_old_keys
from torch import Tensor

from stages.lib import bitstream
from stages.lib.elic import Elic
from stages.lib.features import SHARD_IMAGES, Features
from stages.lib.files import atomic, create_h5, open_h5, write_array
from stages.lib.hevc import Hevc
from stages.lib.learned import Family, LearnedCodec
from stages.lib.models import DEVICE, UNBUILT, load_weights, naming, published_state, read_checkpoint
from stages.lib.params import SCALES
from stages.lib.planes import Packing, Range, pack, plane_shape, unpack
from stages.lib.schema import InputError
from stages.lib.tcm import LicTcm

RANGE_BYTES = 4  # of a record
CHUNK_BYTES = 2**12  # of a shard's records: an image is read without its neighbours, but for so many bytes
LEDGER = (
    "pixels",
    "bytes_latent",
    "bytes_hyper",
    "bytes_header",
    "bytes_range",
    "bits",
    "estimated_bits",
    "mse",
    "mse_feature",
)
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
    mse: float  # of the plane, in units of its range; NaN, and so the next, of a plane that was not reconstructed
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
    with naming(path, UNBUILT):
        codec, packing = build_codec(checkpoint["config"]), Packing(**checkpoint["packing"])
    load_codec_weights(codec, checkpoint["state"], str(path))
    codec = codec.eval().to(DEVICE).to(memory_format=torch.channels_last).update()
    return FeatureCodec(codec, packing, checkpoint["channels"])


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


def encode_scale(
    features: Tensor, scale: str, level: int, feature_codec: FeatureCodec, reconstruct: bool = True
) -> list[Record]:
    """Feature maps of one scale [N, C, H, W] -> N records. A sender need not `reconstruct` what the receiver will."""
    codec, packing, channels = feature_codec
    planes, ranges = zip(*(pack(f, scale, packing) for f in features), strict=True)
    records = []
    for f, plane, value_range, coded in zip(
        features, planes, ranges, codec.encode(torch.stack(planes).to(DEVICE), level, reconstruct), strict=True
    ):
        data = bitstream.pack_record(bitstream.Record(level, value_range.low, value_range.high, coded.string))
        mse = mse_feature = math.nan
        if reconstruct:
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


def compress_shard(
    path: Path, features: Features, image_ids: list[int], feature_codec: FeatureCodec, level: int
) -> None:
    """Some images of a split, ids rising -> a file of records, with their lines of the ledger.

    HDF5: image_ids [n], offsets [5 n + 1] and data: the records of an image, scale by scale; ledger/<column> [5 n].
    """
    records: dict[int, list[Record]] = {i: [] for i in image_ids}
    rows: dict[int, list[dict[str, float]]] = {i: [] for i in image_ids}
    for batch in features.batches(image_ids):
        for scale, maps in features.pyramids(batch).items():
            _, _, height, width = maps.shape
            pixels = math.prod(plane_shape(feature_codec.channels, height, width, feature_codec.packing)[1:])
            for image_id, record in zip(batch, encode_scale(maps, scale, level, feature_codec), strict=True):
                records[image_id].append(record)
                rows[image_id].append(_ledger_line(record, pixels))
    chunks = [record.data for of_image in records.values() for record in of_image]
    ledger = pd.DataFrame([row for of_image in rows.values() for row in of_image])
    with create_h5(path) as file:
        write_array(file, "image_ids", np.array(image_ids, dtype=np.int64))
        write_array(file, "offsets", np.cumsum([0, *map(len, chunks)], dtype=np.int64))
        write_array(file, "data", np.frombuffer(b"".join(chunks), dtype=np.uint8), CHUNK_BYTES)
        for column in ledger:
            write_array(file, f"ledger/{column}", ledger[column].to_numpy())


def read_ledger(paths: list[Path]) -> pd.DataFrame:
    """Files of `compress_shard` -> split, image_id, scale and the columns of the ledger, a row for each record."""
    frames = []
    for path in paths:
        with open_h5(path, "compress") as file:
            lines = {name: values[:] for name, values in file["ledger"].items()}
            image_ids = file["image_ids"][:]
        key = {"split": path.stem.rpartition("-")[0], "image_id": np.repeat(image_ids, len(SCALES))}
        frames.append(pd.DataFrame(key | {"scale": np.tile(SCALES, len(image_ids))} | {c: lines[c] for c in LEDGER}))
    return pd.concat(frames, ignore_index=True)


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


class CodedSplit:
    """Reader of the records of one split, in a folder of `compress`; `features`: what was coded."""

    def __init__(self, path: Path, features: Features):
        self._path, self._features = path, features
        self._row = {image_id: n % SHARD_IMAGES for n, image_id in enumerate(features.image_ids)}

    def records(self, image_id: int) -> list[bytes]:
        """The records of an image, scale by scale."""
        path, row = self._path / self._features.file_of(image_id).name, self._row[image_id]
        with open_h5(path, "compress") as file:
            if file["image_ids"][:].tolist()[row : row + 1] != [image_id]:
                raise InputError(f"{path}: holds other images than {self._features.path}; run `compress` again")
            offsets = file["offsets"][row * len(SCALES) : (row + 1) * len(SCALES) + 1].tolist()
            data = file["data"][offsets[0] : offsets[-1]].tobytes()
        cuts = [at - offsets[0] for at in offsets]
        return [data[start:end] for start, end in pairwise(cuts)]

    def decode(self, image_ids: list[int], feature_codec: FeatureCodec) -> dict[str, Tensor]:
        """Decoded pyramids of images of one padded size: scale -> [N, C, H, W] on DEVICE."""
        shapes = pyramid_shapes(self._features.sizes(image_ids[0]).padded)
        records = zip(*map(self.records, image_ids), strict=True)
        return {
            scale: decode_scale(list(of_scale), scale, shapes[scale], feature_codec)
            for scale, of_scale in zip(SCALES, records, strict=True)
        }
