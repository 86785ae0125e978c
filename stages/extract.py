"""Images + detector -> feature pyramids, with what is needed to run the heads on them later."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stages.lib.coco import image_path, load_split
from stages.lib.command import entry
from stages.lib.features import Shard, shards_of, write_index, write_shard
from stages.lib.files import atomic
from stages.lib.models import load_model, pyramid_of, read_image
from stages.lib.params import load_params
from stages.lib.shards import map_shards, publish, unfinished


def main(splits: Path, weights: Path, model: str, out: Path) -> None:
    params = load_params()
    described, extract = params["models"][model], params["extract"]
    image_ids = {split: load_split(splits, split).image_ids for split in ("train", "fit", "test")}
    image_ids["train"] = image_ids["train"][: extract["train_images"]]
    load = partial(extractor, splits, weights, described, extract["dtype"])
    with unfinished(out, splits, weights, described, extract) as folder:
        paths = map_shards(load, shards_of(image_ids), folder, "extract")
        with atomic(out) as scratch:
            publish(paths, scratch)
            write_index(scratch)


def extractor(splits: Path, weights: Path, described: dict[str, Any], dtype: str) -> Callable[[Shard, Path], None]:
    """What writes the pyramids of a shard."""
    detector = load_model(weights, described)
    parts = {split: load_split(splits, split) for split in ("train", "fit", "test")}

    def extract(shard: Shard, path: Path) -> None:
        images = ((i, read_image(image_path(parts[shard.split], i))) for i in shard.image_ids)
        write_shard(path, ((i, *pyramid_of(detector, image)) for i, image in images), dtype)

    return extract


if __name__ == "__main__":
    entry(main)
