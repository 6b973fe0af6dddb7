"""Pareto dominance between reward vectors, and each prompt's frontier (PG-OT, Eq. 4). Larger rewards are better."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PAIRWISE = 256  # rows up to which all pairs are compared at once; sorting is faster above
PAIRS = 2**24  # pairs held in memory at once
WORD = 63  # members of a set in one int64, whose sign bit stays free
BLOCK = 16 * WORD  # rows that are compared with all later ones at once


def dominates(a: Float[Tensor, "*p n m"], b: Float[Tensor, "*p k m"]) -> Bool[Tensor, "*p n k"]:
    """Whether a_i dominates b_j: no reward is smaller, and one is larger (the matrix A of PG-OT, Eq. 4).

    Costs O(n k m) time and O(n k) memory for each prompt. An infinite reward compares like any number.

    Args:
        a: reward vectors, (n, m), or (P, n, m) for P prompts; higher is better, any scale, any float type.
        b: reward vectors to compare with, (k, m) or (P, k, m), with the same m rewards in the same order.

    Returns:
        Entry [i, j] is True where a_i dominates b_j. A vector dominates neither itself nor a copy.

    Raises:
        ValueError: if the shapes do not fit, there is no reward, or a reward is NaN.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1] or not a.shape[-1]:
        raise ValueError(
            f"dominates: two matrices (n, m) and (k, m) with m >= 1 rewards, or two batches of them; got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        raise ValueError("dominates: a reward is NaN, and a comparison with NaN means nothing; drop those rows first.")
    return _no_smaller(a, b) & ~_no_smaller(b, a).mT


def non_dominated(
    r: Float[Tensor, "*p n m"], *, mask: Bool[Tensor, "*p n"] | None = None, dedupe: bool = False
) -> Bool[Tensor, "*p n"]:
    """Whether each row is on its prompt's frontier: no other row dominates it (PG-OT, Eq. 4).

    Exact. Up to 256 rows all pairs are compared, for many prompts at once: O(n^2 m) a prompt. Above, rows are sorted
    and compared with the frontier in blocks, prompt by prompt: O(n f m / 63) for a frontier of f rows, and O(n)
    memory.

    Args:
        r: reward vectors, (n, m), or (P, n, m) for P prompts; higher is better, any scale, any float type.
        mask: True for rows that count, (n,) or (P, n). The others are never on the frontier, dominate nothing, and may
            hold anything, NaN too. `finite_rows` makes a mask that drops broken rows.
        dedupe: keep only the first of equal rows. By default all copies of a frontier point are on the frontier.

    Returns:
        True for the rows on the frontier. A prompt with a row that counts has at least one.

    Raises:
        ValueError: if a shape is wrong, there is no reward, or a row that counts has a reward that is not finite.
    """
    if r.ndim not in (2, 3) or not r.shape[-1]:
        raise ValueError(f"non_dominated: r is (n, m) or (P, n, m) with m >= 1 rewards; got {tuple(r.shape)}.")
    if mask is None:
        mask = torch.ones(r.shape[:-1], dtype=torch.bool, device=r.device)
    elif mask.shape != r.shape[:-1]:
        raise ValueError(f"non_dominated: with this r, mask is {tuple(r.shape[:-1])}; got {tuple(mask.shape)}.")
    _, broken = finite_rows(r, mask)
    if broken:
        raise ValueError(
            f"non_dominated: {broken} of {int(mask.sum())} rows hold a reward that is NaN or infinite, which would be "
            f"on the frontier or push good rows off it; drop them with mask=finite_rows(r)[0]."
        )
    if r.ndim == 2:
        return non_dominated(r[None], mask=mask[None], dedupe=dedupe)[0]
    n = r.shape[1]
    if n > PAIRWISE:
        return torch.stack([_by_sorting(x, m, dedupe) for x, m in zip(r, mask, strict=True)]) if len(r) else mask
    size = max(1, PAIRS // max(1, n * n))
    return torch.cat([_by_pairs(x, m, dedupe) for x, m in zip(r.split(size), mask.split(size), strict=True)])


def finite_rows(
    r: Float[Tensor, "*p n m"], mask: Bool[Tensor, "*p n"] | None = None
) -> tuple[Bool[Tensor, "*p n"], int]:
    """The mask of rows without NaN and infinity (within `mask`, if given), and the number of rows that it drops."""
    finite = r.isfinite().all(-1)
    if mask is None:
        return finite, int((~finite).sum())
    return finite & mask, int((~finite & mask).sum())


def _no_smaller(a: Tensor, b: Tensor) -> Tensor:
    """[..., i, j] is True where no reward of a_i is smaller than that of b_j."""
    out = torch.ones(*a.shape[:-1], b.shape[-2], dtype=torch.bool, device=a.device)
    for x, y in zip(a.movedim(-1, 0).contiguous(), b.movedim(-1, 0).contiguous(), strict=True):
        out &= x[..., :, None] >= y[..., None, :]  # reward by reward: n k m comparisons are never in memory
    return out


def _by_pairs(r: Tensor, mask: Tensor, dedupe: bool) -> Bool[Tensor, "p n"]:
    """The frontiers of (P, n, m) from all pairs of rows."""
    ge = _no_smaller(r, r)
    beaten = ge & ~ge.mT
    if dedupe:
        beaten |= (ge & ge.mT).triu(1)  # a copy gives way to an earlier one
    return mask & ~(beaten & mask[:, :, None]).any(1)


def _by_sorting(r: Tensor, mask: Tensor, dedupe: bool) -> Bool[Tensor, " n"]:
    """The frontier of (n, m), best rows first: later rows are compared with the frontier so far, block by block."""
    rows = mask.nonzero()[:, 0]
    values = r[rows].to(torch.promote_types(r.dtype, torch.float32))
    # Ranks keep the order within each reward, have no unit, and their sum is exact. As a row that dominates has the
    # larger sum, "no smaller rank and a larger sum" is dominance, and no row dominates one that comes before it.
    ranks = torch.stack([column.unique(return_inverse=True)[1] for column in values.mT], 1)
    has = torch.cat([ranks.sum(1, keepdim=True), ranks], 1)
    needs = has + torch.eye(1, has.shape[1], dtype=has.dtype, device=has.device)
    left = has[:, 0].argsort(descending=True, stable=True)
    out = torch.zeros_like(mask)
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        block = block[~_reached(has[block], needs[block])]
        left = left[~_reached(has[block], needs[left])]
        out[rows[block]] = True
    if dedupe:
        front = out.nonzero()[:, 0]
        out[front[~_first_copies(r[front])]] = False
    return out


def _reached(has: Int[Tensor, "n k"], needs: Int[Tensor, "l k"]) -> Bool[Tensor, " l"]:
    """Whether some row of `has` is at least needs[j] in all columns, for each j.

    For each column, the rows of `has` that reach needs[j] are the first c_j in falling order. Sets of rows are bits,
    63 in one number, so their intersection over the columns takes one "and" for 63 pairs of rows.
    """
    n = len(has)
    reached = torch.full((len(needs), -(-n // WORD)), -1, device=has.device)
    for column, needed in zip(has.mT, needs.mT, strict=True):
        rising, order = column.sort()
        falling = order.flip(0)
        firsts = reached.new_zeros(n + 1, reached.shape[1])
        firsts[torch.arange(1, n + 1, device=has.device), falling // WORD] = 1 << (falling % WORD)
        firsts = firsts.cumsum(0)  # row c: the set of the first c; a sum of distinct bits is their union
        reached &= firsts[n - torch.searchsorted(rising, needed.contiguous())]
    return (reached != 0).any(1)


def _first_copies(r: Float[Tensor, "n m"]) -> Bool[Tensor, " n"]:
    """True for rows that equal no earlier row."""
    _, group = r.unique(dim=0, return_inverse=True)
    index = torch.arange(len(r), device=r.device)
    first = torch.full_like(index, len(r)).scatter_reduce(0, group, index, "amin")
    return first[group] == index
