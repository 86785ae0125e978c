"""A record holds what the receiver needs, the ledger counts every byte of it, and both sides see the same pyramid."""

import os
import pickle
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from artifacts import write_coded, write_features
from pytest import approx

from stages.lib import coding
from stages.lib.coding import (
    CodedSplit,
    FeatureCodec,
    build_codec,
    decode_scale,
    encode_scale,
    load_codec,
    pyramid_shapes,
    save_codec,
)
from stages.lib.features import Features
from stages.lib.files import read_csv
from stages.lib.learned import Coded
from stages.lib.models import Sizes, build, load_model, save_model
from stages.lib.params import SCALES
from stages.lib.planes import Packing, pack, plane_shape, unpack
from stages.lib.schema import InputError

CHANNELS = 5
LMBDA = 0.005
CONFIG = {
    "codec": "elic",
    "network": {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [8, 8], "kernel": 3}},
    "lambda_range": [1e-4, 0.05],
    "gains": 3,
}
MODEL = {"architecture": "resnet10_fpn", "image_size": {"min": 64, "max": 96}}
SQUARE, WIDE = Sizes((60, 60), (64, 64), (64, 64)), Sizes((40, 60), (64, 96), (64, 96))
IMAGES = [("fit", 31, SQUARE), ("fit", 2, WIDE), ("fit", 40, SQUARE), ("test", 7, WIDE)]


def random_packing(kind: str) -> Packing:
    if kind == "tile":
        return Packing("tile", {}, {})
    basis = {scale: torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q for scale in SCALES}
    return Packing(kind, basis, {scale: torch.randn(CHANNELS) for scale in SCALES})


