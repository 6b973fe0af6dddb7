"""Reward-driven fine-tuning: trainers, objectives over rewards, and the training loop."""

from rsaft.rdrl.draft import DRaFT
from rsaft.rdrl.objectives import Hinge, SoftMin, WeightedSum
from rsaft.rdrl.score import ImageScore, plain_step

__all__ = ["DRaFT", "Hinge", "ImageScore", "SoftMin", "WeightedSum", "plain_step"]
