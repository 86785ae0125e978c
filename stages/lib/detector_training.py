"""Images and annotations of one split -> trained detector. One loop for all heads a model carries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from tqdm import tqdm

from stages.lib.models import DEVICE, emulates_bfloat16, read_image
from stages.lib.ranks import average, place
from stages.lib.schema import InputError
from stages.lib.training import SECONDS_BETWEEN_CHECKPOINTS, check_finite, found_training, keep_training

NOT_FINITE = "lower models.*.lr, or give other weights to begin with (models.*.weights)"


def mirrored_order(names: list[str]) -> list[int]:
    """Order of the keypoints after a horizontal flip: what was left is right."""
    swap = {"left": "right", "right": "left"}
    mirror = ["_".join(swap.get(part, part) for part in name.split("_")) for name in names]
    return [names.index(name) if name in names else i for i, name in enumerate(mirror)]


class DetectionDataset(Dataset):
    """Items: image [3, H, W] and the target of torchvision's R-CNNs, flipped at random.

    Target: boxes [n, 4] (x1 y1 x2 y2, pixels), labels [n] (category ids), masks [n, H, W] if `masks`,
    keypoints [n, K, 3] if `num_keypoints` (all zero, so without loss, for objects that have none). Crowds are left out.
    """

    def __init__(self, instances: COCO, keypoints: COCO | None, files: dict[int, Path], masks: bool):
        """files: image id -> its picture, of the images to learn from."""
        self.instances, self.files, self.masks = instances, files, masks
        # COCO gives a person the same annotation id in both files.
        self.keypoints = {a["id"]: a["keypoints"] for a in keypoints.dataset["annotations"]} if keypoints else {}
        names = next(c["keypoints"] for c in keypoints.dataset["categories"] if "keypoints" in c) if keypoints else []
        self.num_keypoints, self.mirror = len(names), mirrored_order(names)
        self.image_ids = [i for i in files if self._annotations(i)]

    def _annotations(self, image_id: int) -> list[dict]:
        return [
            a
            for a in self.instances.imgToAnns[image_id]
            if not a["iscrowd"]
            and min(a["bbox"][2:]) > 1
            and (self.num_keypoints == 0 or self.masks or a["id"] in self.keypoints)
        ]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image_id = self.image_ids[index]
        image = read_image(self.files[image_id])
        annotations = self._annotations(image_id)
        x, y, w, h = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).unbind(1)
        target = {
            "boxes": torch.stack([x, y, x + w, y + h], 1),
            "labels": torch.tensor([a["category_id"] for a in annotations]),
        }
        if self.masks:
            target["masks"] = torch.from_numpy(np.stack([self.instances.annToMask(a) for a in annotations]))
        if self.num_keypoints:
            none = [0] * (3 * self.num_keypoints)
            flat = [self.keypoints.get(a["id"], none) for a in annotations]
            target["keypoints"] = torch.tensor(flat, dtype=torch.float32).view(len(flat), self.num_keypoints, 3)
        return self._flip(image, target) if torch.rand(()) < 0.5 else (image, target)

    def _flip(self, image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        width = image.shape[-1]
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
        if "keypoints" in target:
            points = target["keypoints"][:, self.mirror]
            points[..., 0] = torch.where(points[..., 2] > 0, width - points[..., 0], 0)
            target["keypoints"] = points
        return image.flip(-1), target


def train(
    model: FasterRCNN,
    data: DetectionDataset,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Train `model` in place with AdamW and a one-cycle schedule; returns the losses, averaged over every 100 steps.

    Heads for which `data` has no targets stay as they are.

    checkpoint: a file that keeps the state of the training now and then; where it exists the training goes on from it,
    and ends with the same weights as one that was not interrupted.

    Under torchrun every process takes `batch` other images per step, and the gradients are averaged. Raises InputError
    where a loss is not finite.
    """
    rank, processes = place()
    torch.manual_seed(seed + rank)
    model.train().to(DEVICE)
    heads = model.roi_heads
    pools = heads.mask_roi_pool, heads.keypoint_roi_pool
    if not data.masks:
        heads.mask_roi_pool = None  # torchvision leaves out a head without it
    if not data.num_keypoints:
        heads.keypoint_roi_pool = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    order = torch.utils.data.RandomSampler(
        data, replacement=False, num_samples=steps * batch, generator=torch.Generator().manual_seed(seed + rank)
    )
    learners: tuple[Any, ...] = optimizer, schedule
    kept = found_training(checkpoint, model, "done", "log", "window", "random")
    done, log, window = kept.get("done", 0), kept.get("log", []), kept.get("window", [])
    if kept:
        for learner, state in zip(learners, kept["learners"], strict=True):
            learner.load_state_dict(state)
        if rank == 0:  # whose state it is
            torch.set_rng_state(kept["random"])
    loader = DataLoader(
        data,
        batch,
        sampler=list(order)[done * batch :],
        num_workers=1,
        collate_fn=_columns,
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=partial(_draw_flips, done * batch),
    )
    saved = time.monotonic()
    shown = tqdm(_batches(loader), "train detector", steps, initial=done, disable=rank > 0 or None)
    for step, (images, targets) in enumerate(shown, start=done + 1):
        images = [image.to(DEVICE) for image in images]
        targets = [{k: v.to(DEVICE) for k, v in target.items()} for target in targets]
        with torch.autocast(DEVICE.type, torch.bfloat16, not emulates_bfloat16()):  # 1.5 times as fast, on CPUs too
            losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if processes > 1:
            average([p.grad for p in model.parameters() if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        window.append({k: v.item() for k, v in losses.items()})
        check_finite("train detector", step, [*window[-1].values(), norm.item()], NOT_FINITE)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            log.append({"step": step} | {k: sum(w[k] for w in window) / len(window) for k in window[0]})
            if rank == 0:
                print(" ".join(f"{k} {v:.4g}" for k, v in log[-1].items()), flush=True)
            window = []
        if checkpoint and rank == 0 and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            drawn = torch.get_rng_state()
            keep_training(checkpoint, model, learners, done=step, log=log, window=window, random=drawn)
            saved = time.monotonic()
    if processes > 1:
        average([b for b in model.buffers() if b.is_floating_point()])  # statistics of the batch norms
    heads.mask_roi_pool, heads.keypoint_roi_pool = pools
    model.eval()
    return log


def _batches(loader: DataLoader) -> Iterator[tuple]:
    """What the process that reads the items finds wrong with one is told without its traceback."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None


def _draw_flips(count: int, worker: int) -> None:
    """What the process that reads the items draws for so many of them."""
    torch.rand(count)


def _columns(items: list[tuple]) -> tuple[tuple, ...]:
    """Items (image, target) -> (images, targets): both differ in size, so they are not stacked."""
    return tuple(zip(*items, strict=True))
