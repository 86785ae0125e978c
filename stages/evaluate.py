"""Allocations + bitstreams + detector -> rate and accuracy of every method and task, jointly decoded, on `test`."""

from pathlib import Path

from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import load_codec
from stages.lib.features import Features
from stages.lib.files import atomic, read_csv, write_csv
from stages.lib.measuring import bits_of, evaluate, tabulate, truths
from stages.lib.models import load_model
from stages.lib.params import entry, load_params, tasks_of
from stages.lib.prediction import load as load_predictor


def main(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    codec: Path,
    coded: Path,
    allocations: Path,
    model: str,
    codec_name: str,
    out: Path,
) -> None:
    params = load_params()
    test, qualities, tasks = Features(features, "test"), list(params["lambdas"]), tasks_of(params, model, codec_name)
    part = load_split(splits, "test")
    evaluated = evaluate(
        load_model(weights, params["models"][model]),
        test,
        coded,
        qualities,
        load_codec(codec),
        load_predictor(prediction),
        {task: read_csv(allocations / f"{task}.csv") for task in tasks},
        truths({task: ground_truth(part, task) for task in tasks}),
    )
    resamples, seed, bits = params["report"]["bootstrap"], params["seed"], bits_of(coded, qualities, test)
    with atomic(out) as scratch:
        for task, (choices, matches) in evaluated.items():
            names = {"task": task, "codec": codec_name}
            points, bootstrap = tabulate(choices, matches, bits, test, names, resamples, seed)
            write_csv(scratch / task / "points.csv", points)
            write_csv(scratch / task / "bootstrap.csv", bootstrap)


if __name__ == "__main__":
    entry(main)
