"""Records of the scales of one image <-> the bytes of a feature bitstream file, `.mfb`; nothing is decoded here.

All numbers are little endian. A file is

    at    bytes  field
     0    3      magic: "MFB" in ASCII
     3    1      version of this layout: 2
     4    4      model: the first bytes of the SHA-256 of the detector's weights file
     8    4      codec: the same of the codec's weights file, followed by that of the prediction
    12    4 x 2  height, width as stored, then height, width as the backbone saw it: uint16, px, 1 to 16384
    20    1      bits 0 to 4: 1 if scale 0, 1, 2, 3, pool is sent; the others are predicted; bits 5 to 7: 0
    21    ...    a record of each scale that is sent, in this order
    -4    4      CRC-32 (that of zlib and PNG) of all bytes before it

and a record, the unit that an allocation chooses,

    at    bytes  field
     0    1      level: rate control of the codec
     1    2 x 2  low, high: IEEE float16, the feature values of the plane's 0 and 1, finite, low <= high
     5    1-4    length of the payload in bytes, 7 bits a byte, lowest first, as few bytes as it takes;
                 the top bit of each says that another one follows
    ...   length payload: one string of the codec, or nothing

All shapes follow from the sizes: the padded size is the second one rounded up to multiples of 32. One content has
exactly one file, so a file that `parse` accepts is the one that `pack` writes. The CRC is against damage; it proves
nothing about who wrote a file.
"""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zlib
from math import inf
from pathlib import Path
from typing import NamedTuple

from stages.lib.params import MAX_SIDE, SCALES
from stages.lib.schema import InputError

MAGIC, VERSION = b"MFB", 2
PAD = 32  # px; torchvision's transform pads to multiples of it
HEADER = struct.Struct("<3sB4s4s4HB")
RECORD = struct.Struct("<Bee")
LENGTH = re.compile(rb"[\x00-\x7f]|[\x80-\xff]{1,3}[\x01-\x7f]")  # a last byte of 0 would be one too many
CRC = struct.Struct("<I")
AGAIN = "code the image again"
FRAME_BYTES = HEADER.size + CRC.size  # of a file, beside its records
MOST_BYTES = FRAME_BYTES + len(SCALES) * (RECORD.size + 4 + 2**28 - 1)  # of a file: a length has 4 bytes of 7 bits


class BitstreamError(InputError):
    """Bytes that are no feature bitstream, damaged, or meant for other weights; content that no bitstream can hold."""


class Record(NamedTuple):
    """One coded scale. `low`, `high`: exact in float16."""

    level: int
    low: float
    high: float
    payload: bytes


