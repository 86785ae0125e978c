"""The receiver sees what x265 reconstructed, to the bit, and needs no more than the slice, the level and the shape."""

import errno
import hashlib
import math
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import av
import pytest
import torch

from stages.lib import hevc
from stages.lib.coding import FeatureCodec, decode_scale, encode_scale
from stages.lib.hevc import Hevc
from stages.lib.planes import Packing
from stages.lib.schema import InputError

codec = Hevc()


def planes(n: int, *shape: int) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7))


def structured(height: int = 64, width: int = 128) -> torch.Tensor:
    """A plane of 16 px tiles, each of its own brightness and waves, with noise: [1, 1, H, W]."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    tile = y.div(16, rounding_mode="floor") * 8 + x.div(16, rounding_mode="floor")
    waves = torch.sin(x * (0.2 + tile % 3 / 10) + tile) * torch.cos(y * (0.1 + tile % 5 / 20))
    noise = planes(1, height, width)[0] - 0.5
    return (0.5 + 0.1 * torch.sin(7 * tile) + 0.15 * waves + 0.05 * noise)[None, None]


def mse(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().item()


@pytest.mark.parametrize("shape", [(1, 8, 16), (1, 1, 1), (1, 40, 72), (1, 17, 19), (1, 128, 256), (3, 8, 16)])
@pytest.mark.parametrize("level", [0, 30, 51])
def test_the_receiver_reconstructs_what_the_sender_did_to_the_bit(shape, level):
    coded = codec.encode(planes(2, *shape), level)
    decoded = codec.decode([c.string for c in coded], level, shape)
    assert decoded.shape == (2, *shape)
    assert torch.equal(decoded, torch.stack([c.plane for c in coded]))


# Sizes of whole coding units: the hash is of the picture before cropping.
@pytest.mark.parametrize("size", [(16, 16), (40, 72), (64, 128)])
@pytest.mark.parametrize("level", [10, 40])
def test_the_decoders_picture_has_the_hash_that_x265_gives_its_own_reconstruction(monkeypatch, size, level):
    monkeypatch.setattr(hevc, "X265_PARAMS", hevc.X265_PARAMS + ":hash=1")  # an MD5 in an SEI behind the slice
    picture = (1023 * structured(*size)[0, 0]).numpy().astype("uint16")
    string = hevc._encode(picture, level)
    decoded = hevc._decode(hevc._encoder(*size, level).extradata + hevc.SLICE_START + string)
    assert hashlib.md5(decoded.tobytes()).digest() in string


def test_a_fresh_process_decodes_from_string_level_and_shape_alone():
    (coded,) = codec.encode(structured(), 35)
    script = (
        "import sys; from stages.lib.hevc import Hevc;"
        f"plane = Hevc().decode([bytes.fromhex('{coded.string.hex()}')], 35, (1, 64, 128))[0];"
        "sys.stdout.buffer.write(plane.numpy().tobytes())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert output == coded.plane.numpy().tobytes()


def test_a_plane_is_coded_alike_in_any_company():
    x = torch.cat([structured(40, 72), planes(3, 1, 40, 72), torch.zeros(1, 1, 40, 72), structured(40, 72).flip(3)])
    together = codec.encode(x, 33)
    assert [codec.encode(plane[None], 33)[0].string for plane in x] == [c.string for c in together]
    order = [5, 0, 3]
    decoded = codec.decode([together[i].string for i in order], 33, (1, 40, 72))
    assert torch.equal(decoded, torch.stack([together[i].plane for i in order]))


@pytest.mark.parametrize("option", ["no-sao=1", "no-deblock=1", "tskip=1", "ipratio=1"])
def test_x265_heeds_its_options(monkeypatch, option):
    dots = 0.3 + 0.4 * (planes(1, 1, 32, 64) > 0.9)  # what transform skipping is for
    (coded,) = codec.encode(dots, 36)
    monkeypatch.setattr(hevc, "X265_PARAMS", hevc.X265_PARAMS.replace(f":{option}", ""))
    assert codec.encode(dots, 36)[0].string != coded.string


def test_a_sender_that_needs_no_reconstruction_decodes_nothing(monkeypatch):
    (whole,) = codec.encode(structured(), 27)
    monkeypatch.setattr(hevc, "_decode", None)
    (sent,) = codec.encode(structured(), 27, reconstruct=False)
    assert sent.string == whole.string and not sent.plane.numel()


def test_coding_twice_gives_the_same_bytes():
    assert codec.encode(structured(), 27)[0].string == codec.encode(structured(), 27)[0].string


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", [0, 51])
def test_flat_planes_stay_flat_for_a_few_bytes(value, level):
    (coded,) = codec.encode(torch.full((1, 1, 20, 40), value), level)
    assert len(coded.string) < 20
    assert (coded.plane - value).abs().max() < 0.01 and coded.plane.unique().numel() == 1


def test_three_channels_come_back_in_their_places():
    x = torch.cat([structured(), 1 - structured(), structured().flip(2)], 1)
    assert mse(codec.encode(x, 20)[0].plane, x[0]) < 1e-4


def test_values_outside_the_range_are_clipped():
    plane = codec.encode(torch.tensor([-0.5, 1.5]).repeat_interleave(16).expand(1, 1, 32, 32), 0)[0].plane
    assert torch.allclose(plane, torch.tensor([0.0, 1.0]).repeat_interleave(16), atol=0.01)


# ---- what is sent


@pytest.mark.parametrize("level", [0, 26, 51])
def test_only_the_slice_is_sent(level):
    parameter_sets = hevc._encoder(64, 128, level).extradata
    units = [unit for unit in parameter_sets.split(b"\x00\x00\x01") if unit.strip(b"\x00")]
    assert [unit[0] >> 1 for unit in units] == [32, 33, 34]  # VPS, SPS, PPS
    (coded,) = codec.encode(structured(), level)
    assert b"\x00\x00\x01" not in coded.string and not any(unit[2:10] in coded.string for unit in units)
    assert coded.bytes_hyper == 0 and math.isnan(coded.estimated_bits)


@pytest.mark.parametrize("level", range(0, 52, 3))
def test_no_slice_holds_what_is_refused(level):
    """Noise and structure of many sizes; and a long run of zeros, which emulation prevention breaks up."""
    sent = [codec.encode(x, level) for x in (planes(8, 1, 40, 72), structured(96, 128), structured(17, 129))]
    (flat,) = codec.encode(torch.zeros(1, 1, 512, 1024), level)
    assert b"\0\0\3" in flat.string
    for coded in [flat, *sum(sent, [])]:
        assert hevc.NO_SLICE.search(coded.string) is None


def test_a_string_with_a_start_code_never_reaches_the_decoder(monkeypatch):
    """Behind one could stand parameter sets of a picture that fits into no memory."""
    (coded,), calls = codec.encode(structured(), 35), []
    monkeypatch.setattr(hevc, "_decode", lambda stream: calls.append(stream))
    large = hevc._encoder(4096, 4096, 0).extradata + hevc.SLICE_START + coded.string
    for forged in (large, large[1:], coded.string + large, coded.string[:9] + b"\0\0\2" + coded.string[9:]):
        assert refused(forged, (1, 64, 128))
    for zeros in (b"\0", b"\0\0", b"\0\0\0\1"):
        assert refused(coded.string + zeros, (1, 64, 128))
    assert calls == []


def test_memory_that_ends_in_the_decoder_is_no_damage(monkeypatch):
    def decode(*_):
        raise av.error.FFmpegError(errno.ENOMEM, "Cannot allocate memory")

    (coded,) = codec.encode(structured(), 35)
    monkeypatch.setattr(hevc.av.CodecContext, "create", lambda *_: SimpleNamespace(decode=decode))
    with pytest.raises(MemoryError):
        hevc._decode(coded.string)


def test_the_parameter_sets_do_not_depend_on_the_level():
    assert len({hevc._encoder(40, 72, level).extradata for level in range(0, 52, 3)}) == 1


def test_records_carry_hevc_strings():
    identity = Packing("pca", {"2": torch.eye(8)}, {"2": torch.zeros(8)})
    feature_codec = FeatureCodec(codec, identity, 8)
    features = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    records = encode_scale(features, "2", codec.level(0.04), feature_codec)
    decoded = decode_scale([r.data for r in records], "2", (4, 4), feature_codec)
    assert [mse(d, f) for d, f in zip(decoded, features, strict=True)] == [r.mse_feature for r in records]


# ---- rate control


def test_a_larger_lambda_costs_more_bits_and_leaves_less_error():
    levels = [codec.level(lmbda) for lmbda in (1e-4, 3e-4, 1e-3, 3.5e-3, 0.012, 0.04)]
    assert levels == sorted(set(levels), reverse=True) and levels[0] == 51 and 24 < levels[-1] < 30
    coded = [codec.encode(structured(), level)[0] for level in levels]
    sizes, errors = [len(c.string) for c in coded], [mse(c.plane, structured()[0]) for c in coded]
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


def test_levels_are_qps_for_every_lambda():
    assert codec.level(1e-9) == 51 and codec.level(1e9) == 0


@pytest.mark.parametrize("lmbda", [1e-3, 3.5e-3, 0.012, 0.04])
def test_the_qp_of_a_lambda_is_near_the_best_for_it(lmbda):
    plane = structured(128, 256)  # on a smaller one the loss jumps from QP to QP

    def loss(level: int) -> float:
        (coded,) = codec.encode(plane, level)
        return 8 * len(coded.string) + lmbda * 255**2 * (coded.plane - plane[0]).square().sum().item()

    level = codec.level(lmbda)
    assert loss(level) < 1.02 * min(loss(level + step) for step in (-6, -4, -3, -2, -1, 1, 2, 3, 4, 6))


def test_the_highest_rate_leaves_little_more_than_the_rounding_to_10_bits():
    assert mse(codec.encode(structured(), 0)[0].plane, structured()[0]) < 1e-6


# ---- damage


def refused(string: bytes, shape: tuple[int, int, int]) -> bool:
    """Whether InputError is raised; what is not refused must be a picture, in less than a second either way."""
    start = time.process_time()
    try:
        assert codec.decode([string], 35, shape).shape == (1, *shape)
        return False
    except InputError:
        return True
    finally:
        assert time.process_time() - start < 1


@pytest.mark.parametrize("shape", [(1, 64, 128), (1, 8, 16)])
def test_a_string_that_breaks_off_is_refused_or_already_says_all(shape):
    (coded,) = codec.encode(structured(*shape[1:]), 35)
    n = len(coded.string)
    for length in {*range(0, n, -(-n // 80)), n - 2, n - 1}:
        if not refused(coded.string[:length], shape):
            assert length >= n - 2 and torch.equal(codec.decode([coded.string[:length]], 35, shape)[0], coded.plane)


def test_flipped_bits_give_a_picture_or_are_refused():
    shape, rng = (1, 16, 32), random.Random(0)
    (coded,) = codec.encode(structured(*shape[1:]), 35)
    outcomes = []
    for _ in range(200):
        damaged = bytearray(coded.string)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        outcomes.append(refused(bytes(damaged), shape))
    assert any(outcomes)


def test_random_bytes_are_nearly_always_refused():
    rng = random.Random(0)
    outcomes = [refused(rng.randbytes(rng.randrange(60)), (1, 16, 32)) for _ in range(200)]
    assert sum(outcomes) > 190


@pytest.mark.parametrize("other", [(1, 32, 64), (1, 128, 128)])
def test_a_string_of_another_shape_is_refused_or_garbage(other):
    (coded,) = codec.encode(structured(), 20)
    assert refused(coded.string, other) or not torch.equal(codec.decode([coded.string], 20, other)[0], coded.plane)


def test_the_message_names_the_string_and_the_remedy():
    with pytest.raises(InputError, match="of 0 bytes.*64 x 128.*again"):
        codec.decode([b""], 35, (1, 64, 128))
