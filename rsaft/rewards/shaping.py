"""Rewards around a reward that change its values: each a Reward, fixed once it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.types import Images, Reward


@dataclass(frozen=True)
class Standardized:
    """(r - mean) / std, with the mean and deviation of `reward` on a reference set, such as the base model's images.

    So that rewards of different units can be weighed. Fixed numbers, not running ones: a reward is a function, and a
    run that goes on from a checkpoint sees the same one.
    """

    reward: Reward
    mean: float
    std: float

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"std: a deviation to divide by, so std > 0; got {self.std}.")

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return (self.reward(images, prompts) - self.mean) / self.std


def standardized(reward: Reward, images: Images, prompts: Sequence[str]) -> Standardized:
    """`Standardized` by the reward's own scores of reference images.

    Raises:
        ConfigError: if all scores are equal, or one is not finite.
    """
    with torch.no_grad():
        scores = reward(images, prompts).double()
    std = float(scores.std()) if len(scores) > 1 else 0.0
    if not std > 0:  # also where it is not a number
        raise ConfigError(
            f"standardized: the reward's scores of {len(scores)} reference images have deviation {std}; "
            "give images that it tells apart."
        )
    return Standardized(reward, float(scores.mean()), std)


@dataclass(frozen=True)
class Clipped:
    """min(max(r, low), high): a baseline; outside the bounds its gradient is 0."""

    reward: Reward
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"low, high: bounds need low < high; got {self.low} and {self.high}.")

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.reward(images, prompts).clamp(self.low, self.high)


def min_max(reward: Reward, low: float, high: float) -> Standardized:
    """(r - low) / (high - low), with the least and greatest score of a reference set: a baseline."""
    return Standardized(reward, low, high - low)


@dataclass(frozen=True)
class PAR:
    """mean_j sigmoid(k (r - r_ref_j)): the chance to be preferred to the base model's images of the same prompt.

    Preference as reward (Fu et al., 2025, "Reward shaping to mitigate reward hacking in RLHF"). Lies in (0, 1); its
    slope k s (1 - s) fades once an image beats all references, so there is little to gain from hacking.
    """

    reward: Reward
    references: Mapping[str, Sequence[float]]  # prompt -> the reward's scores of reference images; one is enough
    k: float = 1.0  # preference for each unit of reward

    def __post_init__(self) -> None:
        empty = sorted(prompt for prompt, scores in self.references.items() if not len(scores))
        if empty:
            raise ConfigError(f"references: found no score for the prompt '{empty[0]}'; give at least one.")
        if self.k <= 0:
            raise ConfigError(f"k: the slope of the preference, so k > 0; got {self.k}.")

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Raises ConfigError for a prompt without references."""
        unknown = sorted(set(prompts) - set(self.references))
        if unknown:
            raise ConfigError(
                f"PAR: there are no reference scores for the prompt '{unknown[0]}'; give some for every prompt."
            )
        scores = self.reward(images, prompts)
        shaped = [
            torch.sigmoid(self.k * (score - score.new_tensor(list(self.references[prompt])))).mean()
            for score, prompt in zip(scores, prompts, strict=True)
        ]
        return torch.stack(shaped)
