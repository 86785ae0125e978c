"""Seed -> a COCO-format data set of generated scenes: boxes, masks, keypoints and crowds, with nothing to download.

Every scene is a 1/f-noise background, clutter that is no object, and 3 to 9 textured objects painted over each other.
Lengths are given for a 128 px image ("px128") and grow with the image size. Pixel (row r, column c) covers
[c, c + 1) x [r, r + 1), so keypoints and polygons live in the same continuous coordinates as COCO boxes.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from stages.lib.progress import progress
from stages.lib.schema import InputError

SPLITS = ("train2017", "val2017")
IDS_PER_SPLIT = 1_000_000  # image ids depend on split and index only, never on how many images are drawn
IDS_PER_IMAGE = 100  # and annotation ids only on the image id and the paint order
CATEGORIES = {"person": 1, "disk": 2, "box": 3, "triangle": 4, "star": 5, "ring": 6}
KEYPOINTS = ("head", "neck", "left_hand", "right_hand", "hip", "left_foot", "right_foot")
SKELETON = [[1, 2], [2, 3], [2, 4], [2, 5], [5, 6], [5, 7]]  # 1-based, as in COCO
OKS_SIGMAS = [0.07, 0.08, 0.09, 0.09, 0.10, 0.09, 0.09]  # COCO's: 0.026 (nose) to 0.107 (hips)

PERSON_SHARE = 0.35
CROWD_SHARE = 0.03
LOW_CONTRAST_SHARE = 0.1
SIZE_PX128 = (12, 96)  # longest side of an object
PERSON_PX128 = (28, 112)  # height of a standing person
MIN_VISIBLE_SHARE = 0.6  # of an object after all later ones are painted
MIN_INSIDE_SHARE = 0.6  # of an object inside the image
MIN_VISIBLE_PIXELS = 12
PLACEMENT_TRIES = 12
SUPERSAMPLING = 3

Polygon = tuple[np.ndarray, bool]  # corners [n, 2] as (x, y); True fills, False cuts a hole


class Figure(NamedTuple):
    """A thing to paint: every layer has its own colour; all layers together are one annotation."""

    category: str
    layers: list[list[Polygon]]
    keypoints: np.ndarray  # [7, 2] for a person, else [0, 2]
    iscrowd: int = 0


class Placed(NamedTuple):
    figure: Figure
    pixels: int  # inside the image, before anything is painted over it


class Scene(NamedTuple):
    image: np.ndarray  # [size, size, 3] float32, 0..255
    owner: np.ndarray  # [size, size] int: 0 is background, k is the k-th placed figure
    placed: list[Placed]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def supersampled(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    return canvas, ImageDraw.Draw(canvas)


def alpha_of(canvas: Image.Image) -> np.ndarray:
    """Supersampled drawing -> [height, width] float32, 0..1."""
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255


def blend(image: np.ndarray, alpha: np.ndarray, paint: np.ndarray) -> None:
    """image += alpha * (paint - image), in place; paint is [h, w, 3] or one colour [3]."""
    image += alpha[..., None] * (paint - image)


def power_law_noise(rng: np.random.Generator, height: int, width: int, exponent: float) -> np.ndarray:
    """amplitude(f) = f**-exponent with random phases, so power falls as f**(-2 exponent); mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    white = rng.standard_normal((2, *frequency.shape))
    spectrum = (white[0] + 1j * white[1]) * frequency**-exponent
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (height, width))
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Three 1/f noises, mixed by a random matrix around a random colour -> [size, size, 3], 0..255."""
    exponent = rng.uniform(0.8, 1.2)
    noise = np.stack([power_law_noise(rng, size, size, exponent) for _ in range(3)], axis=-1)
    mixing = rng.normal(0, 1, (3, 3)) * rng.uniform(6, 18)
    colour = rng.uniform(50, 205, 3)
    return np.clip(colour + noise @ mixing, 0, 255).astype(np.float32)


def add_blob(rng: np.random.Generator, image: np.ndarray) -> None:
    """A patch of another 1/f noise whose edge fades out over its whole radius: looks like something, has no outline."""
    size = len(image)
    radius = rng.uniform(6, 20) * size / 128
    x, y = rng.uniform(0, size, 2)
    axis = np.arange(size) + 0.5
    envelope = np.exp(-0.5 * (((axis - x) / radius) ** 2 + ((axis[:, None] - y) / radius) ** 2))
    noise = power_law_noise(rng, size, size, 1.0)[..., None] * rng.uniform(-30, 30, 3)
    blend(image, rng.uniform(0.4, 0.9) * envelope, rng.uniform(0, 255, 3) + noise)


def add_strokes(rng: np.random.Generator, image: np.ndarray) -> None:
    """Open curves (quadratic Bezier) and groups of dots smaller than any object."""
    size = len(image)
    unit = size / 128
    for _ in range(rng.integers(0, 5)):
        ends = rng.uniform(-0.1, 1.1, (3, 2)) * size
        t = np.linspace(0, 1, 24)[:, None]
        curve = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
        points = (curve * SUPERSAMPLING).ravel().tolist()
        width = max(1, round(rng.uniform(0.7, 2.0) * unit * SUPERSAMPLING))
        canvas, draw = supersampled(size, size)
        draw.line(points, fill=255, width=width, joint="curve")
        blend(image, alpha_of(canvas), rng.uniform(0, 255, 3).astype(np.float32))
    for _ in range(rng.integers(0, 4)):
        centres = rng.uniform(0, size, (rng.integers(3, 12), 2)) * SUPERSAMPLING
        radius = rng.uniform(0.6, 1.4) * unit * SUPERSAMPLING
        canvas, draw = supersampled(size, size)
        for x, y in centres:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        blend(image, alpha_of(canvas), rng.uniform(0, 255, 3).astype(np.float32))


def ellipse(width: float, height: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([width / 2 * np.cos(angle), height / 2 * np.sin(angle)], axis=-1)


def capsule(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """A limb: all points closer than width / 2 to the segment."""
    along = np.arctan2(end[1] - start[1], end[0] - start[0])
    half = np.linspace(-np.pi / 2, np.pi / 2, 9)
    arcs = [np.stack([np.cos(along + half + turn), np.sin(along + half + turn)], -1) for turn in (0, np.pi)]
    return np.concatenate([end + width / 2 * arcs[0], start + width / 2 * arcs[1]])


def rotation(angle: float) -> np.ndarray:
    """Matrix m for points @ m, angle in radians."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def simple_figure(rng: np.random.Generator, category: str, length: float) -> Figure:
    """Any category but person; its longest side is about `length` px."""
    aspect = rng.uniform(0.5, 1.0)
    match category:
        case "disk":
            outlines = [(ellipse(1, aspect), True)]
        case "box":
            outlines = [(np.array([[-1, -aspect], [1, -aspect], [1, aspect], [-1, aspect]]) / 2, True)]
        case "triangle":
            angle = np.radians([90, 210, 330]) + rng.uniform(-0.25, 0.25, 3)
            outlines = [(np.stack([np.cos(angle), np.sin(angle)], -1) * 0.55, True)]
        case "star":
            angle = np.arange(10) * np.pi / 5
            radius = np.where(np.arange(10) % 2, rng.uniform(0.26, 0.32), 0.52)
            outlines = [(np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None], True)]
        case "ring":
            aspect = rng.uniform(0.8, 1.0)
            hole = rng.uniform(0.35, 0.5)
            outlines = [(ellipse(1, aspect), True), (ellipse(hole, hole * aspect), False)]
    turn = rotation(rng.uniform(0, 2 * np.pi)) * length
    return Figure(category, [[(points @ turn, fills) for points, fills in outlines]], np.zeros((0, 2)))


