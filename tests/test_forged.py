"""Whatever a file says, with every codec: detections, or one line, in bounded time and memory."""

import json
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import online_profile
import torch
from online_profile import CHANNELS, IMAGE, LAMBDAS, ROOT

from stages.lib import hevc
from stages.lib.bitstream import Bitstream, Record, pack, parse, parse_record
from stages.lib.coding import encode_scale, pyramid_shapes
from stages.lib.online import encode, load_cell, load_networks
from stages.lib.params import SCALES

profile, inside = online_profile.profile, online_profile.inside  # fixtures
CELLS = ("detection-elic", "segmentation-elic", "keypoints-elic", "detection-tcm", "detection-hevc")
FILES = 60  # of each cell
DECODE = """
import json, resource, sys, time
from pathlib import Path
from stages.lib.bitstream import read
from stages.lib.online import coco_results, decode, load_cell, load_networks
from stages.lib.schema import InputError

def received(path):
    try:
        detection = decode(read(path), cell, networks)
    except InputError as error:
        assert str(error)
        return False
    json.dumps(coco_results(0, detection, cell.task), allow_nan=False)
    return True

limits, found = resource.getrlimit(resource.RLIMIT_AS), {}
for name in sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_AS, limits)
    cell, (whole, *files) = load_cell(name), sorted(Path(sys.argv[1], name).iterdir())
    networks = load_networks(cell)
    assert received(whole)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27, limits[1]))
    start = time.process_time()
    found[name] = {"decoded": sum(map(received, files)), "seconds": time.process_time() - start}
print(json.dumps(found))
"""


def strange_payloads(coded: Bitstream, feature_codec) -> dict[str, list[bytes]]:
    """Whole payloads of each scale that no image leads to: most damaged ones are refused, these decode to anything."""
    generator, payloads = torch.Generator().manual_seed(0), {}
    levels = [feature_codec.codec.level(lmbda) for lmbda in (LAMBDAS["q1"], LAMBDAS["q4"])]
    for scale, shape in pyramid_shapes(coded.padded).items():
        maps = torch.randn(4, CHANNELS, *shape, generator=generator) ** 5
        records = [encode_scale(m[None], scale, level, feature_codec)[0] for m in maps for level in levels]
        payloads[scale] = [parse_record(record.data)[0].payload for record in records]
    return payloads


def mutated(coded: Bitstream, strange: dict[str, list[bytes]], rng: random.Random) -> bytes:
    """A file with anything in it, and a right CRC."""
    if rng.random() < 0.6:  # of the right form
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


def with_parameter_sets(record: Record) -> Record:
    """Those of a picture of 8192 x 8192, and a slice of it."""
    sets = hevc._encoder(8192, 8192, 0).extradata
    return record._replace(payload=sets + hevc.SLICE_START + record.payload)


def test_no_file_raises_anything_but_an_input_error_or_asks_for_more_than_its_image(tmp_path: Path, profile: Path):
    rng = random.Random(0)
    for name in CELLS:
        cell = load_cell(name)
        coded = parse(encode(IMAGE, cell, phi=0).data)
        strange = strange_payloads(coded, load_networks(cell).feature_codec)
        files = [pack(coded), *(mutated(coded, strange, rng) for _ in range(FILES))]
        if cell.codec == "hevc":
            files.append(pack(coded._replace(records={s: with_parameter_sets(r) for s, r in coded.records.items()})))
        (tmp_path / name).mkdir()
        for number, data in enumerate(files):
            (tmp_path / name / f"{number:03}.mfb").write_bytes(data)
    words = [sys.executable, "-c", DECODE, str(tmp_path), *CELLS]
    done = subprocess.run(
        words, cwd=profile, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        assert 0.1 * FILES < found["decoded"] < 0.9 * FILES, name
        assert found["seconds"] < FILES, name  # a second each, of a few milliseconds that it takes
