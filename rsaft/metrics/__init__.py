"""Measuring runs: S1, evaluation on fixed prompts and noise, domination, comparison at matched reward, the report."""

from rsaft.metrics.domination import joint_collapse_rate, joint_domination_rate, null_rate, tie_rate, win_rate
from rsaft.metrics.evaluate import Evaluation, Measure, evaluate, image_grid, joined
from rsaft.metrics.gauge import Gauge, HackingGauge, Reading
from rsaft.metrics.hypervolume import hypervolume
from rsaft.metrics.image_statistics import diversity, drift, image_statistics, thumbnails
from rsaft.metrics.matched import at_matched_reward, common_levels, first_crossing, mean_interval, paired_bootstrap
from rsaft.metrics.report import write_report
from rsaft.metrics.sharpness import sharpness
from rsaft.metrics.stop_rule import StopRule, Verdict, first_alarm, judge

__all__ = [
    "Evaluation",
    "Gauge",
    "HackingGauge",
    "Measure",
    "Reading",
    "StopRule",
    "Verdict",
    "at_matched_reward",
    "common_levels",
    "diversity",
    "drift",
    "evaluate",
    "first_alarm",
    "first_crossing",
    "hypervolume",
    "image_grid",
    "image_statistics",
    "joined",
    "joint_collapse_rate",
    "joint_domination_rate",
    "judge",
    "mean_interval",
    "null_rate",
    "paired_bootstrap",
    "sharpness",
    "thumbnails",
    "tie_rate",
    "win_rate",
    "write_report",
]