def limb(side: int, root: tuple[float, float], angles: tuple[float, float], segment: float) -> np.ndarray:
    """Root, elbow or knee, end [3, 2]; angles from straight down, outwards; side +1 is the viewer's right."""
    steps = [(side * segment * np.sin(angle), segment * np.cos(angle)) for angle in angles]
    return np.cumsum([(side * root[0], root[1]), *steps], axis=0)


def person(rng: np.random.Generator, height: float) -> Figure:
    """A figure seen from the front, hip at the origin: its left side is on the viewer's right (+x).

    The ranges of the angles keep every limb on its own side of the body: left and right can be told from the picture.
    """
    limbs = []  # left arm, left leg, right arm, right leg
    for side in (+1, -1):
        upper, thigh = np.radians(rng.uniform(15, 130)), np.radians(rng.uniform(5, 45))
        lower = np.clip(upper + np.radians(rng.uniform(-45, 75)), np.radians(5), np.radians(170))
        limbs.append(limb(side, (0.095, -0.33), (upper, lower), 0.19))
        limbs.append(limb(side, (0.06, 0.0), (thigh, thigh - rng.uniform(0, 0.9) * thigh), 0.24))
    head, neck, hip = np.array([0, -0.48]), np.array([0, -0.36]), np.zeros(2)
    width = rng.uniform(0.11, 0.14)
    torso = np.array([[-0.12, -0.36], [0.12, -0.36], [0.085, 0.04], [-0.085, 0.04]])
    bones = [(head, neck)] + [bone for joints in limbs for bone in zip(joints[:-1], joints[1:], strict=True)]
    outlines = [ellipse(0.19, 0.21) + head, torso] + [capsule(start, end, width) for start, end in bones]
    keypoints = np.stack([head, neck, limbs[0][-1], limbs[2][-1], hip, limbs[1][-1], limbs[3][-1]])
    turn = rotation(np.radians(rng.uniform(-15, 15))) * height
    return Figure("person", [[(points @ turn, True) for points in outlines]], keypoints @ turn)


