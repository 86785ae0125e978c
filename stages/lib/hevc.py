"""HEVC intra on feature planes: plane + QP -> one slice, and back.

    round(1023 x) -> 10-bit grey picture -> x265 -> slice -> libavcodec -> / 1023

HEVC: ITU-T H.265. A plane is one intra picture of one slice, its channels one below the other. VPS, SPS and PPS follow
from the shape alone: the receiver takes them from an encoder of its own, and only the slice is sent.
"""

from __future__ import annotations

import errno
import math
import re
from fractions import Fraction

import av
import numpy as np
import torch
from av.codec.context import Flags
from torch import Tensor, nn
from torch.nn import functional

from stages.lib.learned import Coded
from stages.lib.schema import InputError

PEAK = 1023  # of 10 bits, at which x265 also predicts and reconstructs
PIXELS = "gray10le"
LEAST_SIDE = 16  # of a picture that x265 takes
SLICE_START = b"\x00\x00\x01\x28\x01"  # start code and header of an IDR slice, always these; never found inside one
# What no slice holds (H.265, 7.4.2): emulation prevention breaks up all runs of zeros, and the last bits are not all 0.
# Behind a start code could stand parameter sets of any size, and the decoder would ask for the memory.
NO_SLICE = re.compile(rb"\0\0[\0-\2]|\0\Z")
# The squared error decides (no psychovisual terms, one QP everywhere). `medium`, with less RDOQ, costs 5 % more bits,
# `slower` saves 0.2 %. Without filters and with transform skipping it is 0.6 % less on large planes, 11 % on the
# smallest: tiles have sharp edges, and in a picture of few bytes every flag is dear.
OPTIONS = {"preset": "slow", "tune": "psnr"}
X265_PARAMS = (
    "keyint=1:ipratio=1"  # by default an intra picture gets a QP 3 below the one asked for
    ":no-sao=1:no-deblock=1:tskip=1"  # deblock=0 would be an offset, and filter
    ":pools=none:frame-threads=1:info=0:log-level=none"
)


class Hevc(nn.Module):
    """The interface of LearnedCodec, without weights. The rate control is the QP, 0..51."""

    def update(self) -> Hevc:
        """There are no tables to build."""
        return self

    def level(self, lmbda: float) -> int:
        """The QP where x265's mode decision trades bits for squared error (in 8-bit units) as `lmbda` does.

        1 / lmbda = 0.038 exp(0.234 QP): `lambda2` of x265 4.2, source/common/constants.cpp.
        """
        return min(max(round(-math.log(0.038 * lmbda) / 0.234), 0), 51)

    def encode(self, planes: Tensor, level: int, reconstruct: bool = True) -> list[Coded]:
        """Planes [B, c, H, W] in [0, 1], of any one size -> B coded planes."""
        _, c, height, width = planes.shape
        rows, columns = _picture_shape(c, height, width)
        stacked = planes.cpu().reshape(-1, 1, c * height, width)
        padded = functional.pad(stacked, (0, columns - width, 0, rows - c * height), mode="replicate")[:, 0]
        pictures = (padded * PEAK).round().clamp(0, PEAK).numpy().astype(np.uint16)
        strings = [_encode(picture, level) for picture in pictures]
        received = planes.new_empty(len(planes), 0)
        if reconstruct:
            start = _start(rows, columns)
            received = _planes([_decode(start + string) for string in strings], (c, height, width))
        return [Coded(string, 0, math.nan, plane) for string, plane in zip(strings, received, strict=True)]

    def decode(self, strings: list[bytes], level: int, shape: tuple[int, int, int]) -> Tensor:
        """B strings of planes of one shape (c, H, W) -> planes [B, c, H, W]. The slices themselves tell the QP.

        Raises InputError at a string that is no whole picture of this shape. Other damage shows only in the values.
        """
        c, height, width = shape
        rows, columns = _picture_shape(c, height, width)
        start, pictures = _start(rows, columns), []
        for string in strings:
            picture = np.empty((0, 0), np.uint16) if NO_SLICE.search(string) else _decode(start + string)
            # The decoder reads on where a slice breaks off, and makes a picture of whatever follows.
            complete = picture.size and np.array_equal(picture, _decode(start + string + b"\xff" * 16))
            if not complete or picture.shape != (rows, columns):
                raise InputError(
                    f"HEVC string of {len(string)} bytes: not a whole picture of {rows} x {columns}; code it again"
                )
            pictures.append(picture)
        return _planes(pictures, shape)


def _picture_shape(c: int, height: int, width: int) -> tuple[int, int]:
    return max(c * height, LEAST_SIDE), max(width, LEAST_SIDE)


def _planes(pictures: list[np.ndarray], shape: tuple[int, int, int]) -> Tensor:
    """B pictures, uint16 -> planes [B, c, H, W]."""
    c, height, width = shape
    cropped = np.stack([picture[: c * height, :width].reshape(shape) for picture in pictures])
    return torch.from_numpy(cropped.astype(np.float32) / PEAK)


def _start(rows: int, columns: int) -> bytes:
    """What a stream has before the slice."""
    return _encoder(rows, columns, 0).extradata + SLICE_START  # type: ignore[operator]  # an open one has them


def _encoder(rows: int, columns: int, qp: int) -> av.VideoCodecContext:
    """x265, opened: its `extradata` are the parameter sets."""
    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = columns, rows, PIXELS, Fraction(1)
    encoder.flags |= Flags.global_header
    encoder.options = OPTIONS | {"x265-params": f"{X265_PARAMS}:qp={qp}"}
    encoder.open()
    return encoder


def _encode(picture: np.ndarray, qp: int) -> bytes:
    """uint16 [rows, columns] -> its slice, by an encoder of its own: no other picture can change it."""
    rows, columns = picture.shape
    encoder = _encoder(rows, columns, qp)
    frame = av.VideoFrame.from_ndarray(picture, format=PIXELS)
    (packet,) = encoder.encode(frame) + encoder.encode(None)
    return bytes(packet).rpartition(SLICE_START)[2]


def _decode(stream: bytes) -> np.ndarray:
    """The picture of a stream, uint16 [rows, columns]; [0, 0] unless there is exactly one."""
    decoder = av.CodecContext.create("hevc", "r")
    decoder.thread_count = 1
    try:
        frames = decoder.decode(av.Packet(stream)) + decoder.decode(None)
    except av.FFmpegError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from None
        frames = []
    return frames[0].to_ndarray() if len(frames) == 1 else np.empty((0, 0), np.uint16)
