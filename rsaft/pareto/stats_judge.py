"""A judge from statistics of scores and images alone, and the tests it is made of. It calls no model.

Read its verdicts with care: PG-OT (App. D.4) found that means and spreads show no pattern at a collapse, and that a
spike of a divergence shows the collapse but not whose it is. What it adds to them are rewards that nothing is trained
on; without these it only sees signs that honest learning has too.
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
from rsaft.pareto.context import GOLD, Context, Verdict
from rsaft.types import Images

REWARD, HELD_OUT = "reward/", "held_out/"


@dataclass(frozen=True)
class Sign:
    """One thing that speaks for a breakdown."""

    text: str
    votes: int = 1


@dataclass(frozen=True)
class StatsJudge:
    """Breakdown where the signs have `votes` in all; held-out disagreement has two, each other sign one.

    The thresholds are ours, but for `significance`, which is the stop rule's. The breakdown is attributed to the active
    reward with a significant rise that all other scores confirm least (`least_confirmed`); to none, if none has risen.
    Gains are over the last check that passed, in standard deviations of the base model's scores. Samples with a score
    that is not finite are left out.

    Cost: a few Fourier transforms of each image; no network.
    """

    significance: float = 3.0  # standard errors over prompts
    follow: float = 0.1  # held-out rewards that rise by less than this part of a reward's rise disagree with it
    spike: float = 3.0  # times the median of earlier checks
    # Of what: "growth" of the distance per update, or its "level", for one that does not grow in an honest run.
    spike_of: Literal["growth", "level"] = "growth"
    spread: float = 0.5  # of the base's standard deviation, below which scores have collapsed to one value
    trend: float = 1.0  # difference of Kendall's taus, in [0, 2]
    shift: float = 2.0  # of a statistic of the images, in standard deviations
    votes: int = 2
    looks: int = 4  # evaluations, this one included, that trends and stagnation are judged by
    stagnation: float = 0.05  # rise of the active rewards' mean over these looks, in base standard deviations

    def __post_init__(self) -> None:
        positive = {"significance": self.significance, "spike": self.spike, "shift": self.shift}
        wrong = {name: value for name, value in positive.items() if not value > 0}
        if wrong or self.votes < 1 or self.looks < 3 or not 0 <= self.follow < 1 or not 0 < self.spread < 1:
            raise ConfigError(
                "StatsJudge: significance, spike and shift are above 0, votes at least 1, looks at least 3, follow in "
                f"[0, 1) and spread in (0, 1); got {self}."
            )

    def __call__(self, context: Context) -> Verdict:
        gains, prompts = standardised_gains(context)
        rewards = {name: gains[f"{REWARD}{name}"] for name in context.active if f"{REWARD}{name}" in gains}
        rising = {name: g for name, g in rewards.items() if over_error(g, prompts) >= self.significance}
        held_out = [g for key, g in gains.items() if _is_held_out(key)]
        signs = [
            *self._disagreements(rising, held_out, prompts),
            *self._spreads(context),
            *self._trends(context),
            *self._spikes(context),
            *self._shifts(context),
        ]
        analysis = "; ".join(sign.text for sign in signs) or "no sign of a breakdown"
        if sum(sign.votes for sign in signs) < self.votes:
            return Verdict(False, analysis=analysis, stagnant=self._stagnant(context))
        reward, confidence = least_confirmed(rising, gains, prompts)
        return Verdict(True, reward, confidence, analysis)

    def _disagreements(
        self, rising: Mapping[str, Tensor], held_out: Sequence[Tensor], prompts: Sequence[str]
    ) -> list[Sign]:
        """The stop rule's idea with a fixed share: a rise that the held-out mean follows by less than `follow`."""
        if not held_out:
            return []
        mean = torch.stack(list(held_out)).mean(dim=0)
        against = [
            name for name, g in rising.items() if over_error(self.follow * g - mean, prompts) >= self.significance
        ]
        return [Sign(f"held-out rewards do not follow {', '.join(against)}", votes=2)] if against else []

    def _spreads(self, context: Context) -> list[Sign]:
        signs = []
        for name in context.active:
            now, base = (_column(scores.get(f"{REWARD}{name}")) for scores in (context.scores, context.base_scores))
            both = now.isfinite() & base.isfinite() if now.shape == base.shape else torch.zeros(0, dtype=torch.bool)
            if int(both.sum()) > 2:
                ratio, t = spread_change(now[both], base[both])
                if ratio < self.spread and t <= -self.significance:
                    signs.append(Sign(f"the spread of {name} is {ratio:.2f} of the base's"))
        return signs[:1]  # they fall together (PG-OT, Table 9), so they are one sign

    def _trends(self, context: Context) -> list[Sign]:
        looks = context.history[-self.looks :]
        held_out = _mean_curve(context, looks, [key for key in context.base_scores if _is_held_out(key)])
        if len(looks) < self.looks or held_out is None:
            return []
        for name in context.active:
            curve = _mean_curve(context, looks, [f"{REWARD}{name}"])
            if curve is not None and kendall_tau(curve) - kendall_tau(held_out) >= self.trend:
                return [Sign(f"{name} goes up while held-out rewards go down, over {self.looks} evaluations")]
        return []

    def _spikes(self, context: Context) -> list[Sign]:
        values = [distance for _, distance in context.distances]
        if self.spike_of == "growth":
            pairs = zip(context.distances, context.distances[1:], strict=False)
            values = [(b - a) / (t - s) for (s, a), (t, b) in pairs if t > s]
        ratio = spike_ratio(values)
        return [Sign(f"the distance from the base jumps, {ratio:.1f} times the median")] if ratio >= self.spike else []

    def _shifts(self, context: Context) -> list[Sign]:
        if len(context.images) < 2:
            return []
        name, size = largest_shift(context.images, context.base_images)
        return [Sign(f"{name} of the images moved by {size:.1f} standard deviations")] if size >= self.shift else []

    def _stagnant(self, context: Context) -> bool:
        looks = context.history[-self.looks :]
        if len(looks) < self.looks:
            return False
        curves = [_mean_curve(context, looks, [f"{REWARD}{name}"]) for name in context.active]
        rises = [curve[-1] - curve[0] for curve in curves if curve is not None]
        return bool(rises) and sum(rises) / len(rises) < self.stagnation


