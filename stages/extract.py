"""Images + detector -> feature pyramids, with what is needed to run the heads on them later."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from stages.lib.coco import disk_check, image_path, load_split
from stages.lib.features import write_features
from stages.lib.models import Sizes, load_model, pyramid_of, read_image
from stages.lib.params import entry, load_params
from stages.lib.progress import progress


def main(splits: Path, weights: Path, model: str, out: Path) -> None:
    params = load_params()
    detector = load_model(weights, params["models"][model])
    images = []
    for split in ("train", "fit", "test"):
        part = load_split(splits, split)
        ids = part.image_ids[: params["extract"]["train_images"]] if split == "train" else part.image_ids
        images += [(split, image_id, image_path(part, image_id)) for image_id in ids]

    def items() -> Iterator[tuple[str, int, dict[str, Tensor], Sizes]]:
        for index, (split, image_id, path) in enumerate(progress(images, "extract", len(images))):
            pyramid, sizes = pyramid_of(detector, read_image(path))
            if index == 0:
                values = sum(scale.numel() for scale in pyramid.values())
                bytes_each = 4 if params["extract"]["dtype"] == "float32" else 2
                disk_check(out, values * bytes_each * len(images))
            yield split, image_id, pyramid, sizes

    write_features(out, items(), params["extract"]["dtype"])


if __name__ == "__main__":
    entry(main)
