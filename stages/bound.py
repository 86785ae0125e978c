"""Allocations + bitstreams + detector -> the least joint cost found on `test`, and how far losses add up."""

from pathlib import Path

from stages.lib.bound import bound
from stages.lib.coding import load_codec
from stages.lib.features import Features
from stages.lib.files import atomic, write_csv
from stages.lib.loss_rate import read_curves
from stages.lib.measuring import read_allocation, read_truths
from stages.lib.models import load_model
from stages.lib.params import entry, load_params
from stages.lib.prediction import load as load_predictor


def main(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    codec: Path,
    coded: Path,
    losses: Path,
    uncoded: Path,
    allocations: Path,
    study: str,
    out: Path,
) -> None:
    params = load_params()
    task, model, codec_name = (params["cells"][study][key] for key in ("task", "model", "codec"))
    lambdas = params["lambdas"]
    found = bound(
        load_model(weights, params["models"][model]),
        Features(features, "test"),
        coded,
        lambdas,
        load_codec(codec),
        load_predictor(prediction),
        read_allocation(allocations, len(lambdas)),
        read_curves(coded, losses, uncoded, list(lambdas), task, "test"),
        read_truths(splits, "test", [task]),
        {"task": task, "codec": codec_name},
        params["report"]["bootstrap"],
        params["seed"],
    )
    with atomic(out) as scratch:
        write_csv(scratch / "allocation.csv", found.allocation)
        write_csv(scratch / "additivity.csv", found.additivity)
        write_csv(scratch / "enumeration.csv", found.enumeration)
        for folder, (points, bootstrap) in ((scratch, found.evaluation), (scratch / "mirrored", found.mirrored)):
            write_csv(folder / "points.csv", points)
            write_csv(folder / "bootstrap.csv", bootstrap)


if __name__ == "__main__":
    entry(main)
