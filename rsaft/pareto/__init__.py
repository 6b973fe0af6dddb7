"""PG-OT (Pareto Frontier-Guided Optimal Transport): frontiers of several rewards, transport to them, and the agent.

The agent's names are resolved when first used, as not every run has one.
"""

import importlib
from typing import Any

from rsaft.pareto.baselines import SeparateConstraints, WeightedSumBound
from rsaft.pareto.dominance import dominates, finite_rows, non_dominated
from rsaft.pareto.frontier import FrontierStore
from rsaft.pareto.objective import ParetoTransport
from rsaft.pareto.sinkhorn import sinkhorn

_HOMES = {
    "AgentState": "agent",
    "Context": "context",
    "Decision": "agent",
    "DecisionAgent": "agent",
    "HumanJudge": "judges",
    "LearnedJudge": "learned_judge",
    "ScriptedJudge": "judges",
    "StatsJudge": "stats_judge",
    "VLMJudge": "vlm_judge",
    "Verdict": "context",
}

__all__ = [
    "FrontierStore",
    "ParetoTransport",
    "SeparateConstraints",
    "WeightedSumBound",
    "dominates",
    "finite_rows",
    "non_dominated",
    "sinkhorn",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"rsaft.pareto.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rsaft.pareto' has no attribute '{name}'")
