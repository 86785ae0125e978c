"""Allocations + bitstreams + detector -> rate and accuracy of every method, jointly decoded, on `test`."""

from pathlib import Path

from stages.lib.coco import ground_truth, load_split
from stages.lib.coding import load_codec
from stages.lib.features import Features
from stages.lib.files import read_csv, write_csv
from stages.lib.measuring import bits_of, evaluate, tabulate, truths
from stages.lib.models import load_model
from stages.lib.params import entry, load_params


def main(
    splits: Path,
    weights: Path,
    features: Path,
    codec: Path,
    coded: Path,
    allocation: Path,
    model: str,
    codec_name: str,
    task: str,
    out: Path,
) -> None:
    params = load_params()
    test, qualities = Features(features, "test"), list(params["lambdas"])
    choices, matches = evaluate(
        load_model(weights, params["models"][model]),
        test,
        coded,
        qualities,
        load_codec(codec),
        read_csv(allocation),
        truths({task: ground_truth(load_split(splits, "test"), task)}),
        task,
    )
    names = {"task": task, "codec": codec_name}
    resamples, seed = params["report"]["bootstrap"], params["seed"]
    points, bootstrap = tabulate(choices, matches, bits_of(coded, qualities, test), test, names, resamples, seed)
    write_csv(out / "points.csv", points)
    write_csv(out / "bootstrap.csv", bootstrap)


if __name__ == "__main__":
    entry(main)
