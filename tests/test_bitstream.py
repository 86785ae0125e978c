"""One content, one file: what is packed is parsed as it was, and no other bytes are accepted or do any harm."""

import random
import struct
import time
import tracemalloc
import zlib
from math import inf, nan
from pathlib import Path

import pytest

from stages.lib.bitstream import (
    FRAME_BYTES,
    MAX_SIDE,
    Bitstream,
    BitstreamError,
    Record,
    check_identity,
    identity,
    pack,
    pack_record,
    parse,
    parse_record,
)
from stages.lib.params import SCALES
from stages.lib.schema import InputError

MODEL, CODEC = bytes.fromhex("deadbeef"), bytes.fromhex("01020304")
PAYLOADS = (b"feature", b"map", b"", b"\xff\x00", b"z" * 130)
RANGES = ((-1.0, 1.0), (-0.5, 2.0), (0.0, 0.0), (-65504.0, 65504.0), (-(2.0**-24), 0.25))
SMALL = Bitstream(
    MODEL,
    CODEC,
    original=(427, 640),
    resized=(800, 1199),
    records={s: Record(60 * i, *RANGES[i], PAYLOADS[i]) for i, s in enumerate(SCALES)},
)
GOLDEN = bytes.fromhex(
    "4d4642 02 deadbeef 01020304 ab01 8002 2003 af04 1f"
    "00 00bc 003c 07 66656174757265"
    "3c 00b8 0040 03 6d6170"
    "78 0000 0000 00"
    "b4 fffb ff7b 02 ff00"
    "f0 0180 0034 8201" + 130 * "7a" + "59ca185d"
)


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def with_sizes(*sizes: int) -> bytes:
    data = pack(SMALL)
    return sealed(data[:12] + struct.pack("<4H", *sizes) + data[20:-4])


def with_first_record(record: bytes) -> bytes:
    """`SMALL` with these bytes in place of its first record, the CRC right."""
    data = pack(SMALL)
    return sealed(data[:21] + record + data[21 + len(pack_record(SMALL.records["0"])) : -4])


def random_bitstream(rng: random.Random) -> Bitstream:
    def record() -> Record:
        low, high = sorted(struct.unpack("<2e", struct.pack("<2e", *(rng.gauss(0, 10) for _ in range(2)))))
        length = rng.choice([0, 1, 127, 128, 16383, 16384, rng.randrange(3000)])
        return Record(rng.randrange(256), low, high, rng.randbytes(length))

    sizes = [(rng.randint(1, MAX_SIDE), rng.randint(1, MAX_SIDE)) for _ in range(2)]
    sent = [scale for scale in SCALES if rng.random() < 0.8]
    return Bitstream(rng.randbytes(4), rng.randbytes(4), *sizes, {scale: record() for scale in sent})


def test_the_receiver_reads_what_the_sender_wrote():
    rng = random.Random(0)
    for _ in range(200):
        bitstream = random_bitstream(rng)
        assert parse(pack(bitstream)) == bitstream


def test_the_layout_is_the_documented_one():
    assert pack(SMALL) == GOLDEN
    assert parse(GOLDEN) == SMALL
    few = {scale: SMALL.records[scale] for scale in ("1", "3")}
    assert pack(SMALL._replace(records=few)) == sealed(GOLDEN[:20] + b"\x0a" + b"".join(map(pack_record, few.values())))
    assert len(pack(SMALL._replace(records={}))) == FRAME_BYTES


