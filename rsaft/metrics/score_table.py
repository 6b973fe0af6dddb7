"""Scores of evaluated models as a tidy table, and a tuned model's scores beside its base's, pair by pair.

A pair is two images of the same prompt_id and seed. Every prompt counts once, whatever its number of images, and
intervals are bootstrapped over prompts: images of one prompt are not independent.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.metrics.domination import joint_collapse_rate, joint_domination_rate, tie_rate, win_rate
from rsaft.metrics.matched import mean_interval
from rsaft.metrics.paired import Compared, compared
from rsaft.metrics.scoring import Item

Interval = tuple[float, float, float]  # mean, low, high
Rate = Callable[[Tensor, Tensor], Tensor]

SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "step": pa.int64(),
        "prompt_id": pa.int64(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "reward": pa.string(),
        "score": pa.float64(),
    }
)


@dataclass(frozen=True)
class PartScores:
    """The scores of one model's images; NaN where one was not finite."""

    run: str
    step: int | None  # of the checkpoint
    items: tuple[Item, ...]
    scores: dict[str, Float[Tensor, " n"]]  # by reward


@dataclass(frozen=True)
class OfReward:
    """One reward of a tuned model, over the pairs in which both scores are finite; without a base, over all images."""

    tuned: Compared  # by prompt_id, with the difference to the base
    interval: Interval | None  # of the mean, without a base
    base_mean: float | None
    win_rate: Interval | None  # share of pairs in which the tuned image scores more
    ties: float | None
    pairs: int  # images, without a base
    nonfinite: dict[str, int]  # scores that were not finite, by "tuned" and "base"


@dataclass(frozen=True)
class Joint:
    """All rewards at once, over the pairs in which all scores are finite."""

    jdr: Interval
    jcr: Interval
    ties: float  # share of pairs with a tie in one reward at least
    pairs: int
    chance: float  # 2^-m: each rate of m independent rewards, exchangeable between the models


@dataclass(frozen=True)
class Summary:
    """What an evaluation found."""

    rewards: dict[str, OfReward]
    joint: Joint | None  # None: no base, or no pair with all scores finite
    categories: dict[str, dict[str, OfReward]]  # by category of the prompts
    unpaired: dict[str, int]  # images without a counterpart, by "tuned" and "base"
    prompts: int


def parquet(parts: Sequence[PartScores]) -> bytes:
    """The tidy table, a row for each image and reward; the same scores give the same bytes. Not finite: null."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for part in parts:
        for i, item in enumerate(part.items):
            for name, values in part.scores.items():
                score = float(values[i])
                row = (part.run, part.step, item.prompt_id, item.prompt, item.seed, name, score)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(None if value != value else value)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink)
    return sink.getvalue()


def summary(tuned: PartScores, base: PartScores | None, categories: Mapping[int, str] | None = None) -> Summary:
    """A model's scores, and beside its base's if there is one.

    Args:
        tuned: what is evaluated.
        base: what it is compared with; of the same rewards.
        categories: of prompts, by prompt_id; prompts without one are in no category's row.

    Raises:
        ValueError: if the rewards differ.
    """
    if base is not None and base.scores.keys() != tuned.scores.keys():
        raise ValueError(
            f"summary: both parts have the same rewards; got {list(tuned.scores)} and {list(base.scores)}."
        )
    ids, a, b = _paired(tuned, base)
    names = tuple(tuned.scores)
    chosen = [categories.get(i) if categories else None for i in ids]
    kinds = sorted({kind for kind in chosen if kind is not None})
    rows = {kind: [i for i, found in enumerate(chosen) if found == kind] for kind in kinds}
    matched = len(ids)
    return Summary(
        rewards=_of_rewards(names, ids, a, b),
        joint=None if b is None else _joint(ids, a, b),
        categories={
            kind: _of_rewards(names, [ids[i] for i in where], a[where], None if b is None else b[where])
            for kind, where in rows.items()
        },
        unpaired={} if base is None else {"tuned": len(tuned.items) - matched, "base": len(base.items) - matched},
        prompts=len(set(ids)),
    )


def _paired(tuned: PartScores, base: PartScores | None) -> tuple[list[int], Tensor, Tensor | None]:
    """Prompt ids of the pairs, and their scores (n, m) in both; without a base, those of all images."""
    a = _matrix(tuned)
    if base is None:
        return [item.prompt_id for item in tuned.items], a, None
    at = {(item.prompt_id, item.seed): i for i, item in enumerate(base.items)}
    rows = [(i, at[key]) for i, item in enumerate(tuned.items) if (key := (item.prompt_id, item.seed)) in at]
    mine, theirs = [i for i, _ in rows], [j for _, j in rows]
    return [tuned.items[i].prompt_id for i in mine], a[mine], _matrix(base)[theirs]


def _matrix(part: PartScores) -> Float[Tensor, "n m"]:
    return torch.stack([values.double() for values in part.scores.values()], dim=1)


def _of_rewards(names: Sequence[str], ids: Sequence[int], a: Tensor, b: Tensor | None) -> dict[str, OfReward]:
    return {
        name: _of_reward(ids, a[:, k : k + 1], None if b is None else b[:, k : k + 1]) for k, name in enumerate(names)
    }


def _of_reward(ids: Sequence[int], a: Float[Tensor, "n 1"], b: Float[Tensor, "n 1"] | None) -> OfReward:
    both = [a] if b is None else [a, b]
    finite = torch.stack([column.isfinite().all(dim=1) for column in both]).all(dim=0)
    lost = {role: int((~part.isfinite()).sum()) for role, part in zip(("tuned", "base"), both, strict=False)}
    kept = [ids[i] for i in finite.nonzero().flatten().tolist()]
    a, b = a[finite], None if b is None else b[finite]
    means = _by_prompt(kept, _mean_score, a, a)
    base_means = None if b is None else _by_prompt(kept, _mean_score, b, b)
    return OfReward(
        tuned=compared(means, base_means),
        interval=_interval(means) if base_means is None and means else None,
        base_mean=_mean(base_means) if base_means else None,
        win_rate=None if b is None or not kept else _interval(_by_prompt(kept, win_rate, a, b)),
        ties=None if b is None or not kept else _mean(_by_prompt(kept, tie_rate, a, b)),
        pairs=len(kept),
        nonfinite=lost,
    )


def _joint(ids: Sequence[int], a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Joint | None:
    finite = (a.isfinite() & b.isfinite()).all(dim=1)
    kept = [ids[i] for i in finite.nonzero().flatten().tolist()]
    if not kept:
        return None
    a, b = a[finite], b[finite]
    return Joint(
        jdr=_interval(_by_prompt(kept, joint_domination_rate, a, b)),
        jcr=_interval(_by_prompt(kept, joint_collapse_rate, a, b)),
        ties=_mean(_by_prompt(kept, tie_rate, a, b)),
        pairs=len(kept),
        chance=2.0 ** -a.shape[1],
    )


def _by_prompt(ids: Sequence[int], rate: Rate, a: Tensor, b: Tensor) -> dict[int, float]:
    """`rate` of each prompt's own rows."""
    rows: dict[int, list[int]] = {}
    for i, prompt_id in enumerate(ids):
        rows.setdefault(prompt_id, []).append(i)
    return {prompt_id: float(rate(a[where], b[where])) for prompt_id, where in rows.items()}


def _mean_score(a: Tensor, _: Tensor) -> Tensor:
    return a.mean()


def _interval(values: Mapping[int, float]) -> Interval:
    """Mean over prompts with its bootstrap interval."""
    return mean_interval(torch.tensor(list(values.values()), dtype=torch.float64), seed=0)


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)
