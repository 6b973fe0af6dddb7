"""Which runs may be compared: those whose evaluations draw the same images from the same model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rsaft.errors import ConfigError
from rsaft.metrics.records import Run, flat, scores

SAME = ("train.eval_seed", "algorithm.sampling.num_steps", "algorithm.sampling.guidance")
"""Settings that decide, with the prompts, what an evaluation's images are before any update."""


def refuse_incomparable(runs: Sequence[Run]) -> None:
    """Refuse runs whose evaluations differ in more than the weights.

    Raises:
        ConfigError: if a run has no evaluation, or prompts, noises, steps or guidance of the evaluations differ.
    """
    for run in runs:
        if not run.evals:
            raise ConfigError(f"compare: {run.path} has no evaluation yet; wait for it, or leave it out.")
    settings = [flat(run.config) if run.config else {} for run in runs]
    for key in SAME:
        _refuse_different(runs, [found.get(key) for found in settings], key)
    for run in runs[1:]:
        for step in sorted(set(runs[0].samples) & set(run.samples))[:1]:
            _refuse_other_samples(runs[0], run, step)


def _refuse_different(runs: Sequence[Run], values: Sequence[Any], key: str) -> None:
    for run, value in zip(runs[1:], values[1:], strict=True):
        if value is not None and values[0] is not None and value != values[0]:
            raise ConfigError(
                f"compare: {key} is {values[0]} in {runs[0].path} and {value} in {run.path}, so their evaluations draw "
                "different images and no difference means anything; compare runs of the same evaluation."
            )


def _refuse_other_samples(first: Run, other: Run, step: int) -> None:
    mine, theirs = first.samples[step], other.samples[step]
    for what in ("prompts", "sample_ids"):
        if mine.get(what) != theirs.get(what):
            raise ConfigError(
                f"compare: {other.path} was evaluated on other {what.replace('_', ' ')} than {first.path}, and scores "
                "are compared image by image; compare runs of the same prompts.eval and train.eval_samples."
            )
    if step or (first.config and other.config):
        return  # the settings say that model, seed and sampler are the same, or how the models differ
    key = next((key for key in mine.get("scores", {}) if key in theirs.get("scores", {})), None)
    if key is not None and not _close(scores(first, 0, key), scores(other, 0, key)):
        raise ConfigError(
            f"compare: before any update {other.path} has other scores of '{key}' than {first.path}: another model or "
            "other noises; compare runs of the same model and evaluation."
        )


def _close(a: Mapping[tuple[str, int], float], b: Mapping[tuple[str, int], float]) -> bool:
    """Equal but for another machine's rounding: a thousandth of the scores' spread."""
    values = list(a.values())
    spread = max(values, default=0.0) - min(values, default=0.0)
    return all(math.isclose(value, b.get(key, math.nan), abs_tol=1e-3 * spread + 1e-9) for key, value in a.items())