def write_codec(path: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = CONFIG | {"packing": kind}
    save_codec(path, FeatureCodec(build_codec(config), random_packing(kind), CHANNELS), config)
    return path


@pytest.fixture(scope="module", params=["pca", "quilt", "tile"])
def codec_file(request, tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp(request.param) / "codec.pt", request.param)


@pytest.fixture(scope="module")
def feature_codec(codec_file) -> FeatureCodec:
    return load_codec(codec_file)


@pytest.fixture(scope="module")
def features_file(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("features") / "f"
    items = []
    for split, image_id, sizes in IMAGES:
        shapes = pyramid_shapes(sizes.padded)
        items.append((split, image_id, {s: torch.randn(1, CHANNELS, *shapes[s]) for s in SCALES}, sizes))
    write_features(path, items)
    return path


@pytest.fixture(scope="module")
def coded(feature_codec, features_file, tmp_path_factory) -> SimpleNamespace:
    """Both splits, written and decoded again."""
    folder = tmp_path_factory.mktemp("coded")
    splits = [Features(features_file, split) for split in ("fit", "test")]
    write_coded(folder, "q", splits, feature_codec, LMBDA)
    decoded = {
        s.split: [(ids, CodedSplit(folder / "q", s).decode(ids, feature_codec)) for ids in s.batches()] for s in splits
    }
    return SimpleNamespace(path=folder / "q", ledger=read_csv(folder / "q.csv"), splits=splits, decoded=decoded)


# ---- records


@pytest.mark.parametrize(
    ("length", "header"),
    [(0, 2), (1, 2), (127, 2), (128, 3), (16383, 3), (16384, 4), (2**21 - 1, 4), (2**21, 5)],
)
def test_the_ledger_counts_every_byte_of_a_record(length, header):
    payload = np.random.default_rng(length).bytes(length)
    hyper = min(length, 20)
    seen = []

    def decode(strings, level, shape):
        seen.append((strings, level, shape))
        return torch.zeros(1, *shape)

    fake = SimpleNamespace(encode=lambda planes, level, _: [Coded(payload, hyper, 8.4, planes[0])], decode=decode)
    fake_codec = FeatureCodec(fake, Packing("tile", {}, {}), 3)
    maps = torch.linspace(-1.2, 3.4, 48).view(1, 3, 4, 4)
    (record,) = encode_scale(maps, "0", 77, fake_codec)
    line = coding._ledger_line(record, 16)
    assert line["bytes_header"] == header
    parts = ("bytes_header", "bytes_range", "bytes_hyper", "bytes_latent")
    assert sum(line[part] for part in parts) == len(record.data) == line["bits"] / 8
    assert (line["bytes_hyper"], line["bytes_latent"]) == (hyper, length - hyper)
    decode_scale([record.data], "0", (4, 4), fake_codec)
    assert seen == [([payload], 77, (3, 4, 4))]


def test_a_record_is_level_range_length_and_payload(feature_codec):
    torch.manual_seed(2)
    maps = 40 * torch.randn(2, CHANNELS, 8, 8)
    planes, ranges = zip(*(pack(m, "1", feature_codec.packing) for m in maps), strict=True)
    strings = [c.string for c in feature_codec.codec.encode(torch.stack(planes), 99)]
    for record, value_range, string in zip(encode_scale(maps, "1", 99, feature_codec), ranges, strings, strict=True):
        assert record.data[0] == 99
        assert struct.unpack("<2e", record.data[1:5]) == value_range
        length = record.data[5] & 127 | record.data[6] << 7 if record.data[5] > 127 else record.data[5]
        assert length == len(string)
        assert record.data.endswith(string)


def test_a_record_without_a_reconstruction_is_the_same(feature_codec):
    maps = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(4))
    whole, sent = (encode_scale(maps, "1", 99, feature_codec, reconstruct) for reconstruct in (True, False))
    assert [record[:4] for record in sent] == [record[:4] for record in whole]
    assert np.isnan([record[4:] for record in sent]).all() and np.isfinite([record[4:] for record in whole]).all()


def test_several_records_decode_as_each_alone(feature_codec):
    torch.manual_seed(3)
    maps = torch.randn(3, CHANNELS, 16, 24) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    data = [record.data for record in encode_scale(maps, "0", 150, feature_codec)]
    together = decode_scale(data, "0", (16, 24), feature_codec)
    for i in range(3):
        assert torch.equal(decode_scale([data[i]], "0", (16, 24), feature_codec)[0], together[i])


def test_records_of_several_levels_are_not_decoded_as_one(feature_codec):
    maps = torch.ones(1, CHANNELS, 2, 2)
    data = [encode_scale(maps, "3", level, feature_codec)[0].data for level in (3, 4)]
    with pytest.raises(InputError, match="rate controls"):
        decode_scale(data, "3", (2, 2), feature_codec)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3])
def test_flat_maps_are_decoded_with_the_error_of_the_ledger(feature_codec, value):
    maps = torch.full((1, CHANNELS, 2, 3), value)
    (record,) = encode_scale(maps, "3", 20, feature_codec)
    error = (decode_scale([record.data], "3", (2, 3), feature_codec) - maps).square().mean().item()
    assert error == approx(record.mse_feature, rel=1e-3, abs=1e-9)


# ---- splits


def test_decoding_gives_what_the_encoder_reconstructed(coded, feature_codec):
    for features in coded.splits:
        for image_ids, pyramid in coded.decoded[features.split]:
            for i, image_id in enumerate(image_ids):
                for scale in SCALES:
                    plane, value_range = pack(features.scale(image_id, scale), scale, feature_codec.packing)
                    sent = feature_codec.codec.encode(plane[None], feature_codec.codec.level(LMBDA))[0].plane
                    expected = unpack(sent, value_range, scale, CHANNELS, feature_codec.packing)
                    assert torch.equal(pyramid[scale][i], expected)


def test_the_ledgers_errors_are_those_of_the_decoded_features(coded):
    for features in coded.splits:
        ledger = coded.ledger[coded.ledger["split"] == features.split].set_index(["image_id", "scale"])
        for image_ids, pyramid in coded.decoded[features.split]:
            for i, image_id in enumerate(image_ids):
                for scale in SCALES:
                    error = (pyramid[scale][i] - features.scale(image_id, scale)).square().mean().item()
                    assert ledger.loc[(image_id, scale), "mse_feature"] == approx(error, rel=1e-4)


