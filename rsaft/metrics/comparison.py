"""Groups of finished runs against the first group: the same scores at the same update and at the same train reward.

A group is runs that differ in nothing but the training seed. Every evaluation has the same prompts and noises, so the
runs of one seed are a pair, and an interval is over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rsaft.errors import ConfigError
from rsaft.metrics.domination import joint_collapse_rate, joint_domination_rate, tie_rate
from rsaft.metrics.matched import at_matched_reward, common_levels
from rsaft.metrics.paired import Compared, compared
from rsaft.metrics.records import GOLD, Run, curve, scores, train_reward

TRAIN, S1, JDR, JCR, TIES, UPDATE = "train reward", "S1", "JDR", "JCR", "ties", "update"
MIN_CHECKPOINTS = 3  # two points always lie on a line
NUM_LEVELS = 3


@dataclass(frozen=True)
class Group:
    """Runs whose settings are equal but for the seed."""

    name: str
    runs: dict[int, Run]  # by training seed


@dataclass(frozen=True)
class Row:
    """All scores of one group at one place."""

    place: str  # "update 100", "train reward 1.5"
    axis: str  # the column that says where: update or train reward
    group: str
    scores: dict[str, Compared]  # by column


@dataclass(frozen=True)
class Correlation:
    """Pearson's r over evaluations; None where there are too few, or one of the two does not move."""

    runs: dict[int, float | None]  # within each run, by seed
    pooled: float | None  # over all evaluations of the group's runs
    checkpoints: int  # evaluations of all runs

    @property
    def mean(self) -> float | None:
        found = [r for r in self.runs.values() if r is not None]
        return math.fsum(found) / len(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    groups: tuple[Group, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    sharpness: dict[str, dict[str, Correlation]]  # group -> held-out reward -> S1 against it (RSA-FT, Fig. 4)
    curves: dict[str, dict[int, dict[str, list[float]]]]  # group -> seed -> column -> one value an evaluation
    notes: tuple[str, ...]  # what could not be compared, and why


def compare(groups: Sequence[Group]) -> Comparison:
    """Compare groups with the first: gold, held-out rewards, S1, JDR and JCR, at matched update and train reward.

    Args:
        groups: at least one; of the same evaluation (`refuse_incomparable`).

    Raises:
        ConfigError: if the runs have no evaluation after the start in common.

    Cost: about a second for ten runs; no model is needed.
    """
    everything = [run for group in groups for run in group.runs.values()]
    held_out = common_keys(everything, "held_out/")
    curves = {g.name: {seed: run_curves(run, held_out) for seed, run in g.runs.items()} for g in groups}
    steps = common_steps(everything)
    levels, notes = _levels(everything)
    columns = _columns(curves, held_out)
    middle = [s for s in steps[:-1] if s > 0]
    shown = [*middle[(len(middle) - 1) // 2 : (len(middle) + 1) // 2], steps[-1]]
    places = [(f"update {step}", UPDATE, float(step)) for step in shown]
    places += [(f"train reward {level:g}", TRAIN, level) for level in levels]
    rows = [row for place in places for row in _rows(groups, curves, columns, *place)]
    sharpness = {g.name: _correlations(curves[g.name], held_out) for g in groups} if S1 in columns else {}
    return Comparison(
        tuple(groups), columns, tuple(rows), sharpness, curves, (*notes, *_notes(groups, curves, held_out))
    )


def run_curves(run: Run, held_out: Sequence[str]) -> dict[str, list[float]]:
    """Every column of a run, one value an evaluation; NaN where there is none."""
    steps, _ = curve(run.evals, "step")
    sharp = [curve(run.evals, key)[1] for key in run.keys("sharpness/")]
    nothing = [math.nan] * len(steps)
    return {
        UPDATE: [float(step) for step in steps],
        TRAIN: train_reward(run),
        **{key: curve(run.evals, key)[1] for key in held_out},
        S1: [math.fsum(row) / len(row) for row in zip(*sharp, strict=True)] if sharp else nothing,
        **dominations(run, held_out),
    }


def dominations(run: Run, held_out: Sequence[str]) -> dict[str, list[float]]:
    """JDR, JCR and ties on the held-out rewards, gold among them, at each evaluation against the one before any update.

    Samples are paired by prompt and noise; one with a score that is not finite in either is left out.
    """
    result: dict[str, list[float]] = {JDR: [], JCR: [], TIES: []}
    base = _by_sample(run, 0, held_out)
    for step in curve(run.evals, "step")[0]:
        tuned = _by_sample(run, step, held_out)
        shared = [key for key in tuned if key in base]
        if not shared:
            for column in result.values():
                column.append(math.nan)
            continue
        a, b = (torch.tensor([rows[key] for key in shared], dtype=torch.float64) for rows in (tuned, base))
        result[JDR].append(float(joint_domination_rate(a, b)))
        result[JCR].append(float(joint_collapse_rate(a, b)))
        result[TIES].append(float(tie_rate(a, b)))
    return result


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r over the pairs in which both are finite; None with fewer than three, or without any spread."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < MIN_CHECKPOINTS:
        return None
    columns = np.array(pairs).T
    if any(np.ptp(column) <= 1e-12 * np.abs(column).max() for column in columns):
        return None
    return float(np.corrcoef(columns)[0, 1])


def have_one_train_reward(runs: Sequence[Run]) -> bool:
    """Whether the runs train on the same rewards, so that one axis holds them all."""
    return len({tuple(run.keys("reward/")) for run in runs}) == 1


def common_steps(runs: Sequence[Run]) -> list[int]:
    """Updates at which every run was evaluated.

    Raises:
        ConfigError: if there is none after the start.
    """
    found = [{int(record["step"]) for record in run.evals} for run in runs]
    common = sorted(set.intersection(*found))
    if not common or common[-1] == 0:
        each = "; ".join(f"{run.path} at {_listed(sorted(steps))}" for run, steps in zip(runs, found, strict=True))
        raise ConfigError(
            f"compare: the runs have no evaluation after the start in common ({each}); give them the same "
            "train.eval_every, or leave out the odd one."
        )
    return common


def common_keys(runs: Sequence[Run], prefix: str) -> list[str]:
    """Keys that every run's evaluations have, gold first, then in order of appearance."""
    shared = set.intersection(*(set(run.keys(prefix)) for run in runs))
    return sorted((key for key in runs[0].keys(prefix) if key in shared), key=lambda key: key != GOLD)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:3])) + (f" ... {steps[-1]}" if len(steps) > 3 else "") if steps else "none"


def _by_sample(run: Run, step: int, keys: Sequence[str]) -> dict[tuple[str, int], list[float]]:
    columns = [scores(run, step, key) for key in keys]
    whole = [sample for sample in columns[0] if all(sample in column for column in columns)] if columns else []
    return {sample: [column[sample] for column in columns] for sample in whole}


def _levels(runs: Sequence[Run]) -> tuple[list[float], list[str]]:
    if not have_one_train_reward(runs):
        return [], ["The runs train on different rewards, so there is no train reward at which they could be matched."]
    levels = common_levels([train_reward(run) for run in runs], count=NUM_LEVELS)
    return levels, [] if levels else ["There is no train reward that every run starts below and reaches."]


def _columns(curves: dict[str, dict[int, dict[str, list[float]]]], held_out: Sequence[str]) -> tuple[str, ...]:
    """The columns in which some run has a value."""
    runs = [columns for group in curves.values() for columns in group.values()]
    wanted = (UPDATE, TRAIN, *held_out, S1, JDR, JCR)
    return tuple(key for key in wanted if any(math.isfinite(v) for columns in runs for v in columns[key]))


def _rows(
    groups: Sequence[Group],
    curves: dict[str, dict[int, dict[str, list[float]]]],
    columns: Sequence[str],
    place: str,
    axis: str,
    value: float,
) -> list[Row]:
    """One row a group, where its runs first reach `value` on the axis."""
    found = {
        group.name: {
            column: {
                seed: _value_at(columns_of[axis], columns_of[column], value, exact=axis == UPDATE)
                for seed, columns_of in curves[group.name].items()
            }
            for column in columns
        }
        for group in groups
    }
    base = groups[0].name
    return [
        Row(
            place, axis, name, {key: compared(mine[key], None if name == base else found[base][key]) for key in columns}
        )
        for name, mine in found.items()
    ]


def _value_at(axis: Sequence[float], column: Sequence[float], value: float, *, exact: bool) -> float | None:
    """The column where the axis is (exact) or first reaches `value`; None where there is no finite one."""
    if not exact:
        return at_matched_reward(axis, column, [value])[0]
    found = column[axis.index(value)]
    return found if math.isfinite(found) else None


def _correlations(runs: dict[int, dict[str, list[float]]], held_out: Sequence[str]) -> dict[str, Correlation]:
    result = {}
    for key in held_out:
        within = {seed: pearson(columns[S1], columns[key]) for seed, columns in runs.items()}
        sharp = [value for columns in runs.values() for value in columns[S1]]
        reward = [value for columns in runs.values() for value in columns[key]]
        result[key] = Correlation(within, pearson(sharp, reward), len(sharp))
    return result


def _notes(
    groups: Sequence[Group], curves: dict[str, dict[int, dict[str, list[float]]]], held_out: Sequence[str]
) -> list[str]:
    """What is missing, one sentence each."""
    notes = []
    if not held_out:
        notes.append("No held-out reward is common to all runs, so there is neither JDR nor JCR.")
    for what, column, why in (
        ("S1", S1, "train.sharpness_rho was not set"),
        ("JDR and JCR", JDR, "the scores of each sample, in samples/step-000000.json and later ones, are not there"),
    ):
        lacking = [
            str(run.path)
            for g in groups
            for seed, run in g.runs.items()
            if not any(math.isfinite(value) for value in curves[g.name][seed][column])
        ]
        if lacking and (held_out or column == S1):
            notes.append(f"No {what} of {_some(lacking)}: {why}.")
    first = set(groups[0].runs)
    for group in groups[1:]:
        if set(group.runs) != first:
            shared = sorted(first & set(group.runs))
            notes.append(
                f"{group.name} and {groups[0].name} share the seeds {shared or 'none'}; others are in no difference."
            )
    return notes


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more runs" if len(paths) > 3 else "")
