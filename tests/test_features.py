"""A feature file gives back what was put in, image by image."""

from pathlib import Path

import pytest
import torch

from stages.lib import features
from stages.lib.features import Features, batches_by_size, write_features
from stages.lib.models import Sizes
from stages.lib.params import SCALES, InputError

WIDE = Sizes((50, 90), (60, 100), (64, 128))
HIGH = Sizes((128, 64), (128, 64), (128, 64))


def pyramid(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {scale: torch.randn(1, 3, 8 - i, 4, generator=generator) for i, scale in enumerate(SCALES)}


ITEMS = [("fit", 12, WIDE), ("fit", 3, HIGH), ("fit", 100, WIDE), ("test", 3, WIDE)]


def write(path: Path, dtype: str = "float32") -> Path:
    write_features(path, ((split, i, pyramid(i), sizes) for split, i, sizes in ITEMS), dtype)
    return path


def test_float32_comes_back_exactly(tmp_path):
    fit = Features(write(tmp_path / "f.h5"), "fit")
    assert fit.image_ids == [3, 12, 100]
    for i in fit.image_ids:
        assert all(torch.equal(fit.scale(i, scale), pyramid(i)[scale][0]) for scale in SCALES)


def test_float16_comes_back_closely_as_float32(tmp_path):
    fit = Features(write(tmp_path / "f.h5", "float16"), "fit")
    for scale in SCALES:
        stored = fit.scale(12, scale)
        assert stored.dtype == torch.float32
        assert torch.allclose(stored, pyramid(12)[scale][0], rtol=2**-11, atol=1e-7)


def test_sizes_come_back(tmp_path):
    path = write(tmp_path / "f.h5")
    assert Features(path, "fit").sizes(12) == WIDE
    assert Features(path, "fit").sizes(3) == HIGH
    assert Features(path, "test").sizes(3) == WIDE


def test_the_same_features_give_the_same_bytes(tmp_path):
    assert write(tmp_path / "a.h5").read_bytes() == write(tmp_path / "b.h5").read_bytes()


def test_batches_hold_images_of_one_padded_size(tmp_path, monkeypatch):
    fit = Features(write(tmp_path / "f.h5"), "fit")
    assert list(fit.batches()) == [[12, 100], [3]]
    monkeypatch.setattr(features, "BATCH", 1)
    assert list(fit.batches()) == [[12], [100], [3]]


def test_pyramids_are_stacked_in_the_order_of_the_ids(tmp_path):
    stacked = Features(write(tmp_path / "f.h5"), "fit").pyramids([100, 12])
    for scale in SCALES:
        assert torch.equal(stacked[scale], torch.cat([pyramid(100)[scale], pyramid(12)[scale]]))


def test_batches_do_not_depend_on_the_order_of_the_sizes(monkeypatch):
    sizes = {i: WIDE if i % 3 else HIGH for i in range(20)}
    monkeypatch.setattr(features, "BATCH", 4)
    batches = list(batches_by_size(sizes))
    assert batches == list(batches_by_size(dict(reversed(sizes.items()))))
    assert sorted(sum(batches, [])) == list(range(20))
    assert all(len({sizes[i].padded for i in batch}) == 1 and len(batch) <= 4 for batch in batches)


def test_images_resized_alike_but_stored_differently_share_a_batch():
    sizes = {1: WIDE, 2: WIDE._replace(original=(25, 45), resized=(61, 128))}
    assert list(batches_by_size(sizes)) == [[1, 2]]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "absent.h5", tmp_path / "text.h5"):
        if path.stem == "text":
            path.write_text("no HDF5")
        with pytest.raises(InputError, match=path.name):
            Features(path, "fit")


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(InputError, match="f.h5.*'train'"):
        Features(write(tmp_path / "f.h5"), "train")


def test_a_failure_on_the_way_leaves_no_file(tmp_path):
    def broken():
        yield "fit", 1, pyramid(1), WIDE
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_features(tmp_path / "f.h5", broken(), "float32")
    assert list(tmp_path.iterdir()) == []