def standardised_gains(context: Context) -> tuple[dict[str, Float[Tensor, " k"]], tuple[str, ...]]:
    """Gains of each score over the last passed check in base standard deviations, of k finite samples; their prompts.

    Scores of removed rewards, and those without a unit (the same for all of the base's samples), are left out.
    """
    active = {f"{REWARD}{name}" for name in context.active}
    before = context.passed_scores or context.base_scores
    keys = [
        key
        for key in context.scores
        if (key in active or _is_held_out(key)) and key in before and key in context.base_scores
    ]
    now, last, base = (
        {key: _column(scores[key]) for key in keys} for scores in (context.scores, before, context.base_scores)
    )
    keys = [key for key in keys if bool(base[key][base[key].isfinite()].std() > 0)]
    if not keys:
        return {}, ()
    good = torch.stack([x[key].isfinite() for key in keys for x in (now, last, base)]).all(dim=0)
    prompts = tuple(p for p, kept in zip(context.prompts, good.tolist(), strict=True) if kept)
    gains = {key: (now[key] - last[key])[good] / base[key][base[key].isfinite()].std() for key in keys}
    return gains, prompts


def over_error(values: Float[Tensor, " n"], prompts: Sequence[str]) -> float:
    """Mean over prompts in standard errors: the paired t statistic, where samples of one prompt count as one.

    0 with fewer than two prompts, or where nothing moved; infinite where all prompts moved alike.
    """
    numbers = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    if len(numbers) < 2:
        return 0.0
    groups = torch.tensor([numbers[p] for p in prompts])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add(0, groups, values.double())
    means = sums / torch.bincount(groups)
    error, mean = float(means.std()) / math.sqrt(len(numbers)), float(means.mean())
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def spread_change(now: Float[Tensor, " n"], base: Float[Tensor, " n"]) -> tuple[float, float]:
    """Standard deviation over the base's, and the t statistic of Pitman (1939) and Morgan (1939) for paired variances.

    The statistic is that of the correlation between sum and difference of the pairs: negative where `now` varies less.
    """
    total, change = now - now.mean() + base - base.mean(), now - now.mean() - base + base.mean()
    norm = float(total.norm() * change.norm())
    r = max(-1.0, min(1.0, float(total @ change) / norm)) if norm else 0.0
    t = math.copysign(math.inf, r) if abs(r) == 1 else r * math.sqrt((len(now) - 2) / (1 - r * r))
    spread = float(base.std())
    return (float(now.std()) / spread if spread else math.inf), t


