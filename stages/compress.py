"""Features + codec -> bitstreams + bit ledger, for one lambda."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from stages.lib.coding import compress_shard, load_codec, read_ledger
from stages.lib.command import entry
from stages.lib.features import Features, Shard, shards_of
from stages.lib.files import atomic, write_csv
from stages.lib.params import load_params
from stages.lib.schema import InputError
from stages.lib.shards import map_shards, publish, unfinished


def main(features: Path, codec: Path, quality: str, out: Path, ledger: Path) -> None:
    lmbda = load_params()["lambdas"][quality]
    image_ids = {split: Features(features, split).image_ids for split in ("fit", "test")}
    with unfinished(out, features, codec, lmbda) as folder:
        paths = map_shards(partial(compressor, features, codec, lmbda), shards_of(image_ids), folder, "compress")
        with atomic(out) as scratch:
            publish(paths, scratch)
        write_csv(ledger, read_ledger(paths))


def compressor(features: Path, codec: Path, lmbda: float) -> Callable[[Shard, Path], None]:
    """What codes the images of a shard."""
    parts = {split: Features(features, split) for split in ("fit", "test")}
    feature_codec = load_codec(codec)
    level, fit = feature_codec.codec.level(lmbda), parts["fit"]
    channels = len(fit.scale(fit.image_ids[0], "pool"))
    if channels != feature_codec.channels:
        raise InputError(
            f"{codec}: made for pyramids of {feature_codec.channels} channels, {features} has {channels}; "
            "run `train_codec` again"
        )

    def compress(shard: Shard, path: Path) -> None:
        compress_shard(path, parts[shard.split], shard.image_ids, feature_codec, level)

    return compress


if __name__ == "__main__":
    entry(main)
