"""A plan is right where stages grow linearly; its samples are profiles that run, whatever the profile."""

import os
import runpy
import signal
import sys
from contextlib import chdir
from pathlib import Path

import pandas as pd
import pytest
import yaml
from pytest import approx

from stages.lib import planning
from stages.lib.params import load_params
from stages.lib.planning import SHARDED, Run, Sample, _extrapolated, forked, items_of, planned, run_sample, sampled
from stages.lib.schema import InputError
from stages.plan import table

ROOT = Path(__file__).parents[1]
PROFILES = [ROOT, *(path.parent for path in ROOT.glob("profiles/*/params.yaml"))]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def params_of(profile: Path) -> dict:
    with chdir(profile):
        return load_params()


# ---- items


DEFAULT_ITEMS = {
    "prepare": 600 + 160 + 120,
    "train_model@small": 0,
    "extract@small": 400 + 160 + 120,
    "fit_prediction@small": 400,
    "train_codec@small-tcm": 0,
    "compress@small-tcm-q3": 280,
    "measure_uncoded@small": 280,
    "measure@small-tcm": 280,
    "fit_loss_rate@detection-tcm": 160,
    "train_mfip@small-tcm": 280,
    "allocate@detection-tcm": 120,
    "evaluate@small-tcm": 120,
    "illustrate@small-tcm": 120,
    "bound@detection-tcm": 120,
    "ablate@detection-tcm": 120,
    "report": 0,
}


def test_items_are_the_images_or_steps_that_a_stage_works_through():
    assert {address.partition("@")[0] for address in DEFAULT_ITEMS} == set(STAGES)
    params = params_of(ROOT)
    assert {a: items_of(params, a.partition("@")[0], a) for a in DEFAULT_ITEMS} == DEFAULT_ITEMS
    smoke = params_of(ROOT / "profiles/smoke")
    assert items_of(smoke, "train_model", "train_model@small") == 2
    assert items_of(smoke, "train_codec", "train_codec@small-elic") == 2 + 2
    assert items_of(smoke, "train_codec", "train_codec@small-hevc") == 0


def test_work_is_said_to_be_shared_where_a_stage_shares_it():
    sharing = {name for name in STAGES if "map_shards(" in (ROOT / f"stages/{name}.py").read_text()}
    assert sharing <= set(SHARDED) <= set(STAGES)


# ---- from two samples to all


def test_a_linear_stage_is_extrapolated_exactly():
    fixed, of_items = _extrapolated([8, 16, 1000], 3 + 2 * 8, 3 + 2 * 16)
    assert (fixed, of_items) == approx((3, 2000))


@pytest.mark.parametrize(("first", "second"), [(5, 5), (5, 4), (5, 9.9), (5, 10.1), (5, 30), (0, 3), (3, 0)])
def test_no_part_is_negative_and_the_larger_sample_is_met(first, second):
    fixed, of_items = _extrapolated([8, 16, 16], first, second)
    assert fixed >= 0 and of_items >= 0 and fixed + of_items == approx(second)


def test_a_stage_without_more_items_takes_what_it_took():
    assert _extrapolated([0, 0, 0], 7, 5) == (5, 0)
    assert _extrapolated([2, 2, 2], 7, 9) == (9, 0)


NONE = Sample({}, [])


def runs(images: int) -> list[Run]:
    """One stage whose work is shared, twice, and one whose is not; 10 s and 2 s an image, 1 and 3 MB an image."""
    shared = [
        Run("measure", f"measure@small-{codec}", 100 + 10 * 2 * images, 90.0, 512.0, 2 * images * 1_000_000)
        for codec in ("elic", "hevc")
    ]
    return [*shared, Run("fit_loss_rate", "fit_loss_rate@detection-elic", 50 + 2 * images, 40.0, 1024.0 + images, 7)]


def test_hours_are_start_fixed_part_and_items_by_workers():
    params = params_of(ROOT)  # 160 images of fit, 120 of test
    found = planned(params, *(Sample(sampled(params, few), runs(few)) for few in (4, 8)), NONE, start=6)
    measure, fit = (found.set_index("stage").loc[name] for name in ("measure", "fit_loss_rate"))
    assert (measure["runs"], measure["items"], fit["items"]) == (2, 2 * 280, 160)
    assert measure["start_h"] * 3600 == approx(2 * (6 + 100))
    assert measure["of_items_h"] * 3600 == approx(2 * 10 * 280)
    assert measure["disk_gb"] == approx(2 * 0.280) and fit["disk_gb"] == approx(7e-9)
    assert (fit["start_h"] * 3600, fit["of_items_h"]) == approx((6 + 50 + 2 * 160, 0))
    assert fit["peak_gb"] == approx(1032 / 1024)  # of the larger sample
    (line,) = (line for line in table(found, 4, 100).splitlines() if line.startswith("all"))
    serial, shared = (float(cell) for cell in line.split()[-2:])
    assert serial == approx((2 * (106 + 2800) + 376) / 3600, abs=1e-3)
    assert shared == approx((2 * (106 + 700) + 376) / 3600, abs=1e-3)