def test_images_come_in_batches_of_one_size_in_both_directions(coded):
    assert [ids for ids, _ in coded.decoded["fit"]] == [[31, 40], [2]]
    assert [ids for ids, _ in coded.decoded["test"]] == [[7]]
    for batches in coded.decoded.values():
        for ids, pyramid in batches:
            sizes = next(s for _, i, s in IMAGES if i == ids[0])
            shapes = pyramid_shapes(sizes.padded)
            assert {s: p.shape for s, p in pyramid.items()} == {s: (len(ids), CHANNELS, *shapes[s]) for s in SCALES}


def test_the_ledger_has_one_line_per_image_and_scale(coded, feature_codec):
    names = "split image_id scale pixels bytes_latent bytes_hyper bytes_header bytes_range bits estimated_bits mse"
    assert " ".join(coded.ledger.columns) == names + " mse_feature"
    keys = list(coded.ledger[["split", "image_id", "scale"]].itertuples(index=False, name=None))
    ids = [("fit", 2), ("fit", 31), ("fit", 40), ("test", 7)]
    assert keys == [(*key, scale) for key in ids for scale in SCALES]
    for _, line in coded.ledger.iterrows():
        sizes = next(s for split, i, s in IMAGES if (split, i) == (line["split"], line["image_id"]))
        _, height, width = plane_shape(CHANNELS, *pyramid_shapes(sizes.padded)[line["scale"]], feature_codec.packing)
        assert line["pixels"] == height * width


def test_the_ledgers_bits_are_the_files(coded):
    for split in ("fit", "test"):
        with h5py.File(coded.path / f"{split}-00000.h5") as file:
            ledger = coded.ledger[coded.ledger["split"] == split]
            assert ledger["bits"].tolist() == (8 * np.diff(file["offsets"][:])).tolist()
            assert file["data"].shape == (ledger["bits"].sum() / 8,)
            level = file["data"][:][file["offsets"][:-1]]
            assert len(set(level.tolist())) == 1


def test_the_same_features_give_the_same_bytes(coded, feature_codec, tmp_path):
    write_coded(tmp_path, "q", coded.splits, feature_codec, LMBDA)
    for path in coded.path.iterdir():
        assert (tmp_path / "q" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "q.csv").read_bytes() == coded.path.with_suffix(".csv").read_bytes()


def test_a_coded_file_that_cannot_be_read_is_named(coded, tmp_path):
    (tmp_path / "fit-00000.h5").write_text("no HDF5")
    fit = coded.splits[0]
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=f"{folder / 'fit-00000.h5'}.*run `compress` again"):
            CodedSplit(folder, fit).records(fit.image_ids[0])


def test_records_of_other_images_are_refused(coded, tmp_path):
    shutil.copy(coded.path / "test-00000.h5", tmp_path / "fit-00000.h5")
    fit = coded.splits[0]
    with pytest.raises(InputError, match="other images"):
        CodedSplit(tmp_path, fit).records(fit.image_ids[0])


def test_a_flipped_byte_of_a_record_is_found(coded, tmp_path):
    """Anywhere in the file: what is read is right or refused."""
    fit = coded.splits[0]
    whole = CodedSplit(coded.path, fit)
    before = [whole.records(i) for i in fit.image_ids]
    raw = (coded.path / "fit-00000.h5").read_bytes()
    damaged, refused = CodedSplit(tmp_path, fit), 0
    for at in range(0, len(raw), 37):
        (tmp_path / "fit-00000.h5").write_bytes(raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :])
        try:
            assert [damaged.records(i) for i in fit.image_ids] == before
        except InputError:
            refused += 1
    assert refused > 20


