"""BD-rates of methods and codecs, and their differences."""

import numpy as np
import pandas as pd
import pytest
from pytest import approx
from reported import PIXELS, ledger

from stages.lib import comparing
from stages.lib.bd_rate import Curve, bd_rate
from stages.lib.params import SCALES


def test_a_paired_interval_holds_the_differences_of_the_same_resamples() -> None:
    rng, bits = np.random.default_rng(0), np.geomspace(4e3, 9e4, 6)
    luck, noise = rng.normal(1, 0.1, (30, 1)), rng.normal(0, 0.005, (2, 30, 6))
    own = {"uniform": (1, noise[0]), "twin": (0.7, noise[1]), "mfiba_skip": (0.35, noise[1]), "mfiba": (0.7, noise[1])}
    own["free"] = (0.8, rng.normal(0, 0.005, (30, 6)))
    head = {"task": "detection", "codec": "elic"}
    points, resamples, deltas = [], [], {}
    for method, (factor, of_method) in own.items():
        curve = pd.DataFrame({"method": method, "point": range(6), "bits_per_image": factor * bits})
        points.append(curve.assign(accuracy=0.5 - 1000 / bits, **head)[::-1])
        for r in range(30):
            of_resample = {"resample": r, "bits_per_image": factor * bits * luck[r]}
            resamples.append(curve.assign(accuracy=0.5 - 1000 / bits + of_method[r], **of_resample))
    for method in own:
        both = [[p for p in resamples if p["method"].iloc[0] == m] for m in ("uniform", method)]
        curves = [[Curve(p["bits_per_image"].to_numpy(), p["accuracy"].to_numpy()) for p in part] for part in both]
        deltas[method] = np.array([bd_rate(*pair).pchip for pair in zip(*curves, strict=True)])
    compared = comparing.compare(pd.concat(points), pd.concat(resamples).sample(frac=1, random_state=0))
    found = comparing.paired(compared)
    second = found[found["method"] == "mfiba_skip"].set_index("other")
    assert second.index.tolist() == ["twin", "mfiba", "free"]
    assert second.loc["mfiba", ["difference", "ci_low", "ci_high"]].max() < -25
    found = found[found["method"] == "mfiba"].set_index("other")
    assert found.index.tolist() == ["twin", "mfiba_skip", "free"]
    numbers = found[["difference", "ci_low", "ci_high"]]
    assert numbers.loc["twin"].tolist() == [0, 0, 0] and np.ptp(deltas["mfiba"]) > 1
    assert numbers.loc["mfiba_skip", "difference"] == approx(35)
    assert numbers.loc["free", "difference"] == approx(-10)
    for other in found.index:
        ends = np.percentile(deltas["mfiba"] - deltas[other], [2.5, 97.5])
        assert numbers.loc[other, ["ci_low", "ci_high"]].tolist() == approx(ends.tolist())