def trained(few: int, steps: int) -> Sample:
    """0.5 s an image of train, 3 s a step of either kind, 20 s else."""
    params = params_of(ROOT / "profiles/coco")
    sample = sampled(params, few, steps, two_qualities=True)
    seconds = 20 + 0.5 * few + 3 * 2 * steps
    return Sample(sample, [Run("train_codec", "train_codec@maskrcnn-elic", seconds, 1.0, 512.0, 1000)])


def test_steps_of_a_training_are_told_from_its_passes_over_the_images():
    params = params_of(ROOT / "profiles/coco")
    (found,) = planned(params, trained(4, 4), trained(8, 4), trained(4, 8), start=0).to_dict("records")
    assert found["start_h"] * 3600 == approx(20 + 0.5 * 400 + 3 * 44_000) and found["of_items_h"] == 0


def test_two_qualities_stand_for_all():
    params = params_of(ROOT / "profiles/coco")
    sample = sampled(params, 4, two_qualities=True)
    assert list(sample["lambdas"]) == ["q2", "q7"] and sample["mfip"]["precode"] == "q2"
    compress = [Run("compress", f"compress@maskrcnn-elic-{q}", 800.0, 1.0, 9.0, 8 * 10**6) for q in sample["lambdas"]]
    measure = Run("measure", "measure@maskrcnn-elic", 160.0, 1.0, 9.0, 80)
    found = planned(params, Sample(sample, [*compress, measure]), NONE, NONE, start=6).set_index("stage")
    assert found["runs"].to_dict() == {"compress": 8, "measure": 1}
    assert found["items"].to_dict() == {"compress": 8 * 5000, "measure": 5000}
    assert found.loc["compress", "of_items_h"] * 3600 == approx(8 * 5000 * 100)
    assert found.loc["compress", "start_h"] * 3600 == approx(8 * 6)
    assert found.loc["compress", "disk_gb"] == approx(8 * 5000 * 1e6 / 1e9)
    assert found.loc["measure", "of_items_h"] * 3600 == approx(5000 * 20 * 4)  # decoded at 8 qualities, not 2


def test_what_codes_large_images_is_sampled_once(monkeypatch):
    asked = []

    def run_sample(params, dvc_yaml, wanted):
        asked.append((params["prepare"]["images"]["test"], wanted))
        names = wanted or ["prepare", "measure_uncoded@x", "train_codec@x-elic", "measure@x-elic"]
        return [Run(name.partition("@")[0], name, 1.0, 1.0, 1.0, 1) for name in names]

    monkeypatch.setattr(planning, "run_sample", run_sample)
    monkeypatch.setattr(planning, "start_seconds", lambda: 0.0)
    cheap = ["prepare", "measure_uncoded@x", "train_codec@x-elic"]
    planning.plan(ROOT / "profiles/coco")
    assert asked == [(4, []), (4, ["train_codec@x-elic"]), (8, cheap)]
    asked.clear()
    planning.plan(ROOT)  # where nothing is trained
    assert asked == [(8, []), (16, [*cheap, "measure@x-elic"])]


def test_the_command_prints_the_plan_of_a_profile(monkeypatch, capsys):
    def run_sample(params, *_):
        images = params["prepare"]["images"]["fit"]
        names = ("prepare", "compress@small-hevc-q1", "measure@small-hevc")
        return [Run(name.partition("@")[0], name, images, images, 1024.0, 10**9) for name in names]

    monkeypatch.setattr(planning, "run_sample", run_sample)
    monkeypatch.setattr(planning, "start_seconds", lambda: 18.0)
    monkeypatch.setattr(sys, "argv", ["plan", str(ROOT / "profiles/study")])
    monkeypatch.delitem(sys.modules, "stages.plan")  # a command's process has not imported it
    runpy.run_module("stages.plan", run_name="__main__")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert list(rows)[2:] == ["prepare", "compress", "measure", "all", "The"]
    assert rows["compress"][:2] == ["1", "280"]  # of `fit` and `test`; only q1 was sampled
    assert rows["measure"][:2] == ["1", "280"] and float(rows["measure"][4]) == approx((18 + 280 / 2) / 3600, abs=5e-4)


def test_a_start_is_a_process_with_its_imports():
    assert planning.start_seconds() > 0.3


