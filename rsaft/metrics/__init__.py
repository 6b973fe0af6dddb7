"""Measuring a run: S1, evaluation on fixed prompts and noise, comparison at matched train reward, the report."""

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
    "mean_interval",
    "paired_bootstrap",
    "sharpness",
    "write_report",
]
