"""Weights that others published code here as they do there, and no file of them does any harm."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressai.entropy_models import GaussianConditional
from compressai.models import Elic2022Official
from pytest import approx
from torch import Tensor, nn
from torch.nn import functional

from stages.lib import learned
from stages.lib.coding import build_codec, load_published
from stages.lib.elic import Elic
from stages.lib.learned import SCALE_LIMITS, SCALE_TABLE, Family
from stages.lib.schema import InputError

N, M, GROUPS = 16, 32, [8, 24]
LAMBDAS = [0.0018, 0.0067, 0.025]
CONFIG = {
    "codec": "elic",
    "packing": "tile",
    "network": {"N": N, "M": M, "groups": GROUPS, "context": {"widths": [224, 128], "kernel": 5}},  # compressai's
    "lambdas": LAMBDAS,
}


def picture(*shape: int) -> Tensor:
    """Smooth, with noise: [1, 3, H, W] in [0, 1]."""
    v, u = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    waves = torch.stack([torch.sin(u / (5 + c)) * torch.cos(v / (9 - c)) for c in range(3)])
    noise = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    return (0.5 + 0.3 * waves + 0.2 * (noise - 0.5))[None]


def published(seed: int) -> Elic2022Official:
    """compressai's own model, with latents of several steps."""
    torch.manual_seed(seed)
    net = Elic2022Official(N=N, M=M, groups=GROUPS).eval()
    with torch.no_grad():
        net.g_a[-1].conv_b[-1].bias.fill_(3.0)
        net.g_a[-2].weight *= 3 / net.g_a(picture(64, 64)).std()
        medians = net.latent_codec["hyper"].entropy_bottleneck.quantiles[:, 0, 1]
        medians += torch.linspace(-2.3, 2.4, len(medians))
        for k, width in enumerate(GROUPS):
            net.latent_codec["y"][f"y{k}"].entropy_parameters[-1].bias[:width] = 4.0  # scales: no number is rare
    net.update()
    return net