def test_counts_are_printed_whole_and_hours_with_three_places():
    numbers = {"disk_gb": 300.0, "peak_gb": 2.0, "start_h": 1.5, "of_items_h": 4.0}
    stages = [{"stage": "extract", "runs": 3, "items": 16200}, {"stage": "report", "runs": 1, "items": 0}]
    rows = {
        line.split()[0]: line.split()[1:]
        for line in table(pd.DataFrame(stages).assign(**numbers), 4, 100).splitlines()
        if line
    }
    assert rows["extract"] == ["3", "16,200", "300.000", "2.000", "5.500", "2.500"]
    assert rows["report"] == ["1", "0", "300.000", "2.000", "5.500", "2.500"]
    assert rows["all"] == ["4", "600.000", "2.000", "11.000", "5.000"]  # items of several stages are no sum


# ---- samples


@pytest.mark.parametrize("few", [2, 4, 16])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
def test_a_sample_is_a_small_profile_with_the_same_stages_anywhere(profile, few, monkeypatch):
    monkeypatch.chdir(profile)
    params = load_params()
    sample = sampled(params, few)  # checks it, as a stage does
    assert yaml.safe_load(yaml.safe_dump(sample)) == sample  # plain values
    images, of_profile = sample["prepare"]["images"], params["prepare"]["images"]
    assert images["fit"] == min(few, of_profile["fit"]) and images["test"] == min(few, of_profile["test"])
    assert sample["extract"]["train_images"] <= few and images["train"] <= of_profile["train"]
    for section in (*sample["models"].values(), *sample["codecs"].values()):
        assert section.get("steps", 0) <= few and section.get("entropy_steps", 0) <= few
        for path in (section.get("weights"), section.get("init")):
            assert not path or "." not in path or (os.path.isabs(path) and Path(path).is_file())
    assert Path(sample["root"]) == ROOT
    for same in ("cells", "studies", "lambdas", "tasks", "mfip", "report"):
        assert sample[same] == params[same]
    assert params == load_params()  # is not changed


DVC_YAML = """
stages:
  prepare: {cmd: PYTHONPATH=. python -m zipfile -c a.zip params.yaml, outs: [a.zip]}
  extract: {cmd: PYTHONPATH=. python -m zipfile -c b.zip a.zip, deps: [a.zip], outs: [b.zip]}
  other: {cmd: PYTHONPATH=. python -m zipfile -c c.zip a.zip, deps: [a.zip], outs: [c.zip]}
"""
SAMPLE = {"prepare": {"images": {"test": 2}}}


@pytest.fixture
def dvc_yaml(tmp_path, monkeypatch) -> Path:
    """Stages that need no data."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "dvc.yaml"
    path.write_text(DVC_YAML)
    return path


def test_a_sample_runs_what_is_wanted_after_what_it_needs_and_leaves_nothing(dvc_yaml):
    found = run_sample(SAMPLE, dvc_yaml, ["extract"])
    assert [run.address for run in found] == ["prepare", "extract"]
    assert all(run.seconds > 0 and run.cpu_seconds > 0 and run.peak_mib > 1 for run in found)
    a, b = (run.written for run in found)
    assert b > a > 100  # a zip in a zip
    assert [run.address for run in run_sample(SAMPLE, dvc_yaml)][0] == "prepare"
    assert len(run_sample(SAMPLE, dvc_yaml)) == 3
    assert os.listdir() == ["dvc.yaml"]


def test_a_stage_that_fails_on_a_sample_is_named_with_its_last_word(dvc_yaml, capsys):
    dvc_yaml.write_text(DVC_YAML.replace("-c b.zip a.zip", "-e missing.zip out"))
    said = pytest.raises(InputError, match="stage extract failed: FileNotFoundError: .*missing.zip")
    with capsys.disabled(), said:  # its words are those of the process, as on a command line
        run_sample(SAMPLE, dvc_yaml, ["extract"])
    assert os.listdir() == ["dvc.yaml"]


def test_a_command_is_run_wherever_the_repository_lies(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(planning.runpy, "run_module", lambda module, run_name: ran.append([module, *sys.argv[1:]]))
    monkeypatch.setenv("WORKERS", "1")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    planning.become("PYTHONPATH=/my own/repository python -m stages.extract 'a b' c", tmp_path)
    assert ran == [["stages.extract", "a b", "c"]]


def test_a_fork_ends_as_its_call_does(capsys):
    def raises():
        raise KeyError("lost")

    with capsys.disabled():
        ends = [forked(call)[0] for call in (lambda: None, lambda: sys.exit(2), lambda: sys.exit("words"), raises)]
        assert ends == [0, 2, 1, 1]
        assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL))[0] == -signal.SIGKILL


def test_memory_is_that_of_the_fork(capsys):
    with capsys.disabled():
        small, large = (forked(lambda size=size: bytearray(size << 20))[1].ru_maxrss / 1024 for size in (1, 300))
    assert large - small == approx(299, abs=20)
