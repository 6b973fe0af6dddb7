"""Comparing runs fairly: gold at matched train reward, and paired intervals.

The end of a run says nothing by itself, since a slower run hacks later. What separates methods is what the truth is
worth at the same train reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor

MIN_BCA = 10  # pairs; with fewer, the acceleration of BCa is itself noise, and the percentile interval is given
MAX_RESAMPLED = 2 * 10**7  # values resampled at a time: 320 MB; the interval does not depend on it


def first_crossing(train: Sequence[float], level: float) -> tuple[int, int, float] | None:
    """Where a curve first reaches a level: (i, j, w), the point (1 - w) * curve[i] + w * curve[j].

    The first passage needs no monotone curve: what happens after it does not count. Points that are not finite are
    stepped over, so j may lie beyond i + 1. None if the curve starts above the level or never reaches it.
    """
    before = None
    for i, value in enumerate(train):
        if not math.isfinite(value):
            continue
        if value == level:
            return i, i, 0.0
        if value > level:
            return None if before is None else (before, i, (level - train[before]) / (value - train[before]))
        before = i
    return None


def at_matched_reward(train: Sequence[float], measure: Sequence[float], levels: Sequence[float]) -> list[float | None]:
    """The measure where the train reward first reaches each level, linear between two evaluations of one run.

    Args:
        train: mean train reward at each evaluation, in the order of steps.
        measure: what is compared (gold, a held-out reward) at the same evaluations.
        levels: train rewards to compare at.

    Returns:
        One value a level; None where the run starts above the level or never reaches it. Evaluations at which either
        is not finite are left out.

    Raises:
        ValueError: if the two curves differ in length.
    """
    if len(train) != len(measure):
        raise ValueError(f"at_matched_reward: one measure a train reward; got {len(measure)} and {len(train)}.")
    pairs = zip(train, measure, strict=True)
    masked = [t if math.isfinite(m) else math.nan for t, m in pairs]
    crossings = [first_crossing(masked, level) for level in levels]
    return [None if c is None else (1 - c[2]) * measure[c[0]] + c[2] * measure[c[1]] for c in crossings]


def common_levels(curves: Sequence[Sequence[float]], count: int = 4) -> list[float]:
    """Up to `count` round train rewards that every run starts below and reaches; empty if there is none."""
    finite = [[value for value in curve if math.isfinite(value)] for curve in curves]
    if not finite or not all(finite):
        return []
    low, high = max(curve[0] for curve in finite), min(max(curve) for curve in finite)
    if not low < high:
        return []
    spacing = (high - low) / (count + 0.5)
    unit = 10.0 ** math.floor(math.log10(spacing))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= spacing * (1 - 1e-9))
    first = math.floor(low / step) + 1
    levels = [round(k * step, 12) for k in range(first, first + count + 2)]
    return [level for level in levels if low < level <= high][:count] or [high]


def paired_bootstrap(
    a: Float[Tensor, " n"],
    b: Float[Tensor, " n"],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """(mean of a - b, low, high): a bootstrap interval over pairs (seeds or prompts).

    BCa (Efron, 1987) from MIN_BCA pairs on, else the percentile interval, whose coverage is too small with a handful
    of pairs. If all differences are equal, low = mean = high.

    Args:
        a: one value a pair.
        b: the other values, row by row.
        seed: of the resampling; the same arguments give the same interval.
        resamples: bootstrap samples.
        confidence: two-sided level in (0, 1).

    Raises:
        ValueError: if the two differ in length, there is no pair, or a value is not finite.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired_bootstrap: one b for each a; got {tuple(a.shape)} and {tuple(b.shape)}.")
    return mean_interval(a.double() - b.double(), seed=seed, resamples=resamples, confidence=confidence)


def mean_interval(
    values: Float[Tensor, " n"], *, seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of independent values; method, arguments and errors as for `paired_bootstrap`."""
    x = values.detach().cpu().double().numpy()
    if not len(x) or not np.isfinite(x).all():
        raise ValueError("mean_interval: give at least one value, all finite; drop the others first and count them.")
    mean = float(x.mean())
    if len(x) == 1 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return mean, mean, mean
    interval = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="BCa" if len(x) >= MIN_BCA else "percentile",
        batch=max(1, MAX_RESAMPLED // len(x)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)
