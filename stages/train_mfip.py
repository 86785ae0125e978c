"""Pyramids + losses of `fit` -> MFIP of each task, what it predicts for fit and test, and its held-out error."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages.lib import mfip
from stages.lib.command import entry
from stages.lib.features import Features
from stages.lib.files import atomic, write_csv, write_json
from stages.lib.loss_rate import importance_labels, read_curves, sensitivity_labels
from stages.lib.models import load_model
from stages.lib.params import SCALES, load_params, tasks_of


def main(
    features: Path, weights: Path, coded: Path, losses: Path, uncoded: Path, model: str, codec_name: str, out: Path
) -> None:
    """Features, detector, folders of <q>.csv -> <task>.pt (network), .json (errors) and .csv (predictions) in `out`.

    What is predicted of `fit` images with ground truth is out of fold: without their own labels, so it is as good, or
    bad, as that of `test`. No label of `test` is read.
    """
    params = load_params()
    proposer = load_model(weights, params["models"][model]).rpn.head
    fit, test = (mfip.described(Features(features, split), proposer) for split in ("fit", "test"))
    with atomic(out) as scratch:
        for task in tasks_of(params, model, codec_name):
            curves = read_curves(coded, losses, uncoded, list(params["lambdas"]), task, "fit")
            labels, sensitivities = (
                dict(zip(curves.image_ids.tolist(), found, strict=True))
                for found in (
                    importance_labels(curves.drop),
                    sensitivity_labels(curves.loss, curves.loss_skipped),
                )
            )
            trained = mfip.train(fit, labels, sensitivities, params["mfip"], params["seed"])
            if flags := trained.report["flags"]:
                why = f"{', '.join(flags)}; {trained.report['n_labelled']} labelled images"
                warnings.warn(f"{task}: MFIP learned nothing beyond the mean weight: {why}", stacklevel=2)
            tables = [_table("fit", trained.image_ids, trained.weights, trained.sensitivity)]
            with torch.inference_mode():
                for image_ids, statistics in test:
                    predicted = (found.numpy() for found in trained.model(torch.from_numpy(statistics)))
                    tables.append(_table("test", image_ids, *predicted))
            mfip.save(scratch / f"{task}.pt", trained.model)
            write_csv(scratch / f"{task}.csv", pd.concat(tables).sort_values(["split", "image_id", "scale"]))
            write_json(scratch / f"{task}.json", trained.report)


def _table(split: str, image_ids: list[int] | np.ndarray, weights: np.ndarray, sensitivity: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "split": split,
            "image_id": np.repeat(image_ids, len(SCALES)),
            "scale": np.tile(SCALES, len(image_ids)),
            "weight": weights.ravel(),
            "sensitivity": sensitivity.ravel(),
        }
    )


if __name__ == "__main__":
    entry(main)
