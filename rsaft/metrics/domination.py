"""How often a tuned model beats another on every reward at once, and how often it loses on all (PG-OT: JDR, JCR).

Rows are samples, paired by prompt and noise. For two models whose scores are exchangeable, m independent rewards
without ties give 2^-m for each rate; correlated rewards raise that level. So a JDR is read beside its JCR, not alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mode = Literal["strict", "pareto"]


def joint_domination_rate(
    r: Float[Tensor, "n m"], r_base: Float[Tensor, "n m"], *, mode: Mode = "strict"
) -> Float[Tensor, ""]:
    """Share of samples that beat their baseline on every reward (JDR; PG-OT, Eq. 2).

    Args:
        r: rewards of the tuned model, one row per sample; higher is better, any scale.
        r_base: rewards of the baseline for the same prompts and seeds, row by row.
        mode: "strict": larger on every reward, so a tie is not a win (the paper's text); "pareto": larger on one and
            smaller on none (its formula). They differ only where there are ties.

    Returns:
        A fraction in [0, 1]; 0 for a model against itself. JDR + JCR <= 1.

    Raises:
        ValueError: if there is no sample or no reward, the shapes differ, or a reward is NaN.
    """
    return _beats(r, r_base, mode).double().mean()


def joint_collapse_rate(
    r: Float[Tensor, "n m"], r_base: Float[Tensor, "n m"], *, mode: Mode = "strict"
) -> Float[Tensor, ""]:
    """Share of samples that their baseline beats on every reward (JCR); as `joint_domination_rate`, the other way."""
    return _beats(r_base, r, mode).double().mean()


def win_rate(r: Float[Tensor, "n m"], r_base: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Share of scores that are larger than their baseline's, over samples and rewards alike; a tie is not a win.

    For one reward's win rate, give that column alone: (n, 1).

    Raises:
        ValueError: as `joint_domination_rate`.
    """
    _check(r, r_base)
    return (r > r_base).double().mean()


def tie_rate(r: Float[Tensor, "n m"], r_base: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """Share of samples with the same value on at least one reward: the only ones that the two modes may tell apart.

    Raises:
        ValueError: as `joint_domination_rate`.
    """
    _check(r, r_base)
    return (r == r_base).any(dim=1).double().mean()


def null_rate(r: Float[Tensor, "n m"], r_base: Float[Tensor, "n m"], *, mode: Mode = "strict") -> Float[Tensor, ""]:
    """What JDR and JCR would both be if the two models were one: expected when each pair is exchanged at random.

    (JDR + JCR) / 2, which knows how much these rewards agree: 2^-m for m independent ones, up to 1/2 for equal ones.

    Raises:
        ValueError: as `joint_domination_rate`.
    """
    return (joint_domination_rate(r, r_base, mode=mode) + joint_collapse_rate(r, r_base, mode=mode)) / 2


def _beats(r: Tensor, other: Tensor, mode: Mode) -> Bool[Tensor, " n"]:
    _check(r, other)
    if mode == "strict":
        return (r > other).all(dim=1)
    if mode == "pareto":
        return (r >= other).all(dim=1) & (r > other).any(dim=1)
    raise ValueError(f"mode is 'strict' or 'pareto'; got '{mode}'.")


def _check(r: Tensor, other: Tensor) -> None:
    if r.shape != other.shape or r.ndim != 2 or not r.numel():
        raise ValueError(
            f"domination: two matrices (samples, rewards) of one shape, not empty; got {tuple(r.shape)} and "
            f"{tuple(other.shape)}."
        )
    if bool(torch.isnan(r).any()) or bool(torch.isnan(other).any()):
        raise ValueError("domination: a reward is NaN, and a comparison with NaN means nothing; drop those rows first.")
