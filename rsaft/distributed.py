"""Sums over the processes of a run; with one process, nothing. Knows only torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rsaft.errors import ConfigError

T = TypeVar("T")


def world_size() -> int:
    """Processes of the run: 1 outside torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number: 0 outside torchrun."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over processes. One collective for each dtype and device.

    The gradient of a sharded parameter is left as it is: it comes out of the backward pass summed.
    """
    if world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if not is_sharded(tensor):
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        for tensor, total in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(total.view_as(tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it (FSDP's DTensor)."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # imports for a second, and one process needs none of it

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is. In place, changes reach the whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gathered(part: T) -> list[T]:
    """Every process's part, in the order of ranks."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


def join(device: torch.device) -> None:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); nothing outside torchrun.

    Raises:
        ConfigError: if the environment speaks of several processes, and does not say how to meet them.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if int(world) > 1 and not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"processes: WORLD_SIZE is {world} in the environment, and {', '.join(missing)} missing; start with "
                "torchrun, which sets them all, or unset WORLD_SIZE to run alone."
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
