"""From a reward matrix (b, m) to a loss and a direction for each sample. Rewards always maximise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError


def weighted_rewards(
    rewards: Float[Tensor, "b m"], names: tuple[str, ...], weights: Mapping[str, float]
) -> Float[Tensor, " b"]:
    """sum_k w_k r_k for each sample; a reward without a weight is measured but not trained on.

    Raises:
        ConfigError: if a weight names no reward.
    """
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ConfigError(f"objective.weights: {unknown} are not among the rewards {list(names)}; name one of these.")
    return rewards @ rewards.new_tensor([weights.get(name, 0.0) for name in names])


def _refuse_empty(weights: Mapping[str, float]) -> None:
    if not weights:
        raise ConfigError("objective.weights: found none; give the weight of at least one reward by its name.")


@dataclass(frozen=True)
class WeightedSum:
    """loss = -sum_k w_k r_k."""

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        _refuse_empty(self.weights)

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        total = weighted_rewards(rewards, names, self.weights)
        return -total, total


@dataclass(frozen=True)
class Hinge:
    """loss = scale * relu(margin - sum_k w_k r_k): no gradient above the margin (ReFL: margin 2, scale 1e-3).

    The direction leaves the hinge out: above the margin its gradient would be 0, and 0/0 no direction.
    """

    weights: Mapping[str, float]
    margin: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        _refuse_empty(self.weights)

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        total = weighted_rewards(rewards, names, self.weights)
        return self.scale * torch.relu(self.margin - total), total


@dataclass(frozen=True)
class SoftMin:
    """loss = temperature * log mean_k exp(-w_k r_k / temperature): the worst reward leads.

    temperature -> 0 is the minimum, -> infinity the mean.
    """

    weights: Mapping[str, float]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _refuse_empty(self.weights)
        if self.temperature <= 0:
            raise ConfigError(f"objective.temperature: SoftMin needs temperature > 0; got {self.temperature}.")

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        weighted_rewards(rewards, names, self.weights)  # for its check of the names
        used = [k for k, name in enumerate(names) if name in self.weights]
        scaled = rewards[:, used] * rewards.new_tensor([self.weights[names[k]] for k in used])
        smooth = torch.logsumexp(-scaled / self.temperature, dim=1) - math.log(len(used))
        return self.temperature * smooth, -self.temperature * smooth
