"""Losses by a sender's own uncoded detections, and those by MFIP -> the losses that it expects of every choice.

`measuring` finds the former, pseudo-losses: every quality is coded and decoded, and the heads see each scale's choices.
How much of them is true, `fit` tells: what is expected is the mix of both that is nearest to its losses. Losses are
[n, 5, Q], Q = 2 K + 1 choices of a scale: coded at each quality, not sent without its coarser one, then with that one
at each quality.
"""

from pathlib import Path

import numpy as np

from stages.lib.files import read_json, write_json
from stages.lib.params import SCALES
from stages.lib.schema import NUMBER, Having

GUESSES = ("pseudo", "mfip")


def losses_by_mfip(sensitivity: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Predicted sensitivities [n, 5] and mean losses of fit [5, Q] -> losses [n, 5, Q]."""
    return sensitivity[:, :, None] * mean


def expected_losses(factors: np.ndarray, pseudo: np.ndarray, by_mfip: np.ndarray) -> np.ndarray:
    """Factors [5, 2] of both guesses [n, 5, Q] -> their mix [n, 5, Q]."""
    return factors[:, :1] * pseudo + factors[:, 1:] * by_mfip


def fit_mix(pseudo: np.ndarray, by_mfip: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Pseudo-losses, losses by MFIP (of its predictions out of fold) and losses of fit -> factors [5, 2] of the two.

    Least squares over the images and choices of each scale. One pair for a scale: a pair for each of its choices is
    nearer to the losses of other images, but chooses worse for them (5-fold cross-validation on fit).
    """
    guesses = np.stack([pseudo, by_mfip], 3)  # [n, 5, Q, 2]
    of_scales = ((guesses[:, s].reshape(-1, len(GUESSES)), loss[:, s].ravel()) for s in range(len(SCALES)))
    return np.stack([np.linalg.lstsq(known, wanted, rcond=None)[0] for known, wanted in of_scales])


def save_mix(path: Path, factors: np.ndarray) -> None:
    of_scales = (dict(zip(GUESSES, of_scale, strict=True)) for of_scale in factors.tolist())
    write_json(path, dict(zip(SCALES, of_scales, strict=True)))


def load_mix(path: Path) -> np.ndarray:
    """What `save_mix` wrote; raises InputError that names the file where it is another's."""
    found = read_json(path, Having(dict.fromkeys(SCALES, Having(dict.fromkeys(GUESSES, NUMBER)))))
    return np.array([[found[scale][guess] for guess in GUESSES] for scale in SCALES], float)
