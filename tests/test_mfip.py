import json

import numpy as np
import pandas as pd
import pytest
import torch
from pytest import approx

from stages import train_mfip
from stages.lib import mfip
from stages.lib.allocation import read_weights
from stages.lib.files import read_csv, write_csv
from stages.lib.loss_rate import importance_labels
from stages.lib.mfip import MFIP
from stages.lib.params import SCALES, InputError

C, N = 4, 120
PARAMS = {"channels": 16, "epochs": 30, "lr": 2e-3, "validation": 0.2}
SHORT = PARAMS | {"epochs": 3}
QUICK = PARAMS | {"epochs": 8, "lr": 1e-2}  # enough to learn something


def make_pyramid(energy, height, width, generator):
    """energy [n, 5] -> scale -> [n, C, H_s, W_s]; the smallest map is one pixel for sides of at most 16."""
    pyramid = {}
    for s, scale in enumerate(SCALES):
        noise = torch.randn(len(energy), C, -(-height // 2**s), -(-width // 2**s), generator=generator)
        pyramid[scale] = noise * torch.tensor(energy[:, s], dtype=torch.float32)[:, None, None, None]
    return pyramid


def make_images(seed, n=N, unrelated=False):
    """Batches of pyramids of three sizes, in rising id, and labels: noisy shares of the scales' energies."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    energy = np.exp(rng.normal(0, 0.7, (n, 5)))
    share = energy / energy.sum(1, keepdims=True)
    if unrelated:
        share = rng.permutation(share)
    labels = {3 * i + 7: rng.dirichlet(20 * share[i]) for i in range(n)}
    batches = []
    for start in range(0, n, 8):
        height, width = ((24, 32), (16, 16), (32, 40))[start // 8 % 3]
        ids = list(labels)[start : start + 8]
        batches.append((ids, make_pyramid(energy[start : start + 8], height, width, generator)))
    return batches, labels


def train(batches, labels, params, seed):
    return mfip.train([(ids, mfip.describe(pyramid).numpy()) for ids, pyramid in batches], labels, params, seed)


@pytest.fixture(scope="module")
def images():
    return make_images(0)


@pytest.fixture(scope="module")
def trained(images):
    return train(*images, PARAMS, 0)


def test_weights_lie_on_the_simplex_for_any_size():
    torch.manual_seed(0)
    model = MFIP(C, 8).eval()
    torch.nn.init.normal_(model.weigh.weight)
    for height, width in ((16, 16), (17, 40), (64, 32), (1, 1)):
        weights = model(make_pyramid(np.full((3, 5), 2.0), height, width, torch.Generator().manual_seed(1)))
        assert weights.shape == (3, 5)
        assert (weights >= 0).all()
        assert weights.sum(1).tolist() == approx([1] * 3, abs=1e-6)
        assert weights.std(0).max() > 1e-3  # it does look at the images


def test_learns_which_scale_has_the_energy(trained):
    held_out = trained.report["held_out"]
    assert trained.report["flags"] == []
    assert trained.report["epoch"] > 0
    assert held_out["network"]["kl"] < 0.7 * held_out["constant"]["kl"]
    assert held_out["network"]["mae"] < 0.85 * held_out["constant"]["mae"]
    assert min(held_out["correlation"].values()) > 0.4

    batches, labels = make_images(1)  # new images
    predicted = torch.cat([trained.model(pyramid) for _, pyramid in batches]).detach().numpy()
    constant = np.array(list(trained.report["mean_weight"].values()))
    label = np.array(list(labels.values()))
    assert np.abs(predicted - label).mean() < 0.85 * np.abs(constant - label).mean()


@pytest.mark.filterwarnings("ignore:MFIP learned nothing")
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_without_relation_to_the_images_give_the_constant(seed):
    batches, labels = make_images(seed, unrelated=True)
    model, report, image_ids, weights = train(batches, labels, SHORT, seed)
    label = np.array(list(labels.values()))
    assert report["flags"] == ["constant"]
    assert report["epoch"] == 0
    for _, pyramid in batches:
        assert model(pyramid).detach().numpy() == approx(np.tile(label.mean(0), (8, 1)), abs=1e-5)
    fold = np.arange(N) % 5
    assert weights[fold == 2] == approx(np.tile(label[fold != 2].mean(0), (N // 5, 1)), abs=1e-5)


def test_errors_are_those_of_their_definition(images, trained):
    label, fold = np.array(list(images[1].values())), np.arange(N) % 5
    constant = np.array([label[fold != k].mean(0) for k in fold])
    for name, predicted in (("network", trained.weights), ("constant", constant)):
        errors = trained.report["held_out"][name]
        assert errors["kl"] == approx((label * np.log(label / predicted)).sum(1).mean(), rel=1e-4)
        assert errors["mae"] == approx(np.abs(label - predicted).mean(), rel=1e-4)
    residue = [
        np.concatenate([x[fold == k] - x[fold == k].mean(0) for k in range(5)]) for x in (label, trained.weights)
    ]
    for s, scale in enumerate(SCALES):
        r = np.corrcoef(residue[0][:, s], residue[1][:, s])[0, 1]
        assert trained.report["held_out"]["correlation"][scale] == approx(r, rel=1e-4)


def test_an_image_is_predicted_without_its_own_label(images):
    batches, labels = images
    second = list(labels)[1]
    before = train(batches, labels, QUICK, 0)
    after = train(batches, labels | {second: np.eye(5)[4]}, QUICK, 0)
    assert before.report["flags"] == after.report["flags"] == []
    assert (after.weights[1] == before.weights[1]).all()
    assert (after.weights[0] != before.weights[0]).any()  # the label was used for the others


@pytest.mark.filterwarnings("ignore:MFIP learned nothing")
def test_same_seed_gives_the_same_in_any_order_of_batches(images):
    batches, labels = images
    state = torch.random.get_rng_state()
    first, second = train(batches, labels, SHORT, 3), train(batches[::-1], labels, SHORT, 3)
    other = train(batches, labels, SHORT, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.report == second.report
    assert (first.weights == second.weights).all()
    assert first.report["held_out"]["network"] != other.report["held_out"]["network"]


@pytest.mark.filterwarnings("ignore:MFIP learned nothing")
def test_images_without_label_are_predicted_but_not_trained_on(images):
    batches, labels = images
    without = [i for batch_ids, _ in batches[2:4] for i in batch_ids]
    expected = train(batches[:2] + batches[4:], {i: w for i, w in labels.items() if i not in without}, SHORT, 0)
    model, report, image_ids, weights = train(batches, labels | dict.fromkeys(without, np.full(5, np.nan)), SHORT, 0)
    assert report == expected.report | {"n_images": N}
    unlabelled = np.isin(image_ids, without)
    assert (weights[~unlabelled] == expected.weights).all()
    shown = torch.cat([model(pyramid) for _, pyramid in batches[2:4]]).detach()
    assert weights[unlabelled] == approx(shown.numpy(), abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_few_images_give_the_constant_and_say_so():
    batches, labels = make_images(0, 6)
    with pytest.warns(UserWarning, match="MFIP learned nothing"):
        report = train(batches, labels, SHORT, 0).report
    assert report["flags"] == ["constant", "too_few_images"]
    json.dumps(report, allow_nan=False)


def test_bad_labels_are_named(images):
    batches, labels = images
    with pytest.raises(InputError, match="image 7 has decoded features or a label, but not both"):
        train(batches, {i: w for i, w in labels.items() if i != 7}, SHORT, 0)
    with pytest.raises(InputError, match="0 images with ground truth"):
        train(batches, dict.fromkeys(labels, np.full(5, np.nan)), SHORT, 0)


def test_saved_network_predicts_the_same(images, trained, tmp_path):
    mfip.save(tmp_path / "task.pt", trained.model)
    loaded = mfip.load(tmp_path / "task.pt")
    for _, pyramid in images[0]:
        assert torch.equal(loaded(pyramid), trained.model(pyramid))


@pytest.fixture
def profile(tmp_path, monkeypatch, images):
    """Tables and fake pyramids of a profile: the fit images are `images`, labels of test are absent."""
    batches, labels = images
    params = {"seed": 0, "lambdas": {"q1": 1, "q2": 2}, "mfip": QUICK | {"precode": "q2"}}
    params["cells"] = {"keypoints-elic": {"task": "keypoints", "model": "small", "codec": "elic"}}
    monkeypatch.setattr(train_mfip, "load_params", lambda: params)
    test_batches = [([i + 1 for i in ids], pyramid) for ids, pyramid in batches[:3]]
    asked = []

    class Records:
        def __init__(self, coded, split):
            asked.append((coded.name, split))
            self.pyramids = {tuple(ids): p for ids, p in {"fit": batches, "test": test_batches[::-1]}[split]}

        def batches(self):
            return map(list, self.pyramids)

        def decode(self, image_ids, codec):
            assert codec == "codec of elic.pt"
            return self.pyramids[tuple(image_ids)]

    monkeypatch.setattr(train_mfip, "load_codec", lambda path: f"codec of {path.name}")
    monkeypatch.setattr(train_mfip, "CodedSplit", Records)
    for q in params["lambdas"]:
        rows = [
            {"split": split, "image_id": i, "scale": scale, "bits": 8, "pixels": 4, "mse": 0.1}
            for split, ids in (("fit", labels), ("test", [i for batch_ids, _ in test_batches for i in batch_ids]))
            for i in ids
            for scale in SCALES
        ]
        write_csv(tmp_path / "coded" / f"{q}.csv", pd.DataFrame(rows))
        drops = [
            {"task": "keypoints", "split": "fit", "image_id": i, "scale": scale, "clean": 0.9, "drop": drop}
            for i, weights in list(labels.items())[4:]  # the first four have no ground truth
            for scale, drop in zip(SCALES, weights, strict=True)
        ]
        write_csv(tmp_path / "losses" / f"{q}.csv", pd.DataFrame(drops))
    return tmp_path, asked, test_batches


def test_stage_writes_out_of_fold_weights_of_fit_and_weights_of_test(profile, images):
    folder, asked, test_batches = profile
    batches, drops = images
    train_mfip.main(folder / "coded", folder / "losses", folder / "elic.pt", "small", "elic", folder / "mfip")
    out = folder / "mfip" / "keypoints"
    assert asked == [("q2.h5", "fit"), ("q2.h5", "test")]
    assert sorted(path.name for path in out.parent.iterdir()) == ["keypoints.csv", "keypoints.json", "keypoints.pt"]

    label = importance_labels(np.repeat(np.array(list(drops.values()))[:, :, None], 2, 2))
    label[:4] = np.nan
    expected = train(batches, dict(zip(drops, label, strict=True)), QUICK, 0)
    assert json.loads(out.with_suffix(".json").read_text()) == expected.report
    assert expected.report["n_labelled"] == N - 4
    assert expected.report["epoch"] > 0
    table = out.with_suffix(".csv")
    assert read_weights(table, "fit", expected.image_ids) == approx(expected.weights, abs=1e-6)

    loaded = mfip.load(out.with_suffix(".pt"))
    shown = torch.cat([loaded(pyramid) for _, pyramid in test_batches]).detach().numpy()
    test_ids = np.array([i for ids, _ in test_batches for i in ids])
    assert read_weights(table, "test", test_ids) == approx(shown, abs=1e-6)
    frame = read_csv(table)
    assert list(frame.columns) == ["split", "image_id", "scale", "weight"]
    assert frame["image_id"][frame["split"] == "test"].is_monotonic_increasing


def test_no_label_of_test_is_read(profile):
    folder, _, _ = profile
    written = []
    for garbage in (False, True):
        if garbage:
            for path in (folder / "losses").iterdir():
                rows = read_csv(path)
                nonsense = rows.assign(split="test", image_id=999999, clean="?", drop="?")
                write_csv(path, pd.concat([rows.astype({"clean": object, "drop": object}), nonsense]))
        made = folder / f"mfip{garbage}"
        train_mfip.main(folder / "coded", folder / "losses", folder / "elic.pt", "small", "elic", made)
        out = made / "keypoints"
        written.append([out.with_suffix(suffix).read_bytes() for suffix in (".csv", ".json", ".pt")])
    assert written[0] == written[1]
