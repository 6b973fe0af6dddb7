"""The hacking gauge: what each evaluation of a run says beside its train reward, and when to stop.

    gauge = HackingGauge()
    reading = gauge.look(step, evaluate(backbone, prompts, sampling, ...))     # in any loop; the first is of the base
    print(reading.sentence)

It adds no sampling: it reads the evaluations that a run has anyway. A held-out reward named "gold" is a testbed's
ground truth, and the gauge never looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.metrics.domination import joint_collapse_rate, joint_domination_rate
from rsaft.metrics.evaluate import Evaluation
from rsaft.metrics.image_statistics import diversity, drift, image_statistics, thumbnails
from rsaft.metrics.stop_rule import StopRule, Verdict, judge

GOLD = "gold"  # never looked at
PREFIX = "image/"  # of what is measured on images
_CHUNK = 8  # images at a time on the device
_TREND = 4  # looks that S1's trend is fitted to


@dataclass(frozen=True)
class Gauge:
    """Settings of the gauge in a run file."""

    # stop ends the run at the alarm, warn says so once and goes on, off measures without a verdict
    stop: Literal["stop", "warn", "off"] = "warn"
    rule: StopRule = field(default_factory=StopRule)  # when the alarm is raised


GAUGE = Gauge()  # of a run that says nothing else


@dataclass(frozen=True)
class Reading:
    """The gauge at one evaluation."""

    step: int
    values: dict[str, float]  # "gauge/..." (docs/logged_keys.md)
    keep_step: int | None  # the evaluation whose weights to keep, so far; None without held-out rewards
    alarm: bool  # the train reward is being hacked, says the rule
    stop: bool  # at an alarm the run is to end
    sentence: str  # the same for people


class HackingGauge:
    """Readings of a run's evaluations, which must be of the same prompts and noises.

    Attributes:
        settings: what it heeds.
        steps: of the evaluations looked at.
    """

    def __init__(self, settings: Gauge | None = None) -> None:
        self.settings = settings or Gauge()
        self.steps: list[int] = []
        self._scores: list[Mapping[str, Tensor]] = []
        self._prompts: tuple[str, ...] = ()
        self.base_thumbnails: Float[Tensor, "n 3 s s"] | None = None

    def measured(self, evaluation: Evaluation, *, device: torch.device | None = None) -> Evaluation:
        """The evaluation with "image/..." scores: statistics, drift from the base's images, diversity of a prompt's.

        The first evaluation measured is taken for the base's. Computed on `device`; by default where the images are.
        """
        if any(key.startswith(PREFIX) for key in evaluation.scores):
            return evaluation
        parts = [part.to(device or part.device) for part in evaluation.images.split(_CHUNK)]
        small = torch.cat([thumbnails(part).cpu() for part in parts])
        if self.base_thumbnails is None and not self.steps:
            self.base_thumbnails = small
        base = torch.full_like(small, torch.nan) if self.base_thumbnails is None else self.base_thumbnails
        columns = [image_statistics(part) for part in parts]
        found = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        found |= {"drift": drift(small, base), "diversity": diversity(small.flatten(1), evaluation.prompts)}
        return replace(
            evaluation, scores=evaluation.scores | {f"{PREFIX}{name}": x.double().cpu() for name, x in found.items()}
        )

    def look(self, step: int, evaluation: Evaluation, *, weight_distance: float | None = None) -> Reading:
        """Read one evaluation; the first one is of the untuned model.

        Args:
            step: updates done.
            evaluation: as `rsaft.metrics.evaluate` gives it, always of the same samples.
            weight_distance: of the weights from the base's, if it is known (`rsaft.backbones.weight_distance`).

        Raises:
            ValueError: if it is of other prompts than the first.
        """
        if self._prompts and evaluation.prompts != self._prompts:
            raise ValueError("gauge: the evaluation is of other prompts than the first; evaluate the same ones.")
        self._remember(step, evaluation.prompts, self.measured(evaluation).scores)
        return self.reading(weight_distance=weight_distance)

    def restore(self, samples: Iterable[Mapping[str, Any]], base_thumbnails: Tensor | None) -> None:
        """Remember earlier looks from what a run wrote: `samples/step-XXXXXX.json`, in the order of steps."""
        self.base_thumbnails = base_thumbnails
        for record in samples:
            scores = {key: torch.tensor(_numbers(column)) for key, column in record["scores"].items()}
            self._remember(int(record["step"]), tuple(record["prompts"]), scores)

    def _remember(self, step: int, prompts: tuple[str, ...], scores: Mapping[str, Tensor]) -> None:
        self.steps.append(step)
        self._prompts = prompts
        self._scores.append({key: x for key, x in scores.items() if key != f"held_out/{GOLD}"})

    def _usable(self) -> list[int]:
        """Looks that can be compared: with every score of the first, and half of each finite at least."""
        rewards = [key for key in self._scores[0] if key.startswith(("reward/", "held_out/"))]
        found = []
        for t, scores in enumerate(self._scores):
            columns = [scores[key] for key in rewards if key in scores]
            if len(columns) == len(rewards) and all(2 * int(x.isfinite().sum()) >= len(x) for x in columns):
                found.append(t)
        return found

    def _columns(self, prefix: str, looks: Sequence[int]) -> dict[str, Float[Tensor, "t n"]]:
        """Scores that all those looks have, by what follows the prefix."""
        chosen = [self._scores[t] for t in looks]
        keys = [key for key in self._scores[0] if key.startswith(prefix) and all(key in s for s in chosen)]
        return {key.removeprefix(prefix): torch.stack([s[key].double() for s in chosen]) for key in keys}

    def reading(self, *, weight_distance: float | None = None) -> Reading:
        """The reading after the last look. A look that cannot be compared leaves the verdict as it was.

        Raises:
            ValueError: if there was none.
        """
        if not self.steps:
            raise ValueError("gauge: it has not looked at an evaluation yet; give it the base's first.")
        every, usable = range(len(self.steps)), self._usable()
        values = _image_values(self._columns(PREFIX, every))
        steps = [self.steps[t] for t in usable]
        values |= _reward_values(self._columns("sharpness/", usable), self._columns("slope/", usable), steps)
        if weight_distance is not None:
            values["weight_distance"] = weight_distance
        verdict = self._verdict(usable)
        keep = None
        if verdict is not None:
            values |= _verdict_values(verdict, self._columns("held_out/", usable))
            if self.settings.stop != "off":
                keep = steps[verdict.keep]
                values |= {"keep_step": float(keep), "alarm": float(verdict.alarm)}
        named = {f"gauge/{name}": value for name, value in sorted(values.items()) if math.isfinite(value)}
        alarm = verdict is not None and verdict.alarm and keep is not None
        sentence = _sentence(keep, verdict, alarm)
        return Reading(self.steps[-1], named, keep, alarm, self.settings.stop == "stop", sentence)

    def _verdict(self, usable: Sequence[int]) -> Verdict | None:
        """None without held-out rewards, without the base's evaluation, or with too few prompts."""
        if not usable or self.steps[0] != 0 or usable[0] != 0:
            return None
        rewards, held_out = (
            # A reward that is the same for all of the base's images has no unit to measure its gain in.
            {name: x for name, x in self._columns(prefix, usable).items() if bool(_deviation(x[0]) > 0)}
            for prefix in ("reward/", "held_out/")
        )
        if not rewards or not held_out:
            return None
        train = _mean_gain(rewards)
        finite = torch.stack([train, *held_out.values()]).isfinite().flatten(0, 1).all(dim=0).tolist()
        if len({p for p, good in zip(self._prompts, finite, strict=True) if good}) < 2:
            return None
        return judge(train, held_out, self._prompts, self.settings.rule)


