"""A receiver reads what a sender wrote, files have the size that was asked for, and nothing in one does any harm."""

import json
import random
import re
import runpy
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pytest import approx

from stages.benchmark import RECEIVER, SENDER
from stages.lib import mfip, online, online_costs, prediction
from stages.lib.bitstream import (
    FRAME_BYTES,
    MAX_SIDE,
    Bitstream,
    BitstreamError,
    pack,
    pack_record,
    parse,
    parse_record,
)
from stages.lib.coding import FeatureCodec, build_codec, decode_scale, encode_scale, pyramid_shapes, save_codec
from stages.lib.files import write_json
from stages.lib.models import build, pyramid_of, read_image, save_model
from stages.lib.online import (
    Cell,
    Networks,
    coco_results,
    decode,
    decode_pyramid,
    draw,
    encode,
    load_cell,
    load_networks,
    nearest_in_size,
)
from stages.lib.params import COARSER, SCALES, SKIPPED, TASKS
from stages.lib.planes import Packing
from stages.lib.schema import InputError

ROOT = Path(__file__).parents[1]
IMAGE, SIZE = Path("image_12.png"), (40, 50)  # height, width in px; 32 x 40 as the backbone sees it
CHANNELS = 32  # of resnet10_fpn
LAMBDAS = {"q1": 0.0005, "q2": 0.002, "q3": 0.008, "q4": 0.032}
STEPS, PRICE = np.array([4.0, 1.0, 0.25]), 0.001  # see `write_fit`
WITHOUT = (9.0, 9.0, 9.0, 9.0, 3.0)  # loss of a skipped scale
NETWORK = {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [8, 8], "kernel": 3}}
MADE = {
    "data/models/small.pt": "train_model@small",
    "data/predictions/small.pt": "fit_prediction@small",
    "data/codecs/small/elic.pt": "train_codec@small-elic",
    "data/loss_rate/small/elic/detection.json": "fit_loss_rate@detection-elic",
    "data/mfip/small/elic/detection.pt": "train_mfip@small-elic",
}


