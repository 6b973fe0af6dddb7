"""Hypervolume: how much of the reward space a set of samples covers, one number for a whole frontier."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def hypervolume(r: Float[Tensor, "n m"], reference: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Volume of what lies above the reference and below some sample: of the union of the boxes from it to each sample.

    Exact, by slices along one reward after another (While et al., 2006). For comparing sets of one prompt: fix the
    reference, and bring the rewards to one scale first, as the volume is in the product of their units.

    Args:
        r: reward vectors, higher is better; dominated ones and copies add nothing.
        reference: a point that counts as worthless, such as the base model's worst value of each reward.

    Returns:
        >= 0, float64; 0 where no sample is larger than the reference in every reward.

    Raises:
        ValueError: if the shapes do not fit, or a number is not finite.

    Cost: O(n^(m - 1) log n), on the CPU: meant for tens of samples and up to four or five rewards.
    """
    if r.ndim != 2 or not r.shape[1] or reference.shape != r.shape[1:]:
        raise ValueError(
            f"hypervolume: samples (n, m) with m >= 1 rewards, and a reference (m,); got {tuple(r.shape)} and "
            f"{tuple(reference.shape)}."
        )
    if not bool(torch.isfinite(r).all()) or not bool(torch.isfinite(reference).all()):
        raise ValueError("hypervolume: a reward or the reference is not finite; drop those rows first.")
    above = (r.detach().double() - reference.detach().double()).cpu().numpy()
    return torch.tensor(_volume(above[(above > 0).all(axis=1)]), dtype=torch.float64)


def _volume(points: np.ndarray) -> float:
    """Of boxes from 0 to each point, all positive."""
    if not len(points):
        return 0.0
    points = points[points[:, -1].argsort()[::-1]]  # highest first: a slice holds those that reach it
    heights = points[:, -1] - np.append(points[1:, -1], 0.0)
    if points.shape[1] == 1:
        return float(points[0, 0])
    if points.shape[1] == 2:
        return float((heights * np.maximum.accumulate(points[:, 0])).sum())
    return float(sum(h * _volume(points[: i + 1, :-1]) for i, h in enumerate(heights) if h > 0))
