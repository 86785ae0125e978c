"""Made-up curves of drop, loss and bits over quality, the models fitted to others like them, and an importance."""

import numpy as np
import pytest

from stages.lib.allocation import Importance
from stages.lib.loss_rate import Curves, fit_scales

N, K, PRECODE = 12, 4, 1


def make_curves(seed: int, n: int = N) -> Curves:
    rng = np.random.default_rng(seed)
    pixels = np.tile([4096.0, 1024, 256, 64, 16], (n, 1))
    rate = np.cumsum(rng.uniform(0.1, 0.6, (n, 5, K)), 2) + 0.05
    sensitivity = rng.dirichlet(np.ones(5), n)[:, :, None]
    drop = 0.2 * sensitivity * rate**-0.7 + rng.normal(0, 0.01, rate.shape)
    loss = 3 * drop + rng.normal(0, 0.02, rate.shape)
    clean = rng.uniform(0.2, 0.9, n)
    drop[1], loss[1], clean[1] = np.nan, 0, np.nan
    drop[2], clean[2] = 0, 0
    bits = np.round(rate * pixels[:, :, None]) + 1
    skipped = 1.5 * sensitivity * np.linspace(3, 1, 1 + K) + rng.normal(0, 0.02, (n, 5, 1 + K))
    skipped[:, 4] += 0.2  # or pool, whose bits are as dear as its losses are small, would never be sent
    skipped[1] = 0
    pseudo = np.concatenate([loss, skipped], 2) * rng.uniform(0.5, 1.5, (n, 5, 1)) + 0.01
    return Curves(np.arange(n) * 3 + 5, drop, loss, skipped, clean, bits, pixels, 1e-3 * rate**-0.8, pseudo)


@pytest.fixture(scope="module")
def evaluated():
    return make_curves(0)


@pytest.fixture(scope="module")
def fit():
    return fit_scales(make_curves(1, 40), PRECODE)


@pytest.fixture(scope="module")
def importance():
    rng = np.random.default_rng(3)
    return Importance(rng.dirichlet(np.ones(5), N), rng.uniform(0.05, 3, (N, 5)))
