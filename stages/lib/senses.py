"""Pyramids -> sensitivities other than MFIP's, to compare it with: other inputs, other labels, or nothing learned."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from stages.lib import mfip
from stages.lib.ablation import Senses
from stages.lib.features import Features
from stages.lib.models import DEVICE, Sizes
from stages.lib.params import SCALES
from stages.lib.shards import map_in_memory


def other_senses(
    of_fit: Features, of_test: Features, detector: FasterRCNN, model: mfip.MFIP, smooth: np.ndarray, drops: np.ndarray
) -> Senses:
    """Features of fit and test; sensitivity labels of fit from smooth losses and from drops of AP, both [m, 5].

    The ridges see the statistics that `model`, the trained MFIP, sees, standardised as there.
    """
    splits = of_fit, of_test
    fit, test = (mfip.collect(mfip.described(part, detector.rpn.head))[1] for part in splits)
    learned = {
        "channels": mfip.learned_sensitivity(model, fit, smooth, test, ["channels"]),
        "objectness": mfip.learned_sensitivity(model, fit, smooth, test, ["objectness"]),
        "ap": mfip.learned_sensitivity(model, fit, drops, test, mfip.INPUTS),
    }
    gradients = gradients_of(of_fit, detector), gradients_of(of_test, detector)
    return Senses(learned, {"variance": (mfip.variance(fit), mfip.variance(test)), "gradient": gradients})


def score_gradients(model: FasterRCNN, pyramid: dict[str, Tensor], sizes: list[Sizes]) -> Tensor:
    """Pyramids [N, C, H_s, W_s] of images of one padded size -> |d (sum of the scores) / d (scale s)|, [N, 5].

    The scores are those of the box head, of all classes and proposals; the proposals themselves stay as they are, so
    pool, which only they see, has gradient 0.
    """
    heads, shapes = model.roi_heads, [s.resized for s in sizes]
    # RPN reads only shape, dtype and device of the images.
    blank = torch.zeros((), device=pyramid["0"].device).expand(len(sizes), 3, *sizes[0].padded)
    with torch.no_grad():
        proposals, _ = model.rpn(ImageList(blank, shapes), pyramid)
    maps = {scale: pyramid[scale].detach().requires_grad_() for scale in SCALES}
    logits, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, shapes)))
    scores = logits.softmax(1)[:, 1:].sum()  # without the background
    found = torch.autograd.grad(scores, list(maps.values()), materialize_grads=True)
    return torch.stack([of_scale.flatten(1).norm(dim=1) for of_scale in found], 1)


def gradients_of(features: Features, model: FasterRCNN) -> np.ndarray:
    """`score_gradients` of a split, [n, 5], images in rising id."""

    def of_batch(image_ids: list[int]) -> np.ndarray:
        pyramid = {scale: maps.to(DEVICE) for scale, maps in features.pyramids(image_ids).items()}
        return score_gradients(model, pyramid, [features.sizes(i) for i in image_ids]).cpu().numpy()

    batches = list(features.batches())
    order = np.argsort(np.concatenate(batches))
    return np.concatenate(map_in_memory(of_batch, batches, f"gradients {features.split}"))[order].astype(float)
