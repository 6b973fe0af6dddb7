"""What PG-OT is compared with: weighted sums under a bound, and separate constraints. Reward soups: backbones/soup.py.

b_k(p) is the largest reward k on the prompt's frontier. All rewards are divided by the store's scales first.

    weighted sum, one bound C        L = form(C - sum_k w_k r_k)
    weighted-sum bounds              L = form(C(p) - sum_k w_k r_k),   C(p) = sum_k w_k b_k(p)
    separate constraints             L = sum_k (r_k - b_k(p))^2

form is x (where the bound has no gradient, so it is a plain weighted sum), relu(x) or x^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.pareto.frontier import FrontierStore, Normalization

Form = Literal["linear", "hinge", "squared"]
WEIGHTS = ((1, 1, 1, 1), (2, 3, 2, 3), (2, 2, 3, 3), (4, 4, 1, 1))
"""The paper's ratios of ICT, HP, CLIP and HPS."""


@dataclass(frozen=True)
class WeightedSumBound:
    """An objective: a weighted sum that is worth nothing above a bound. The weights are brought to the sum 1."""

    weights: Mapping[str, float]
    frontiers: FrontierStore
    bound: float | Literal["prompt", "mean"] = "prompt"  # a number; each prompt's C(p); or the mean of C(p)
    form: Form = "hinge"
    normalize: Normalization = "prompt_pool"

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ConfigError(f"objective.weights: none is negative, and one is above 0; got {dict(self.weights)}.")

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Loss, and the weighted sum as the direction.

        Raises:
            ConfigError: if a reward or the frontier of a prompt is not there.
        """
        active = tuple(self.weights)
        share = torch.tensor([self.weights[name] for name in active], dtype=torch.float64)
        share /= share.sum()
        scale = self.frontiers.scales(self.normalize, prompts, active)
        total = (_chosen(rewards, names, active) / scale.to(rewards) * share.to(rewards)).sum(dim=1)
        gap = self._bound(prompts, active, share).to(rewards) - total
        return {"linear": gap, "hinge": gap.relu(), "squared": gap.square()}[self.form], total

    def _bound(self, prompts: Sequence[str], active: tuple[str, ...], share: Tensor) -> Tensor:
        """C for each prompt, or one C for all."""
        if not isinstance(self.bound, str):
            return share.new_tensor(self.bound)
        of = self.frontiers.prompts if self.bound == "mean" else prompts
        best = best_of(self.frontiers, of, active) / self.frontiers.scales(self.normalize, of, active)
        bounds = (best * share).sum(dim=1)
        return bounds.mean() if self.bound == "mean" else bounds


@dataclass(frozen=True)
class SeparateConstraints:
    """An objective: each reward to its own largest value on the prompt's frontier, though no one image may have all."""

    frontiers: FrontierStore
    active: tuple[str, ...] | None = None  # None: all rewards of the run
    normalize: Normalization = "prompt_pool"

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Loss, and minus the loss as the direction.

        Raises:
            ConfigError: if a reward or the frontier of a prompt is not there.
        """
        active = names if self.active is None else self.active
        gap = _chosen(rewards, names, active) - best_of(self.frontiers, prompts, active).to(rewards)
        loss = (gap / self.frontiers.scales(self.normalize, prompts, active).to(rewards)).square().sum(dim=1)
        return loss, -loss


def best_of(store: FrontierStore, prompts: Sequence[str], names: Sequence[str]) -> Float[Tensor, "p m"]:
    """b_k(p): the largest of each reward on each prompt's frontier, which is the largest of all its samples."""
    pool, mask = store.pool(prompts, names)
    return pool.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


def _chosen(rewards: Float[Tensor, "b m"], names: tuple[str, ...], active: Sequence[str]) -> Float[Tensor, "b k"]:
    missing = sorted(set(active) - set(names))
    if missing:
        raise ConfigError(f"objective: {missing} are not among the rewards {list(names)}; name some of these.")
    return rewards[:, [names.index(name) for name in active]]