def cell_of(curves: dict[str, tuple[np.ndarray, np.ndarray]], whole: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Method -> bits, accuracies, and the uncoded accuracy -> points.csv and bootstrap.csv, in which images differ."""
    rng = np.random.default_rng(1)
    parts = [
        pd.DataFrame({"method": name, "point": range(len(bits)), "bits_per_image": bits, "accuracy": accuracy})
        for name, (bits, accuracy) in {"none": (np.zeros(1), np.array([whole])), **curves}.items()
    ]
    points, resamples = pd.concat(parts, ignore_index=True), []
    for r in range(40):
        luck = rng.uniform(0.8, 1.2)
        noise = np.where(points["method"] == "none", 1, rng.normal(1, 0.01, len(points)))
        resamples.append(points.assign(resample=r, accuracy=points["accuracy"] * luck * noise))
    return points.assign(task="detection", codec="elic"), pd.concat(resamples, ignore_index=True)


BITS, ACCURACY = np.geomspace(4e3, 9e4, 33), np.linspace(0.1, 0.5, 33)


def test_at_high_accuracy_only_the_rates_there_count() -> None:
    # Half the bits up to 80 % of the uncoded accuracy, nine tenths from 90 % on.
    factor = np.interp(ACCURACY, [0.4, 0.44], [0.5, 0.9])
    points, resamples = cell_of({"uniform": (BITS, ACCURACY), "mfiba": (factor * BITS, ACCURACY)}, 0.5)
    (whole,) = comparing.compare(points, resamples).bd.itertuples()
    (high,) = comparing.compare(points, resamples, share=0.9).bd.itertuples()
    assert whole.bd_rate_pchip < -40 and high.bd_rate_pchip == approx(-10, abs=2)
    assert high.ci_low < high.bd_rate_pchip < high.ci_high < -1  # of each resample's own uncoded accuracy
    assert list(high._fields) == list(whole._fields) and high.overlap == 1


def test_high_accuracies_that_a_method_does_not_reach_have_no_bd_rate() -> None:
    points, resamples = cell_of({"uniform": (BITS, ACCURACY), "mfiba": (BITS / 2, ACCURACY / 2)}, 0.5)
    with pytest.warns(UserWarning, match="mfiba against uniform from 90% of the uncoded accuracy on, detection, elic"):
        (high,) = comparing.compare(points, resamples, share=0.9).bd.itertuples()
    assert np.isnan(high.bd_rate_pchip) and high.flags == "no overlap; resamples_failed:100%"


def test_a_direct_comparison_has_the_other_method_as_its_anchor() -> None:
    better = {"static": 0.8, "mfiba": 0.6, "oracle": 0.4}
    curves = {"uniform": (BITS, ACCURACY)} | {name: (factor * BITS, ACCURACY) for name, factor in better.items()}
    points, resamples = cell_of(curves, 0.5)
    found = comparing.direct(points, resamples).set_index("anchor")
    assert found["method"].to_dict() == {"static": "mfiba", "oracle": "mfiba"}
    assert found["bd_rate_pchip"].to_numpy() == approx([-25, 50])
    for row in found.itertuples():
        assert row.ci_low < row.bd_rate_pchip < row.ci_high
    assert comparing.direct(points[points["method"] != "mfiba"], resamples).empty


def test_without_the_hero_nothing_is_paired() -> None:
    points = pd.DataFrame({"task": "detection", "codec": "elic", "method": ["uniform"] * 2, "point": [0, 1]})
    points = points.assign(bits_per_image=[1e3, 2e3], accuracy=[0.1, 0.2])
    assert comparing.paired(comparing.compare(points, points.assign(resample=0))).empty


def test_a_codec_of_a_fifth_fewer_bits_than_hevc_saves_20_percent() -> None:
    bits = np.geomspace(4e3, 9e4, 6)
    points, resamples = [], {}
    for codec, factor in (("elic", 0.8), ("hevc", 1.0), ("tcm", 0.5)):
        curve = pd.DataFrame({"method": "uniform", "point": range(6), "bits_per_image": factor * bits})
        curve["accuracy"] = 0.5 - 100 / bits
        points.append(curve.assign(task="detection", codec=codec))
        luck = [curve.assign(resample=r, bits_per_image=factor * bits * (1 + r / 100)) for r in range(5)]
        resamples["detection", codec] = pd.concat([*luck, luck[0].assign(method="static")])
    points = pd.concat([*points, points[0].assign(method="static", bits_per_image=1.0)])
    found = comparing.codec_bd_rates(points, resamples).set_index("codec")
    assert found.index.tolist() == ["elic", "tcm"] and set(found["anchor"]) == {"hevc"}
    for codec, saved in (("elic", -20), ("tcm", -50)):
        assert found.loc[codec, ["bd_rate_pchip", "ci_low", "ci_high"]].tolist() == pytest.approx([saved] * 3)
    without = comparing.codec_bd_rates(points[points["codec"] != "hevc"], resamples)
    assert without.empty and without.columns.tolist() == ["task", "codec", *comparing.BD_RATE[3:]]


def test_a_codecs_curve_is_the_mean_over_fit_of_bits_and_psnr() -> None:
    curve = comparing.rate_distortion([ledger(0), ledger(3)]).set_index("scale")
    assert len(curve) == 2 * len(SCALES)
    for scale, pixels in PIXELS.items():
        assert curve.loc[scale, "bits"].tolist() == [pixels / 8, pixels]
        # Errors 1 and 2, or an eighth of it: the PSNR is averaged, not the error.
        assert curve.loc[scale, "psnr"].tolist() == approx([-10 * np.log10(2) / 2, 10 * np.log10(8) - 5 * np.log10(2)])


def test_a_codec_with_a_fifth_less_rate_saves_a_fifth_of_hevcs_on_every_scale() -> None:
    curves = {
        ("small", codec): comparing.rate_distortion([ledger(q, rate) for q in range(6)])
        for codec, rate in (("elic", 0.8), ("hevc", 1.0))
    }
    found = comparing.feature_bd_rates(curves)
    assert found["scale"].tolist() == list(SCALES) and set(found["codec"]) == {"elic"}
    assert found["bd_rate_pchip"].to_numpy() == approx(-20) and found["bd_rate_akima"].to_numpy() == approx(-20)
    assert found["overlap"].to_numpy() == approx(1)
    assert comparing.feature_bd_rates({("small", "elic"): curves["small", "elic"]}).empty
