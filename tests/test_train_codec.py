"""The stage keeps given weights, or refuses them; without any, it starts as a transform, or is a published family."""

import math
import os
import socket
from pathlib import Path

import pytest
import torch
import trainable
from compressai.models import Elic2022Official
from pytest import approx
from trainable import CHANNELS, CONFIG, PLAIN, SIDES, WIDE, tiny

from stages import train_codec
from stages.lib import codec_training
from stages.lib.codec_training import random_crops
from stages.lib.coding import FeatureCodec, decode_scale, encode_scale, load_codec, save_codec
from stages.lib.features import Features
from stages.lib.files import read_csv
from stages.lib.planes import pack
from stages.lib.ranks import join
from stages.lib.schema import InputError

path = trainable.path  # a fixture
LAMBDAS = {"q1": 0.0002, "q2": 0.02}


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "codec.pt"
    save_codec(path, FeatureCodec(tiny(), PLAIN, CHANNELS), CONFIG)
    return path


@pytest.fixture
def run(path, tmp_path, monkeypatch):
    def run(init: Path | None, **changes) -> Path:
        schedule = {"entropy_steps": 0, "steps": 0, "batch": 1, "crop": 64, "lr": 1e-3}
        return run_with(CONFIG | schedule | {"init": init and str(init)} | changes)

    def run_with(codec: dict) -> Path:
        monkeypatch.setattr(
            train_codec, "load_params", lambda: {"seed": 0, "codecs": {"elic": codec}, "lambdas": LAMBDAS}
        )
        train_codec.main(path, "small", "elic", tmp_path / "codec.pt", tmp_path / "reports")
        return tmp_path / "codec.pt"

    run.with_codec = run_with  # these params and no others
    return run


def test_zero_steps_keep_the_given_weights(run, codec_file, tmp_path):
    given, kept = (torch.load(path, weights_only=True) for path in (codec_file, run(codec_file)))
    assert kept["config"] == given["config"] and kept["channels"] == given["channels"]
    for part, expected in ((kept["state"], given["state"]), (kept["packing"]["basis"], given["packing"]["basis"])):
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], expected[name]) for name in part)
    assert read_csv(tmp_path / "reports" / "loss.csv").columns.tolist() == ["step", "loss", "bpp_plane", "mse"]


