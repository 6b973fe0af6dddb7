"""What a finished or stopped run leaves behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """What `Trainer.fit` leaves behind."""

    run_dir: Path
    step: int  # updates done
    best_step: int  # evaluation with the best mean held-out reward (train reward, if nothing is held out)
    evaluations: tuple[dict[str, float], ...]  # means of each evaluation, with its "step"
    checkpoints: tuple[Path, ...]
    signal: int | None = None  # the signal that stopped the run, if one did


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
