"""Feature planes of the training split -> packing and trained codec."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stages.lib.features import Features
from stages.lib.learned import LATENT_STRIDE, STRIDE, LearnedCodec
from stages.lib.models import DEVICE, emulates_bfloat16
from stages.lib.params import SCALES
from stages.lib.planes import Packing, learn_packing, pack, principal
from stages.lib.progress import progress
from stages.lib.ranks import average, place
from stages.lib.shards import cores
from stages.lib.training import SECONDS_BETWEEN_CHECKPOINTS, check_finite, found_training, keep_training

# A GPU would wait for the reading and rotating of its crops; on a CPU the networks need all cores themselves.
FEEDERS = min(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16) if DEVICE.type == "cuda" else 0
SAMPLES = 3  # crops in a step, in units of the batch of scale 0
TRANSFORM_RATE = 0.1  # of the learning rate: it starts near its optimum, the entropy model at noise
NOT_FINITE = "lower codecs.*.lr, or give other weights to begin with (codecs.*.init)"


def fit_packing(features: Features, kind: str) -> Packing:
    """One pass over the split: moments of the channels -> packing."""
    moments: dict[str, tuple[int, Tensor, Tensor]] = {}
    for image_id in progress(features.image_ids, "channel statistics", len(features.image_ids)):
        for scale in SCALES:
            x = features.scale(image_id, scale).flatten(1).double()
            count, first, second = moments.get(scale, (0, 0.0, 0.0))
            moments[scale] = (count + x.shape[1], first + x.sum(1), second + x @ x.T)
    return learn_packing(kind, moments)


def block_basis(features: Features, packing: Packing) -> Tensor:
    """One pass over the split -> the principal components of 16 x 16 blocks of grey planes, [256, 16, 16].

    Each scale counts by the side of its maps: in between its share of the pixels, which would leave all to scale 0,
    and equal shares, with which small maps, whose blocks hold several tiles, spoil it for large ones.
    """
    covariance = torch.zeros(256, 256, dtype=torch.float64)
    for image_id in progress(features.image_ids, "block statistics", len(features.image_ids)):
        for scale in SCALES:
            maps = features.scale(image_id, scale)
            plane, _ = pack(maps, scale, packing)
            centred = functional.pad(plane - 0.5, (0, -plane.shape[2] % 16, 0, -plane.shape[1] % 16))
            blocks = functional.unfold(centred[None], 16, stride=16)[0].double()  # [256, blocks]
            covariance += max(maps.shape[1:]) / blocks.shape[1] * blocks @ blocks.T
    return principal(covariance).view(256, 16, 16)


def random_crops(
    features: Features, packing: Packing, batch: int, crop: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops of planes, padded to multiples of 32, and the masks of their real pixels.

    `batch` crops of scale 0, which has most of the pixels, and half as many of each other scale. Yields
    (planes [B, c, h, w], masks [B, 1, h, w]), the crops of one shape together.
    """
    shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for scale in SCALES:
        for image_id in rng.choice(features.image_ids, batch if scale == "0" else -(-batch // 2)):
            plane, _ = pack(features.scale(int(image_id), scale), scale, packing)
            top, left = (int(rng.integers(0, max(side - crop, 0) + 1)) for side in plane.shape[1:])
            plane = plane[:, top : top + crop, left : left + crop]
            height, width = plane.shape[1:]
            padding = (0, -width % STRIDE, 0, -height % STRIDE)
            mask = functional.pad(torch.ones(1, height, width), padding)
            plane = functional.pad(plane, padding, value=0.5)
            shapes.setdefault(plane.shape, []).append((plane, mask))
    for pairs in shapes.values():
        planes, masks = zip(*pairs, strict=True)
        yield torch.stack(planes), torch.stack(masks)


class Crops(Dataset):
    """Item k: the `random_crops` of step k, in one process's part of the training; the same whoever makes them."""

    def __init__(self, features: Features, packing: Packing, schedule: Schedule, seeds: tuple[int, int]):
        self.features, self.packing, self.schedule, self.seeds = features, packing, schedule, seeds

    def __len__(self) -> int:
        return self.schedule.entropy_steps + self.schedule.steps

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([*self.seeds, step])
        return list(random_crops(self.features, self.packing, self.schedule.batch, self.schedule.crop, rng))


class Schedule(NamedTuple):
    """`entropy_steps` of the entropy model alone, then `steps` of everything; `batch` and `crop` as in random_crops."""

    entropy_steps: int
    steps: int
    batch: int
    crop: int
    lr: float


def train(
    codec: LearnedCodec,
    features: Features,
    packing: Packing,
    schedule: Schedule,
    seed: int,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Minimise  bits + lambda * 255^2 * squared error  in place, lambda log-uniform in the codec's range per sample.

    A crop counts by the side, not the area, of its real pixels, or a step would be about scale 0 alone. First the
    entropy model learns alone, several times as fast: as long as the transform is orthonormal, as it starts,
    the error of a plane is that of its latents. Then everything learns, the transform at a tenth of the rate. Returns
    loss, bits and squared error per plane pixel, averaged over every 100 steps.

    checkpoint: a file that keeps the state of the training now and then; where it exists the training goes on from it,
    and ends with the same weights as one that was not interrupted.

    Under torchrun every process takes other crops and lambdas in a step, and the gradients are averaged; the losses are
    those of its own crops. Raises InputError where a loss is not finite.
    """
    rank, processes = place()
    crops = Crops(features, packing, schedule, (seed, rank))
    codec.train().to(DEVICE).to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    transform = [p for part in (codec.net.g_a, codec.net.g_s) for p in part.parameters()]
    quantiles = [p for name, p in codec.named_parameters() if name.endswith(".quantiles")]
    apart = {id(p) for p in transform + quantiles}
    others = [p for p in codec.parameters() if id(p) not in apart]

    def latent_error(x: Tensor, mask: Tensor, lmbda: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = codec.net.g_a(x - codec.centre).float()
        y_hat, bits = codec.quantised(y, lmbda)
        real = functional.max_pool2d(mask, LATENT_STRIDE)
        return ((y_hat - y).square() * real).flatten(1).sum(1), bits

    def plane_error(x: Tensor, mask: Tensor, lmbda: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, bits = codec(x, lmbda)
        return ((x_hat.float() - x).square() * mask).flatten(1).sum(1), bits

    def group(learning: list[nn.Parameter], lr: float) -> dict[str, Any]:
        return {"params": learning, "lr": lr}

    kept = found_training(checkpoint, codec, "done", "log", "window")
    done, log, window = kept.get("done", 0), kept.get("log", []), kept.get("window", [])
    unseen = range(done, len(crops))
    feed = iter(DataLoader(crops, None, sampler=unseen, num_workers=FEEDERS, generator=torch.Generator()))
    saved = time.monotonic()
    for errors_and_bits, first, steps, groups in (
        (latent_error, 0, schedule.entropy_steps, [group(others, schedule.lr)]),
        (
            plane_error,
            schedule.entropy_steps,
            schedule.steps,
            [group(others, schedule.lr), group(transform, schedule.lr * TRANSFORM_RATE)],
        ),
    ):
        if done >= first + steps:
            continue
        optimizer, aux_optimizer = torch.optim.Adam(groups), torch.optim.Adam(quantiles, 1e-2)
        peaks = [group["lr"] for group in groups]
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.05)
        learners: tuple[Any, ...] = optimizer, aux_optimizer, rates
        if done > first:
            for learner, state in zip(learners, kept["learners"], strict=True):
                learner.load_state_dict(state)
        left = range(done - first + 1, steps + 1)
        for step in tqdm(left, "train codec", steps, initial=done - first, disable=rank > 0 or None):
            torch.manual_seed(_seed(seed, rank, done))
            optimizer.zero_grad(set_to_none=True)
            total = np.zeros(4)
            for x, mask in next(feed):
                x, mask = x.to(DEVICE), mask.to(DEVICE)
                low, high = codec.log_lambdas[0].item(), codec.log_lambdas[-1].item()
                lmbda = torch.empty(len(x)).uniform_(low, high).exp().to(DEVICE)
                with torch.autocast(DEVICE.type, torch.bfloat16, not emulates_bfloat16()):
                    error, bits = errors_and_bits(x, mask, lmbda)
                loss, pixels = bits + lmbda * 255**2 * error, mask.flatten(1).sum(1)
                (loss / pixels.sqrt() / (SAMPLES * schedule.batch * schedule.crop)).sum().backward()
                total += [value.sum().item() for value in (loss, bits, error, pixels)]
            learning = [p for group in groups for p in group["params"]]
            if processes > 1:
                average([p.grad for p in learning if p.grad is not None])
            norm = nn.utils.clip_grad_norm_(learning, 1.0)
            check_finite("train codec", done + 1, [*total, norm.item()], NOT_FINITE)
            optimizer.step()
            rates.step()
            aux_optimizer.zero_grad(set_to_none=True)
            codec.net.aux_loss().backward()  # of the weights alone: the same in all processes
            aux_optimizer.step()
            done += 1
            window.append(total.tolist())
            if step % 100 == 0 or step == steps:
                loss, bits, error, pixels = np.sum(window, 0).tolist()
                log.append({"step": step, "loss": loss / pixels, "bpp_plane": bits / pixels, "mse": error / pixels})
                if rank == 0:
                    print(" ".join(f"{k} {v:.4g}" for k, v in log[-1].items()), flush=True)
                window = []
            if checkpoint and rank == 0 and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                keep_training(checkpoint, codec, learners, done=done, log=log, window=window)
                saved = time.monotonic()
    codec.eval()
    return log


def _seed(*numbers: int) -> int:
    """One seed of several numbers: the randomness of a step does not depend on the steps before it."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
