"""Feature files: pyramids and sizes of many images in HDF5, written and read one image at a time.

/<split>/<image_id>/<scale>   [C, H_s, W_s], float32 or float16
/<split>/<image_id>           attribute `sizes` [6]: original, resized, padded height and width
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from stages.lib.files import atomic
from stages.lib.models import Sizes
from stages.lib.params import SCALES, InputError


def write_features(path: Path, items: Iterable[tuple[str, int, dict[str, Tensor], Sizes]], dtype: str) -> None:
    """Items (split, image id, scale -> [1, C, H, W], sizes) -> one file; memory does not grow with their number."""
    with atomic(path) as scratch, h5py.File(scratch, "w") as file:
        for split, image_id, pyramid, sizes in items:
            group = file.create_group(f"{split}/{image_id}")
            group.attrs["sizes"] = np.array(sizes, dtype=np.int32).ravel()
            for scale in SCALES:
                group.create_dataset(scale, data=pyramid[scale][0].cpu().numpy().astype(dtype))


class Features:
    """Reader of one split of a feature file; opens it on first use, so it can be handed to worker processes."""

    def __init__(self, path: Path, split: str):
        self.path, self.split = path, split
        self._file: h5py.File | None = None
        self.image_ids = sorted(int(name) for name in self._group())

    def _group(self) -> h5py.Group:
        if self._file is None:
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read as HDF5 ({error}); run `extract` again") from None
        if self.split not in self._file:
            raise InputError(f"{self.path}: has no split {self.split!r}; run `extract` again")
        return self._file[self.split]

    def sizes(self, image_id: int) -> Sizes:
        return sizes_from(self._group()[str(image_id)].attrs["sizes"].tolist())

    def scale(self, image_id: int, scale: str) -> Tensor:
        """One feature map [C, H, W], float32."""
        return torch.from_numpy(self._group()[f"{image_id}/{scale}"][:].astype(np.float32))

    def batches(self, size: int) -> Iterator[list[int]]:
        """Image ids in batches of up to `size` images of one padded size."""
        return batches_by_size({i: self.sizes(i) for i in self.image_ids}, size)

    def pyramids(self, image_ids: list[int]) -> dict[str, Tensor]:
        """Pyramids of images of one padded size: scale -> [N, C, H, W]."""
        return {scale: torch.stack([self.scale(i, scale) for i in image_ids]) for scale in SCALES}


def sizes_from(numbers: list[int]) -> Sizes:
    """Six numbers, as stored -> sizes."""
    return Sizes(tuple(numbers[:2]), tuple(numbers[2:4]), tuple(numbers[4:]))


def batches_by_size(sizes: dict[int, Sizes], size: int) -> Iterator[list[int]]:
    """Image ids in batches of up to `size` images of one padded size, in an order that depends on nothing else."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for image_id in sorted(sizes):
        by_size.setdefault(sizes[image_id].padded, []).append(image_id)
    for _, ids in sorted(by_size.items()):
        for start in range(0, len(ids), size):
            yield ids[start : start + size]
