"""Measuring runs: S1, evaluation on fixed prompts and noise, domination, comparison at matched reward, the report."""

from rsaft.metrics.domination import joint_collapse_rate, joint_domination_rate, tie_rate, win_rate
from rsaft.metrics.evaluate import Evaluation, Measure, evaluate, image_grid, joined
from rsaft.metrics.matched import at_matched_reward, common_levels, first_crossing, mean_interval, paired_bootstrap
from rsaft.metrics.report import write_report
from rsaft.metrics.sharpness import sharpness

__all__ = [
    "Evaluation",
    "Measure",
    "at_matched_reward",
    "common_levels",
    "evaluate",
    "first_crossing",
    "image_grid",
    "joined",
    "joint_collapse_rate",
    "joint_domination_rate",
    "mean_interval",
    "paired_bootstrap",
    "sharpness",
    "tie_rate",
    "win_rate",
    "write_report",
]
