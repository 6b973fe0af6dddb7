"""ReFL (Xu et al., 2023, "ImageReward", Algorithm 1): the reward of a one-step prediction from a random late step.

With T steps, a stop step t drawn uniformly from the last `last` of them, and x_t reached without gradient:

    (1)  x_0_hat = (x_t - sigma_t eps_theta(x_t, t)) / alpha_t
    (2)  L = lambda phi( r(c, decode(x_0_hat)) ) + lambda_pre L_pre,   phi(r) = relu(margin - r)

phi and lambda are the objective `Hinge(weights, margin=2, scale=1e-3)`; lambda_pre L_pre is `pretrain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.randomness import integer
from rsaft.rdrl.pretraining import DenoisingTerm, Pretraining, denoising_term
from rsaft.sampling import Sampling, State, ancestral, checkpointed, initial_noise, step_noises
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Batch, Denoiser, Latents, Sample


@dataclass(frozen=True)
class ReFL:
    """Settings of ReFL. The defaults are the authors' code: 40 DDPM steps without guidance, one of the last 10.

    Cost for each sample of a batch that stops at step t: t denoiser calls without gradient, 1 with gradient (once more
    with gradient checkpointing), 1 decode and 1 reward with gradient; with `pretrain`, 1 denoiser call with gradient.
    t is T - (last + 1) / 2 on average.
    """

    last: int | None = None  # the stop step is one of the last ones, so many; null: a quarter of the steps
    eta: float = 1.0  # noise of the steps before it: 1 is DDPM, 0 the deterministic sampler
    pretrain: Pretraining | None = None  # the pretraining term; null: none, as in the authors' code
    sampling: Sampling = field(default_factory=lambda: Sampling(num_steps=40, guidance=1.0))
    gradient_checkpointing: bool = False  # recompute the denoiser call in the backward pass

    def __post_init__(self) -> None:
        steps = self.sampling.num_steps
        if self.last is not None and not 1 <= self.last <= steps:
            raise ConfigError(
                f"algorithm.last: ReFL stops at one of the last of {steps} steps, so 1 <= last <= {steps}; "
                f"got {self.last}."
            )
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"algorithm.eta is a share of DDPM's noise, so 0 <= eta <= 1; got {self.eta}.")

    @property
    def first_stop(self) -> int:
        """The earliest step at which a trajectory stops."""
        steps = self.sampling.num_steps
        return steps - (max(steps // 4, 1) if self.last is None else self.last)

    def rollout(self, backbone: Backbone, batch: Batch) -> ReFLRollout:
        """Draw the stop step (the same for all samples of an update), all noise and the pairs; encode the prompts."""
        keys = {"seed": batch.seed, "step": batch.step}
        stop = integer(self.first_stop, self.sampling.num_steps, purpose="refl-stop", **keys)
        x_T = initial_noise(backbone, purpose="rollout", sample_ids=batch.sample_ids, **keys)
        noises = step_noises(
            backbone, stop if self.eta else 0, purpose="refl-noise", sample_ids=batch.sample_ids, **keys
        )
        return ReFLRollout(self, backbone, batch, stop, x_T, noises)


class ReFLRollout:
    """A trajectory of ReFL that stops at step `stop`: nothing is drawn after it is made."""

    def __init__(
        self,
        settings: ReFL,
        backbone: Backbone,
        batch: Batch,
        stop: int,
        x_T: Latents,
        noises: Float[Tensor, "b s c hz wz"],
    ) -> None:
        self.batch = batch
        self.stop = stop
        self.num_steps = stop + 1  # the trajectory ends with the prediction from its stop step
        self._settings = settings
        self._backbone = backbone
        self._x_T = x_T
        self._noises = noises
        self._schedule: Schedule = backbone.schedule(settings.sampling.num_steps)
        self._denoise: Denoiser = backbone.denoiser(
            batch.prompts,
            guidance=settings.sampling.guidance,
            detach_unconditional=settings.sampling.detach_unconditional,
        )
        self._pretraining: DenoisingTerm | None = (
            None if settings.pretrain is None else denoising_term(settings.pretrain, backbone, batch, self._schedule)
        )

    @torch.no_grad()
    def prefix(self, start: State | None = None, stop: int | None = None) -> State:
        """The state before the stop step (before step `stop`, if that is earlier)."""
        state = State(self._x_T, 0) if start is None else start
        end = self.stop if stop is None else min(stop, self.stop)
        x = ancestral(
            self._denoise, self._schedule, state.x, self._noises, eta=self._settings.eta, start=state.i, stop=end
        )
        return State(x, end)

    def tail(self, prefix: State) -> Sample:
        """x_0_hat of (1) with a graph through its one denoiser call, and the pretraining term."""
        denoise = checkpointed(self._denoise) if self._settings.gradient_checkpointing else self._denoise
        x_t, t = self.prefix(prefix).x, self.stop  # finishes a prefix that was stopped early
        x_0, _ = self._schedule.x_0_and_eps(denoise(x_t, self._schedule.timesteps[t]), x_t, t)
        index = torch.arange(len(x_0), device=x_0.device)
        penalty = None if self._pretraining is None else self._pretraining()
        return Sample(x_0, self.batch.prompts, index, penalty)

    def select(self, rows: Sequence[int]) -> ReFLRollout:
        index = torch.as_tensor(list(rows), device=self._x_T.device)
        return ReFLRollout(
            self._settings,
            self._backbone,
            self.batch.select(rows),
            self.stop,
            self._x_T[index],
            self._noises[index],
        )
