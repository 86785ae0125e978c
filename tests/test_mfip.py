import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pytest import approx

from stages import train_mfip
from stages.lib import mfip
from stages.lib.allocation import read_importance
from stages.lib.files import read_csv, write_csv
from stages.lib.loss_rate import importance_labels, sensitivity_labels
from stages.lib.mfip import LEAST_SENSITIVITY, MFIP, OBJECTNESS
from stages.lib.params import SCALES
from stages.lib.schema import InputError

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


def propose(maps):
    """For the head of the region proposal network: two channels as the logits of two anchors."""
    return [part[:, :2] - 2 for part in maps], None


def described(pyramid):
    return mfip.describe(pyramid, propose).clone()  # a tensor of inference mode would not pass a network


def predicted(model, batches):
    """Weights and sensitivities [n, 5] of all images."""
    return [torch.cat(part).detach().numpy() for part in zip(*(model(described(p)) for _, p in batches), strict=True)]


def train(batches, labels, params, seed, sensitivities=None):
    statistics = [(ids, described(pyramid).numpy()) for ids, pyramid in batches]
    return mfip.train(statistics, labels, sensitivities or dict.fromkeys(labels, np.ones(5)), params, seed)


@pytest.fixture(scope="module")
def images():
    return make_images(0)


@pytest.fixture(scope="module")
def trained(images):
    return train(*images, PARAMS, 0)


def test_objectness_counts_peaks_of_the_best_anchor():
    logits = torch.full((2, 2, 8, 8), -30.0)
    logits[0, 0, 2, 2], logits[0, 1, 2, 2], logits[0, 0, 2, 3], logits[0, 1, 6, 7] = 2, -1, 1, 0
    sure, doubtful, near, other = 1 / (1 + np.exp([-2.0, 1.0, -1.0, 0.0]))
    assert mfip.objectness(logits)[0].numpy() == approx(
        [
            sure + doubtful + near + other,
            sure**2 + doubtful**2 + near**2 + other**2,
            sure + near + other,
            sure + other,  # two objects
            sure,
        ],
        abs=1e-6,
    )
    assert mfip.objectness(logits)[1].numpy() == approx(0, abs=1e-6)


def test_an_image_is_described_scale_by_scale():
    pyramid = make_pyramid(np.full((3, 5), 2.0), 24, 40, torch.Generator().manual_seed(0))
    found = described(pyramid)
    assert found.shape == (3, 5, 3 * C + OBJECTNESS)
    for s, scale in enumerate(SCALES):
        maps = pyramid[scale].numpy().reshape(3, C, -1)
        assert found[:, s, : 3 * C].numpy() == approx(
            np.concatenate([maps.mean(2), maps.std(2), np.abs(maps).max(2)], 1), abs=1e-5
        )
        assert torch.equal(found[:, s, 3 * C :], mfip.objectness(pyramid[scale][:, :2] - 2))


def test_weights_lie_on_the_simplex_for_any_size():
    torch.manual_seed(0)
    model = MFIP(C, 8).eval()
    torch.nn.init.normal_(model.weigh.weight)
    for height, width in ((16, 16), (17, 40), (64, 32), (1, 1)):
        pyramid = make_pyramid(np.full((3, 5), 2.0), height, width, torch.Generator().manual_seed(1))
        weights, sensitivity = model(described(pyramid))
        assert weights.shape == sensitivity.shape == (3, 5)
        assert (weights >= 0).all()
        assert weights.sum(1).tolist() == approx([1] * 3, abs=1e-6)
        assert weights.std(0).max() > 1e-3 and sensitivity.std(0).max() > 1e-3  # it does look at the images
        assert (sensitivity >= LEAST_SENSITIVITY).all()


