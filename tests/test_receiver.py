"""A receiver reads what a sender wrote, and nothing in a file does any harm."""

import json
import random
import re
import resource
from pathlib import Path

import numpy as np
import online_profile
import pytest
import torch
from artifacts import assert_same
from online_profile import IMAGE, ROOT, SIZE, command, write_codec, write_model
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from stages.lib import online
from stages.lib.bitstream import MAX_SIDE, Bitstream, BitstreamError, pack, parse
from stages.lib.online import coco_results, decode, decode_pyramid, draw, encode, load_cell
from stages.lib.params import TASKS
from stages.lib.schema import InputError

profile, inside, cell = online_profile.profile, online_profile.inside, online_profile.cell  # fixtures
networks, threads = online_profile.networks, online_profile.threads

COCO_MINI = ROOT.parent / "shared" / "coco_mini"


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


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"{COCO_MINI} is missing: no COCO data here")
@pytest.mark.parametrize("name", ["detection-elic", "segmentation-elic", "keypoints-elic", "detection-hevc"])
def test_photographs_are_sent_and_received(name, tmp_path, monkeypatch, capsys):
    for image_id, (height, width) in {139: (426, 640), 109313: (640, 480)}.items():
        photograph, file, out = (
            COCO_MINI / f"val2017/{image_id:012}.jpg",
            tmp_path / f"{image_id}.mfb",
            tmp_path / "o.json",
        )
        assert command("encode", photograph, "-o", file, "--cell", name, monkeypatch=monkeypatch) == 0
        assert capsys.readouterr().err == ""  # within 5 % of the precoding's bits
        words = (file, "-o", out, "--cell", name, "--picture", tmp_path / "seen.png", "--image", photograph)
        assert command("decode", *words, monkeypatch=monkeypatch) == 0
        assert parse(file.read_bytes()).original == (height, width)
        found = json.loads(out.read_text())
        assert found and {item["image_id"] for item in found} == {image_id}
        for item in found:
            if "segmentation" in item:
                assert item["segmentation"]["size"] == [height, width]
            if "bbox" in item:
                x, y, w, h = item["bbox"]
                assert min(x, y, w, h) >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3


def test_detections_are_the_same_on_any_number_of_threads(cell, networks, coded, threads):
    threads(1)
    first = decode(coded, cell, networks)
    threads(3)
    assert_same(decode(coded, cell, networks), first)


@pytest.mark.parametrize(("write", "which"), [(write_model, "model"), (write_codec, "codec")])
def test_other_weights_than_the_senders_are_refused(write, which, cell, networks, coded, tmp_path):
    write(tmp_path / "other.pt", 1)
    other = networks._replace(**{f"{which}_id": online.identity(tmp_path / "other.pt")})
    with pytest.raises(BitstreamError, match=f"coded with {which}"):
        decode(coded, cell, other)


@pytest.mark.parametrize(
    "resized", [(32, 39), (33, 40), (16, 20), (40, 32), (32, 48), (MAX_SIDE, 1), (MAX_SIDE, MAX_SIDE)]
)
def test_a_size_that_the_model_never_sees_is_refused_before_decoding(resized, cell, networks, coded):
    assert coded.original == SIZE and coded.resized == (32, 40)
    blind = networks._replace(feature_codec=None)
    with pytest.raises(BitstreamError, match="image_size 32 x 48 makes 32 x 40"):
        decode(coded._replace(resized=resized), cell, blind)


@pytest.mark.parametrize(("least", "most"), [(32, 48), (128, 128), (800, 1333)])
def test_a_size_of_the_backbones_image_follows_from_the_images_as_in_torchvision(least, most, cell, coded):
    model = cell.params["models"]["small"] | {"image_size": {"min": least, "max": most}}
    cell = cell._replace(params=cell.params | {"models": {"small": model}})
    transform = GeneralizedRCNNTransform(least, most, [0.0] * 3, [1.0] * 3).eval()
    rng = random.Random(0)
    sides = [(rng.randint(1, 1400), rng.randint(1, 1400)) for _ in range(60)]
    for height, width in [*sides, (800, 1333), (1333, 800), (480, 640), (427, 640), (3000, 4000), (MAX_SIDE, MAX_SIDE)]:
        if max(height, width) >= min(height, width) * most:  # the sender refuses it
            continue
        images, _ = transform([torch.empty(3, height, width, device="meta")])
        online._check_sizes(coded._replace(original=(height, width), resized=images.image_sizes[0]), cell)


def test_masks_of_12_megapixels_are_run_lengths(networks, tmp_path):
    """As floats they would be 48 MB each, and twice so many."""
    cell, photograph = load_cell("segmentation-elic"), tmp_path / "photograph.png"
    Image.effect_noise((4000, 3000), 90).resize((500, 375)).resize((4000, 3000)).save(photograph, compress_level=1)
    encoded = encode(photograph, cell, phi=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    detection = decode(parse(encoded.data), cell, networks)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    found = coco_results(0, detection, cell.task)
    assert "masks" not in detection and len(found) == len(detection["boxes"]) > 4
    assert {tuple(item["segmentation"]["size"]) for item in found} == {(3000, 4000)}
    for item, (left, top, right, bottom) in zip(found, detection["boxes"].tolist(), strict=True):
        x, y, width, height = rle.toBbox(item["segmentation"])
        assert not width or (left - 300 < x and x + width < right + 300 and top - 300 < y and y + height < bottom + 300)


class Lost(Exception):
    """Of a codec's own library."""


@pytest.mark.parametrize("error", [RuntimeError, IndexError, Lost, InputError])
def test_whatever_a_codec_raises_is_a_bitstream_error_with_the_scale(error, coded, networks, monkeypatch):
    def decode_scale(*_):
        raise error("payload\nlost")

    monkeypatch.setattr(online, "decode_scale", decode_scale)
    with pytest.raises(BitstreamError, match="scale 0.*payload\nlost"):
        decode_pyramid(coded, networks.feature_codec, networks.predictor)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), TypeError("bug"), NameError()]
)
def test_memory_that_ends_and_bugs_are_not_the_files(error, coded, networks, monkeypatch):
    def decode_scale(*_):
        raise error

    monkeypatch.setattr(online, "decode_scale", decode_scale)
    with pytest.raises(type(error)) as raised:
        decode_pyramid(coded, networks.feature_codec, networks.predictor)
    assert raised.value is error


def test_a_forged_scale_is_named_with_its_file(coded, tmp_path, monkeypatch, capsys):
    record = coded.records["1"]
    forged = coded._replace(records=coded.records | {"1": record._replace(payload=record.payload[:-1] + b"\1")})
    (tmp_path / "forged.mfb").write_bytes(pack(forged))
    words = (tmp_path / "forged.mfb", "-o", tmp_path / "out.json", "--cell", "detection-elic")
    assert command("decode", *words, monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"{tmp_path}/forged.mfb: scale 1: .* is damaged; code it again", line)


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
    masks = np.zeros((40, 50, 2), dtype=np.uint8, order="F")
    masks[5:30, 5:20, 0] = masks[10:35, 30:45, 1] = 1
    detection = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.4]),
        "run_lengths": rle.encode(masks),
        "keypoints": torch.tensor([[[12.0, 25, 1]], [[38, 30, 1]]]),
    }
    drawn = draw(image, detection, task)
    assert drawn[:, :, 5].any() and not drawn[:, 20:, 25:].any()  # rows below the label, which has any width
    assert drawn[:, 25, 12].any() == (task != "detection")  # within the box
    assert torch.equal(draw(image, detection | {"scores": torch.zeros(2)}, task), image)
