"""From a reward matrix (b, m) to a loss and a direction for each sample. Rewards always maximise.

Each objective treats a sample by its own rewards alone. Those that need a group of samples (ranks, z-scores within a
prompt) are in `rsaft.rdrl.advantages`; those that change one reward (clipping, PAR) in `rsaft.rewards.shaping`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
        scaled = _weighted_columns(rewards, names, self.weights)
        smooth = torch.logsumexp(-scaled / self.temperature, dim=1) - math.log(scaled.shape[1])
        return self.temperature * smooth, -self.temperature * smooth


@dataclass(frozen=True)
class Min:
    """loss = -min_k w_k r_k: the worst reward alone (worst-case optimisation of an ensemble, Coste et al., 2024).

    Its gradient goes to one reward, and jumps where two are equal: `SoftMin` is the smooth form.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        _refuse_empty(self.weights)

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        least = _weighted_columns(rewards, names, self.weights).amin(dim=1)
        return -least, least


@dataclass(frozen=True)
class Conservative:
    """loss = -(mean_k w_k r_k - penalty * spread_k w_k r_k): where the members of an ensemble disagree, less.

    spread "var" is uncertainty-weighted optimisation (UWO, Coste et al., 2024), "std" has the rewards' own unit. Both
    are of the population (divided by the number of rewards). Bring the rewards to one scale first. Not monotone in
    every reward: one that is far above the others lowers the score.
    """

    weights: Mapping[str, float]
    penalty: float = 1.0
    spread: Literal["std", "var"] = "std"

    def __post_init__(self) -> None:
        _refuse_empty(self.weights)
        if self.penalty < 0:
            raise ConfigError(f"objective.penalty: of disagreement, so penalty >= 0; got {self.penalty}.")

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        columns = _weighted_columns(rewards, names, self.weights)
        spread = columns.var(dim=1, correction=0)
        if self.spread == "std":  # the root has no gradient at 0, where all agree: there its slope is taken as 0
            agree = spread == 0
            spread = torch.where(agree, spread, spread.masked_fill(agree, 1).sqrt())
        score = columns.mean(dim=1) - self.penalty * spread
        return -score, score


@dataclass(frozen=True)
class LogSigmoid:
    """loss = -sum_k w_k log sigmoid((r_k - reference_k) / scale): the log-probability that every reward is good enough.

    A soft AND (Wang et al., 2024, "Transforming and combining large language model rewards"). Its slope in a reward,
    w sigmoid(-(r - reference) / scale) / scale, fades where that reward is good already.
    """

    weights: Mapping[str, float]
    references: Mapping[str, float]  # a good score of each reward, such as the base model's 85th percentile
    scale: float = 1.0

    def __post_init__(self) -> None:
        _refuse_empty(self.weights)
        if self.scale <= 0:
            raise ConfigError(f"objective.scale divides the rewards, so scale > 0; got {self.scale}.")
        missing = sorted(set(self.weights) - set(self.references))
        if missing:
            raise ConfigError(f"objective.references: {missing} have a weight and no reference; give one for each.")

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        references = rewards.new_tensor([self.references.get(name, 0.0) for name in names])
        good = torch.nn.functional.logsigmoid((rewards - references) / self.scale)
        total = weighted_rewards(good, names, self.weights)
        return -total, total


def _weighted_columns(
    rewards: Float[Tensor, "b m"], names: tuple[str, ...], weights: Mapping[str, float]
) -> Float[Tensor, "b k"]:
    """w_k r_k of the rewards that have a weight."""
    weighted_rewards(rewards, names, weights)  # for its check of the names
    used = [k for k, name in enumerate(names) if name in weights]
    return rewards[:, used] * rewards.new_tensor([weights[names[k]] for k in used])