@pytest.fixture(scope="module")
def models() -> list[Elic2022Official]:
    return [published(seed) for seed in range(len(LAMBDAS))]


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> list[str]:
    """With the keys of compressai's own checkpoints, alone, and from several GPUs."""
    folder = tmp_path_factory.mktemp("published")
    first, second, third = (model.state_dict() for model in models)
    torch.save({"epoch": 7, "state_dict": first, "loss": torch.tensor(0.5)}, folder / "0.pth.tar")
    torch.save(second, folder / "1.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in third.items()}}, folder / "2.pth.tar")
    return [str(path) for path in sorted(folder.iterdir())]


def loaded(files: list[str], **network) -> Family:
    torch.manual_seed(9)
    family = build_codec(CONFIG | {"network": CONFIG["network"] | network})
    load_published(family, files)
    return family.eval().to(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def exact(monkeypatch) -> None:
    """Transforms as exact as compressai's."""
    monkeypatch.setattr(learned, "TRANSFORM_TYPE", torch.float32)


@pytest.fixture(scope="module")
def whole(files) -> Family:
    return loaded(files)


@pytest.fixture
def family(whole, exact) -> Family:
    return whole.update()


def with_scales_of_the_tables(_, given: tuple, named: dict) -> tuple[tuple, dict]:
    latent, scales = given
    return (latent, SCALE_TABLE[torch.bucketize(scales.contiguous(), SCALE_LIMITS)]), named


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_a_published_network_codes_as_compressais_own_model(family, models, shape):
    x = picture(*shape)
    for level, model in enumerate(models):
        gaussians = [module for module in model.modules() if isinstance(module, GaussianConditional)]
        hooks = [g.register_forward_pre_hook(with_scales_of_the_tables, with_kwargs=True) for g in gaussians]
        with torch.no_grad():
            own = model(x)
        for hook in hooks:
            hook.remove()
        (coded,) = family.encode(x, level)
        assert torch.allclose(coded.plane, own["x_hat"][0], atol=1e-4)
        bits = sum(-likelihood.log2().sum().item() for likelihood in own["likelihoods"].values())
        assert coded.estimated_bits == approx(bits, rel=1e-3)
        assert 0.99 * bits < 8 * len(coded.string) < 1.01 * bits + 32
        assert torch.equal(family.decode([coded.string], level, x.shape[1:])[0], coded.plane)


def test_the_latents_of_these_tests_are_worth_coding(family, models):
    """Zeros alone would agree whatever the weights."""
    for model in models:
        with torch.no_grad():
            y = model.g_a(picture(64, 128))
            assert y.round().unique().numel() > 9
    planes = [family.encode(picture(64, 128), level)[0].plane for level in range(3)]
    assert (planes[0] - planes[1]).abs().max() > 0.01 and (planes[1] - planes[2]).abs().max() > 0.01


def test_compressais_own_strings_decode_to_the_same_picture(family, models):
    x = picture(64, 128)
    with torch.no_grad():
        sent = models[1].compress(x)
        own = models[1].decompress(sent["strings"], sent["shape"])["x_hat"]
    plane = family.encode(x, 1)[0].plane
    assert (plane.clamp(0, 1) - own[0]).abs().max() < 1e-4


def test_sizes_that_are_no_multiples_of_32_are_padded_with_black(family):
    """As compressai's evaluation pads pictures, but below and to the right."""
    x = picture(40, 72)
    (coded,) = family.encode(x, 0)
    (whole,) = family.encode(functional.pad(x, (0, 24, 0, 24)), 0)
    assert coded.string == whole.string
    assert torch.equal(coded.plane, whole.plane[:, :40, :72])
    assert torch.equal(family.decode([coded.string], 0, (3, 40, 72))[0], coded.plane)


# ---- rate control


def test_the_level_is_the_index_of_the_nearest_lambda(family):
    assert [family.level(lmbda) for lmbda in LAMBDAS] == [0, 1, 2]
    assert [family.level(lmbda) for lmbda in (1e-9, 0.0034, 0.0036, 0.0128, 0.0131, 9.0)] == [0, 0, 1, 1, 2, 2]


def test_a_level_without_a_network_is_refused(family):
    string = family.encode(picture(64, 64), 2)[0].string
    for level in (3, 255):
        with pytest.raises(InputError, match=f"rate control {level}.*only 3 networks"):
            family.decode([string], level, (3, 64, 64))


def test_the_string_of_one_network_is_refused_by_another(family):
    string = family.encode(picture(64, 64), 2)[0].string
    with pytest.raises(InputError, match="damaged"):
        family.decode([string], 0, (3, 64, 64))


# ---- files


def test_a_file_of_another_network_names_the_layer(models, files, tmp_path):
    with pytest.raises(InputError, match=r"0\.pth\.tar: layer 'g_a\.0\.weight' has shape"):
        loaded(files, N=24)
    with pytest.raises(InputError, match=r"0\.pth\.tar: layer '.*context.*' has shape"):
        loaded(files, context={"widths": [8, 8], "kernel": 3})
    grey = Family([Elic(1, **CONFIG["network"]) for _ in files], M, LAMBDAS)
    with pytest.raises(InputError, match=r"0\.pth\.tar: layer 'g_a\.0\.weight' has shape"):
        load_published(grey, files)
    cases: list[tuple[Callable[[dict], object], str]] = [
        (lambda state: state.pop("g_s.1.weight"), r"no weights for layer 'g_s\.1\.weight'"),
        (lambda state: state.update({"g_b.0.weight": torch.zeros(3)}), r"layer 'g_b\.0\.weight' is unknown"),
    ]
    for edit, message in cases:
        edit(state := dict(models[0].state_dict()))
        torch.save({"state_dict": state}, tmp_path / "edited.pth.tar")
        with pytest.raises(InputError, match=f"edited.pth.tar: .*{message}"):
            load_published(build_codec(CONFIG), [str(tmp_path / "edited.pth.tar"), *files[1:]])


def test_older_names_of_the_entropy_bottleneck_are_known(models, files, tmp_path):
    """compressai 1.2.6 and before saved `_matrix0`, not `matrices.0`; 1.2.8 itself reads both."""
    older = {}
    for name, value in models[0].state_dict().items():
        for then, now in (("_matrix", "matrices."), ("_bias", "biases."), ("_factor", "factors.")):
            name = name.replace(f"entropy_bottleneck.{now}", f"entropy_bottleneck.{then}")
        older[name] = value
    assert "latent_codec.hyper.entropy_bottleneck._matrix0" in older
    torch.save({"state_dict": older}, tmp_path / "older.pth.tar")
    family = loaded([str(tmp_path / "older.pth.tar"), *files[1:]])
    own = models[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in family.members[0].net.named_parameters())


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_hold_no_weights_are_named_and_never_executed(models, files, tmp_path):
    family = build_codec(CONFIG)
    evil, state = tmp_path / "executed", models[0].state_dict()
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "cut.pth").write_bytes(Path(files[0]).read_bytes()[:5000])
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"state_dict": Evil(evil)}, protocol=2))
    torch.save({"state_dict": state, "args": Evil(evil)}, tmp_path / "zip.pth")
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "module.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    torch.save({"state_dict": {"g_a.0.weight": 3}}, tmp_path / "number.pth")
    for name in ("absent", "text", "cut", "pickle", "zip", "module", "list", "number"):
        with pytest.raises(InputError, match=f"{name}.pth"):
            load_published(family, [files[0], str(tmp_path / f"{name}.pth"), files[2]])
    assert not evil.exists()