def edited(codec_file: Path, path: Path, edit) -> Path:
    checkpoint = torch.load(codec_file, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_given_weights_must_fit_the_configuration(run, codec_file, tmp_path):
    with pytest.raises(InputError, match=r"codecs\.elic: gains is 4.*codec\.pt.*3"):
        run(codec_file, gains=4)
    other = edited(codec_file, tmp_path / "other.pt", lambda c: c.update(channels=9))
    with pytest.raises(InputError, match=r"other\.pt.*9 channels.*4"):
        run(other)
    with pytest.raises(InputError, match=r"detector\.pt.*config"):
        run(edited(codec_file, tmp_path / "detector.pt", lambda c: c.pop("config")))


def test_given_weights_must_be_complete(run, codec_file, tmp_path):
    cut = edited(codec_file, tmp_path / "cut.pt", lambda c: c["state"].pop("net.g_a.4.weight"))
    with pytest.raises(InputError, match=r"cut\.pt.*net\.g_a\.4\.weight"):
        run(cut)


@pytest.mark.parametrize("kind", ["pca", "quilt"])
def test_without_weights_the_codec_starts_as_the_transform_of_its_planes(kind, run, path):
    """A transform start has error from rounding only, and 256 bands carry what 16 x 16 pixels hold."""
    codec, packing, channels = load_codec(run(None, network=WIDE, packing=kind))
    assert channels == CHANNELS and packing.kind == kind
    plane, _ = pack(Features(path, "fit").scale(0, "0"), "0", packing)
    (coded,) = codec.encode(plane[None], 255)
    assert -10 * math.log10((coded.plane - plane).square().mean()) > 33  # D = 1 / (2 ln 2 lambda 255^2): 36.5 dB


def test_a_killed_stage_finds_its_training_again(run, codec_file, tmp_path, monkeypatch):
    schedule = {"steps": 3, "entropy_steps": 2}
    wanted = torch.load(run(codec_file, **schedule), weights_only=True)["state"]
    monkeypatch.setattr(codec_training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    draw, drawn = random_crops, []

    def crops_until_killed(*args):
        drawn.append(args)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(*args)

    (tmp_path / "codec.pt").unlink()
    monkeypatch.setattr(codec_training, "random_crops", crops_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(codec_file, **schedule)
    assert not (tmp_path / "codec.pt").exists()
    found = torch.load(run(codec_file, **schedule), weights_only=True)["state"]
    assert len(drawn) == 1 + 5
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec.pt", "reports"]


def test_two_processes_train_one_codec(path, tmp_path):
    """As torchrun starts them: both end with the same weights, not with those of one process; one of them writes."""
    schedule = {"entropy_steps": 1, "steps": 2, "batch": 1, "crop": 64, "lr": 1e-3}
    params = {"seed": 0, "codecs": {"elic": CONFIG | schedule | {"init": None, "network": WIDE}}}
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    of_rank = [shared | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    context = torch.multiprocessing.get_context("fork")
    folders = [tmp_path / name for name in ("rank 0", "rank 1", "alone")]
    processes = [
        context.Process(target=train_in, args=(folder, path, params, environment))
        for folder, environment in zip(folders, [*of_rank, {}], strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    first, second, alone = (torch.load(folder / "trained.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["log_gain"], alone["log_gain"])
    written = [sorted(p.name for p in folder.rglob("*") if p.is_file()) for folder in folders]
    assert written == [["codec.pt", "loss.csv", "trained.pt"], ["trained.pt"], ["codec.pt", "loss.csv", "trained.pt"]]


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="^torchrun began process 3 on 2 GPUs; lower --nproc-per-node to 2$"):
        join()


def train_in(folder: Path, features: Path, params: dict, environment: dict[str, str]) -> None:
    """The stage, in a process of its own and with its outputs in `folder`, where it also leaves what it trained."""
    torch.set_num_threads(1)  # a fork lacks the threads that this process started
    os.environ.update(environment)
    folder.mkdir()
    train = codec_training.train

    def train_and_keep(codec, *others):
        log = train(codec, *others)
        torch.save(codec.state_dict(), folder / "trained.pt")
        return log

    codec_training.train, train_codec.load_params = train_and_keep, lambda: params
    train_codec.main(features, "small", "elic", folder / "codec.pt", folder / "reports")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_family_of_published_networks_becomes_a_codec_file(path, run, tmp_path):
    files, network = [], {"N": 8, "M": 16, "groups": [4, 12], "context": {"widths": [224, 128], "kernel": 5}}
    for k in range(2):
        torch.manual_seed(k)
        files.append({"lmbda": (0.002, 0.02)[k], "weights": str(tmp_path / f"{k}.pth.tar")})
        torch.save({"state_dict": Elic2022Official(8, 16, [4, 12]).state_dict()}, files[-1]["weights"])
    params = {"packing": "tile", "network": network, "family": files}
    feature_codec = load_codec(run.with_codec(params))
    codec = feature_codec.codec
    assert feature_codec.packing.kind == "tile" and codec.lambdas == [0.002, 0.02]
    assert [codec.level(lmbda) for lmbda in LAMBDAS.values()] == [0, 1]
    for file, member in zip(files, codec.members, strict=True):
        state = torch.load(file["weights"], weights_only=True)["state_dict"]
        for name, value in member.net.named_parameters():
            assert torch.equal(value, state[name].half().float() if value.ndim > 1 else state[name])
    fit = Features(path, "fit")
    for scale, side in SIDES.items():
        maps = fit.scale(1, scale)
        for level in range(2):
            (record,) = encode_scale(maps[None], scale, level, feature_codec)
            decoded = decode_scale([record.data], scale, (side, side), feature_codec)[0]
            assert record.data[0] == level
            assert (decoded - maps).square().mean().item() == approx(record.mse_feature, rel=1e-4)
    assert read_csv(tmp_path / "reports" / "loss.csv").empty


def test_a_family_of_another_network_is_refused(run, tmp_path):
    torch.save(Elic2022Official(8, 16, [4, 12]).state_dict(), tmp_path / "small.pth")
    network = {"N": 8, "M": 16, "groups": [8, 8], "context": {"widths": [224, 128], "kernel": 5}}
    family = [{"lmbda": 0.002, "weights": str(tmp_path / "small.pth")}]
    with pytest.raises(InputError, match=r"small\.pth: layer 'latent_codec\.y\."):
        run.with_codec({"packing": "tile", "network": network, "family": family})
    assert not (tmp_path / "codec.pt").exists()
