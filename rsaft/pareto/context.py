"""What the decision agent's judges are given and what they say: `Context` in, `Verdict` out (PG-OT, App. D.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError, RsaftError
from rsaft.types import Images

Strategy = Literal["offline", "online"]

GOLD = "held_out/gold"  # a testbed's ground truth, which no judge here looks at


class JudgeError(RsaftError):
    """A judge gives no verdict: nobody at the terminal, or a server that is away or refuses."""


@dataclass(frozen=True)
class Verdict:
    """What a judge finds at one check."""

    breakdown: bool  # the images have broken down since the last check that passed
    reward: str | None = None  # the active reward that did it; None: not known. Not read without a breakdown
    confidence: float = 1.0  # in [0, 1], for the log; the judge itself decides when it is sure enough
    analysis: str = ""  # for the log: why, in the judge's words
    stagnant: bool = False  # the images no longer change for the better. Not read with a breakdown

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise ConfigError(f"a verdict's confidence is in [0, 1]; got {self.confidence}.")


@dataclass(frozen=True, eq=False)
class Context:
    """What a judge may look at. n samples, the same prompts and noises at every check of a run.

    Keys of scores are those of `rsaft.metrics.Evaluation`: "reward/NAME" and "held_out/NAME".
    """

    step: int  # updates done: the weights being judged
    active: tuple[str, ...]  # rewards in training
    strategy: Strategy = "offline"
    removed: tuple[str, ...] = ()  # rewards that were taken out, in order
    check: int = 0  # checks of this run before this one, those before a revert included
    prompts: tuple[str, ...] = ()
    images: Images = field(default_factory=lambda: torch.zeros(0, 3, 1, 1))  # in [0, 1]
    base_images: Images = field(default_factory=lambda: torch.zeros(0, 3, 1, 1))  # of the untuned model
    scores: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    base_scores: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    passed_scores: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)  # at the last passed check; {}: base
    history: tuple[tuple[int, Mapping[str, float]], ...] = ()  # (step, means) of evaluations, this one last
    distances: tuple[tuple[int, float], ...] = ()  # (step, distance from the base: KL or of weights), this one last
    grid: Path | None = None  # the images as one picture, and those of the untuned model
    base_grid: Path | None = None

    def __post_init__(self) -> None:
        n = len(self.prompts)
        lengths = {"images": len(self.images), "base_images": len(self.base_images)}
        for name in ("scores", "base_scores", "passed_scores"):
            lengths |= {f"{name} of {key}": len(values) for key, values in getattr(self, name).items()}
        wrong = {name: found for name, found in lengths.items() if found != n and (found or "scores" in name)}
        if wrong or self.images.shape != self.base_images.shape:
            raise ConfigError(
                f"context: {n} prompts have as many images, base images of the same size, and scores of each reward; "
                f"got {wrong or [tuple(self.images.shape), tuple(self.base_images.shape)]}."
            )


@runtime_checkable
class Judge(Protocol):
    """Any callable of this form is a judge."""

    def __call__(self, context: Context) -> Verdict: ...
