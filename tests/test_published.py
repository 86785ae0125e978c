"""Weights that torchvision publishes make the detectors that torchvision makes of them."""

import hashlib
import os
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from artifacts import assert_same
from torchvision.models import detection, get_model_weights

from stages import train_model
from stages.lib import shapes
from stages.lib.coco import Split
from stages.lib.models import (
    NORM_EPSILON,
    build,
    downloaded,
    load_model,
    load_weights,
    norms,
    published_state,
    pyramid_of,
    read_checkpoint,
    set_norm_epsilon,
)
from stages.lib.params import ARCHITECTURES
from stages.lib.schema import InputError

PARAMS = {"architecture": "maskrcnn_resnet50_fpn", "image_size": {"min": 64, "max": 96}}
CLASSES = 7


@pytest.fixture
def published() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Mask R-CNN and its weights as torchvision publishes them: older names, no counters of batches."""
    torch.manual_seed(1)
    network = build(PARAMS, CLASSES, 0)
    state = {}
    for name, value in network.state_dict().items():
        name = re.sub(r"((inner|layer)_blocks\.\d)\.0\.", r"\1.", name).replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", name)
        if "num_batches_tracked" not in name:
            state[name] = value.clone()
    return network, state


def test_weights_with_torchvisions_older_names_are_loaded(published):
    network, state = published
    assert not state.keys() >= network.state_dict().keys() and "backbone.fpn.inner_blocks.0.weight" in state
    own = {name: value.clone() for name, value in network.state_dict().items()}
    for value in network.state_dict().values():
        value.zero_()
    load_weights(network, state, "file.pth")
    assert_same(network.state_dict(), own)
    shorter = state | {"rpn.head.conv.bias": torch.zeros(3)}
    for changed, layer in ((shorter, "rpn.head.conv.0.0.bias"), (state | {"rpn.more": torch.zeros(3)}, "rpn.more")):
        with pytest.raises(InputError, match=f"^file.pth: (?s:.*){layer}"):
            load_weights(network, changed, "file.pth")


def test_a_published_file_and_its_name_in_torchvision_give_the_same_model(published, tmp_path, monkeypatch):
    _, state = published
    root = tmp_path / "shapes"
    shapes.generate(root, n_train=1, n_val=1, size=64, seed=5)
    monkeypatch.chdir(tmp_path)
    torch.save(OrderedDict(state), "weights.pth")
    digest = hashlib.sha256(Path("weights.pth").read_bytes()).hexdigest()
    file = f"maskrcnn_resnet50_fpn_coco-{digest[:8]}.pth"
    Path("weights.pth").rename(file)
    known = SimpleNamespace(url=Path(file).absolute().as_uri())
    monkeypatch.setattr(train_model, "get_model_weights", lambda _: {"COCO_V1": known})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = PARAMS | {"tasks": ["detection"], "steps": 0}
    split = Split(root / "train2017", root / "annotations/instances_train2017.json", None, [1], {1: "000001.png"})
    monkeypatch.setattr(train_model, "load_split", lambda *_: split)
    for weights in ("COCO_V1", file):
        monkeypatch.setattr(
            train_model, "load_params", lambda w=weights: {"seed": 0, "models": {"m": model | {"weights": w}}}
        )
        train_model.main(Path("splits.json"), "m", Path(weights).with_suffix(".pt"))
    first, second = (read_checkpoint(path) for path in sorted(Path().glob("*.pt")))
    assert_same(first["state"], second["state"])
    assert first[NORM_EPSILON] == second[NORM_EPSILON] == 0
    assert {norm.eps for norm in norms(load_model(Path("COCO_V1.pt"), model))} == {0}
    assert first["state"]["backbone.body.conv1.weight"].equal(state["backbone.body.conv1.weight"])  # not rounded

    known.url = f"file:///nowhere/{file.replace('mask', 'other')}"
    monkeypatch.setattr(
        train_model, "load_params", lambda: {"seed": 0, "models": {"m": model | {"weights": "COCO_V1"}}}
    )
    with pytest.raises(InputError, match=f"models.m.weights is 'COCO_V1': .*No such file.*download {known.url}"):
        train_model.main(Path("splits.json"), "m", Path("new.pt"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def named_by_its_hash(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(path.with_name(f"m-{digest[:8]}.pth"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_file_in_torchs_cache_is_verified_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"layer": torch.ones(1000)}, "m.pth")
    file = named_by_its_hash(tmp_path / "m.pth")
    cached = downloaded(file.as_uri())
    assert cached.is_relative_to(tmp_path / "cache") and published_state(cached)["layer"].equal(torch.ones(1000))
    flip(cached)
    assert downloaded(file.as_uri()) == cached  # not fetched again
    with pytest.raises(InputError, match=f"{cached}: its SHA-256 begins with .*; remove it, and download it again"):
        published_state(cached)
    for name, protocol in (("zip", {}), ("pickle", {"_use_new_zipfile_serialization": False})):
        evil = tmp_path / "cache/hub/checkpoints" / f"{name}.pth"
        torch.save({"layer": torch.ones(3), "evil": Evil()}, evil, **protocol)
        evil = named_by_its_hash(evil)  # as who could write it would name it
        with pytest.raises(InputError, match=f"{evil}: holds no state dict of tensors"):
            published_state(downloaded(f"https://download.pytorch.org/models/{evil.name}"))
    assert not Path("executed").exists()


def test_what_is_not_fetched_whole_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"layer": torch.ones(1000)}, tmp_path / "m.pth")
    file = named_by_its_hash(tmp_path / "m.pth")
    flip(file)
    with pytest.raises(RuntimeError, match="invalid hash"):
        downloaded(file.as_uri())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_name_of_a_published_file_tells_its_hash(published, tmp_path):
    _, state = published
    path = tmp_path / "m-00000000.pth"
    torch.save(state, path)
    with pytest.raises(InputError, match="m-00000000.pth: its SHA-256 begins with [0-9a-f]{8}, not as its name says"):
        published_state(path)
    plain = path.rename(tmp_path / "m.pth")
    assert_same(published_state(plain), state)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "resnet50" in name])
def test_features_are_those_of_torchvisions_own_detector(architecture, tmp_path, monkeypatch):
    """It adds nothing to the variances of these weights; 1e-5, as to others, would show where they are small."""
    weights = get_model_weights(architecture)["COCO_V1"]
    params = PARAMS | {"architecture": architecture}
    classes = 2 if architecture.startswith("keypoint") else 91
    torch.manual_seed(2)
    state = build(params, classes, 17).state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(5e-5, 1e-4)
            state[name.replace("running_var", "weight")].fill_(0.007)  # so that features keep a sensible size
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: state)
    theirs = getattr(detection, architecture)(weights=weights, min_size=64, max_size=96).eval()
    ours = build(params, classes, 17)
    load_weights(ours, state, "file.pth")
    set_norm_epsilon(ours, {NORM_EPSILON: 0.0})
    image = torch.rand(3, 64, 80)
    found, wanted = pyramid_of(ours.eval(), image)[0], pyramid_of(theirs, image)[0]
    assert all(torch.allclose(found[scale], wanted[scale], rtol=1e-3) for scale in wanted)
    set_norm_epsilon(ours, {NORM_EPSILON: 1e-5})
    assert not torch.allclose(pyramid_of(ours, image)[0]["0"], wanted["0"], rtol=1e-1)