def _numbers(column: Sequence[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in column]


def _mean_gain(rewards: Mapping[str, Float[Tensor, "t n"]]) -> Float[Tensor, "t n"]:
    """The train rewards as one: their mean in standard deviations of the base's scores."""
    return torch.stack([(x - x[0].nanmean()) / _deviation(x[0]) for x in rewards.values()]).mean(dim=0)


def _deviation(x: Float[Tensor, " n"]) -> Tensor:
    good = x[x.isfinite()]
    return good.std() if len(good) > 1 else torch.tensor(torch.nan, dtype=x.dtype)


def _image_values(columns: Mapping[str, Float[Tensor, "t n"]]) -> dict[str, float]:
    """Shifts of the statistics' means in base standard deviations, drift, and diversity as a share of the base's."""
    values = {}
    for name, x in columns.items():
        if name == "drift":
            values[name] = float(x[-1].nanmean())
        elif name == "diversity":
            values[name] = float(x[-1].nanmean() / x[0].nanmean())
        else:
            values[f"{PREFIX}{name}"] = float((x[-1].nanmean() - x[0].nanmean()) / _deviation(x[0]))
    return values


def _reward_values(
    sharpness: Mapping[str, Tensor], slope: Mapping[str, Tensor], steps: Sequence[int]
) -> dict[str, float]:
    """S1 and the gradient's norm beside the base's, and S1's trend, of the mean over train rewards."""
    values = {}
    for name, columns in (("sharpness", sharpness), ("slope", slope)):
        if columns:
            means = torch.stack([x.nanmean(dim=1) / x[0].nanmean() for x in columns.values()]).mean(dim=0)
            values[name] = float(means[-1])
            if name == "sharpness" and len(steps) > 1:
                t = torch.tensor(steps[-_TREND:], dtype=torch.float64)
                y, centred = means[-_TREND:], t - t.mean()
                values["sharpness_trend"] = float((centred @ y) / centred.square().sum() * 100)
    return values


def _verdict_values(verdict: Verdict, held_out: Mapping[str, Float[Tensor, "t n"]]) -> dict[str, float]:
    values = {
        "gain": verdict.gain,
        "believed": verdict.believed,
        "gap": verdict.gap,
        "worth": verdict.worth[-1],
    }
    now, base = (torch.stack([x[t] for x in held_out.values()], dim=1) for t in (-1, 0))
    good = now.isfinite().all(dim=1) & base.isfinite().all(dim=1)
    if bool(good.any()):
        values["jdr"] = float(joint_domination_rate(now[good], base[good]))
        values["jcr"] = float(joint_collapse_rate(now[good], base[good]))
    return values


def _sentence(keep: int | None, verdict: Verdict | None, alarm: bool) -> str:
    if verdict is None:
        return "no verdict: it needs the base's evaluation and held-out rewards of two prompts or more"
    if keep is None:
        return f"of a gain of {verdict.gain:.2f} the held-out rewards believe {verdict.believed:.2f}"
    if alarm and keep == 0:
        return "hacked, it seems: held-out rewards do not follow the train reward; keep the model as it was loaded"
    if alarm:
        return f"hacked, it seems: held-out rewards have stopped following since step {keep}; keep step {keep}"
    if math.isnan(verdict.believed):
        return "the train reward has not risen yet"
    return f"of a gain of {verdict.gain:.2f} the held-out rewards believe {verdict.believed:.2f}; keep step {keep}"
