"""What the samples of a FrontierStore are like: how much of them is frontier, and how the rewards vary together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.pareto.dominance import non_dominated
from rsaft.pareto.frontier import FrontierStore


@dataclass(frozen=True)
class FrontierSummary:
    """Counts over a store, and second moments of its rewards within prompts."""

    names: tuple[str, ...]
    prompts: int
    samples: int  # of each prompt
    finite: int  # samples that count, of all prompts
    size: float  # of a frontier, mean over prompts
    share: float  # of the samples that count, those on their prompt's frontier
    deviations: Float[Tensor, " m"]  # within a prompt, pooled over prompts
    correlations: Float[Tensor, "m m"]  # within prompts, pooled; NaN of a reward that does not vary


def summarize(store: FrontierStore) -> FrontierSummary:
    """The summary of all prompts and rewards of a store; samples that are not finite do not count."""
    pool, mask = store.pool(store.prompts, store.names)
    front = non_dominated(pool, mask=mask).sum(dim=1)
    counts = mask.sum(dim=1)
    centred = torch.where(mask[..., None], pool - (pool.sum(dim=1) / counts[:, None])[:, None], 0.0)
    covariance = torch.einsum("pnk,pnl->kl", centred, centred) / counts.sum()
    deviations = covariance.diagonal().sqrt()
    return FrontierSummary(
        names=store.names,
        prompts=len(store.prompts),
        samples=store.rewards.shape[1],
        finite=int(counts.sum()),
        size=float(front.double().mean()),
        share=float(front.sum() / counts.sum()),
        deviations=deviations,
        correlations=covariance / (deviations[:, None] * deviations),
    )


def markdown(summary: FrontierSummary) -> str:
    """The summary as two tables."""
    head = ["reward", "deviation", *(f"with {name}" for name in summary.names)]
    rows = [
        [name, f"{deviation:.3g}", *("-" if value != value else f"{value:.2f}" for value in row)]
        for name, deviation, row in zip(
            summary.names, summary.deviations.tolist(), summary.correlations.tolist(), strict=True
        )
    ]
    total = summary.prompts * summary.samples
    left_out = "" if summary.finite == total else f" ({total - summary.finite} of {total} left out)"
    counts = [
        ["prompts", "samples of each", "frontier, mean size", "share on the frontier"],
        [str(summary.prompts), f"{summary.samples}{left_out}", f"{summary.size:.2f}", f"{summary.share:.1%}"],
    ]
    return f"{_table(counts)}\n\nWithin prompts, deviation and correlations:\n\n{_table([head, *rows])}\n"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