def test_an_image_is_read_without_its_neighbours(coded, feature_codec, tmp_path, monkeypatch):
    """What is damaged at the end of the records is seen by who reads the last image, and by nobody else."""
    monkeypatch.setattr(coding, "CHUNK_BYTES", 16)
    fit = coded.splits[0]
    write_coded(tmp_path, "q", [fit], feature_codec, LMBDA)
    file = tmp_path / "q/fit-00000.h5"
    with h5py.File(file) as stored:
        data = stored["data"].id
        at = data.get_chunk_info(data.get_num_chunks() - 1).byte_offset
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    damaged, whole = CodedSplit(tmp_path / "q", fit), CodedSplit(coded.path, fit)
    *others, last = fit.image_ids
    assert [damaged.records(i) for i in others] == [whole.records(i) for i in others]
    with pytest.raises(InputError, match="fit-00000.h5.*run `compress` again"):
        damaged.records(last)


@pytest.mark.parametrize("padded", [(32, 32), (64, 96), (96, 32), (160, 224)])
def test_pyramid_shapes_are_those_of_the_network(padded):
    backbone = build(MODEL, 3, 2).eval().backbone
    with torch.inference_mode():
        pyramid = backbone(torch.zeros(1, 3, *padded))
    assert {scale: tuple(p.shape[2:]) for scale, p in pyramid.items()} == pyramid_shapes(padded)


# ---- codec files


def strings_of(feature_codec: FeatureCodec) -> list[bytes]:
    torch.manual_seed(4)
    return [record.data for record in encode_scale(torch.randn(2, CHANNELS, 8, 8), "2", 128, feature_codec)]


def test_a_codec_saved_and_loaded_again_codes_alike(codec_file, feature_codec, tmp_path):
    config = torch.load(codec_file, weights_only=True)["config"]
    save_codec(tmp_path / "codec.pt", feature_codec, config)
    assert strings_of(load_codec(tmp_path / "codec.pt")) == strings_of(feature_codec)
    loaded = load_codec(codec_file)
    assert loaded.channels == CHANNELS and not loaded.codec.training
    for name in ("basis", "mean"):
        for scale, value in getattr(feature_codec.packing, name).items():
            assert torch.equal(getattr(loaded.packing, name)[scale], value)


@pytest.fixture(scope="module")
def pca_file(tmp_path_factory) -> Path:
    return write_codec(tmp_path_factory.mktemp("codec") / "codec.pt", "pca")


def test_weights_of_another_codec_name_the_layer(pca_file, tmp_path):
    layer = "net.g_a.4.weight"
    for edit, word in (
        (lambda state: state.pop(layer), f"no weights.*'{layer}'"),
        (lambda state: state.update({layer: state[layer][:3]}), f"'{layer}'.*shape"),
        (lambda state: state.update({"net.more": state[layer]}), "'net.more'"),
    ):
        checkpoint = torch.load(pca_file, weights_only=True)
        edit(checkpoint["state"])
        torch.save(checkpoint, tmp_path / "other.pt")
        with pytest.raises(InputError, match=f"other.pt.*{word}"):
            load_codec(tmp_path / "other.pt")


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoint_are_named_and_never_executed(pca_file, tmp_path):
    whole, evil = pca_file.read_bytes(), tmp_path / "executed"
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"state": {}, "config": Evil(evil)}, protocol=2))
    torch.save(torch.load(pca_file, weights_only=True) | {"channels": Evil(evil)}, tmp_path / "zip.pt")
    for name in ("absent", "text", "cut", "list", "pickle", "zip"):
        with pytest.raises(InputError, match=f"{name}.pt"):
            load_codec(tmp_path / f"{name}.pt")
    assert not evil.exists()


def test_a_codec_is_no_detector_and_a_detector_no_codec(pca_file, tmp_path):
    with pytest.raises(InputError, match="codec.pt"):
        load_model(pca_file, MODEL)
    save_model(tmp_path / "detector.pt", build(MODEL, 3, 2), 3, 2, half=True)
    with pytest.raises(InputError, match="detector.pt"):
        load_codec(tmp_path / "detector.pt")
