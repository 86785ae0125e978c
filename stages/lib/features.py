"""Feature folders: pyramids and sizes of many images, in HDF5 shards, written and read one image at a time.

index.csv           a row for each image: split, image_id and its sizes
<split>-<n>.h5      a run of images of a split, in rising id (a `Shard`):
  /<image_id>         attribute `sizes` [6]: original, resized, padded height and width
  /<image_id>/<scale> [C, H_s, W_s], float32, float16, or uint10: uint16 of 0..1023 with attribute `range`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5plugin
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stages.lib.files import create_h5, open_h5, read_csv, write_array
from stages.lib.models import Sizes, images_per_pass
from stages.lib.params import SCALES, InputError

SHARD_IMAGES = 16  # of a shard
BATCH = 8  # images of one size that pass the heads together, or fewer if they are large
LEVELS = 1023  # of uint10
INDEX = ["split", "image_id", *(f"{kind}_{side}" for kind in Sizes._fields for side in ("height", "width"))]


class Shard(NamedTuple):
    """A run of images of one split."""

    split: str
    number: int
    image_ids: list[int]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05}"


def shards_of(splits: dict[str, Sequence[int]]) -> list[Shard]:
    """Image ids of every split -> shards, ids rising."""
    shards = []
    for split, image_ids in splits.items():
        image_ids = sorted(image_ids)
        starts = range(0, len(image_ids), SHARD_IMAGES)
        shards += [Shard(split, number, image_ids[start : start + SHARD_IMAGES]) for number, start in enumerate(starts)]
    return shards


def write_shard(path: Path, items: Iterable[tuple[int, dict[str, Tensor], Sizes]], dtype: str) -> None:
    """Items (image id, scale -> [1, C, H, W], sizes) -> one file; memory does not grow with their number."""
    with create_h5(path) as file:
        for image_id, pyramid, sizes in items:
            group = file.create_group(str(image_id))
            group.attrs["sizes"] = np.array(sizes, dtype=np.int32).ravel()
            for scale in SCALES:
                features = pyramid[scale][0].cpu().numpy()
                if not np.linalg.norm(features, axis=0).max() < np.finfo(np.float16).max:  # bounds any channel rotation
                    raise InputError(
                        f"image {image_id}: the features of scale {scale} are not finite, or beyond what float16 "
                        "holds; train the model again, or give other weights"
                    )
                _write_scale(group, scale, features, dtype)


def _write_scale(group: h5py.Group, scale: str, features: np.ndarray, dtype: str) -> None:
    if dtype != "uint10":
        write_array(group, scale, features.astype(dtype))
        return
    low, high = features.min(), features.max()
    step = (high - low) / LEVELS or np.float32(1)
    # Ten of sixteen bits are used, and neighbours are alike: half of what float16 takes, at the speed of a disk.
    write_array(group, scale, ((features - low) / step).round().astype(np.uint16), **hdf5plugin.Bitshuffle(cname="lz4"))
    group[scale].attrs["range"] = np.array([low, step], dtype=np.float32)


def write_index(folder: Path) -> None:
    """The index of the shards in `folder`."""
    rows = []
    for path in sorted(folder.glob("*.h5")):
        with open_h5(path, "extract") as file:
            split = path.stem.rpartition("-")[0]
            rows += [(split, image_id, *file[str(image_id)].attrs["sizes"]) for image_id in sorted(map(int, file))]
    pd.DataFrame(rows, columns=INDEX).to_csv(folder / "index.csv", index=False, lineterminator="\n")


class Features:
    """Reader of one split of a feature folder."""

    def __init__(self, path: Path, split: str):
        self.path, self.split = path, split
        if not (path / "index.csv").is_file():
            raise InputError(f"{path}: is no folder of features (index.csv is missing); run `extract` again")
        index = read_csv(path / "index.csv", INDEX)
        index = index.loc[index["split"] == split, INDEX].sort_values("image_id")
        if index.empty:
            raise InputError(f"{path}: has no split {split!r}; run `extract` again")
        self._sizes = {image_id: sizes_from(numbers) for _, image_id, *numbers in index.to_numpy().tolist()}
        self.image_ids = list(self._sizes)
        self._file = {
            image_id: path / f"{split}-{n // SHARD_IMAGES:05}.h5" for n, image_id in enumerate(self.image_ids)
        }

    def sizes(self, image_id: int) -> Sizes:
        return self._sizes[image_id]

    def file_of(self, image_id: int) -> Path:
        """The shard that holds an image."""
        return self._file[image_id]

    def scale(self, image_id: int, scale: str) -> Tensor:
        """One feature map [C, H, W], float32."""
        with open_h5(self._file[image_id], "extract") as file:
            stored = file[f"{image_id}/{scale}"]
            if sizes_from(stored.parent.attrs["sizes"].tolist()) != self._sizes[image_id]:
                raise InputError(
                    f"{self.path}/index.csv: has other sizes of image {image_id} than {self._file[image_id]}; "
                    "run `extract` again"
                )
            values, ranged = stored[:].astype(np.float32), stored.attrs.get("range")
        return torch.from_numpy(values if ranged is None else values * ranged[1] + ranged[0])

    def batches(self, image_ids: list[int] | None = None) -> Iterator[list[int]]:
        """These image ids, or all, in batches of up to BATCH images of one padded size."""
        return batches_by_size({i: self._sizes[i] for i in image_ids or self.image_ids})

    def pyramids(self, image_ids: list[int]) -> dict[str, Tensor]:
        """Pyramids of images of one padded size: scale -> [N, C, H, W]."""
        return {scale: torch.stack([self.scale(i, scale) for i in image_ids]) for scale in SCALES}


def sizes_from(numbers: list[int]) -> Sizes:
    """Six numbers, as stored -> sizes."""
    return Sizes(tuple(numbers[:2]), tuple(numbers[2:4]), tuple(numbers[4:]))


def batches_by_size(sizes: dict[int, Sizes]) -> Iterator[list[int]]:
    """Image ids in batches of images of one padded size, in an order that depends on nothing else."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for image_id in sorted(sizes):
        by_size.setdefault(sizes[image_id].padded, []).append(image_id)
    for _, ids in sorted(by_size.items()):
        count = min(BATCH, images_per_pass(sizes[ids[0]]))
        for start in range(0, len(ids), count):
            yield ids[start : start + count]
