"""Growth is that of the stages that work through images, each sample twice as large as the one before."""

from pathlib import Path

import pytest
import yaml
from pytest import approx

from stages.lib import growth as module
from stages.lib.growth import growth
from stages.lib.params import load_params
from stages.lib.planning import Run
from stages.lib.schema import InputError

ROOT = Path(__file__).parents[1]
HEAVY = {"extract", "compress", "measure_uncoded", "measure", "evaluate"}


@pytest.fixture
def samples(monkeypatch) -> list[dict]:
    """Instead of runs: 9 s, CPU 5 s and 0.1 s an image of `test`, 600 MiB and 1 an image; the samples asked for."""
    asked = []

    def run_sample(params: dict, dvc_yaml: Path, wanted: list[str]) -> list[Run]:
        asked.append(params)
        images = params["prepare"]["images"]["test"]
        runs = [Run(address.partition("@")[0], address, 9, 5 + 0.1 * images, 600 + images, 0) for address in wanted]
        return [Run("prepare", "prepare", 1, 1, 1, 1), *runs]

    monkeypatch.setattr(module, "run_sample", run_sample)
    return asked


def test_every_heavy_stage_is_sampled_with_one_two_and_four_times_the_images(samples, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = growth(load_params(), Path("dvc.yaml"))
    assert [sample["prepare"]["images"]["test"] for sample in samples] == [16, 32, 64]
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert {name.partition("@")[0] for name in stages} == HEAVY
    assert [name for name in stages if "compress" in name] == ["compress@small-hevc-q3", "compress@small-elic-q3"]
    assert stages["evaluate@small-hevc"]["items"] == [16, 32, 64]
    assert stages["measure@small-hevc"]["items"] == [32, 64, 128]
    assert stages["extract@small"]["items"] == [48, 96, 192]
    assert found["before_mib"] > 10


def test_ratios_are_those_of_the_largest_to_the_smallest(samples, monkeypatch):
    monkeypatch.chdir(ROOT)
    stage = growth(load_params(), Path("dvc.yaml"))["stages"][0]
    assert stage["cpu_seconds"] == approx([6.6, 8.2, 11.4]) and stage["peak_mib"] == [616, 632, 664]
    assert stage["seconds"] == [9] * 3
    assert stage["ratio"] == approx({"cpu_seconds": 11.4 / 6.6, "peak_mib": 664 / 616})


def test_too_few_images_to_grow_from_are_told_before_any_sample(samples, monkeypatch):
    monkeypatch.chdir(ROOT)
    params = load_params()
    params["prepare"]["images"]["fit"] = 7
    with pytest.raises(InputError, match="prepare.images is .*'fit': 7.*: growth needs 8 of each split"):
        growth(params, Path("dvc.yaml"))
    assert samples == []


@pytest.mark.parametrize("profile", [ROOT, *(path.parent for path in ROOT.glob("profiles/*/params.yaml"))], ids=str)
def test_the_stages_exist_in_every_profile(samples, profile, monkeypatch):
    monkeypatch.chdir(profile)
    params = load_params()
    models, codecs, qualities = params["models"], params["codecs"], params["lambdas"]
    coders = {f"{model}-{codec}" for model in models for codec in codecs}
    names = {f"{stage}@{coder}" for stage in ("measure", "evaluate") for coder in coders}
    names |= {f"{stage}@{model}" for stage in ("extract", "measure_uncoded") for model in models}
    names |= {f"compress@{coder}-{quality}" for coder in coders for quality in qualities}
    assert set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]) > HEAVY
    assert {stage["stage"] for stage in growth(params, Path("dvc.yaml"))["stages"]} <= names
