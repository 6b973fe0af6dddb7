"""What metrics.jsonl says of one update: means over the samples of all processes that were not masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from rsaft import distributed
from rsaft.types import Batch, StepOutput


def update_record(
    output: StepOutput, names: Sequence[str], *, step: int, device: torch.device
) -> tuple[dict[str, Any], float]:
    """The record of an update, and the share of the global batch's samples that were not masked.

    Args:
        output: of this process's step.
        names: of the rewards, in the order of the losses' columns.
        step: updates done, this one included.
        device: of the backbone.

    Returns:
        (record, share in [0, 1]); a reward is None where every sample was masked. Cost: one collective.
    """
    sums = torch.zeros(3 + len(names), dtype=torch.float64)
    for loss in output.losses:
        good = torch.where(loss.valid[:, None], loss.rewards, 0.0)
        sums[0] += len(loss.valid)
        sums[1] += int(loss.valid.sum())
        sums[2] += float(loss.value) * len(loss.valid)
        sums[3:] += good.sum(dim=0).double().cpu()
    own = output.logs | {  # of the losses, their mean over micro-batches
        key: math.fsum(loss.logs[key] for loss in output.losses) / len(output.losses) for key in output.losses[0].logs
    }
    logs = torch.tensor(list(own.values()), dtype=torch.float64) / distributed.world_size()
    is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    both = torch.cat([sums, logs]).to(device if is_nccl else "cpu")
    distributed.sum_([both])
    total, valid, loss_sum, *rest = both.tolist()
    record: dict[str, Any] = {"kind": "train", "step": step, "loss": loss_sum / max(valid, 1)}
    record |= {f"reward/{name}": value / valid if valid else None for name, value in zip(names, rest, strict=False)}
    record |= {"nonfinite/reward": int(total - valid)}
    record |= dict(zip(own, rest[len(names) :], strict=True))
    return record, valid / total


def nonfinite_sentence(output: StepOutput, names: Sequence[str], batch: Batch, *, in_a_row: int) -> str:
    """What stops a run that found no finite gradient for `in_a_row` updates, of which that of `batch` was the last."""
    values = torch.cat([loss.rewards for loss in output.losses])
    bad = [name for k, name in enumerate(names) if not bool(torch.isfinite(values[:, k]).all())]
    return (
        f"step {batch.step + 1}: no finite gradient for {in_a_row} updates in a row (rewards that are not finite: "
        f"{bad or 'none, so the gradient itself'}; first prompt '{batch.prompts[0]}'); the weights are those "
        "of the last good update; lower the learning rate, or look at that reward."
    )
