"""The COCO profile, all of its stages, models, codecs and rates, on a few real photographs and with tiny codecs."""

import json
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from torchvision.models import detection

from stages.lib import measuring, prediction  # noqa: F401  their imports are made before the stages are forked
from stages.lib.params import SCALES, SKIPPED, check_params
from stages.lib.planning import Run, run_stages

ROOT = Path(__file__).parents[1]
COCO_MINI = ROOT.parent / "shared" / "coco_mini"
PARAMS = yaml.safe_load((ROOT / "profiles/coco/params.yaml").read_text())
STAGES = yaml.safe_load((ROOT / "profiles/coco/dvc.yaml").read_text())["stages"]
PAIRS = [(model, codec) for model in PARAMS["models"] for codec in PARAMS["codecs"]]
METHODS = {"none", "uniform", "static", "upstream_predicted", "mfiba_closed_form", "mfiba", "static_skip", "mfiba_skip"}
METHODS |= {"mfiba_pseudo", "mfiba_pseudo_skip"}
METHODS |= {"upstream_measured", "oracle", "oracle_skip"}  # they need the labels
CELLS = {(cell["task"], cell["codec"]) for cell in PARAMS["cells"].values()}
SPLITS = {  # of upright and of wide images, with crowds, with and without persons
    "train": [790, 69468],
    "fit": [34417, 109313],
    "test": [139, 802],
}


def few_photographs(root: Path) -> None:
    """A folder like COCO's that has no other images than those of SPLITS."""
    (root / "annotations").mkdir(parents=True)
    for path in (COCO_MINI / "annotations").iterdir():
        data, ids = json.loads(path.read_text()), {i for split in SPLITS.values() for i in split}
        data["images"] = [image for image in data["images"] if image["id"] in ids]
        data["annotations"] = [item for item in data["annotations"] if item["image_id"] in ids]
        (root / "annotations" / path.name).write_text(json.dumps(data))
    for folder in ("train2017", "val2017"):
        (root / folder).symlink_to(COCO_MINI / folder)


