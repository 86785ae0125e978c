"""A feature folder gives back what was put in, image by image."""

from pathlib import Path

import pytest
import torch
from artifacts import write_features

from stages.lib import features, models
from stages.lib.features import SHARD_IMAGES, Features, batches_by_size
from stages.lib.models import Sizes
from stages.lib.params import SCALES
from stages.lib.schema import InputError

WIDE = Sizes((50, 90), (60, 100), (64, 128))
HIGH = Sizes((128, 64), (128, 64), (128, 64))


def pyramid(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {scale: torch.randn(1, 3, 8 - i, 4, generator=generator) for i, scale in enumerate(SCALES)}


ITEMS = [("fit", 12, WIDE), ("fit", 3, HIGH), ("fit", 100, WIDE), ("test", 3, WIDE)]


def write(path: Path, dtype: str = "float32") -> Path:
    return write_features(path, ((split, i, pyramid(i), sizes) for split, i, sizes in ITEMS), dtype)


def test_float32_comes_back_exactly(tmp_path):
    fit = Features(write(tmp_path / "f"), "fit")
    assert fit.image_ids == [3, 12, 100]
    for i in fit.image_ids:
        assert all(torch.equal(fit.scale(i, scale), pyramid(i)[scale][0]) for scale in SCALES)


def test_float16_comes_back_closely_as_float32(tmp_path):
    fit = Features(write(tmp_path / "f", "float16"), "fit")
    for scale in SCALES:
        stored = fit.scale(12, scale)
        assert stored.dtype == torch.float32
        assert torch.allclose(stored, pyramid(12)[scale][0], rtol=2**-11, atol=1e-7)


def test_uint10_comes_back_to_half_a_step(tmp_path):
    fit = Features(write(tmp_path / "f", "uint10"), "fit")
    for scale in SCALES:
        stored, given = fit.scale(12, scale), pyramid(12)[scale][0]
        assert stored.dtype == torch.float32
        assert (stored - given).abs().max() <= 0.501 * (given.max() - given.min()) / 1023


def test_a_constant_map_comes_back_from_uint10(tmp_path):
    constant = {scale: torch.full((1, 3, 4, 4), -0.25) for scale in SCALES}
    fit = Features(write_features(tmp_path / "f", [("fit", 1, constant, HIGH)], "uint10"), "fit")
    assert all(torch.equal(fit.scale(1, scale), constant[scale][0]) for scale in SCALES)


def test_images_are_found_in_any_shard(tmp_path):
    items = [("fit", 7 * i, pyramid(7 * i), WIDE) for i in range(2 * SHARD_IMAGES + 3)]
    fit = Features(write_features(tmp_path / "f", items), "fit")
    assert len(list((tmp_path / "f").glob("*.h5"))) == 3
    assert all(torch.equal(fit.scale(i, "2"), pyramid(i)["2"][0]) for i in fit.image_ids)


@pytest.mark.parametrize("dtype", ["float32", "uint10"])
def test_a_flipped_byte_is_found(tmp_path, dtype):
    """Anywhere in the file: what is read is right or refused."""
    fit = Features(write(tmp_path / "f", dtype), "fit")
    file = tmp_path / "f" / "fit-00000.h5"
    raw, before, refused = file.read_bytes(), fit.pyramids([12, 100]), 0
    for at in range(0, len(raw), 61):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        try:
            read = fit.pyramids([12, 100])
            assert all(torch.equal(read[scale], before[scale]) for scale in SCALES)
        except InputError:
            refused += 1
    assert refused > 20


def test_sizes_come_back(tmp_path):
    path = write(tmp_path / "f")
    assert Features(path, "fit").sizes(12) == WIDE
    assert Features(path, "fit").sizes(3) == HIGH
    assert Features(path, "test").sizes(3) == WIDE


def test_the_same_features_give_the_same_bytes(tmp_path):
    for dtype in ("float32", "float16", "uint10"):
        first, second = write(tmp_path / "a", dtype), write(tmp_path / "b", dtype)
        names = sorted(path.name for path in first.iterdir())
        assert names == ["fit-00000.h5", "index.csv", "test-00000.h5"]
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_batches_hold_images_of_one_padded_size(tmp_path, monkeypatch):
    fit = Features(write(tmp_path / "f"), "fit")
    assert list(fit.batches()) == [[12, 100], [3]]
    monkeypatch.setattr(features, "BATCH", 1)
    assert list(fit.batches()) == [[12], [100], [3]]


def test_large_images_share_a_batch_with_few(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "PIXELS_PER_PASS", 2 * 64 * 128)
    assert list(batches_by_size({i: WIDE for i in range(5)})) == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(models, "PIXELS_PER_PASS", 1)
    assert list(batches_by_size({i: WIDE for i in range(2)})) == [[0], [1]]


def test_pyramids_are_stacked_in_the_order_of_the_ids(tmp_path):
    stacked = Features(write(tmp_path / "f"), "fit").pyramids([100, 12])
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
    with pytest.raises(InputError, match="absent"):
        Features(tmp_path / "absent", "fit")
    fit = Features(write(tmp_path / "f"), "fit")
    (tmp_path / "f" / "fit-00000.h5").write_text("no HDF5")
    with pytest.raises(InputError, match="f/fit-00000.h5.*run `extract` again"):
        fit.scale(12, "0")


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(InputError, match="f.*'train'"):
        Features(write(tmp_path / "f"), "train")


def test_a_failure_on_the_way_leaves_no_file(tmp_path):
    def broken():
        yield "fit", 1, pyramid(1), WIDE
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_features(tmp_path / "f", broken())
    assert list(tmp_path.iterdir()) == []
