"""Decoded precodings + drops of `fit` -> MFIP of each task, its weights for fit and test, and its held-out error."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages.lib import mfip
from stages.lib.coding import CodedSplit, FeatureCodec, load_codec
from stages.lib.files import atomic, write_csv, write_json
from stages.lib.loss_rate import importance_labels, read_curves
from stages.lib.params import SCALES, entry, load_params, tasks_of
from stages.lib.shards import map_shards

Described = list[tuple[list[int], np.ndarray]]  # batches: image ids, what `mfip.describe` says of their pyramids


def main(coded: Path, losses: Path, codec: Path, model: str, codec_name: str, out: Path) -> None:
    """Folders of <q>.h5 and <q>.csv, a codec's file -> <task>.pt (network), .json (errors) and .csv (weights) in `out`.

    The weights of `fit` images with ground truth are out of fold: predicted without their own labels, so they are as
    good, or bad, as those of `test`. No label of `test` is read.
    """
    params = load_params()
    precoded, feature_codec = coded / f"{params['mfip']['precode']}.h5", load_codec(codec)
    fit, test = (_described(precoded, feature_codec, split) for split in ("fit", "test"))
    with atomic(out) as scratch:
        for task in tasks_of(params, model, codec_name):
            curves = read_curves(coded, losses, list(params["lambdas"]), task, "fit")
            labels = dict(zip(curves.image_ids.tolist(), importance_labels(curves.drop), strict=True))
            trained = mfip.train(fit, labels, params["mfip"], params["seed"])
            tables = [_table("fit", trained.image_ids, trained.weights)]
            with torch.inference_mode():
                for image_ids, statistics in test:
                    weights = trained.model.log_weights(torch.from_numpy(statistics)).exp().numpy()
                    tables.append(_table("test", image_ids, weights))
            mfip.save(scratch / f"{task}.pt", trained.model)
            write_csv(scratch / f"{task}.csv", pd.concat(tables).sort_values(["split", "image_id", "scale"]))
            write_json(scratch / f"{task}.json", trained.report)


def _described(coded: Path, feature_codec: FeatureCodec, split: str) -> Described:
    records = CodedSplit(coded, split)
    batches = list(records.batches())
    described = map_shards(lambda ids: mfip.describe(records.decode(ids, feature_codec)).cpu().numpy(), batches)
    return list(zip(batches, described, strict=True))


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
