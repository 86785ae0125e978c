"""Processes that torchrun started, each with a GPU of its own -> one training."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stages.lib.schema import InputError


def join() -> None:
    """Meet the other processes; without torchrun there are none. Raises InputError where a GPU for each is lacking."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if torch.cuda.is_available():
            rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if rank >= gpus:
                raise InputError(f"torchrun began process {rank + 1} on {gpus} GPUs; lower --nproc-per-node to {gpus}")
            torch.cuda.set_device(rank)  # or all would share the first
        dist.init_process_group()


def place() -> tuple[int, int]:
    """Number of this process, and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors: list[Tensor]) -> None:
    """Replace tensors by their mean over all processes, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, flat.div_(dist.get_world_size()).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def shared(value: Any) -> Any:
    """What the first process has, in all of them."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
