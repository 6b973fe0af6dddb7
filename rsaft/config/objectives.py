"""Settings of objectives that need files: plain values here; `rsaft.config.frontiers` makes them of what files hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParetoTransport:
    """Transport of each prompt's samples to reward vectors that dominate them (rsaft/pareto/objective.py)."""

    frontiers: str | None = None  # the folder that `rsaft frontier --out` wrote, of this model, prompts and rewards
    # offline: to the prompt's frontier; online: to samples of the same update (both need train.group_size above 1)
    strategy: Literal["offline", "online"] = "offline"
    active: tuple[str, ...] | None = None  # rewards that count; null: all that are trained on
    source: Literal["any", "all"] = "any"  # samples that some point of the frontier dominates, or that all points do
    # hinge does not count what exceeds the target; dominance_masked moves a sample only to what dominates it.
    cost: Literal["sqeuclidean", "hinge", "dominance_masked"] = "sqeuclidean"
    # What rewards are divided by; null: prompt_pool with frontiers, none without.
    normalize: Literal["prompt_pool", "global", "minmax", "none"] | None = None
    reg: float = 0.05  # entropic strength, relative to the prompt's mean cost
    unroll: bool = False  # differentiate through Sinkhorn's sweeps, too
