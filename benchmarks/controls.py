"""Controls for the evidence: what a regularizer must beat to be more than noise or a smaller step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsaft.flatten import perturbed
from rsaft.flatten.weight import global_norm
from rsaft.randomness import generator
from rsaft.rdrl import plain_step
from rsaft.types import Rollout, Score, StepOutput


@dataclass(frozen=True)
class RandomPerturbation:
    """A plain step at theta + eps, eps uniform on the sphere of radius rho_w: RSA-FT's norm without its direction."""

    rho_w: float

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: Any = None
    ) -> StepOutput:
        batch = rollouts[0].batch
        draw = generator(batch.seed, "random-perturbation", batch.step)
        direction = [torch.randn(p.shape, generator=draw).to(p) for p in params]
        norm = global_norm(direction)
        with perturbed(params, [self.rho_w * d / norm for d in direction]):
            return plain_step(rollouts, score, params)
