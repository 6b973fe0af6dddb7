"""One score of a method's runs beside that of a baseline's, paired by training seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rsaft.metrics.matched import paired_bootstrap

MIN_PAIRS = 3  # with fewer, an interval over seeds is the seeds' own range


@dataclass(frozen=True)
class Compared:
    """One score of a method's runs at one place, and its difference to the baseline's."""

    values: dict[int, float]  # by seed: the runs that have one
    runs: int
    seeds: tuple[int, ...]  # shared with the baseline
    difference: tuple[float, float, float] | None  # mean, low, high over them

    @property
    def mean(self) -> float | None:
        return sum(self.values.values()) / len(self.values) if self.values else None

    @property
    def text(self) -> str:
        """For a table."""
        return self.shown()

    def shown(self, *, decimals: int = 3, min_pairs: int = MIN_PAIRS) -> str:
        """For a table: the mean, the difference, and its interval from `min_pairs` seeds on.

        Without a difference, +- the standard error over seeds. "2 of 5": only so many runs have a value.
        """
        if self.mean is None:
            return f"0 of {self.runs}"
        text = f"{self.mean:.{decimals}f}"
        if len(self.values) < self.runs:
            return f"{text} ({len(self.values)} of {self.runs})"
        if self.difference is None and self.runs > 1:
            error = float(torch.tensor(list(self.values.values()), dtype=torch.float64).std()) / self.runs**0.5
            return f"{text} +- {error:.{decimals}f}"
        if self.difference is None:
            return text
        mean, low, high = self.difference
        interval = f" [{low:+.{decimals}f}, {high:+.{decimals}f}]" if len(self.seeds) >= min_pairs else ""
        return f"{text} ({mean:+.{decimals}f}{interval}, n={len(self.seeds)})"


def compared(mine: Mapping[int, float | None], base: Mapping[int, float | None] | None) -> Compared:
    """A method's values against a baseline's, both by seed; None where a run has none.

    The difference is over the seeds that both have. It is None if they share no seed, or if a run of a shared seed has
    no value: else runs that were chosen by their result would be compared.
    """
    values = {seed: value for seed, value in mine.items() if value is not None}
    shared = sorted(mine.keys() & base.keys()) if base is not None else []
    pairs = [(mine[s], base[s]) for s in shared] if base is not None else []
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not whole or len(whole) < len(pairs):
        return Compared(values, len(mine), tuple(shared), None)
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*whole, strict=True))
    return Compared(values, len(mine), tuple(shared), paired_bootstrap(a, b, seed=0))