def test_learns_which_scale_has_the_energy(trained):
    held_out = trained.report["held_out"]
    assert trained.report["flags"] == []
    assert trained.report["epoch"] > 0
    assert held_out["network"]["kl"] < 0.7 * held_out["constant"]["kl"]
    assert held_out["network"]["mae"] < 0.85 * held_out["constant"]["mae"]
    assert min(held_out["correlation"].values()) > 0.4

    batches, labels = make_images(1)  # new images
    weights, _ = predicted(trained.model, batches)
    constant = np.array(list(trained.report["mean_weight"].values()))
    label = np.array(list(labels.values()))
    assert np.abs(weights - label).mean() < 0.85 * np.abs(constant - label).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_without_relation_to_the_images_give_the_constant(seed):
    batches, labels = make_images(seed, unrelated=True)
    model, report, image_ids, weights, _ = train(batches, labels, SHORT, seed)
    label = np.array(list(labels.values()))
    assert report["flags"] == ["constant"]
    assert report["epoch"] == 0
    assert predicted(model, batches)[0] == approx(np.tile(label.mean(0), (N, 1)), abs=1e-5)
    fold = np.arange(N) % 5
    assert weights[fold == 2] == approx(np.tile(label[fold != 2].mean(0), (N // 5, 1)), abs=1e-5)


def test_errors_are_those_of_their_definition(images, trained):
    label, fold = np.array(list(images[1].values())), np.arange(N) % 5
    constant = np.array([label[fold != k].mean(0) for k in fold])
    for name, weights in (("network", trained.weights), ("constant", constant)):
        errors = trained.report["held_out"][name]
        assert errors["kl"] == approx((label * np.log(label / weights)).sum(1).mean(), rel=1e-4)
        assert errors["mae"] == approx(np.abs(label - weights).mean(), rel=1e-4)
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


def test_same_seed_gives_the_same_in_any_order_of_batches(images):
    batches, labels = images
    state = torch.random.get_rng_state()
    first, second = train(batches, labels, SHORT, 3), train(batches[::-1], labels, SHORT, 3)
    other = train(batches, labels, SHORT, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.report == second.report
    assert (first.weights == second.weights).all()
    assert first.report["held_out"]["network"] != other.report["held_out"]["network"]


def test_images_without_label_are_predicted_but_not_trained_on(images):
    batches, labels = images
    without = [i for batch_ids, _ in batches[2:4] for i in batch_ids]
    expected = train(batches[:2] + batches[4:], {i: w for i, w in labels.items() if i not in without}, SHORT, 0)
    model, report, image_ids, weights, _ = train(batches, labels | dict.fromkeys(without, np.full(5, np.nan)), SHORT, 0)
    assert report == expected.report | {"n_images": N}
    unlabelled = np.isin(image_ids, without)
    assert (weights[~unlabelled] == expected.weights).all()
    assert weights[unlabelled] == approx(predicted(model, batches[2:4])[0], abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_few_images_give_the_constant_and_say_so():
    report = train(*make_images(0, 6), SHORT, 0).report
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
    for shown, expected in zip(predicted(loaded, images[0]), predicted(trained.model, images[0]), strict=True):
        assert (shown == expected).all()


IDLE = PARAMS | {"epochs": 0}  # what is learned of sensitivities does not depend on the network


@pytest.fixture
def profile(tmp_path, monkeypatch, images):
    """Tables and fake pyramids of a profile: the fit images are `images`, labels of test are absent."""
    batches, labels = images
    params = {"seed": 0, "lambdas": {"q1": 1, "q2": 2}, "mfip": QUICK | {"precode": "q2"}}
    params["cells"] = {"keypoints-elic": {"task": "keypoints", "model": "small", "codec": "elic"}}
    params["models"] = {"small": {"architecture": "resnet10_fpn"}}
    monkeypatch.setattr(train_mfip, "load_params", lambda: params)
    test_batches = [([i + 1 for i in ids], pyramid) for ids, pyramid in batches[:3]]
    asked = []

    class Features:
        def __init__(self, path, split):
            asked.append((path.name, split))
            self.images = {tuple(ids): p for ids, p in {"fit": batches, "test": test_batches[::-1]}[split]}

        def batches(self):
            return map(list, self.images)

        def pyramids(self, image_ids):
            return self.images[tuple(image_ids)]

    def load_model(path, config):
        asked.append((path.name, config["architecture"]))
        return SimpleNamespace(rpn=SimpleNamespace(head=propose))

    monkeypatch.setattr(train_mfip, "load_model", load_model)
    monkeypatch.setattr(train_mfip, "Features", Features)
    for q in params["lambdas"]:
        rows = [
            {"split": split, "image_id": i, "scale": scale, "bits": 8, "pixels": 4, "mse": 0.1}
            for split, ids in (("fit", labels), ("test", [i for batch_ids, _ in test_batches for i in batch_ids]))
            for i in ids
            for scale in SCALES
        ]
        write_csv(tmp_path / "coded" / f"{q}.csv", pd.DataFrame(rows))
        drops = []
        for n, (i, weights) in enumerate(labels.items()):
            for scale, drop in zip(SCALES, weights, strict=True):
                key = {"task": "keypoints", "split": "fit", "image_id": i, "scale": scale}
                losses = {"loss": 3 * drop, "loss_skipped": 4 * drop}
                accuracies = {"clean": 0.9, "drop": drop}
                if n < 4:  # the first four have no ground truth
                    losses, accuracies = dict.fromkeys(losses, 0), dict.fromkeys(accuracies, np.nan)
                own = {f"pseudo_{name}": value / 2 for name, value in losses.items()}
                drops.append(key | accuracies | losses | own)
        write_csv(tmp_path / "losses" / f"{q}.csv", pd.DataFrame(drops))
    write_csv(tmp_path / "uncoded.csv", pd.DataFrame(drops))
    return tmp_path, asked, test_batches


def run_stage(folder, name):
    inputs = (folder / file for file in ("small.h5", "small.pt", "coded", "losses", "uncoded.csv"))
    train_mfip.main(*inputs, "small", "elic", folder / name)
    return folder / name / "keypoints"


@pytest.mark.filterwarnings("error")
def test_stage_says_for_which_task_nothing_was_learned(profile):
    train_mfip.load_params()["mfip"] |= {"epochs": 0}
    said = "keypoints: MFIP learned nothing beyond the mean weight: constant; 116 labelled images"
    with pytest.warns(UserWarning, match=said):
        run_stage(profile[0], "mfip")


def test_stage_writes_out_of_fold_predictions_of_fit_and_predictions_of_test(profile, images):
    folder, asked, test_batches = profile
    batches, drops = images
    out = run_stage(folder, "mfip")
    assert asked == [("small.pt", "resnet10_fpn"), ("small.h5", "fit"), ("small.h5", "test")]
    names = ["keypoints.csv", "keypoints.json", "keypoints.pt"]
    assert sorted(path.name for path in out.parent.iterdir()) == names

    drop = np.repeat(np.array(list(drops.values()))[:, :, None], 2, 2)
    label, loss, skipped = importance_labels(drop), 3 * drop, 4 * drop[:, :, [0, 0, 1]]
    label[:4], loss[:4], skipped[:4] = np.nan, 0, 0
    sensitivities = dict(zip(drops, sensitivity_labels(loss, skipped), strict=True))
    expected = train(batches, dict(zip(drops, label, strict=True)), QUICK, 0, sensitivities)
    assert json.loads(out.with_suffix(".json").read_text()) == expected.report
    assert expected.report["n_labelled"] == N - 4
    assert expected.report["epoch"] > 0
    assert expected.report["sensitivity"]["0"]["r2"] > 0.1
    table = out.with_suffix(".csv")
    of_fit = read_importance(table, "fit", expected.image_ids)
    assert of_fit.weights == approx(expected.weights, abs=1e-6)
    assert of_fit.sensitivity == approx(expected.sensitivity, abs=1e-6)

    test_ids = np.array([i for ids, _ in test_batches for i in ids])
    shown = predicted(mfip.load(out.with_suffix(".pt")), test_batches)
    for read, values in zip(read_importance(table, "test", test_ids), shown, strict=True):
        assert read == approx(values, abs=1e-6)
    frame = read_csv(table)
    assert list(frame.columns) == ["split", "image_id", "scale", "weight", "sensitivity"]
    assert frame["image_id"][frame["split"] == "test"].is_monotonic_increasing


def test_no_label_of_test_is_read(profile):
    folder, _, _ = profile
    written = []
    for garbage in (False, True):
        if garbage:
            for path in [*(folder / "losses").iterdir(), folder / "uncoded.csv"]:
                rows, labels = (
                    read_csv(path),
                    ("clean", "drop", "loss", "loss_skipped", "pseudo_loss", "pseudo_loss_skipped"),
                )
                nonsense = rows.assign(split="test", image_id=999999, **dict.fromkeys(labels, 999.0))
                write_csv(path, pd.concat([rows, nonsense]))
        out = run_stage(folder, f"mfip{garbage}")
        written.append([out.with_suffix(suffix).read_bytes() for suffix in (".csv", ".json", ".pt")])
    assert written[0] == written[1]
