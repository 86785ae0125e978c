"""Allocations + bitstreams + detector -> rate and accuracy of every method and task, jointly decoded, on `test`."""

from functools import partial
from pathlib import Path

from stages.lib.features import Features, shards_of
from stages.lib.files import atomic, write_csv
from stages.lib.measuring import bits_of, choices_of, load_evaluator, read_allocation, read_matches, tabulate
from stages.lib.params import entry, load_params, tasks_of
from stages.lib.shards import map_shards, unfinished


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
    described, qualities, tasks = params["models"][model], list(params["lambdas"]), tasks_of(params, model, codec_name)
    paths, test = (splits, weights, features, prediction, codec, coded), Features(features, "test")
    tables = {task: allocations / f"{task}.csv" for task in tasks}
    choices = {task: choices_of(read_allocation(table, len(qualities))) for task, table in tables.items()}
    resamples, seed, bits = params["report"]["bootstrap"], params["seed"], bits_of(coded, qualities, test)
    with unfinished(out, *paths, *tables.values(), described, qualities) as folder:
        load = partial(load_evaluator, *paths, described, qualities, choices)
        found = map_shards(load, shards_of({"test": test.image_ids}), folder, "evaluate")
        with atomic(out) as scratch:
            for task, chosen in choices.items():
                names, matches = {"task": task, "codec": codec_name}, read_matches(found, task, chosen.points)
                points, bootstrap = tabulate(chosen, matches, bits, test, names, resamples, seed)
                write_csv(scratch / task / "points.csv", points)
                write_csv(scratch / task / "bootstrap.csv", bootstrap)


if __name__ == "__main__":
    entry(main)
