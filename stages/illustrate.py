"""Predictions + bitstreams + detector -> the best, typical and worst images of `test`, and what is found in them."""

import json
from pathlib import Path

from stages.lib.allocation import read_importance
from stages.lib.coco import image_path, load_split
from stages.lib.coding import load_codec
from stages.lib.command import entry
from stages.lib.examples import Cell, illustrate, write_picture
from stages.lib.features import Features
from stages.lib.files import atomic
from stages.lib.loss_rate import read_curves, read_fit
from stages.lib.measuring import decoder, read_truths
from stages.lib.models import load_model
from stages.lib.params import load_params, precode_of, tasks_of
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
    loss_rate: Path,
    importance: Path,
    model: str,
    codec_name: str,
    out: Path,
) -> None:
    """`loss_rate`, `importance`: folders with a file of each task; so is `out`, beside the pictures."""
    params = load_params()
    test, qualities, tasks = Features(features, "test"), list(params["lambdas"]), tasks_of(params, model, codec_name)
    part, cells = load_split(splits, "test"), {}
    for task in tasks:
        curves = read_curves(coded, losses, uncoded, qualities, task, "test")
        predicted = read_importance(importance / f"{task}.csv", "test", curves.image_ids)
        cells[task] = Cell(curves, read_fit(loss_rate / f"{task}.json", len(qualities)), predicted)
    illustrations = illustrate(
        load_model(weights, params["models"][model]),
        test,
        decoder(test, coded, qualities, load_codec(codec)),
        load_predictor(prediction),
        cells,
        read_truths(splits, "test", tasks),
        precode_of(params),
    )
    shown = {example["image_id"] for found in illustrations.values() for example in found["examples"]}
    with atomic(out) as scratch:
        scratch.mkdir()
        for task, found in illustrations.items():
            (scratch / f"{task}.json").write_text(json.dumps(found, separators=(",", ":")), encoding="utf-8")
        for image_id in sorted(shown):
            write_picture(image_path(part, image_id), scratch / f"{image_id}.webp")


if __name__ == "__main__":
    entry(main)
