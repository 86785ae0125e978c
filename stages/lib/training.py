"""What long trainings have in common: a state to go on from once they were killed, and losses that must be finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.lib.files import atomic
from stages.lib.models import load_weights, read_checkpoint
from stages.lib.schema import InputError

SECONDS_BETWEEN_CHECKPOINTS = 300  # what a killed training loses at most


def keep_training(path: Path, module: nn.Module, learners: Iterable[Any], **plain: Any) -> None:
    """Write what `found_training` reads. learners: optimizers, schedules; plain: numbers, tensors, lists and dicts."""
    states = [learner.state_dict() for learner in learners]
    with atomic(path) as scratch:
        torch.save({"state": module.state_dict(), "learners": states} | plain, scratch)


def found_training(path: Path | None, module: nn.Module, *needed: str) -> dict[str, Any]:
    """What `keep_training` wrote, its weights in `module`; nothing where there is no such file.

    "learners": the states of the learners; `needed`: the plain values that the caller reads. Raises InputError that
    names a damaged file, which is to be removed.
    """
    if path is None or not path.exists():
        return {}
    try:
        kept = read_checkpoint(path, "learners", *needed)
        load_weights(module, kept["state"], str(path))
    except InputError as error:
        what = str(error).rpartition(";")[0]  # its remedy is that for a file which the user gave
        raise InputError(f"{what}; remove {path}, and the training begins again") from None
    return kept


def check_finite(training: str, step: int, numbers: Iterable[float], remedy: str) -> None:
    """Raises InputError where a loss or a gradient is not: after such a step, kept or not, nothing more is learned."""
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{training}: the loss or its gradient is not finite in step {step}; {remedy}")
