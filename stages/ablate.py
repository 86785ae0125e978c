"""One cell -> rates and accuracies on `test` of the method without one part each; object sizes; rate control.

Nothing is tuned here: the variants take what `fit` says, as the methods of `allocate` do.
"""

from functools import partial
from pathlib import Path

from stages.lib import ablation, mfip
from stages.lib.allocation import allocation_table, read_importance
from stages.lib.bitstream import FRAME_BYTES
from stages.lib.coco import ground_truth, load_split
from stages.lib.command import entry
from stages.lib.evaluating import bits_of, choices_of, load_evaluator, read_matches, tabulate
from stages.lib.features import Features, shards_of
from stages.lib.files import atomic, write_csv
from stages.lib.loss_rate import importance_labels, mean_loss, read_curves, read_fit, sensitivity_labels, sensitivity_to
from stages.lib.models import load_model
from stages.lib.params import load_params, precode_of
from stages.lib.senses import other_senses
from stages.lib.shards import map_shards, unfinished
from stages.lib.sizes import object_areas, size_table


def main(
    splits: Path,
    weights: Path,
    features: Path,
    prediction: Path,
    codec: Path,
    coded: Path,
    losses: Path,
    uncoded: Path,
    loss_rate: Path,
    importance: Path,
    study: str,
    out: Path,
) -> None:
    """The paths of `allocate` and `evaluate`; `importance`: the folder that `train_mfip` wrote."""
    params = load_params()
    task, model_name, codec_name = (params["cells"][study][key] for key in ("task", "model", "codec"))
    qualities, precode, points = list(params["lambdas"]), precode_of(params), params["tasks"][task]["points"]
    seed, resamples = params["seed"], params["report"]["bootstrap"]
    fit, test = (read_curves(coded, losses, uncoded, qualities, task, split) for split in ("fit", "test"))
    of_fit, of_test = Features(features, "fit"), Features(features, "test")
    detector, model = load_model(weights, params["models"][model_name]), read_fit(loss_rate, len(qualities))
    of_split = partial(read_importance, importance / f"{task}.csv")
    predicted, predicted_of_fit = of_split("test", test.image_ids), of_split("fit", fit.image_ids)

    drops = ablation.drops(fit)
    labels = sensitivity_labels(fit.loss, fit.loss_skipped), sensitivity_to(mean_loss(drops), drops)
    senses = other_senses(of_fit, of_test, detector, mfip.load(importance / f"{task}.pt"), *labels)
    truth = ground_truth(load_split(splits, "test"), task)
    paths, described = (splits, weights, features, prediction, codec, coded), params["models"][model_name]
    with unfinished(out, *paths, losses, uncoded, loss_rate, importance, described, task, points) as folder:
        methods = ablation.variants(fit, test, model, predicted, predicted_of_fit, senses, precode, seed)
        choices = choices_of(allocation_table(methods, test, points))
        load = partial(load_evaluator, *paths, described, qualities, {task: choices})
        found = map_shards(load, shards_of({"test": of_test.image_ids}), folder, "ablate")
        matches = dict(read_matches(found, task, choices.points))
        names, bits = {"task": task, "codec": codec_name}, bits_of(coded, qualities, of_test)
        worth = {
            "weight": importance_labels(test.drop),
            "sensitivity": predicted.sensitivity,
            "measured_sensitivity": ablation.measured(test, model),
        }
        areas, header = object_areas(truth, test.image_ids), 8 * FRAME_BYTES
        rates = ablation.rate_control(test.bits, model, predicted.sensitivity, precode, points, header)
        known = bits, of_test, names, resamples, seed
        with atomic(out) as scratch:
            points_table, bootstrap = tabulate(choices, matches.items(), *known)
            write_csv(scratch / "points.csv", points_table)
            write_csv(scratch / "bootstrap.csv", bootstrap)
            write_csv(scratch / "rows.csv", ablation.described_rows())
            write_csv(scratch / "sizes.csv", size_table(choices, matches, *known, areas, worth))
            write_csv(scratch / "rate_control.csv", rates)


if __name__ == "__main__":
    entry(main)
