"""Reward-driven fine-tuning: trainers, objectives over rewards, and the training loop."""

from rsaft.rdrl.alignprop import AlignProp
from rsaft.rdrl.draft import DRaFT
from rsaft.rdrl.drtune import DRTune
from rsaft.rdrl.kl import OverRated, WithKL
from rsaft.rdrl.objectives import Conservative, Hinge, LogSigmoid, Min, SoftMin, WeightedSum
from rsaft.rdrl.pretraining import Pretraining
from rsaft.rdrl.refl import ReFL
from rsaft.rdrl.score import ImageScore, plain_step

__all__ = [
    "AlignProp",
    "Conservative",
    "DRTune",
    "DRaFT",
    "Hinge",
    "ImageScore",
    "LogSigmoid",
    "Min",
    "OverRated",
    "Pretraining",
    "ReFL",
    "SoftMin",
    "WeightedSum",
    "WithKL",
    "plain_step",
]
