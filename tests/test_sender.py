"""Files have the size that was asked for, and hold what the receiver needs and nothing twice."""

import re
from pathlib import Path

import numpy as np
import online_profile
import pytest
import torch
import yaml
from artifacts import write_coded, write_features
from online_profile import IMAGE, LAMBDAS, MADE, NETWORKS, PRICE, ROOT, SIZE, STEPS, WITHOUT, command
from PIL import Image
from pycocotools.coco import COCO
from pytest import approx

from stages.lib import mfip, online, online_costs
from stages.lib.accuracy import match
from stages.lib.benchmark_tables import RECEIVER, SENDER
from stages.lib.bitstream import FRAME_BYTES, MAX_SIDE, pack_record, parse
from stages.lib.coding import decode_scale, encode_scale
from stages.lib.evaluating import Choices, bits_of, tabulate
from stages.lib.features import Features
from stages.lib.learned import LearnedCodec
from stages.lib.models import pyramid_of, read_image
from stages.lib.nearest import nearest_in_size
from stages.lib.online import decode_pyramid, encode, load_cell, load_networks
from stages.lib.params import COARSER, SCALES, SKIPPED
from stages.lib.schema import InputError

profile, inside, cell = online_profile.profile, online_profile.inside, online_profile.cell  # fixtures
networks, threads = online_profile.networks, online_profile.threads


def test_one_image_has_one_file_on_any_number_of_threads(cell, threads):
    threads(1)
    first = encode(IMAGE, cell, lambda_prime=PRICE)
    threads(3)
    assert encode(IMAGE, cell, lambda_prime=PRICE).data == first.data
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("codec", NETWORKS)
def test_the_entropy_coders_tables_are_built_on_one_thread(codec, threads, monkeypatch):
    """As the sender's: on several a sum may end in another bit."""
    seen, update = [], LearnedCodec.update
    monkeypatch.setattr(LearnedCodec, "update", lambda self: seen.append(torch.get_num_threads()) or update(self))
    bits = []
    for count in (1, 5):
        threads(count)
        bits.append(load_networks(load_cell(f"detection-{codec}")).feature_codec.codec._tables.bits)
        assert torch.get_num_threads() == count
    assert seen == [1, 1] and np.array_equal(*bits)


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


@pytest.mark.parametrize("codec", ["elic", "tcm", "hevc"])
@pytest.mark.parametrize("choice", [{"phi": 1}, {"lambda_prime": PRICE}, {"lambda_prime": 4 * PRICE}])
def test_the_bits_of_a_file_are_those_of_the_table_of_results(codec, choice, tmp_path):
    """Which come from the records of `compress` and an allocation's phi, with skipped scales but for a given phi."""
    cell = load_cell(f"detection-{codec}")
    networks, encoded = load_networks(cell), encode(IMAGE, cell, **choice)
    pyramid, sizes = pyramid_of(networks.detector, read_image(IMAGE))
    features = Features(write_features(tmp_path / "f", [("test", 12, pyramid, sizes)]), "test")
    for quality, lmbda in LAMBDAS.items():
        write_coded(tmp_path, quality, [features], networks.feature_codec, lmbda)
    truth = COCO()
    truth.dataset = {"images": [{"id": 12}], "categories": [{"id": 1}], "annotations": []}
    truth.createIndex()
    nothing, phi = match(truth, [], [12], "detection"), encoded.phi[None].astype(int)
    assert (SKIPPED in phi) == ("phi" not in choice)
    table = tabulate(
        Choices([("mfiba_skip", 0)], {12: phi}),
        [(("none", 0), nothing), (("mfiba_skip", 0), nothing)],
        bits_of(tmp_path, list(LAMBDAS), features),
        features,
        {"task": "detection", "codec": codec},
        2,
        0,
    ).points
    assert table["bits_per_image"].tolist() == [0, 8 * len(encoded.data)]
    assert table["bpp"].tolist() == [0, encoded.bpp]


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