def write_model(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = build(yaml.safe_load(Path("params.yaml").read_text())["models"]["small"], 4, 3)
    save_model(path, model, 4, 3, half=True)


def write_codec(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = yaml.safe_load(Path("params.yaml").read_text())["codecs"]["elic"] | {"codec": "elic"}
    codec = build_codec(config)
    basis = {scale: torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q for scale in SCALES}
    packing = Packing("pca", basis, {scale: torch.zeros(CHANNELS) for scale in SCALES})
    save_codec(path, FeatureCodec(codec, packing, CHANNELS), config)


def write_fit(path: Path) -> None:
    """Each quality halves the loss and doubles the bits: q is worth it below a price of STEPS[q - 1] * k / bits.

    To skip a scale costs a loss of WITHOUT[s], less than to send it at a price above that of some scales.
    """
    gain = [0.5, 1.0, 2.0, 4.0]  # of the bits of q2
    models = {
        "mean": {"loss": [4.0, 2.0, 1.0, 0.5], "drop": [0.0] * len(LAMBDAS), "bits": [1.0] * len(LAMBDAS)},
        "rate": {"slope": [1.0] * len(LAMBDAS), "offset": np.log(gain).tolist(), "error": [0.0] * len(LAMBDAS)},
    }
    fit = {name: dict.fromkeys(SCALES, values) for name, values in models.items()}
    fit["mean"] = {
        scale: values | {"loss_skipped": [without] * (1 + len(LAMBDAS))}
        for (scale, values), without in zip(fit["mean"].items(), WITHOUT, strict=True)
    }
    write_json(path, fit | {"n_labelled": 9})


def write_predictor(path: Path) -> None:
    torch.manual_seed(0)
    prediction.save(path, prediction.Predictor(CHANNELS))


def write_mfip(path: Path) -> None:
    torch.manual_seed(0)
    predictor = mfip.MFIP(CHANNELS, 4)
    with torch.no_grad():
        predictor.sense.weight *= 0.5
        predictor.sense.bias.copy_(torch.tensor([8.0, 4.0, 1.0, 0.5, 0.25]))
    mfip.save(path, predictor)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """A profile's folder as `dvc repro` leaves it, with random weights, and an image."""
    folder = tmp_path_factory.mktemp("profile")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"]["small"]["image_size"] = {"min": 32, "max": 48}
    params["lambdas"] = LAMBDAS
    params["codecs"] = {"elic": params["codecs"]["elic"] | {"network": NETWORK, "gains": 3}}
    params["mfip"]["precode"] = "q2"
    params["tasks"] = {task: {"points": 2} for task in TASKS}
    params["cells"] = {f"{task}-elic": {"task": task, "model": "small", "codec": "elic"} for task in TASKS}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(Path("data/models/small.pt"), 0)
        write_predictor(Path("data/predictions/small.pt"))
        write_codec(Path("data/codecs/small/elic.pt"), 0)
        for task in TASKS:
            write_fit(Path(f"data/loss_rate/small/elic/{task}.json"))
            write_mfip(Path(f"data/mfip/small/elic/{task}.pt"))
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / IMAGE)
    return folder


@pytest.fixture(autouse=True)
def inside(profile, monkeypatch) -> None:
    monkeypatch.chdir(profile)


@pytest.fixture
def cell() -> Cell:
    return load_cell("detection-elic")


@pytest.fixture(scope="module")
def networks(profile) -> Networks:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(profile)
        return load_networks(load_cell("detection-elic"))


@pytest.fixture(scope="module")
def coded(profile) -> Bitstream:
    """The image at the lowest quality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(profile)
        return parse(encode(IMAGE, load_cell("detection-elic"), phi=0).data)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def command(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`python -m stages.<name>` in this process -> its exit code."""
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    try:
        runpy.run_path(str(ROOT / f"stages/{name}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


# ---- sender


def test_one_image_has_one_file_on_any_number_of_threads(cell, threads):
    threads(1)
    first = encode(IMAGE, cell, lambda_prime=PRICE)
    threads(3)
    assert encode(IMAGE, cell, lambda_prime=PRICE).data == first.data
    assert torch.get_num_threads() == 3


def test_the_receiver_has_what_each_scale_decodes_to_at_its_level(cell, networks):
    encoded = encode(IMAGE, cell, lambda_prime=PRICE)
    received = decode_pyramid(parse(encoded.data), networks.feature_codec, networks.predictor)
    pyramid, _ = pyramid_of(networks.detector, read_image(IMAGE))
    lambdas = list(LAMBDAS.values())
    assert encoded.phi.tolist().count(SKIPPED) == 1
    for scale, phi in zip(SCALES, encoded.phi.astype(int), strict=True):
        if phi == SKIPPED:
            assert torch.equal(received[scale], networks.predictor(scale, received[COARSER[scale]]))
            continue
        level = networks.feature_codec.codec.level(lambdas[phi])
        (record,) = encode_scale(pyramid[scale].cpu(), scale, level, networks.feature_codec)
        alone = decode_scale([record.data], scale, pyramid[scale].shape[2:], networks.feature_codec)
        assert torch.equal(received[scale], alone)


def test_the_bits_of_a_file_are_those_of_the_ledger(cell):
    encoded = encode(IMAGE, cell, lambda_prime=PRICE)
    records = {scale: len(pack_record(record)) for scale, record in parse(encoded.data).records.items()}
    assert encoded.scale_bits.tolist() == [8 * records.get(scale, 0) for scale in SCALES] and len(records) < 5
    assert len(encoded.data) == FRAME_BYTES + sum(records.values())
    assert encoded.bpp == 8 * len(encoded.data) / (SIZE[0] * SIZE[1])


def test_phi_follows_from_sensitivity_and_the_bits_of_the_precoding(cell, networks, monkeypatch):
    precoded = encode(IMAGE, cell, phi=1).scale_bits  # precode: q2
    monkeypatch.setattr(online, "decode_scale", None)
    encoded = encode(IMAGE, cell, lambda_prime=PRICE)
    pyramid, _ = pyramid_of(networks.detector, read_image(IMAGE))
    with torch.inference_mode():
        _, expected = mfip.load(cell.made_by("train_mfip"))(mfip.describe(pyramid, networks.detector.rpn.head))
    assert encoded.sensitivity == approx(expected[0].numpy(), rel=1e-4) and np.ptp(encoded.sensitivity) > 0.1
    worth = (STEPS * encoded.sensitivity[:, None] / precoded[:, None] > PRICE).sum(1)
    loss, bits = 4 * 0.5**worth, 0.5 * 2.0**worth * precoded  # of the best quality
    skipped = np.array(WITHOUT) * encoded.sensitivity < loss * encoded.sensitivity + PRICE * bits
    assert encoded.phi.tolist() == np.where(skipped, SKIPPED, worth).tolist() and len(set(encoded.phi)) > 2
    assert list(encoded.seconds) == ["backbone", "precoding", "MFIP", "allocation", "coding", "writing"]


def test_a_given_quality_needs_no_importance(cell, monkeypatch):
    monkeypatch.setattr(mfip, "load", None)
    encoded = encode(IMAGE, cell, phi=1)
    assert encoded.phi.tolist() == [1] * 5 and encoded.sensitivity is None
    assert list(encoded.seconds) == ["backbone", "coding", "writing"]


def test_the_steps_of_sender_and_receiver_are_timed_for_every_way_to_choose(cell):
    sent = online_costs.send(cell, [IMAGE], PRICE)
    uniform, price, bits = sent["seconds"]
    assert (uniform, price, bits) == ("uniform", "mfiba_skip, price given", "mfiba_skip, bits given")
    assert list(sent["seconds"][uniform]) == ["backbone", "coding", "writing"]
    assert [list(sent["seconds"][way]) for way in (price, bits)] == [list(SENDER)] * 2
    ways = {uniform: {"phi": 1}, price: {"lambda_prime": PRICE}, bits: {}}  # precode: q2
    assert sent["files"] == {way: [encode(IMAGE, cell, **choice).data] for way, choice in ways.items()}
    received = online_costs.receive(cell, sent["files"])
    assert {tuple(seconds) for seconds in received["seconds"].values()} == {RECEIVER}
    seconds = [s for side in (sent, received) for steps in side["seconds"].values() for s in steps.values()]
    assert min(seconds) > 0 and min(sent["peak_mib"], received["peak_mib"]) > 10


def test_the_price_is_that_of_the_middle_operating_point(tmp_path):
    rows = [
        f"{method},{point},{price / (1 + point)},7,{scale},0"
        for method, price in (("static", 7), ("mfiba_skip", 12))
        for point in (0, 1, 2)
        for scale in SCALES
    ]
    (tmp_path / "a.csv").write_text("\n".join(["method,point,lambda_prime,image_id,scale,phi", *rows]))
    assert online_costs.middle_price(tmp_path / "a.csv") == 6


def test_nothing_is_coded_twice(cell, monkeypatch):
    seen = []
    monkeypatch.setattr(online, "encode_scale", lambda *words: seen.append(words[1:3]) or encode_scale(*words))
    encode(IMAGE, cell, bpp=20)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_a_file_is_as_large_as_asked_for(cell, share):
    low, high = (encode(IMAGE, cell, phi=phi).bpp for phi in (0, 3))
    bpp = low + share * (high - low)
    encoded = encode(IMAGE, cell, bpp=bpp)
    assert encoded.bpp == approx(bpp, rel=0.05)
    assert encoded.wanted_bpp == bpp


def test_without_a_choice_a_file_is_as_large_as_its_precoding(cell):
    assert encode(IMAGE, cell).bpp == approx(encode(IMAGE, cell, phi=1).bpp, rel=0.05)  # precode: q2


@pytest.mark.parametrize(("bpp", "sent"), [(0.01, 0), (1e4, 5)])
def test_a_size_out_of_reach_gives_the_nearest_and_a_warning(bpp, sent, cell, tmp_path, monkeypatch, capsys):
    words = (IMAGE, "-o", tmp_path / "out.mfb", "--cell", cell.name, "--bpp", bpp)
    assert command("encode", *words, monkeypatch=monkeypatch) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"out.mfb: .* nearest to {re.escape(format(bpp, '.4g'))}", warning)
    data = (tmp_path / "out.mfb").read_bytes()
    assert data == encode(IMAGE, cell, phi=3).data if sent else len(data) == FRAME_BYTES


@pytest.mark.parametrize(
    ("jump", "top", "together"),
    [(1, 5, False), (5, 5, False), (5, 5, True), (1, 3, False), (3, 3, True), (1, 0, False)],
)
def test_any_size_between_the_ends_is_met_with_few_codings(jump, top, together):
    """Allocations that jump several qualities at once, of all scales together, or whose most bits are not the most."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, slope, size = rng.normal(size=5), rng.uniform(0.2, 3, 5), rng.uniform(10, 1000, 5)
        seen = set()
        if together:
            start[:], slope[:] = start[0], slope[0]

        def choose(lambda_prime: float, start=start, slope=slope) -> np.ndarray:
            return jump * np.rint(np.clip(start - slope * np.log10(lambda_prime), 0, top) / jump)

        def bits(phi: np.ndarray, size=size, seen=seen) -> float:
            seen.update(enumerate(phi))
            return float((size * 1.7**phi).sum())

        wanted = rng.uniform(bits(np.zeros(5)), bits(np.full(5, 5.0)))
        phi = nearest_in_size(choose, bits, wanted, 5)
        assert bits(phi) == approx(wanted, rel=0.05)
        assert phi.min() >= 0 and phi.max() <= 5
        assert len(seen) <= 45  # of (scale, phi): nine whole pyramids


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phi", "4"], "--phi.*choose 0 to 3"),
        (["--phi", "-1"], "--phi.*choose 0 to 3"),
        (["--bpp", "0"], "--bpp is 0.0"),
        (["--bpp", "nan"], "--bpp is nan"),
        (["--lambda-prime", "inf"], "--lambda-prime is inf"),
    ],
)
def test_a_choice_that_means_nothing_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    assert (
        command(
            "encode", IMAGE, "-o", tmp_path / "out.mfb", "--cell", "detection-elic", *words, monkeypatch=monkeypatch
        )
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_coded_is_named(cell, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (MAX_SIDE + 1, 400)).save(tmp_path / "large.png")
    Image.new("RGB", (480, 10)).save(tmp_path / "narrow.png")
    for name in ("absent.png", "text.png", "large.png", "narrow.png"):
        with pytest.raises(InputError, match=name):
            encode(tmp_path / name, cell, phi=0)


# ---- files of the profile


@pytest.mark.parametrize("path", MADE)
def test_what_is_missing_is_named_with_the_target_that_makes_it(path, cell, monkeypatch):
    here = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: self != Path(path) and here(self))
    with pytest.raises(InputError, match=f"^{path}: .*`dvc repro {MADE[path]}`"):
        encode(IMAGE, cell)


@pytest.mark.parametrize("path", MADE)
def test_dvc_makes_it_by_that_name(path):
    made = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"][MADE[path]]["outs"]
    assert {path, str(Path(path).parent)} & {out["path"] for out in made}  # a file, or a folder for all tasks


def test_an_unknown_cell_names_the_known_ones():
    with pytest.raises(InputError, match="'detection-jpeg'.*choose from detection-elic, keypoints-elic"):
        load_cell("detection-jpeg")


def test_a_model_of_other_qualities_is_refused(cell):
    fewer = cell._replace(params=cell.params | {"lambdas": dict(list(LAMBDAS.items())[:3])})
    with pytest.raises(InputError, match="detection.json: mean.0.*params.yaml has 3 lambdas"):
        encode(IMAGE, fewer)


# ---- receiver


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
