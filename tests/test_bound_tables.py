"""What `bound` wrote -> its tables and figures."""

import numpy as np
import pandas as pd
import pytest
from pytest import approx

from stages.lib.bound import (
    KINDS,
)
from stages.lib.bound_tables import PEERS, bound_tables, describe, parts_of, tenths
from stages.lib.figures import additivity_figure
from stages.lib.results import Study
from stages.lib.tables import latex, markdown


def tuples_of(joint, additive, mirrored, images: int) -> pd.DataFrame:
    n = len(joint)
    frame = {"image_id": np.arange(n) % images, "kind": np.tile(KINDS, n)[:n], "bits": np.arange(n) * 10.0}
    return pd.DataFrame(frame | {"joint": joint, "additive": additive, "mirrored": mirrored})


def test_a_line_is_explained_whatever_its_slope_but_interacts_unless_it_is_the_sum():
    x = np.random.default_rng(0).random(300)
    same, half = (describe(tuples_of(a * x + b, x, x, 10)) for a, b in ((1, 0), (0.5, 2)))
    for found in (same, half):
        assert found[5:9] == approx((1, 1, 1, 1))  # r2, in image, mirrored, Spearman
    assert (same.slope, half.slope) == approx((1, 0.5)) and (same.interaction, half.interaction) == approx((0, 1))


def test_what_differs_between_images_only_is_not_explained_within_them():
    rng = np.random.default_rng(1)
    noise, other = rng.random((2, 3000))
    of_image = 10.0 * (np.arange(3000) % 10)
    found = describe(tuples_of(of_image + noise, of_image + other, of_image + noise, 10))
    assert found.r2 > 0.99 and found.r2_within < 0.01 and found.r2_mirrored == approx(1)


def test_thirds_are_by_rate_and_of_tuples_that_send_all_scales():
    x = np.random.default_rng(0).random(300)
    low, middle, high, skipping = parts_of(tuples_of(x, x, x, 10)).values()
    assert low["bits"].max() < middle["bits"].min() and middle["bits"].max() < high["bits"].min()
    assert len(low) + len(middle) + len(high) + len(skipping) == 300
    assert set(skipping["kind"]) == {"skipping"} and "skipping" not in set(low["kind"]) | set(high["kind"])


def test_a_tenth_is_a_tenth_of_the_tuples_in_rising_loss():
    means = tenths(tuples_of(np.arange(50.0)[::-1] * 2, np.arange(50.0)[::-1], np.zeros(50), 10))
    assert means["additive"].tolist() == [2.0 + 5 * n for n in range(10)]
    assert means["joint"].tolist() == (2 * means["additive"]).tolist()


@pytest.fixture
def study() -> Study:
    """Every method has the accuracies of uniform, at a share of its bits; mirrored, bounds save no more."""
    shares = {"uniform": 1, "mfiba": 0.8, "mfiba_skip": 0.5, "oracle": 0.6, "oracle_skip": 0.4}
    shares |= {"mfiba_pseudo": 0.75, "mfiba_pseudo_skip": 0.45}
    shares |= {"oracle_joint": 0.55, "oracle_skip_joint": 0.35, "oracle_mirrored": 0.8}

    def world(shares: dict[str, float]) -> tuple[pd.DataFrame, pd.DataFrame]:
        bits, accuracy = np.geomspace(1e3, 1e5, 6), np.linspace(0.2, 0.6, 6)
        rows = [("none", 0, 0.0, 0.7)]
        rows += [(name, p, share * bits[p], accuracy[p]) for name, share in shares.items() for p in range(6)]
        points = pd.DataFrame(rows, columns=["method", "point", "bits_per_image", "accuracy"])
        resamples = pd.concat([points.assign(resample=r) for r in range(3)])
        return points.assign(task="detection", codec="elic"), resamples

    rng = np.random.default_rng(0)
    additive = rng.random(300)
    enumeration = {"image_id": [1, 2, 1, 2], "lambda_prime": [1e-5, 1e-5, 1e-3, 1e-3]}
    costs = {"additive": [2.0, 1, 4, 4], "descent": [1.5, 1, 4, 2], "optimum": [1.0, 1, 2, 2]}
    unlucky = shares | {name: shares[peers[0]] for name, peers in PEERS.items()}
    return Study(
        *world(shares),
        *world(unlucky),
        tuples_of(additive, additive, rng.random(300), 10),
        pd.DataFrame(enumeration | costs),
    )


def test_tables_say_what_is_luck_and_what_additivity_costs(study):
    found = bound_tables({("detection", "elic"): study})
    files, mirrored, lead, enumeration, additivity = found
    saved = {row[0].rstrip(" *"): float(row[1].split()[0]) for row in files.rows}
    assert saved["oracle"] == approx(-40) and saved["oracle_skip_joint"] == approx(-65)
    assert {row[0] for row in files.rows if row[0].endswith("*")} == {f"{name} *" for name in PEERS}
    leads = {tuple(row[1:3]): [float(cell.split()[0]) for cell in row[3:]] for row in lead.rows}
    assert leads["oracle", "mfiba"] == approx([20, 0]) and leads["oracle_skip_joint", "mfiba_skip"] == approx([15, 0])
    assert leads["oracle", "mfiba_pseudo"] == approx([15, -5])
    assert leads["oracle_skip", "mfiba_pseudo_skip"] == approx([5, -5])
    assert leads["oracle_mirrored", "mfiba"] == approx([0, 0])
    assert [row[2:] for row in enumeration.rows] == [
        ["1.500", "1.250", "1.000", "50.0 %", "25.0 %", "50%", "50%"],
        ["4.000", "3.000", "2.000", "100.0 %", "50.0 %", "0%", "50%"],
    ]
    assert additivity.rows[-1][0] == "detection, elic: all" and additivity.rows[-1][5:8] == ["1.00", "1.00", "1.00"]
    assert "oracle_joint" in markdown(found) and r"oracle\_joint" in latex(found, "bound")


def test_the_figure_of_additivity_is_the_same_again(study, tmp_path):
    for name in ("a", "b"):
        additivity_figure(tmp_path / name, "detection", "elic", parts_of(study.additivity))
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