def small(coco_root: Path) -> dict:
    """The profile with fewer and smaller images, narrower codecs, short trainings and random weights."""
    params = yaml.safe_load((ROOT / "profiles/coco/params.yaml").read_text()) | {"root": str(ROOT)}
    counts = {split: len(ids) for split, ids in SPLITS.items()}
    params["prepare"] |= {"coco_root": str(coco_root), "images": counts}
    params["extract"]["train_images"] = counts["train"]
    params["report"]["bootstrap"] = 100
    for model in params["models"].values():
        model |= {"weights": None, "image_size": {"min": 32, "max": 64}}
    training = {"entropy_steps": 1, "steps": 1, "batch": 1, "crop": 64}
    elic = {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [16, 16], "kernel": 3}}
    tcm = {"N": 32, "M": 32, "slices": 2, "blocks": 1, "hyper_channels": 16, "context_widths": [16, 16, 16]}
    for codec, network in {"elic": elic, "tcm": tcm}.items():
        params["codecs"][codec] |= training
        params["codecs"][codec]["network"] |= network
    check_params(params)
    return params


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """The folder of the profile's run, and its stages."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"{COCO_MINI} is missing: no COCO data here")
    folder = tmp_path_factory.mktemp("profile")
    few_photographs(folder.parent / "coco")
    with pytest.MonkeyPatch.context() as patch:
        # Untrained, they find nothing, or a person in each of 1,000 places, in which the heads of keypoints look.
        few = {"rpn_post_nms_top_n_test": 8, "box_score_thresh": 0.0, "box_detections_per_img": 2}
        for model in PARAMS["models"].values():
            builder = getattr(detection, model["architecture"])
            patch.setattr(detection, model["architecture"], partial(builder, **few))
        patch.setattr(prediction, "KERNEL", 1)  # 25 places of 256 channels would take as long as all else
        return folder, run_stages(small(folder.parent / "coco"), ROOT / "profiles/coco/dvc.yaml", folder)


def table(ran: tuple[Path, list[Run]], name: str) -> pd.DataFrame:
    return pd.read_csv(ran[0] / name, keep_default_na=False, na_values=[""], dtype={"scale": str})


def test_every_stage_ran_for_every_model_codec_and_rate(ran):
    counts = pd.Series([run.stage for run in ran[1]]).value_counts().to_dict()
    models, pairs, cells = len(PARAMS["models"]), len(PAIRS), len(CELLS)
    assert (models, pairs, cells, len(PARAMS["lambdas"])) == (3, 6, 6, 8)
    of_models = dict.fromkeys(("train_model", "extract", "fit_prediction", "measure_uncoded"), models)
    of_pairs = dict.fromkeys(("train_codec", "measure", "train_mfip", "evaluate", "illustrate"), pairs)
    of_cells = dict.fromkeys(("fit_loss_rate", "allocate"), cells)
    once = {"prepare": 1, "report": 1}
    assert counts == once | of_models | of_pairs | of_cells | {"compress": 8 * pairs}
    assert set(counts) == set(STAGES) - {"bound", "ablate"}  # the profile has no studies


def test_the_report_has_all_cells(ran):
    points, bd_rate = table(ran, "reports/rd_points.csv"), table(ran, "reports/bd_rate.csv")
    for found, methods in ((points, METHODS), (bd_rate, METHODS - {"none", "uniform"})):
        rows = set(found[["task", "codec", "method"]].itertuples(index=False, name=None))
        assert rows == {(*cell, method) for cell in CELLS for method in methods}
    assert len(bd_rate) == len(CELLS) * (len(METHODS) - 2)
    assert bd_rate.loc[bd_rate["bd_rate_pchip"].isna(), "flags"].notna().all()
    assert (points["split"] == "test").all() and (points["n_images"] == len(SPLITS["test"])).all()
    assert points["accuracy"].between(0, 1).all()
    sent = points[points["method"] != "none"]
    assert (sent["bits_per_image"] > 0).all() and (sent["bpp"] > 0).all()
    for _, uniform in points[points["method"] == "uniform"].groupby(["task", "codec"]):
        assert len(uniform) == len(PARAMS["lambdas"]) and uniform["bits_per_image"].is_monotonic_increasing
    page = (ran[0] / "reports/index.html").read_text()
    for task, codec in CELLS:
        assert (ran[0] / f"reports/figures/rd_{task}_{codec}.svg").stat().st_size > 5000
        assert task in page and codec in page


def test_no_photograph_is_in_two_splits_and_upright_and_wide_ones_pass(ran):
    splits = json.loads((ran[0] / "data/dataset/splits.json").read_text())
    assert {name: split["image_ids"] for name, split in splits.items()} == SPLITS
    assert len({i for ids in SPLITS.values() for i in ids}) == sum(map(len, SPLITS.values()))
    for model in PARAMS["models"]:
        index = table(ran, f"data/features/{model}/index.csv")
        sides = set(zip(index["padded_height"], index["padded_width"], strict=True))
        assert index.groupby("split")["image_id"].agg(list).to_dict() == SPLITS
        assert sides == {(32, 64), (64, 32)}
        for split in SPLITS:
            of_split = index[index["split"] == split]
            assert (of_split["original_height"] > of_split["original_width"]).sum() == 1
            with h5py.File(ran[0] / f"data/features/{model}/{split}-00000.h5") as file:
                assert all(file[f"{i}/{scale}"].dtype == "uint16" for i in SPLITS[split] for scale in SCALES)


@pytest.mark.parametrize(("model", "codec"), PAIRS)
def test_every_scale_is_sent_and_its_loss_is_finite_at_every_rate(ran, model, codec):
    tasks = PARAMS["models"][model]["tasks"]
    for quality in PARAMS["lambdas"]:
        ledger = table(ran, f"data/coded/{model}/{codec}/{quality}.csv")
        assert len(ledger) == len(SCALES) * len(SPLITS["fit"] + SPLITS["test"])
        assert (ledger[["bits", "mse", "mse_feature"]] > 0).all(axis=None)
        losses = table(ran, f"data/losses/{model}/{codec}/{quality}.csv")
        assert set(losses["task"]) == set(tasks) and set(losses["scale"]) == set(SCALES)
        labelled = losses[losses["clean"].notna()]
        assert np.isfinite(losses[["loss", "loss_skipped", "pseudo_loss", "pseudo_loss_skipped"]]).all(axis=None)
        assert np.isfinite(labelled[["coded", "drop"]]).all(axis=None) and len(labelled)


@pytest.mark.parametrize(("model", "codec"), PAIRS)
def test_importances_are_shares_and_qualities_are_those_of_the_profile(ran, model, codec):
    (task,) = PARAMS["models"][model]["tasks"]
    predicted = table(ran, f"data/mfip/{model}/{codec}/{task}.csv")
    assert len(predicted) == len(SCALES) * len(SPLITS["fit"] + SPLITS["test"])
    weights = predicted.pivot(index="image_id", columns="scale", values="weight")
    assert (
        np.allclose(weights.sum(axis=1), 1) and (weights >= 0).all(axis=None) and (predicted["sensitivity"] > 0).all()
    )
    allocation = table(ran, f"data/allocations/{model}/{codec}/{task}.csv")
    assert set(allocation["image_id"]) == set(SPLITS["test"])
    assert allocation["phi"].between(SKIPPED, len(PARAMS["lambdas"]) - 1).all()
