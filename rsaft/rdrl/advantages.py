"""From the rewards of a group of samples to an advantage for each: constants, for trainers without a pathwise gradient.

Groups are the samples of one prompt. Everything is computed in float64 and returned as it came. A sample whose reward
is not finite gets 0 and takes no part: `valid` is False for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_zscore(
    rewards: Float[Tensor, " n"],
    group: Int[Tensor, " n"],
    valid: Bool[Tensor, " n"] | None = None,
    *,
    eps: float = 1e-4,
    global_std: bool = False,
) -> Float[Tensor, " n"]:
    """(r - mean of its group) / (std of its group + eps): GRPO (Shao et al., 2024).

    Args:
        rewards: one a sample.
        group: number of each sample's group, its prompt.
        valid: which samples take part; by default those with a finite reward.
        eps: floor of the deviation, in the rewards' unit. A group of equal rewards gets 0.
        global_std: divide by the deviation over all samples (Flow-GRPO's option); small groups are steadier so.
    """
    r, valid = _prepared(rewards, valid)
    centred = r - group_mean(r, group, valid)
    squares = torch.where(valid, centred.square(), 0)
    if global_std:
        kept = r[valid]
        std = kept.std(correction=0) if len(kept) else r.new_zeros(())
    else:
        std = group_mean(squares, group, valid).sqrt()
    return torch.where(valid, centred / (std + eps), 0).to(rewards.dtype)


def gdpo(
    rewards: Float[Tensor, "n m"],
    weights: Float[Tensor, " m"],
    group: Int[Tensor, " n"],
    valid: Bool[Tensor, " n"] | None = None,
    *,
    eps: float = 1e-4,
) -> Float[Tensor, " n"]:
    """Each reward standardised within its group, then summed by weight, then standardised over the batch (GDPO, 2026).

    A reward with a large unit cannot drown the others, as it does where rewards are summed first.
    """
    if valid is None:
        valid = torch.isfinite(rewards).all(dim=1)
    columns = [group_zscore(column, group, valid, eps=eps).double() for column in rewards.T]
    total = torch.stack(columns, dim=1) @ weights.double()
    one = torch.zeros_like(group)
    return group_zscore(total, one, valid, eps=eps).to(rewards.dtype)


def group_rank(
    rewards: Float[Tensor, " n"], group: Int[Tensor, " n"], valid: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, " n"]:
    """Rank within the group, from -1 (worst) to 1 (best); equal rewards share theirs, and a group of one gets 0.

    That is the share of the group's other samples that it beats, minus the share that beat it: whatever increasing
    transform the rewards go through, ranks stay.
    """
    r, valid = _prepared(rewards, valid)
    pairs = (group[:, None] == group[None, :]) & valid[:, None] & valid[None, :]
    wins = torch.where(pairs, torch.sign(r[:, None] - r[None, :]), 0).sum(dim=1)
    others = (pairs.sum(dim=1) - 1).clamp_min(1)
    return torch.where(valid, wins / others, 0).to(rewards.dtype)


@dataclass(frozen=True)
class History:
    """The last rewards of each prompt, oldest first; what `running_zscore` goes by."""

    rewards: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


def running_zscore(
    rewards: Float[Tensor, " n"],
    group: Int[Tensor, " n"],
    history: History,
    *,
    size: int = 32,
    least: int = 16,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, " n"], History]:
    """z-score by the prompt's last `size` rewards, this batch's among them (DDPO's statistics; Black et al., 2024).

    A prompt with fewer than `least` of them is standardised by the whole batch.

    Args:
        rewards: one a sample; one that is not finite gets 0 and is not kept.
        group: the prompt's number: the same number at every update.
        history: what the last call returned; `History()` at first.
        size: rewards that are kept of each prompt.
        least: rewards that a prompt needs for statistics of its own.
        eps: floor of the deviation.

    Returns:
        Advantages, and the history for the next call.
    """
    r, valid = _prepared(rewards, None)
    kept = dict(history.rewards)
    for prompt, value in zip(group[valid].tolist(), r[valid].tolist(), strict=True):
        kept[prompt] = (*kept.get(prompt, ()), value)[-size:]
    advantages = torch.zeros_like(r)
    for prompt in group.unique().tolist():
        rows = valid & (group == prompt)
        own = kept.get(prompt, ())
        basis = r.new_tensor(own) if len(own) >= least else r[valid]
        if rows.any():
            advantages[rows] = (r[rows] - basis.mean()) / (basis.std(correction=0) + eps)
    return advantages.to(rewards.dtype), History(kept)


def group_mean(values: Float[Tensor, " n"], group: Int[Tensor, " n"], valid: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """For each sample, the mean of the valid values of its group; 0 where there are none."""
    _, row = torch.unique(group, return_inverse=True)
    sums = values.new_zeros(len(values)).index_add_(0, row, torch.where(valid, values, 0))
    counts = values.new_zeros(len(values)).index_add_(0, row, valid.to(values.dtype))
    return (sums / counts.clamp_min(1))[row]


def _prepared(
    rewards: Float[Tensor, " n"], valid: Bool[Tensor, " n"] | None
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    r = rewards.detach().double()
    valid = torch.isfinite(r) if valid is None else valid & torch.isfinite(r)
    return torch.where(valid, r, 0), valid
