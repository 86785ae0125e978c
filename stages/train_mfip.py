"""Decoded precodings + drops of `fit` -> MFIP, its weights for fit and test, and its held-out error."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages.lib import mfip
from stages.lib.coding import CodedSplit, FeatureCodec, load_codec
from stages.lib.files import write_csv, write_json
from stages.lib.loss_rate import importance_labels, read_curves
from stages.lib.params import SCALES, entry, load_params
from stages.lib.shards import map_shards


def main(coded: Path, losses: Path, codec: Path, task: str, out: Path) -> None:
    """Folders of <q>.h5 and <q>.csv, a codec's file -> `out` with .pt (network), .json (errors) and .csv (weights).

    The weights of `fit` images with ground truth are out of fold: predicted without their own labels, so they are as
    good, or bad, as those of `test`. No label of `test` is read.
    """
    params = load_params()
    fit = read_curves(coded, losses, list(params["lambdas"]), task, "fit")
    labels = dict(zip(fit.image_ids.tolist(), importance_labels(fit.drop), strict=True))
    precoded = coded / f"{params['tasks'][task]['precode']}.h5"
    feature_codec = load_codec(codec)

    trained = mfip.train(_described(precoded, feature_codec, "fit"), labels, params["mfip"], params["seed"])
    tables = [_table("fit", trained.image_ids, trained.weights)]
    with torch.inference_mode():
        for image_ids, statistics in _described(precoded, feature_codec, "test"):
            tables.append(
                _table("test", image_ids, trained.model.log_weights(torch.from_numpy(statistics)).exp().numpy())
            )
    mfip.save(out.with_suffix(".pt"), trained.model)
    write_csv(out.with_suffix(".csv"), pd.concat(tables).sort_values(["split", "image_id", "scale"]))
    write_json(out.with_suffix(".json"), trained.report)


def _described(coded: Path, feature_codec: FeatureCodec, split: str) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of a coded split: (image ids, what `mfip.describe` says of their decoded pyramids)."""
    records = CodedSplit(coded, split)
    batches = list(records.batches())
    described = map_shards(lambda ids: mfip.describe(records.decode(ids, feature_codec)).cpu().numpy(), batches)
    return zip(batches, described, strict=True)


def _table(split: str, image_ids: list[int] | np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "split": split,
            "image_id": np.repeat(image_ids, len(SCALES)),
            "scale": np.tile(SCALES, len(image_ids)),
            "weight": weights.ravel(),
        }
    )


if __name__ == "__main__":
    entry(main)