def kendall_tau(values: Sequence[float]) -> float:
    """Kendall's tau of a series with time (Mann, 1945): 1 if each value is above all before it, -1 if below."""
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return sum((b > a) - (b < a) for a, b in pairs) / len(pairs) if pairs else 0.0


def spike_ratio(values: Sequence[float]) -> float:
    """The last value over the median of those before it; 0 where there is none before it, or it is not positive."""
    if len(values) < 2:
        return 0.0
    median = float(torch.tensor(values[:-1], dtype=torch.float64).median())
    return values[-1] / median if median > 0 and math.isfinite(values[-1]) else 0.0


def largest_shift(images: Images, base_images: Images) -> tuple[str, float]:
    """The statistic of `rsaft.metrics.image_statistics` that moved most, and by how much (Cohen's d, 1988).

    d is the difference of means over the root mean square of both standard deviations; images that are not finite are
    left out, and a statistic that is constant on both sides does not count.
    """
    from rsaft.metrics.image_statistics import image_statistics  # its package draws plots, and takes long to import

    now, base = image_statistics(images), image_statistics(base_images)
    sizes = {}
    for name in now:
        x, y = (values[values.isfinite()].double() for values in (now[name], base[name]))
        pooled = math.sqrt(float(x.var() + y.var()) / 2) if min(len(x), len(y)) > 1 else 0.0
        sizes[name] = abs(float(x.mean() - y.mean())) / pooled if pooled > 1e-6 else 0.0
    name = max(sizes, key=lambda key: sizes[key])
    return name, sizes[name]


def least_confirmed(
    rising: Mapping[str, Float[Tensor, " n"]], gains: Mapping[str, Float[Tensor, " n"]], prompts: Sequence[str]
) -> tuple[str | None, float]:
    """The reward with the largest rise that the others do not confirm, and the confidence in that (ours).

    Leave one out: c_k is the correlation, over samples, of reward k's gains with the mean gain of all other active and
    held-out scores; what is not confirmed is mean(g_k) (1 - max(c_k, 0)). An honest reward rises where the others do.
    (Taking the others' mean rise off instead would always give the reward that rose most.) The confidence is the normal
    probability of the paired statistic between the first and the second; with one candidate, of its unconfirmed rise.
    """
    if not rising:
        return None, 0.0
    total = torch.stack(list(gains.values())).sum(dim=0)
    unconfirmed = {name: g * (1 - max(0.0, _correlation(g, total - g))) for name, g in rising.items()}
    ranked = sorted(unconfirmed, key=lambda name: -float(unconfirmed[name].mean()))
    lead = unconfirmed[ranked[0]] - (unconfirmed[ranked[1]] if len(ranked) > 1 else 0.0)
    return ranked[0], 0.5 * (1 + math.erf(over_error(lead, prompts) / math.sqrt(2)))


def _correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0


def _mean_curve(
    context: Context, looks: Sequence[tuple[int, Mapping[str, float]]], keys: Sequence[str]
) -> list[float] | None:
    """Mean of these scores' means, in base standard deviations, at each look; None if there is none that all have."""
    units = {}
    for key in keys:
        base = _column(context.base_scores.get(key))
        deviation = float(base[base.isfinite()].std()) if len(base) else 0.0
        if deviation > 0 and all(key in means for _, means in looks):
            units[key] = deviation
    return [sum(means[key] / units[key] for key in units) / len(units) for _, means in looks] if units else None


def _is_held_out(key: str) -> bool:
    return key.startswith(HELD_OUT) and key != GOLD


def _column(values: Tensor | None) -> Float[Tensor, " n"]:
    return torch.zeros(0, dtype=torch.float64) if values is None else values.detach().double().cpu()
