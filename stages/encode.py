"""Image -> feature bitstream file: the sender of a cell. Run in a profile's folder, after `dvc repro`."""

import sys
from pathlib import Path

from stages.lib.command import Parser, run
from stages.lib.files import atomic
from stages.lib.nearest import TOLERANCE
from stages.lib.online import Encoded, encode, load_cell
from stages.lib.params import SCALES, SKIPPED


def main(
    image: Path, out: Path, cell: str, phi: float | None, lambda_prime: float | None, bpp: float | None, verbose: bool
) -> None:
    encoded = encode(image, load_cell(cell), phi, lambda_prime, bpp)
    with atomic(out) as scratch:
        scratch.write_bytes(encoded.data)
    wanted = encoded.wanted_bpp
    if wanted and abs(encoded.bpp / wanted - 1) > TOLERANCE:
        print(f"{out}: {encoded.bpp:.4g} bpp is the nearest to {wanted:.4g} that the qualities reach", file=sys.stderr)
    if verbose:
        print(table(encoded))


def table(encoded: Encoded) -> str:
    known = encoded.sensitivity
    sensitivities = ["-"] * len(SCALES) if known is None else [f"{value:.3f}" for value in known]
    rows = [("scale", "sensitivity", "phi", "bits")]
    qualities = ["skipped" if phi == SKIPPED else f"{phi:.2f}" for phi in encoded.phi]
    rows += zip(SCALES, sensitivities, qualities, encoded.scale_bits, strict=True)
    lines = [f"{scale:<6}{sensitivity:>12}{phi:>9}{bits:>9}" for scale, sensitivity, phi, bits in rows]
    lines.append(f"file: {len(encoded.data)} bytes, {encoded.bpp:.4g} bpp")
    return "\n".join(lines + [f"{step}: {seconds:.3f} s" for step, seconds in encoded.seconds.items()])


if __name__ == "__main__":
    parser = Parser(prog="python -m stages.encode", description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file to write, .mfb")
    parser.add_argument("--cell", required=True, help="of params.yaml, e.g. detection-elic")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--phi", type=float, help="one quality for all scales, 0, 1.5, ...: no precoding, no MFIP")
    choice.add_argument("--lambda-prime", type=float, help="price of a bit in the allocation")
    choice.add_argument("--bpp", type=float, help="bits per pixel of the image; without: as many as the precoding has")
    parser.add_argument(
        "--verbose", action="store_true", help="sensitivity, phi, bits of the scales; seconds of the steps"
    )
    run(parser, main)
