"""PG-OT's dominance, frontier and entropic plan as the paper writes them, slowly: one pair, one prompt at a time.

Nothing is shared with `rsaft.pareto`: the plan has no kernel, no absorption, no annealing and no extrapolation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dominates(x: Tensor, y: Tensor) -> bool:
    """R(x) > R(y): x is nowhere smaller and somewhere larger, for two vectors (m,)."""
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def non_dominated(r: Tensor, counts: list[bool] | None = None, dedupe: bool = False) -> list[bool]:
    """Eq. 4: { j : sum_m A[m, j] = 0 } among the rows of r (n, m) that count."""
    n = len(r)
    counts = [True] * n if counts is None else counts
    front = []
    for j in range(n):
        others = [i for i in range(n) if counts[i]]
        beaten = any(dominates(r[i], r[j]) for i in others)
        copied = dedupe and any(i < j and r[i].tolist() == r[j].tolist() for i in others)
        front.append(counts[j] and not beaten and not copied)
    return front


def plan(cost: Tensor, a: Tensor, b: Tensor, eps: float, sweeps: int) -> Tensor:
    """Eqs. 5 and 6 for one prompt with positive weights: plain sweeps of the potentials in the log domain.

    f_i = eps (log a_i - LSE_j (g_j - C_ij) / eps), g_j likewise, plan_ij = exp((f_i + g_j - C_ij) / eps).
    """
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(sweeps):
        f = eps * (a.log() - torch.logsumexp((g[None, :] - cost) / eps, 1))
        g = eps * (b.log() - torch.logsumexp((f[:, None] - cost) / eps, 0))
    return ((f[:, None] + g[None, :] - cost) / eps).exp()
