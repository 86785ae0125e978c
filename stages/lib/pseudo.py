"""Losses by a sender's own uncoded detections, and those by MFIP -> the losses that it expects of every choice.

`measuring` finds the former, pseudo-losses: every quality is coded and decoded, and the heads see each scale's choices.
How much of them is true, `fit` tells: what is expected is the mix of both that is nearest to its losses. Losses are
[n, 5, Q], Q = 2 K + 1 choices of a scale: coded at each quality, not sent without its coarser one, then with that one
at each quality.
"""

from pathlib import Path

import numpy as np

from stages.lib.files import read_json, write_json
from stages.lib.loss_rate import FOLDS
from stages.lib.params import SCALES
from stages.lib.schema import Having, numbers

GUESSES = ("pseudo", "mfip")


def losses_by_mfip(sensitivity: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Predicted sensitivities [n, 5] and mean losses of fit [5, Q] -> losses [n, 5, Q]."""
    return sensitivity[:, :, None] * mean


def expected_losses(factors: np.ndarray, pseudo: np.ndarray, by_mfip: np.ndarray) -> np.ndarray:
    """Factors [5, Q, 2] of both guesses [n, 5, Q] -> their mix [n, 5, Q]."""
    return factors[:, :, 0] * pseudo + factors[:, :, 1] * by_mfip


def fit_mix(pseudo: np.ndarray, by_mfip: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Pseudo-losses, losses by MFIP (of its predictions out of fold) and losses of fit -> factors [5, Q, 2] of the two.

    Each choice of each scale has the least-squares factors over the images. A scale for which, by 5-fold
    cross-validation (fold = index mod 5), MFIP alone is at least as near keeps that: factors 0 and 1.
    """
    factors = np.tile([0.0, 1.0], (*loss.shape[1:], 1))
    fold = np.arange(len(loss)) % FOLDS
    for s in range(len(SCALES)):
        guesses = np.stack([pseudo[:, s], by_mfip[:, s]], 2)  # [n, Q, 2]
        held_out = np.empty_like(loss[:, s])
        for k in np.unique(fold):
            held_out[fold == k] = _mixed(_factors(guesses[fold != k], loss[fold != k, s]), guesses[fold == k])
        if ((held_out - loss[:, s]) ** 2).sum() < ((by_mfip[:, s] - loss[:, s]) ** 2).sum():
            factors[s] = _factors(guesses, loss[:, s])
    return factors


def save_mix(path: Path, factors: np.ndarray) -> None:
    parts = {scale: dict(zip(GUESSES, of.T.tolist(), strict=True)) for scale, of in zip(SCALES, factors, strict=True)}
    write_json(path, parts)


def load_mix(path: Path, k: int) -> np.ndarray:
    """What `save_mix` wrote for k qualities; raises InputError that names the file where it is another's."""
    of_scale = Having(dict.fromkeys(GUESSES, numbers(2 * k + 1)))
    found = read_json(path, Having(dict.fromkeys(SCALES, of_scale)))
    return np.stack([np.array([found[scale][guess] for guess in GUESSES], float).T for scale in SCALES])


def _factors(guesses: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Guesses [n, Q, 2], losses [n, Q] -> least-squares factors [Q, 2]."""
    return np.stack([np.linalg.lstsq(guesses[:, q], loss[:, q], rcond=None)[0] for q in range(loss.shape[1])])


def _mixed(factors: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """[Q, 2], [n, Q, 2] -> [n, Q]."""
    return (guesses * factors).sum(2)
