"""Feature bitstream file -> detections in COCO's results format: the receiver of a cell, who has only the weights.

Run in a profile's folder. Keypoints are written for all labels: which categories have any, the weights do not tell
(a keypoint R-CNN knows persons only). Without --image-id it is the last number in the file's name, or 0.
"""

import re
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from stages.lib.bitstream import BitstreamError, read
from stages.lib.command import Parser, run
from stages.lib.files import atomic, write_json
from stages.lib.models import read_image
from stages.lib.online import coco_results, decode, draw, load_cell, load_networks
from stages.lib.schema import InputError


def main(bitstream: Path, out: Path, cell: str, image_id: int | None, picture: Path | None, image: Path | None) -> None:
    if (picture is None) != (image is None):
        raise InputError("--picture and --image belong together: where to draw, and what to draw on")
    described = load_cell(cell)
    try:
        coded = read(bitstream)
        if image is not None:
            pixels, (height, width) = read_image(image), coded.original
            if pixels.shape[1:] != (height, width):
                raise InputError(f"{image}: has not the size of the coded image, {width} x {height} px")
        detection = decode(coded, described, load_networks(described))
    except BitstreamError as error:
        raise InputError(f"{bitstream}: {error}") from None
    if image_id is None:
        image_id = int((re.findall(r"\d+", bitstream.stem) or [0])[-1])
    write_json(out, coco_results(image_id, detection, described.task))
    if picture is not None:
        with atomic(picture) as scratch:
            to_pil_image(draw(pixels, detection, described.task)).save(scratch, format="PNG")


if __name__ == "__main__":
    summary, details = __doc__.split("\n\n", 1)
    parser = Parser(prog="python -m stages.decode", description=summary, epilog=details)
    parser.add_argument("bitstream", type=Path, metavar="in.mfb")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file to write, .json")
    parser.add_argument("--cell", required=True, help="of params.yaml, e.g. detection-elic")
    parser.add_argument("--image-id", type=int)
    parser.add_argument("--picture", type=Path, help="a PNG file to draw the detections into, on --image")
    parser.add_argument("--image", type=Path, help="the image that was coded")
    run(parser, main)
