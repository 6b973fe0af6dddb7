"""PG-OT's losses, sample by sample and point by point, as the paper writes them (Eqs. 4 to 7)."""

from __future__ import annotations

import numpy as np
import ot


def beats(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(a >= b) and np.any(a > b))


def frontier(pool: np.ndarray) -> np.ndarray:
    """Eq. 4: the samples that no other sample beats."""
    return np.stack([y for y in pool if not any(beats(other, y) for other in pool)])


def offline(
    samples: np.ndarray, pool: np.ndarray, scale: np.ndarray, *, reg: float, source: str
) -> tuple[float, np.ndarray]:
    """Eq. 6 of one prompt: L and its gradient in the samples, with the plan as a constant."""
    targets, gradient = frontier(pool), np.zeros_like(samples)
    quantifier = any if source == "any" else all
    chosen = [i for i, r in enumerate(samples) if quantifier(beats(f, r) for f in targets)]
    if not chosen:
        return 0.0, gradient
    cost = np.array([[np.sum(((samples[i] - f) / scale) ** 2) for f in targets] for i in chosen])
    a, b = np.full(len(chosen), 1 / len(chosen)), np.full(len(targets), 1 / len(targets))
    plan = ot.bregman.sinkhorn_log(a, b, cost, reg * cost.mean(), stopThr=1e-13, numItermax=100_000)
    for row, i in enumerate(chosen):
        for column, f in enumerate(targets):
            gradient[i] += plan[row, column] * 2 * (samples[i] - f) / scale**2
    return float((plan * cost).sum()), gradient


def online(samples: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 7 of one prompt: L_j of each sample, and its gradient, with the other samples as constants."""
    losses, gradient = np.zeros(len(samples)), np.zeros_like(samples)
    for j, r in enumerate(samples):
        better = [d for d in samples if beats(d, r)]
        for d in better:
            losses[j] += np.sum(((r - d) / scale) ** 2) / len(better)
            gradient[j] += 2 * (r - d) / scale**2 / len(better)
    return losses, gradient