@pytest.mark.parametrize(
    ("length", "coded"),
    [
        (0, "00"),
        (127, "7f"),
        (128, "8001"),
        (16383, "ff7f"),
        (16384, "808001"),
        (2**21 - 1, "ffff7f"),
        (2**21, "80808001"),
    ],
)
def test_everything_beyond_the_payloads_is_counted_and_at_most_128_bytes(length: int, coded: str):
    record = Record(7, -1.0, 1.0, bytes(length))
    assert pack_record(record)[5:] == bytes.fromhex(coded) + bytes(length)
    overhead = len(pack(SMALL._replace(records=dict.fromkeys(SCALES, record)))) - len(SCALES) * length
    assert overhead == FRAME_BYTES + len(SCALES) * (5 + len(coded) // 2) <= 128


def test_records_stand_back_to_back():
    data, at, read = b"".join(map(pack_record, SMALL.records.values())), 0, []
    while at < len(data):
        record, at = parse_record(data, at)
        read.append(record)
    assert read == list(SMALL.records.values())


@pytest.mark.parametrize(("resized", "padded"), [((800, 1199), (800, 1216)), ((1, 33), (32, 64)), ((64, 32), (64, 32))])
def test_the_padded_size_is_the_next_multiple_of_32(resized: tuple[int, int], padded: tuple[int, int]):
    assert SMALL._replace(resized=resized).padded == padded


def test_a_file_cut_anywhere_is_refused():
    for length in range(len(GOLDEN)):
        with pytest.raises(BitstreamError):
            parse(GOLDEN[:length])
    for length in range(len(GOLDEN) - 4):
        with pytest.raises(BitstreamError):
            parse(sealed(GOLDEN[:length]))


def test_a_file_with_any_one_bit_flipped_is_refused():
    for bit in range(8 * len(GOLDEN)):
        damaged = bytearray(GOLDEN)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            parse(bytes(damaged))


def mutated(data: bytes, rng: random.Random) -> bytes:
    out, at, length = bytearray(data), rng.randrange(len(data)), rng.randint(1, 8)
    match rng.choice(["flip", "overwrite", "delete", "insert", "splice"]):
        case "flip":
            out[at] ^= 1 << rng.randrange(8)
        case "overwrite":
            out[at : at + length] = rng.randbytes(length)
        case "delete":
            del out[at : at + length]
        case "insert":
            out[at:at] = rng.randbytes(length)
        case "splice":
            source = rng.randrange(len(data))
            out[at : rng.randrange(at, len(data))] = data[source : source + rng.randrange(60)]
    return bytes(out)


def test_mutated_bytes_are_refused_at_once_or_are_the_file_of_what_they_say():
    rng, accepted, slowest = random.Random(1), {True: 0, False: 0}, 0.0
    for i in range(10_000):
        with_right_crc = i % 2 == 0
        data = sealed(mutated(GOLDEN[:-4], rng)) if with_right_crc else mutated(GOLDEN, rng)
        start = time.process_time()
        try:
            bitstream = parse(data)
        except BitstreamError as error:
            assert "\n" not in str(error)
        else:
            assert pack(bitstream) == data
            accepted[with_right_crc] += data != GOLDEN
        slowest = max(slowest, time.process_time() - start)
    assert accepted[False] == 0 and 500 < accepted[True] < 4500
    assert slowest < 0.1


RANGE_0_1, INF, NAN = "0000003c", "007c", "007e"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no feature bitstream"),
        (b"\x89PNG\r\n" + GOLDEN, "no feature bitstream"),
        (GOLDEN[:23], "cut off after 23 bytes"),
        (sealed(b"MFB\x01" + GOLDEN[4:-4]), "version 1, known is 2"),
        (sealed(GOLDEN[:20] + b"\x3f" + GOLDEN[21:-4]), "scales 00111111"),
        (sealed(GOLDEN[:20] + b"\x0f" + GOLDEN[21:-4]), "137 bytes after its last record"),
        (GOLDEN[:-1] + b"\x00", "wrong CRC"),
        (sealed(GOLDEN[:-4] + b"??"), "2 bytes after its last record"),
        (sealed(GOLDEN[:21]), "record at byte 21.*cut off"),
        (sealed(GOLDEN[:26]), "record at byte 21.*cut off"),
        (with_first_record(bytes.fromhex(f"00 {RANGE_0_1} ffffff7f")), "268435455 bytes of payload, 16. are left"),
        (with_first_record(bytes.fromhex(f"00 {RANGE_0_1} 8000")), "as few as it takes"),
        (with_first_record(bytes.fromhex(f"00 {RANGE_0_1} 81808000") + b"x"), "as few as it takes"),
        (with_first_record(bytes.fromhex(f"00 {RANGE_0_1} 8080808001")), "1 to 4 bytes"),
        (with_first_record(bytes.fromhex("00 003c0000 00")), "range 1.0 to 0.0"),
        (with_first_record(bytes.fromhex(f"00 0000{INF} 00")), "range 0.0 to inf"),
        (with_first_record(bytes.fromhex(f"00 00fc{INF} 00")), "range -inf to inf"),
        (with_first_record(bytes.fromhex(f"00 {NAN}003c 00")), "range nan to 1.0"),
        (with_first_record(bytes.fromhex(f"00 0000{NAN} 00")), "range 0.0 to nan"),
    ],
)
def test_what_is_wrong_is_named_even_if_the_crc_is_right(data: bytes, message: str):
    with pytest.raises(BitstreamError, match=message):
        parse(data)


@pytest.mark.parametrize("wrong", [0, MAX_SIDE + 1, 65535])
@pytest.mark.parametrize("at", range(4))
def test_sizes_of_zero_or_over_the_limit_are_neither_written_nor_read(at: int, wrong: int):
    sizes = [MAX_SIDE, 1, 1, MAX_SIDE]
    assert parse(with_sizes(*sizes)).padded == (32, MAX_SIDE)
    sizes[at] = wrong
    with pytest.raises(BitstreamError, match=f"size.* {wrong} "):
        parse(with_sizes(*sizes))
    with pytest.raises(BitstreamError, match=f"size.* {wrong} "):
        pack(SMALL._replace(original=tuple(sizes[:2]), resized=tuple(sizes[2:])))


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (-inf, 0.0), (0.0, inf), (nan, 1.0), (0.0, nan), (0.0, 0.1)])
def test_a_range_that_the_receiver_would_not_get_is_not_written(low: float, high: float):
    with pytest.raises(BitstreamError, match="range"):
        pack_record(Record(0, low, high, b""))


def test_a_length_beyond_the_data_allocates_nothing():
    data = with_first_record(bytes.fromhex(f"00 {RANGE_0_1} ffffff7f"))
    tracemalloc.start()
    with pytest.raises(BitstreamError):
        parse(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_an_identity_is_the_start_of_the_sha_256_of_the_file(tmp_path: Path):
    path, other = tmp_path / "weights.pt", tmp_path / "other.pt"
    path.write_bytes(b"abc")
    assert identity(path).hex() == "ba7816bf"  # FIPS 180-4's example
    path.write_bytes(b"a")
    other.write_bytes(b"bc")
    assert identity(path, other).hex() == "ba7816bf"


def test_other_weights_than_the_senders_are_named():
    check_identity(SMALL, MODEL, CODEC)
    with pytest.raises(InputError, match="with model deadbeef, this model is 00000000"):
        check_identity(SMALL, bytes(4), CODEC)
    with pytest.raises(InputError, match="with codec 01020304, this codec is 00000000"):
        check_identity(SMALL, MODEL, bytes(4))
