"""A receiver reads what a sender wrote, and nothing in a file does any harm."""

import json
import random
import re
import struct
import zlib
from pathlib import Path

import online_profile
import pytest
import torch
from online_profile import CHANNELS, IMAGE, SIZE, command, write_codec, write_model
from PIL import Image
from pycocotools.coco import COCO

from stages.lib import online
from stages.lib.bitstream import MAX_SIDE, Bitstream, BitstreamError, pack, parse, parse_record
from stages.lib.coding import encode_scale, pyramid_shapes
from stages.lib.online import coco_results, decode, decode_pyramid, draw, encode, load_cell
from stages.lib.params import SCALES, TASKS
from stages.lib.schema import InputError

profile, inside, cell = online_profile.profile, online_profile.inside, online_profile.cell  # fixtures
networks, threads = online_profile.networks, online_profile.threads


@pytest.fixture(scope="module")
def coded(profile) -> Bitstream:
    """The image at the lowest quality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(profile)
        return parse(encode(IMAGE, load_cell("detection-elic"), phi=0).data)


@pytest.mark.parametrize("task", TASKS)
def test_detections_are_cocos_results(task, tmp_path, monkeypatch):
    cell = f"{task}-elic"
    file, out = tmp_path / "set2_000012.mfb", tmp_path / "out.json"
    picture = ("--picture", tmp_path / "out.png", "--image", IMAGE)
    assert command("encode", IMAGE, "-o", file, "--cell", cell, "--phi", 0, monkeypatch=monkeypatch) == 0
    assert command("decode", file, "-o", out, "--cell", cell, *picture, monkeypatch=monkeypatch) == 0
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 12, "width": SIZE[1], "height": SIZE[0]}],
        "categories": [{"id": k} for k in (1, 2, 3)],
        "annotations": [],
    }
    truth.createIndex()
    found = list(truth.loadRes(str(out)).anns.values())
    assert found and {item["image_id"] for item in found} == {12}
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == SIZE[::-1]
    if task == "segmentation":
        assert truth.annToMask(found[0]).shape == SIZE
    if task == "keypoints":
        assert len(found[0]["keypoints"]) == 3 * 3


@pytest.mark.parametrize(("name", "words", "image_id"), [("a.mfb", [], 0), ("a7.mfb", ["--image-id", "5"], 5)])
def test_the_image_id_is_given_or_in_the_files_name_or_0(name, words, image_id, coded, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(pack(coded))
    out = tmp_path / "out.json"
    command("decode", tmp_path / name, "-o", out, "--cell", "detection-elic", *words, monkeypatch=monkeypatch)
    assert {item["image_id"] for item in json.loads(out.read_text())} == {image_id}


def test_detections_are_the_same_on_any_number_of_threads(cell, networks, coded, threads):
    threads(1)
    first = decode(coded, cell, networks)
    threads(3)
    for name, value in decode(coded, cell, networks).items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize(("write", "which"), [(write_model, "model"), (write_codec, "codec")])
def test_other_weights_than_the_senders_are_refused(write, which, cell, networks, coded, tmp_path):
    write(tmp_path / "other.pt", 1)
    other = networks._replace(**{f"{which}_id": online.identity(tmp_path / "other.pt")})
    with pytest.raises(BitstreamError, match=f"coded with {which}"):
        decode(coded, cell, other)


@pytest.fixture(scope="module")
def strange(networks, coded) -> dict[str, list[bytes]]:
    """Whole payloads of each scale that no image leads to: most damaged ones are refused, these decode to anything."""
    generator, payloads = torch.Generator().manual_seed(0), {}
    for scale, shape in pyramid_shapes(coded.padded).items():
        maps = torch.randn(4, CHANNELS, *shape, generator=generator) ** 5
        records = [encode_scale(m[None], scale, level, networks.feature_codec)[0] for m in maps for level in (0, 255)]
        payloads[scale] = [parse_record(record.data)[0].payload for record in records]
    return payloads


def mutated(coded: Bitstream, strange: dict[str, list[bytes]], rng: random.Random) -> bytes:
    """A file with anything in it, and a right CRC."""
    if rng.random() < 0.5:  # of the right form
        scale, share = rng.choice(SCALES), rng.random()
        record = coded.records[scale]
        payload = bytearray(record.payload)
        at = rng.randrange(len(payload))
        payload[at : at + rng.randint(0, 9)] = rng.choice([rng.randbytes(rng.randint(0, 40)), b"\xff" * 40, b""])
        low, high = rng.choice([record[1:3], (-65504.0, 65504.0), (0.0, 0.0)])
        changed = record._replace(level=rng.choice([record.level, rng.randrange(256)]), low=low, high=high)
        if share > 0.4:
            payload = rng.choice([record.payload, *strange[scale]]) if share < 0.9 else b""
        changed = changed._replace(payload=bytes(payload))
        return pack(coded._replace(records=coded.records | {scale: changed}))
    body = bytearray(pack(coded)[:-4])
    at = rng.choice([rng.randrange(len(body)), rng.randrange(12, 28)])  # payloads are long, sizes and lengths are not
    body[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
    return bytes(body) + struct.pack("<I", zlib.crc32(body))


def test_no_file_raises_anything_but_an_input_error(cell, networks, coded, strange):
    rng, decoded = random.Random(0), 0
    cells = [load_cell(f"{task}-elic") for task in TASKS]
    for number in range(300):
        try:
            chosen = cells[number % len(cells)]
            detection = decode(parse(mutated(coded, strange, rng)), chosen, networks)
        except InputError:
            continue
        decoded += 1
        json.dumps(coco_results(0, detection, chosen.task), allow_nan=False)
    assert 60 < decoded < 240


@pytest.mark.parametrize("resized", [(33, 33), (16, 49), (MAX_SIDE, 1), (MAX_SIDE, MAX_SIDE)])
def test_a_size_that_the_model_never_sees_is_refused_before_decoding(resized, cell, networks, coded):
    blind = networks._replace(feature_codec=None)
    with pytest.raises(BitstreamError, match="image_size allows 32 x 48"):
        decode(coded._replace(resized=resized), cell, blind)


def test_masks_that_fit_into_no_memory_are_refused_before_decoding(networks, coded):
    huge = coded._replace(original=(MAX_SIDE, MAX_SIDE))
    with pytest.raises(BitstreamError, match="masks.*GiB"):
        decode(huge, load_cell("segmentation-elic"), networks._replace(feature_codec=None))
    assert len(decode(huge, load_cell("detection-elic"), networks)["boxes"])


@pytest.mark.parametrize("error", [RuntimeError, IndexError, MemoryError])
def test_whatever_a_codec_raises_is_a_bitstream_error(error, coded, networks, monkeypatch):
    def decode_scale(*_):
        raise error("payload\nlost")

    monkeypatch.setattr(online, "decode_scale", decode_scale)
    with pytest.raises(BitstreamError, match="payload cannot be decoded"):
        decode_pyramid(coded, networks.feature_codec, networks.predictor)


def test_damage_is_one_line_and_leaves_no_file(coded, tmp_path, monkeypatch, capsys):
    (tmp_path / "cut.mfb").write_bytes(pack(coded)[:-9])
    words = (tmp_path / "cut.mfb", "-o", tmp_path / "out.json", "--cell", "detection-elic")
    assert command("decode", *words, monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wrong CRC" in line
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--picture", "p.png"], "belong together"),
        (["--image", IMAGE], "belong together"),
        (["--picture", "p.png", "--image", "other.png"], "other.png: .* 50 x 40 px"),
        (["--picture", "p.png", "--image", "absent.png"], "absent.png"),
    ],
)
def test_a_picture_needs_the_coded_image(words, message, coded, profile, tmp_path, monkeypatch, capsys):
    for name in ("params.yaml", "dvc.yaml", "data", IMAGE):
        (tmp_path / name).symlink_to(profile / name)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", SIZE).save("other.png")
    Path("a.mfb").write_bytes(pack(coded))
    assert command("decode", "a.mfb", "-o", "a.json", "--cell", "detection-elic", *words, monkeypatch=monkeypatch) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("p.png").exists() and not Path("a.json").exists()


@pytest.mark.parametrize("task", TASKS)
def test_what_is_sure_is_drawn_and_the_rest_is_not(task):
    image, boxes = torch.zeros(3, 40, 50), torch.tensor([[5.0, 5, 20, 30], [30, 10, 45, 35]])
    masks = torch.zeros(2, 1, 40, 50)
    masks[0, :, 5:30, 5:20] = masks[1, :, 10:35, 30:45] = 1
    detection = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.4]),
        "masks": masks,
        "keypoints": torch.tensor([[[12.0, 25, 1]], [[38, 30, 1]]]),
    }
    drawn = draw(image, detection, task)
    assert drawn[:, :, 5].any() and not drawn[:, 20:, 25:].any()  # rows below the label, which has any width
    assert drawn[:, 25, 12].any() == (task != "detection")  # within the box
    assert torch.equal(draw(image, detection | {"scores": torch.zeros(2)}, task), image)