def heap(rng: np.random.Generator, unit: float) -> Figure:
    """Many tiny disks that nobody would annotate one by one: a crowd region."""
    layers = []
    for _ in range(rng.integers(15, 30)):
        centre = rng.normal(0, 6, 2) * unit
        layers.append([(ellipse(1, 1) * rng.uniform(3.5, 6.5) * unit + centre, True)])
    return Figure("disk", layers, np.zeros((0, 2)), iscrowd=1)


def random_figure(rng: np.random.Generator, unit: float) -> Figure:
    if rng.random() < PERSON_SHARE:
        return person(rng, log_uniform(rng, *PERSON_PX128) * unit)
    category = str(rng.choice([name for name in CATEGORIES if name != "person"]))
    return simple_figure(rng, category, log_uniform(rng, *SIZE_PX128) * unit)


def moved(figure: Figure, shift: np.ndarray) -> Figure:
    layers = [[(points + shift, fills) for points, fills in layer] for layer in figure.layers]
    return figure._replace(layers=layers, keypoints=figure.keypoints + shift)


def coverage(polygons: list[Polygon], window: tuple[int, int, int, int]) -> np.ndarray:
    """Anti-aliased alpha [bottom - top, right - left] of polygons, drawn one after the other."""
    left, top, right, bottom = window
    canvas, draw = supersampled(bottom - top, right - left)
    for points, fills in polygons:
        corners = (points - (left, top)) * SUPERSAMPLING - 0.5  # PIL's whole numbers are pixel centres, ours corners
        draw.polygon(corners.ravel().tolist(), fill=255 if fills else 0)
    return alpha_of(canvas)


