"""Feature files: pyramids and sizes of many images in HDF5, written and read one image at a time.

/<split>/<image_id>/<scale>   [C, H_s, W_s], float32 or float16
/<split>/<image_id>           attribute `sizes` [6]: original, resized, padded height and width
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from stages.lib.files import atomic
from stages.lib.models import Sizes
from stages.lib.params import SCALES, InputError

BATCH = 8  # images of one size that pass the heads together


def write_features(path: Path, items: Iterable[tuple[str, int, dict[str, Tensor], Sizes]], dtype: str) -> None:
    """Items (split, image id, scale -> [1, C, H, W], sizes) -> one file; memory does not grow with their number."""
    with atomic(path) as scratch, h5py.File(scratch, "w") as file:
        for split, image_id, pyramid, sizes in items:
            group = file.create_group(f"{split}/{image_id}")
            group.attrs["sizes"] = np.array(sizes, dtype=np.int32).ravel()
            for scale in SCALES:
                features = pyramid[scale][0].cpu().numpy()
                if not np.linalg.norm(features, axis=0).max() < np.finfo(np.float16).max:  # bounds any channel rotation
                    raise InputError(
                        f"image {image_id} of {split}: the features of scale {scale} are not finite, or beyond what "
                        "float16 holds; train the model again, or give other weights"
                    )
                group.create_dataset(scale, data=features.astype(dtype))


class SplitFile:
    """One split of an HDF5 file; every process that reads it opens it for itself, on first use.

    stage: what writes such a file, for the message of InputError.
    """

    def __init__(self, path: Path, split: str, stage: str):
        self.path, self.split, self._stage = path, split, stage
        self._file: h5py.File | None = None
        self._process = os.getpid()

    @property
    def group(self) -> h5py.Group:
        if self._file is None or self._process != os.getpid():
            try:
                self._file, self._process = h5py.File(self.path, "r"), os.getpid()
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read as HDF5 ({error}); run `{self._stage}` again") from None
        if self.split not in self._file:
            raise InputError(f"{self.path}: has no split {self.split!r}; run `{self._stage}` again")
        return self._file[self.split]


class Features(SplitFile):
    """Reader of one split of a feature file."""

    def __init__(self, path: Path, split: str):
        super().__init__(path, split, "extract")
        self.image_ids = sorted(int(name) for name in self.group)

    def sizes(self, image_id: int) -> Sizes:
        return sizes_from(self.group[str(image_id)].attrs["sizes"].tolist())

    def scale(self, image_id: int, scale: str) -> Tensor:
        """One feature map [C, H, W], float32."""
        return torch.from_numpy(self.group[f"{image_id}/{scale}"][:].astype(np.float32))

    def batches(self) -> Iterator[list[int]]:
        """Image ids in batches of up to BATCH images of one padded size."""
        return batches_by_size({i: self.sizes(i) for i in self.image_ids})

    def pyramids(self, image_ids: list[int]) -> dict[str, Tensor]:
        """Pyramids of images of one padded size: scale -> [N, C, H, W]."""
        return {scale: torch.stack([self.scale(i, scale) for i in image_ids]) for scale in SCALES}


def sizes_from(numbers: list[int]) -> Sizes:
    """Six numbers, as stored -> sizes."""
    return Sizes(tuple(numbers[:2]), tuple(numbers[2:4]), tuple(numbers[4:]))


def batches_by_size(sizes: dict[int, Sizes]) -> Iterator[list[int]]:
    """Image ids in batches of up to BATCH images of one padded size, in an order that depends on nothing else."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for image_id in sorted(sizes):
        by_size.setdefault(sizes[image_id].padded, []).append(image_id)
    for _, ids in sorted(by_size.items()):
        for start in range(0, len(ids), BATCH):
            yield ids[start : start + BATCH]
