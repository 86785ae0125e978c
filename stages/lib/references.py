"""What the paper and its authors' repository report, to be read beside a run of the same models on the same data.

BD-rates: Liu et al., Multiscale Feature Importance-based Bit Allocation for End-to-End Feature Coding for Machines, ACM
TOMM 2025, doi 10.1145/3748654, arXiv 2503.19278, abstract. Operating points: github.com/SYSU-Video/MFIBA at 112619e,
folder fasterrcnn_getw: Faster R-CNN and ELIC on the first 2,000 images of val2017, calibrated weights.
"""

from typing import Any, NamedTuple

ARCHITECTURES = {
    "detection": "fasterrcnn_resnet50_fpn",
    "segmentation": "maskrcnn_resnet50_fpn",
    "keypoints": "keypointrcnn_resnet50_fpn",
}
BD_RATE = {  # (task, codec) -> percent, against the codec at one quality for all scales
    ("detection", "elic"): -38.202,
    ("segmentation", "elic"): -17.212,
    ("keypoints", "elic"): -36.492,
    ("detection", "tcm"): -18.103,
    ("segmentation", "tcm"): -19.866,
    ("keypoints", "tcm"): -19.597,
}


class Point(NamedTuple):
    """An operating point of the authors. `lmbda`: their multiplier of the allocation."""

    lmbda: int
    bits_per_image: int
    accuracy: float


POINTS = {  # (task, codec) -> points by rising rate
    ("detection", "elic"): [
        Point(1100, 267244, 0.2561),
        Point(1000, 279421, 0.2663),
        Point(900, 294641, 0.2704),
        Point(600, 360853, 0.2888),
        Point(500, 395164, 0.3007),
        Point(400, 441569, 0.3092),
    ]
}


def comparable(params: dict[str, Any]) -> set[tuple[str, str]]:
    """(task, codec) of the cells with the paper's data, model and codec."""
    if params["prepare"]["source"] != "coco":
        return set()
    models = params["models"]
    return {
        (cell["task"], cell["codec"])
        for cell in params["cells"].values()
        if (cell["task"], cell["codec"]) in BD_RATE
        and models[cell["model"]]["architecture"] == ARCHITECTURES[cell["task"]]
    }
