"""What the paper and its authors' repository report, to be read beside a run of the same models on the same data.

BD-rates: Liu et al., Multiscale Feature Importance-based Bit Allocation for End-to-End Feature Coding for Machines, ACM
TOMM 2025, doi 10.1145/3748654, arXiv 2503.19278, abstract. Operating points: github.com/SYSU-Video/MFIBA at 112619e,
folder fasterrcnn_getw: Faster R-CNN and ELIC on the first 2,000 images of val2017, calibrated weights.
"""

from typing import Any, NamedTuple

import pandas as pd

ARCHITECTURES = {
    "detection": "fasterrcnn_resnet50_fpn",
    "segmentation": "maskrcnn_resnet50_fpn",
    "keypoints": "keypointrcnn_resnet50_fpn",
}
BD_RATE = {  # (task, codec) -> percent of the bits, against one quality for all scales
    ("detection", "elic"): -38.202,
    ("segmentation", "elic"): -17.212,
    ("keypoints", "elic"): -36.492,
    ("detection", "tcm"): -18.103,
    ("segmentation", "tcm"): -19.866,
    ("keypoints", "tcm"): -19.597,
}
POINTS = {  # (task, codec) -> their multiplier of the allocation, bits per image, accuracy
    ("detection", "elic"): [
        (1100, 267244, 0.2561),
        (1000, 279421, 0.2663),
        (900, 294641, 0.2704),
        (600, 360853, 0.2888),
        (500, 395164, 0.3007),
        (400, 441569, 0.3092),
    ]
}


class Reported(NamedTuple):
    """By (task, codec): the paper's BD-rates; the authors' points, of columns lmbda, bits_per_image, accuracy."""

    bd_rate: dict[tuple[str, str], float]
    points: dict[tuple[str, str], pd.DataFrame]

    def of(self, task: str, codec: str) -> dict[str, float]:
        """Name -> BD-rate."""
        return {"MFIBA, paper": self.bd_rate[task, codec]} if (task, codec) in self.bd_rate else {}


def reported(params: dict[str, Any]) -> Reported:
    """Of the cells that have the paper's data and models; of others it could not be compared."""
    cells = {
        (cell["task"], cell["codec"])
        for cell in params["cells"].values()
        if params["prepare"]["source"] == "coco"
        and params["models"][cell["model"]]["architecture"] == ARCHITECTURES[cell["task"]]
    }
    columns = ["lmbda", "bits_per_image", "accuracy"]
    return Reported(
        {key: value for key, value in BD_RATE.items() if key in cells},
        {key: pd.DataFrame(rows, columns=columns) for key, rows in POINTS.items() if key in cells},
    )
