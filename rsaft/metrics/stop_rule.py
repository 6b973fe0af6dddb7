"""When a run begins to be hacked, and which checkpoint to keep, from rewards that nothing is trained on.

A held-out reward rises with the train reward as long as the model truly improves. Hacked, the train reward rises
alone, often while every held-out reward still creeps up, so that waiting for one of them to fall is waiting too long.
With gains g(t) over the untuned model, each in standard deviations of its base scores, and a first look t_1:

    (1)  s_k = g_k(t_1) / g_train(t_1)             how much held-out reward k follows at first
    (2)  u(t) = mean of the lower half of g_k(t) / s_k over k: the train reward that the doubtful half believes
    (3)  gap(t) = g_train(t) - u(t)                what they do not believe
    (4)  worth(t) = u(t) - share * g_train(t)      keep the look where it is largest

A reward that does not rise at first, by more than its standard error, believes nothing (0). worth falls once the
doubtful half follows with less than `share` of its first slope: of held-out rewards some share the train reward's
error, and these must not outvote the others. The alarm is raised when `patience` looks in a row have a higher train
reward than the look to keep, and less worth. How it was chosen, and what it is worth: docs/gauge.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError

Scores = Float[Tensor, "t n"]
"""One reward of the same n samples at each of t looks; row 0 is the untuned model."""


@dataclass(frozen=True)
class StopRule:
    """Settings, chosen on the testbed's runs of one trainer (docs/gauge.md)."""

    share: float = 0.5  # of the first slope, below which held-out rewards no longer follow
    significance: float = 3.0  # standard errors over prompts, of a rise
    patience: int = 3  # looks since the one to keep, each with a higher train reward, before the alarm

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"stop rule: share is a part of the first slope, 0 < share < 1; got {self.share}.")
        if self.significance < 0:
            raise ConfigError(f"stop rule: significance counts standard errors, >= 0; got {self.significance}.")
        if self.patience < 1:
            raise ConfigError(f"stop rule: patience counts looks, >= 1; got {self.patience}.")


@dataclass(frozen=True)
class Verdict:
    """What the rule says after the last look. Gains are in standard deviations of the base model's train reward."""

    keep: int  # look with the largest worth so far
    alarm: bool  # whether the last `patience` looks have a higher train reward, and less worth
    gain: float  # g_train
    believed: float  # u (2); NaN while nothing is known of the first slope
    gap: float  # (3)
    following: tuple[str, ...]  # held-out rewards that rose with the train reward at first
    worth: tuple[float, ...]  # (4) at each look; zeros while nothing is known


def judge(
    train: Scores, held_out: Mapping[str, Tensor], prompts: Sequence[str], rule: StopRule | None = None
) -> Verdict:
    """The verdict after the last of the looks, from the looks so far.

    Args:
        train: the train reward (the mean, if there are several).
        held_out: rewards that nothing is trained on, at least one; each (t, n).
        prompts: of the n samples; samples of one prompt count as one in every standard error.
        rule: settings.

    Returns:
        No alarm while the train reward has not risen significantly; the look to keep is then that of the best held-out
        rewards. Samples with a score that is not finite, in any look, are left out.

    Raises:
        ValueError: if there is no held-out reward, the shapes differ, fewer than two prompts are finite, or a reward
            is the same for all samples of look 0.
    """
    rule = rule or StopRule()
    g_train, gains, groups = _gains(train, held_out, prompts)
    means = g_train.mean(dim=1)
    g_held_out = torch.stack([g.mean(dim=1) for g in gains.values()])
    risen = [t for t in range(1, len(train)) if _over_error(g_train[t], groups) >= rule.significance]
    if not risen:
        nothing = (0.0,) * len(train)
        return Verdict(int(g_held_out.mean(dim=0).argmax()), False, float(means[-1]), math.nan, math.nan, (), nothing)
    slopes = g_held_out[:, risen[0]] / means[risen[0]]
    follows = torch.tensor([_over_error(g[risen[0]], groups) > 1 for g in gains.values()])
    beliefs = torch.where(follows[:, None], g_held_out / slopes[:, None], 0.0)
    u = beliefs.sort(dim=0).values[: (len(gains) + 1) // 2].mean(dim=0)
    worth = u - rule.share * means
    keep = int(worth.argmax())
    higher = [_over_error(g_train[t] - g_train[keep], groups) >= rule.significance for t in range(keep + 1, len(train))]
    alarm = len(higher) >= rule.patience and all(higher[-rule.patience :])
    following = tuple(name for name, yes in zip(gains, follows.tolist(), strict=True) if yes)
    gain, believed = float(means[-1]), float(u[-1])
    return Verdict(keep, alarm, gain, believed, gain - believed, following, tuple(worth.tolist()))


def first_alarm(
    train: Scores, held_out: Mapping[str, Tensor], prompts: Sequence[str], rule: StopRule | None = None
) -> tuple[int | None, Verdict]:
    """The look at which a run that heeds the rule ends (None: it goes on to the last), and the verdict there."""
    verdict = judge(train[:1], {k: v[:1] for k, v in held_out.items()}, prompts, rule)
    for looks in range(2, len(train) + 1):
        verdict = judge(train[:looks], {k: v[:looks] for k, v in held_out.items()}, prompts, rule)
        if verdict.alarm:
            return looks - 1, verdict
    return None, verdict


def _gains(
    train: Scores, held_out: Mapping[str, Tensor], prompts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Gains (t, samples) over look 0 in base standard deviations, of finite samples; each sample's prompt number."""
    if not held_out:
        raise ValueError("stop rule: it reads rewards that nothing is trained on, and there is none; hold one out.")
    every = {"the train reward": train, **held_out}
    for name, scores in every.items():
        if scores.ndim != 2 or scores.shape != (len(train), len(prompts)):
            raise ValueError(
                f"stop rule: {name} has shape {tuple(scores.shape)}; for {len(prompts)} prompts and {len(train)} "
                f"looks it must be ({len(train)}, {len(prompts)})."
            )
    finite = torch.stack([scores.isfinite().all(dim=0) for scores in every.values()]).all(dim=0)
    kept = [p for p, good in zip(prompts, finite.tolist(), strict=True) if good]
    numbers = {p: i for i, p in enumerate(dict.fromkeys(kept))}
    if len(numbers) < 2:
        raise ValueError(f"stop rule: standard errors are over prompts, so give at least 2; {len(numbers)} are finite.")
    groups = torch.tensor([numbers[p] for p in kept])

    def gain(name: str, scores: Tensor) -> Tensor:
        x = scores[:, finite].double().cpu()
        deviation = x[0].std()
        if not deviation > 0:
            raise ValueError(f"stop rule: {name} is the same for all samples of look 0, so gains have no unit.")
        return (x - x[0]) / deviation

    return gain("the train reward", train), {k: gain(k, v) for k, v in held_out.items()}, groups


def _over_error(values: Float[Tensor, " n"], groups: Tensor) -> float:
    """Mean over prompts in standard errors; 0 where nothing moved, infinite where all prompts moved alike."""
    n = int(groups.max()) + 1
    sums = torch.zeros(n, dtype=values.dtype).index_add(0, groups, values)
    means = sums / torch.bincount(groups, minlength=n)
    error = float(means.std()) / math.sqrt(n)
    mean = float(means.mean())
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
