"""What a finished or stopped run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsaft.metrics.gauge import Reading


@dataclass(frozen=True)
class RunResult:
    """What `Trainer.fit` leaves behind."""

    run_dir: Path
    step: int  # updates done
    # The evaluation whose weights to keep, by the gauge; without it the one with the best mean held-out reward, and
    # with nothing held out the one with the best train reward.
    best_step: int
    evaluations: tuple[dict[str, float], ...]  # means of each evaluation, with its "step"
    checkpoints: tuple[Path, ...]
    signal: int | None = None  # the signal that stopped the run, if one did
    reading: Reading | None = None  # the gauge at the last evaluation, with an alarm if it was raised


def best_step(evaluations: Sequence[Mapping[str, float]]) -> int:
    """Step of the evaluation with the best mean held-out reward, or train reward if nothing is held out.

    Args:
        evaluations: means of each evaluation, with its "step", as in `RunResult.evaluations`.

    Returns:
        The first of equally good ones; 0 if there is no evaluation.
    """

    def mean_of(means: Mapping[str, float]) -> float:
        values = [v for k, v in means.items() if k.startswith("held_out/")]
        values = values or [v for k, v in means.items() if k.startswith("reward/")]
        return math.fsum(values) / len(values) if values else -math.inf

    return int(max(evaluations, key=mean_of)["step"]) if evaluations else 0


def evaluation_share(run: Path) -> float | None:
    """Share of a run's time that its evaluations took, with the gauge on them; None before the first update.

    Updates and evaluations are the whole: loading and checkpoints are not counted.
    """
    seconds = {"seconds": 0.0, "evaluation_seconds": 0.0}
    for line in (run / "timing.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key in seconds:
                seconds[key] += value
    return seconds["evaluation_seconds"] / sum(seconds.values()) if seconds["seconds"] else None
