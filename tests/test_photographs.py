"""The smoke profile on real photographs, with a model that has learned nothing."""

from pathlib import Path

import pandas as pd
import pytest
from test_pipeline import METHODS, ROOT, TASKS, params_of

from stages.lib import measuring  # noqa: F401  its imports are made before stages are forked
from stages.lib.planning import run_stages

COCO_MINI = ROOT.parent / "shared" / "coco_mini"


def test_real_photographs_go_through_all_stages(tmp_path: Path) -> None:
    """Without pretrained weights: the accuracies are next to nothing, and the report has to say so."""
    if not COCO_MINI.is_dir():
        pytest.skip(f"{COCO_MINI} is missing: no COCO data here")
    params = params_of(ROOT / "profiles/smoke")
    params["prepare"] |= {"source": "coco", "coco_root": str(COCO_MINI), "images": {"train": 8, "fit": 14, "test": 6}}
    params["models"]["small"] |= {"weights": None, "image_size": {"min": 96, "max": 128}}
    params["codecs"]["elic"] |= {"init": None}
    params["extract"]["train_images"] = 6
    params["studies"] = {}
    run_stages(params, ROOT / "dvc.yaml", tmp_path)
    for quality in params["lambdas"]:
        losses = pd.read_csv(tmp_path / f"data/losses/small/elic/{quality}.csv", dtype={"scale": str})
        assert set(losses["task"]) == TASKS
        assert losses[["loss", "pseudo_loss"]].notna().all(axis=None)
        assert (losses["drop"].notna() == losses["clean"].notna()).all() and losses["clean"].notna().any()
    points = pd.read_csv(tmp_path / "reports/rd_points.csv", keep_default_na=False)
    assert set(points["task"]) == TASKS and set(points["method"]) == METHODS
    bd_rate = pd.read_csv(tmp_path / "reports/bd_rate.csv")
    assert len(bd_rate) == len(TASKS) * (len(METHODS) - 2)
    without = bd_rate["bd_rate_pchip"].isna()
    assert without.any() and bd_rate.loc[without, "flags"].notna().all()
