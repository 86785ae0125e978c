"""A profile's folder as `dvc repro` leaves it, for `encode` and `decode`: random networks, and an image."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stages.lib import mfip, prediction
from stages.lib.coding import FeatureCodec, build_codec, save_codec
from stages.lib.files import write_json
from stages.lib.models import build, save_model
from stages.lib.online import Cell, Networks, load_cell, load_networks
from stages.lib.params import SCALES, TASKS
from stages.lib.planes import Packing

ROOT = Path(__file__).parents[1]
IMAGE, SIZE = Path("image_12.png"), (40, 50)  # height, width in px; 32 x 40 as the backbone sees it
CHANNELS = 32  # of resnet10_fpn
LAMBDAS = {"q1": 0.0005, "q2": 0.002, "q3": 0.008, "q4": 0.032}
STEPS, PRICE = np.array([4.0, 1.0, 0.25]), 0.001  # see `write_fit`
WITHOUT = (9.0, 9.0, 9.0, 9.0, 3.0)  # loss of a skipped scale
NETWORKS = {
    "elic": {"N": 16, "M": 32, "groups": [8, 24], "context": {"widths": [8, 8], "kernel": 3}},
    "tcm": {"N": 16, "M": 32, "slices": 4, "head_dims": [8, 8, 8], "window": 4, "blocks": 1}
    | {"hyper_channels": 8, "context_widths": [16, 8, 8]},
}
MADE = {
    "data/models/small.pt": "train_model@small",
    "data/predictions/small.pt": "fit_prediction@small",
    "data/codecs/small/elic.pt": "train_codec@small-elic",
    "data/loss_rate/small/elic/detection.json": "fit_loss_rate@detection-elic",
    "data/mfip/small/elic/detection.pt": "train_mfip@small-elic",
}


def write_model(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = build(yaml.safe_load(Path("params.yaml").read_text())["models"]["small"], 4, 3)
    save_model(path, model, 4, 3, half=True)


def write_codec(path: Path, seed: int, name: str = "elic") -> None:
    torch.manual_seed(seed)
    config = yaml.safe_load(Path("params.yaml").read_text())["codecs"][name] | {"codec": name}
    codec = build_codec(config)
    basis = {scale: torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q for scale in SCALES}
    packing = Packing("pca", basis, {scale: torch.zeros(CHANNELS) for scale in SCALES})
    save_codec(path, FeatureCodec(codec, packing, CHANNELS), config)


def write_fit(path: Path) -> None:
    """Each quality halves the loss and doubles the bits: q is worth it below a price of STEPS[q - 1] * k / bits.

    To skip a scale costs a loss of WITHOUT[s], less than to send it at a price above that of some scales.
    """
    gain = [0.5, 1.0, 2.0, 4.0]  # of the bits of q2
    models = {
        "mean": {"loss": [4.0, 2.0, 1.0, 0.5], "drop": [0.0] * len(LAMBDAS), "bits": [1.0] * len(LAMBDAS)},
        "rate": {"slope": [1.0] * len(LAMBDAS), "offset": np.log(gain).tolist(), "error": [0.0] * len(LAMBDAS)},
    }
    fit = {name: dict.fromkeys(SCALES, values) for name, values in models.items()}
    fit["mean"] = {
        scale: values | {"loss_skipped": [without] * (1 + len(LAMBDAS))}
        for (scale, values), without in zip(fit["mean"].items(), WITHOUT, strict=True)
    }
    write_json(path, fit | {"n_labelled": 9})


def write_predictor(path: Path) -> None:
    torch.manual_seed(0)
    prediction.save(path, prediction.Predictor(CHANNELS))


def write_mfip(path: Path) -> None:
    torch.manual_seed(0)
    predictor = mfip.MFIP(CHANNELS, 4)
    with torch.no_grad():
        predictor.sense.weight *= 0.5
        predictor.sense.bias.copy_(torch.tensor([8.0, 4.0, 1.0, 0.5, 0.25]))
    mfip.save(path, predictor)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """A profile's folder as `dvc repro` leaves it, with random weights, and an image."""
    folder = tmp_path_factory.mktemp("profile")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"]["small"]["image_size"] = {"min": 32, "max": 48}
    params["lambdas"] = LAMBDAS
    for codec, network in NETWORKS.items():
        params["codecs"][codec] |= {"network": network, "gains": 3}
    params["mfip"]["precode"] = "q2"
    params["tasks"] = {task: {"points": 2} for task in TASKS}
    cells = [*((task, "elic") for task in TASKS), ("detection", "tcm"), ("detection", "hevc")]
    params["cells"] = {f"{task}-{codec}": {"task": task, "model": "small", "codec": codec} for task, codec in cells}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_model(Path("data/models/small.pt"), 0)
        write_predictor(Path("data/predictions/small.pt"))
        for codec in params["codecs"]:
            write_codec(Path(f"data/codecs/small/{codec}.pt"), 0, codec)
        for task, codec in cells:
            write_fit(Path(f"data/loss_rate/small/{codec}/{task}.json"))
            write_mfip(Path(f"data/mfip/small/{codec}/{task}.pt"))
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / IMAGE)
    return folder


@pytest.fixture(autouse=True)
def inside(profile, monkeypatch) -> None:
    monkeypatch.chdir(profile)


@pytest.fixture
def cell() -> Cell:
    return load_cell("detection-elic")


@pytest.fixture(scope="module")
def networks(profile) -> Networks:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(profile)
        return load_networks(load_cell("detection-elic"))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def command(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`python -m stages.<name>` in this process -> its exit code."""
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    try:
        runpy.run_path(str(ROOT / f"stages/{name}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0