class Bitstream(NamedTuple):
    """One coded image. `model`, `codec`: `identity` of the weights; sizes: height, width; records: of what is sent."""

    model: bytes
    codec: bytes
    original: tuple[int, int]
    resized: tuple[int, int]
    records: dict[str, Record]  # scale -> record

    @property
    def padded(self) -> tuple[int, int]:
        height, width = self.resized
        return -(-height // PAD) * PAD, -(-width // PAD) * PAD


def identity(*paths: Path) -> bytes:
    """Four bytes that tell these weights files, one after the other, from others."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.digest()[:4]


def check_identity(bitstream: Bitstream, model: bytes, codec: bytes) -> None:
    """Raises BitstreamError if the bitstream was coded with another model or codec than the receiver's."""
    for name, sent, own in (("model", bitstream.model, model), ("codec", bitstream.codec, codec)):
        if sent != own:
            raise BitstreamError(
                f"bitstream was coded with {name} {sent.hex()}, this {name} is {own.hex()}; "
                f"give the {name} weights that it was coded with"
            )


def pack(bitstream: Bitstream) -> bytes:
    """The whole file; raises BitstreamError for what `parse` would refuse."""
    model, codec, original, resized, records = bitstream
    _check_sizes(original, resized)
    sent = [scale for scale in SCALES if scale in records]
    flags = sum(1 << SCALES.index(scale) for scale in sent)
    header = HEADER.pack(MAGIC, VERSION, model, codec, *original, *resized, flags)
    body = header + b"".join(pack_record(records[scale]) for scale in sent)
    return body + CRC.pack(zlib.crc32(body))


def read(path: Path) -> Bitstream:
    """`parse` of a file; BitstreamError for one that can be none by its kind or size, before it is read."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise BitstreamError("is no regular file; give a .mfb file")
    if about.st_size > MOST_BYTES:
        raise BitstreamError(f"has {about.st_size} bytes, a bitstream at most {MOST_BYTES}; give a .mfb file")
    with open(path, "rb") as file:
        return parse(file.read(about.st_size))


def parse(data: bytes) -> Bitstream:
    """Inverse of `pack`; raises BitstreamError for any bytes that `pack` does not write."""
    if data[:3] != MAGIC:
        raise BitstreamError(f"no feature bitstream: starts with {data[:3]!r}, not {MAGIC!r}; give a .mfb file")
    if len(data) < FRAME_BYTES:
        raise BitstreamError(f"bitstream is cut off after {len(data)} bytes; copy it again")
    if data[3] != VERSION:
        raise BitstreamError(f"bitstream has version {data[3]}, known is {VERSION}; {AGAIN}")
    body = data[: -CRC.size]
    if data[-CRC.size :] != CRC.pack(zlib.crc32(body)):
        raise BitstreamError(f"bitstream of {len(data)} bytes is damaged or cut off (wrong CRC); copy it again")
    _, _, model, codec, *sizes, flags = HEADER.unpack_from(body)
    original, resized = tuple(sizes[:2]), tuple(sizes[2:])
    _check_sizes(original, resized)
    if flags >> len(SCALES):
        raise BitstreamError(f"bitstream sends scales {flags:08b}, known are the lowest {len(SCALES)} bits; {AGAIN}")
    records, at = {}, HEADER.size
    for s, scale in enumerate(SCALES):
        if flags >> s & 1:
            records[scale], at = parse_record(body, at)
    if at < len(body):
        raise BitstreamError(f"bitstream has {len(body) - at} bytes after its last record; {AGAIN}")
    return Bitstream(model, codec, original, resized, records)


def pack_record(record: Record) -> bytes:
    """The bytes of one scale; raises BitstreamError for a range or length that the receiver would not get as it is."""
    length, head = len(record.payload), bytearray(RECORD.pack(*record[:3]))
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    data = bytes([*head, length]) + record.payload
    if parse_record(data)[0] != record:
        raise BitstreamError(f"range {record.low} to {record.high} is not exact in float16; round it before coding")
    return data


def parse_record(data: bytes, at: int = 0) -> tuple[Record, int]:
    """The record that starts at byte `at`, and where it ends; raises BitstreamError."""
    where = f"record at byte {at} of the bitstream"
    coded_length = LENGTH.match(data, at + RECORD.size)
    if coded_length is None:
        raise BitstreamError(f"{where}: cut off, or its length is not 1 to 4 bytes and as few as it takes; {AGAIN}")
    level, low, high = RECORD.unpack_from(data, at)
    if not -inf < low <= high < inf:
        raise BitstreamError(f"{where}: range {low} to {high} is not finite or falls; {AGAIN}")
    length = sum((byte & 127) << 7 * i for i, byte in enumerate(coded_length[0]))
    start, end = coded_length.end(), coded_length.end() + length
    if end > len(data):
        raise BitstreamError(f"{where}: {length} bytes of payload, {len(data) - start} are left; {AGAIN}")
    return Record(level, low, high, data[start:end]), end


def _check_sizes(*sizes: tuple[int, int]) -> None:
    for height, width in sizes:
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise BitstreamError(f"size {height} x {width} px: sides must be 1 to {MAX_SIDE}; resize the image first")