def test_a_quality_between_two_lambdas_is_that_of_their_geometric_mean(cell, networks):
    between = [encode(IMAGE, cell, phi=phi) for phi in (1, 1.5, 2.0)]
    level = networks.feature_codec.codec.level((LAMBDAS["q2"] * LAMBDAS["q3"]) ** 0.5)
    assert {record.level for record in parse(between[1].data).records.values()} == {level}
    assert between[1].phi.tolist() == [1.5] * 5
    assert between[0].bpp < between[1].bpp < between[2].bpp


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
    monkeypatch.setattr(
        online, "encode_scale", lambda *words, **named: seen.append(words[1:3]) or encode_scale(*words, **named)
    )
    monkeypatch.setattr(LearnedCodec, "_synthesis", None)  # nor decoded
    encode(IMAGE, cell, bpp=20)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_a_file_is_as_large_as_asked_for(cell, share):
    low, high = (encode(IMAGE, cell, phi=phi).bpp for phi in (0, 3))
    bpp = low + share * (high - low)
    encoded = encode(IMAGE, cell, bpp=bpp)
    assert encoded.bpp == approx(bpp, rel=0.05)
    assert encoded.wanted_bpp == bpp


def test_a_file_is_as_large_as_asked_for_wherever_a_scale_begins_to_be_sent(cell):
    """From the least that the method sends to the most of all: each size is one that single scales leap over."""
    least = min(bpp for k in range(20) if (bpp := encode(IMAGE, cell, lambda_prime=PRICE * 2.0**k).bpp) > 0.2)
    for bpp in np.geomspace(least, encode(IMAGE, cell, phi=3).bpp, 12):
        assert encode(IMAGE, cell, bpp=bpp).bpp == approx(bpp, rel=0.05)


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


@pytest.mark.parametrize("begins", [[0], [2], [0, 3]])
@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 9))
def test_a_size_between_a_scale_that_is_skipped_and_one_that_is_sent_is_met(begins, share):
    size = np.array([200.0, 150.0, 120.0, 90.0, 80.0])

    def choose(lambda_prime: float) -> np.ndarray:
        phi = np.ones(5)
        phi[begins] = -1 if lambda_prime > 1 else 2
        return phi

    def bits(phi: np.ndarray) -> float:
        return float(np.where(phi < 0, 0, size * 1.7**phi).sum())

    few, many = bits(choose(10)), bits(choose(0.1))
    wanted = few + share * (many - few)
    assert bits(nearest_in_size(choose, bits, wanted, 3)) == approx(wanted, rel=0.05)


@pytest.mark.parametrize(("scales", "error"), [(1, 0.06), (2, 0.05), (5, 0.05)])
@pytest.mark.parametrize("step", range(8))
def test_steps_of_12_percent_are_taken_scale_by_scale(scales, error, step):
    """As of HEVC's QPs, where all scales that are sent come to their next one at the same share of the way."""
    size = np.array([100.0] * scales + [0.0] * (5 - scales))

    def choose(lambda_prime: float) -> np.ndarray:
        return np.full(5, 0.0 if lambda_prime > 1 else 1.0)

    def bits(phi: np.ndarray) -> float:
        return float((size * 1.12 ** np.rint(8 * phi)).sum())

    wanted = 1.06 * 1.12**step * size.sum()  # both neighbours are more than 5 % away
    assert bits(nearest_in_size(choose, bits, wanted, 1)) == approx(wanted, rel=error)


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
    with pytest.raises(InputError, match="'detection-jpeg'.*choose from detection-elic, detection-hevc,"):
        load_cell("detection-jpeg")


def test_a_model_of_other_qualities_is_refused(cell):
    fewer = cell._replace(params=cell.params | {"lambdas": dict(list(LAMBDAS.items())[:3])})
    with pytest.raises(InputError, match="detection.json: mean.0.*params.yaml has 3 lambdas"):
        encode(IMAGE, fewer)