def texture(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    """Plain, stripes, checker or 1/f noise -> [height, width], about -1..1."""
    kind = rng.integers(4)
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 3:
        return power_law_noise(rng, height, width, rng.uniform(0.8, 1.2)) * 0.7
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(3, 10) * unit
    y, x = np.mgrid[:height, :width] * (2 * np.pi / wavelength)
    stripes = np.tanh(3 * np.sin(x * np.cos(angle) + y * np.sin(angle)))  # tanh: nearly square, yet no aliasing
    if kind == 2:
        stripes = stripes * np.tanh(3 * np.sin(y * np.cos(angle) - x * np.sin(angle)))
    return stripes.astype(np.float32)


def fill(rng: np.random.Generator, behind: np.ndarray, alpha: np.ndarray, unit: float) -> np.ndarray:
    """Paint of one layer [h, w, 3], at a chosen colour distance from the mean of what it covers."""
    mean = np.average(behind.reshape(-1, 3), axis=0, weights=alpha.ravel() + 1e-6)
    direction = rng.uniform(0, 255, 3) - mean
    contrast = rng.uniform(45, 80) if rng.random() < LOW_CONTRAST_SHARE else rng.uniform(120, 230)
    colour = np.clip(mean + direction * contrast / (np.linalg.norm(direction) + 1e-6), 0, 255)
    height, width = alpha.shape
    pattern = texture(rng, height, width, unit)[..., None] * rng.uniform(-1, 1, 3) * min(30, contrast / 3)
    return np.clip(colour + pattern, 0, 255).astype(np.float32)


def try_to_place(rng: np.random.Generator, scene: Scene, figure: Figure) -> bool:
    """Paint the figure at one random place, unless it or an earlier one would be left with too little to see."""
    size = len(scene.image)
    points = np.concatenate([points for layer in figure.layers for points, _ in layer])
    low, high = points.min(0), points.max(0)
    shift = rng.uniform(0, size, 2) - (low + high) / 2
    figure = moved(figure, shift)
    left, top = (int(v) for v in np.floor(low + shift) - 1)
    right, bottom = (int(v) for v in np.ceil(high + shift) + 1)
    inside = np.s_[max(0, -top) : size - top, max(0, -left) : size - left]  # of the window
    region = np.s_[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]  # of the image

    alphas = [coverage(layer, (left, top, right, bottom)) for layer in figure.layers]
    mask = np.maximum.reduce(alphas) >= 0.5
    pixels = int(mask[inside].sum())
    if pixels < max(MIN_VISIBLE_PIXELS, MIN_INSIDE_SHARE * mask.sum()):
        return False
    owner = scene.owner.copy()
    owner[region][mask[inside]] = len(scene.placed) + 1
    visible = np.bincount(owner.ravel(), minlength=len(scene.placed) + 2)[1:-1]
    before = np.array([placed.pixels for placed in scene.placed])
    if np.any(visible < np.maximum(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * before)):
        return False

    scene.owner[:] = owner
    scene.placed.append(Placed(figure, pixels))
    for alpha in (alpha[inside] for alpha in alphas):
        behind = scene.image[region]
        if alpha.any():  # a disk of a heap may lie outside
            blend(behind, alpha, fill(rng, behind, alpha, size / 128))
    return True


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """One random scene; everything in it comes from `rng`."""
    unit = size / 128
    scene = Scene(background(rng, size), np.zeros((size, size), np.int64), [])
    for _ in range(rng.integers(0, 3)):
        add_blob(rng, scene.image)
    add_strokes(rng, scene.image)
    figures = [random_figure(rng, unit) for _ in range(rng.integers(3, 10))]
    if rng.random() < CROWD_SHARE:
        figures.insert(0, heap(rng, unit))
    for figure in figures:
        for _ in range(PLACEMENT_TRIES):
            if try_to_place(rng, scene, figure):
                break
    return scene


def coco_keypoints(scene: Scene, number: int) -> list[float]:
    """x, y, v of each keypoint: v = 2 visible, 1 under a later figure, 0 (and x = y = 0) outside the image."""
    triples: list[float] = []
    for x, y in scene.placed[number - 1].figure.keypoints.round(2).tolist():
        if not (0 <= x < len(scene.image) and 0 <= y < len(scene.image)):
            triples += [0, 0, 0]
        else:
            triples += [x, y, 1 if scene.owner[int(y), int(x)] > number else 2]
    return triples


def annotations(scene: Scene, image_id: int) -> list[dict[str, Any]]:
    """COCO annotations of the visible masks, in paint order; persons carry keypoints."""
    entries = []
    for number, placed in enumerate(scene.placed, start=1):
        mask = scene.owner == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        code = rle.encode(np.asfortranarray(mask, np.uint8))
        entry: dict[str, Any] = {
            "id": image_id * IDS_PER_IMAGE + number,
            "image_id": image_id,
            "category_id": CATEGORIES[placed.figure.category],
            "iscrowd": placed.figure.iscrowd,
            "area": int(mask.sum()),
            "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode()},
        }
        if placed.figure.category == "person":
            entry["keypoints"] = coco_keypoints(scene, number)
            entry["num_keypoints"] = sum(v > 0 for v in entry["keypoints"][2::3])
        entries.append(entry)
    return entries


def make_image(index: int, root: Path, split: int, size: int, seed: int) -> tuple[dict, list[dict]]:
    """Write image `index` of a split -> its COCO image entry and annotations."""
    scene = draw_scene(np.random.default_rng([seed, split, index]), size)
    image_id = split * IDS_PER_SPLIT + index + 1
    name = f"{image_id:012d}.jpg"
    Image.fromarray(scene.image.round().astype(np.uint8)).save(root / SPLITS[split] / name, quality=95)
    return {"id": image_id, "file_name": name, "width": size, "height": size}, annotations(scene, image_id)


def write_annotations(root: Path, split: int, images: list[dict], entries: list[dict]) -> None:
    """instances_<split>.json has every object without keypoints, person_keypoints_<split>.json only persons."""
    header = {"info": {"description": "generated shapes", "version": "1"}, "licenses": [], "images": images}
    without_keypoints = [{k: v for k, v in e.items() if "keypoints" not in k} for e in entries]
    categories = [{"id": i, "name": n, "supercategory": "person" if i == 1 else "shape"} for n, i in CATEGORIES.items()]
    body = {"keypoints": list(KEYPOINTS), "skeleton": SKELETON, "oks_sigmas": OKS_SIGMAS}
    contents = {
        "instances": {"annotations": without_keypoints, "categories": categories},
        "person_keypoints": {
            "annotations": [e for e in entries if e["category_id"] == CATEGORIES["person"]],
            "categories": [categories[0] | body],
        },
    }
    for kind, content in contents.items():
        text = json.dumps(header | content, separators=(",", ":"))
        (root / "annotations" / f"{kind}_{SPLITS[split]}.json").write_text(text)


def generate(root: Path, n_train: int, n_val: int, size: int, seed: int) -> None:
    """Write a COCO-format data set under `root`; the same arguments give the same bytes, on any number of cores."""
    if min(n_train, n_val) < 1 or max(n_train, n_val) >= IDS_PER_SPLIT or size < 64:
        raise InputError(f"shapes: {n_train} + {n_val} images of {size} px; give 1 to 999,999 of 64 px or more")
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for split, count in enumerate((n_train, n_val)):
            (root / SPLITS[split]).mkdir(exist_ok=True)
            make = partial(make_image, root=root, split=split, size=size, seed=seed)
            results = pool.map(make, range(count), chunksize=32)
            try:
                done = list(progress(results, SPLITS[split], count))
            except BrokenProcessPool:
                raise InputError(
                    "shapes: a worker was killed, as where memory is out; free some and run it again"
                ) from None
            entries = [entry for _, image_entries in done for entry in image_entries]
            write_annotations(root, split, [image for image, _ in done], entries)
