"""AlignProp (Prabhudesai et al., 2023, "Aligning text-to-image diffusion models with reward backpropagation").

Randomized truncated backpropagation through sampling. With T steps and a truncation step k drawn once per trajectory:

    (1)  x_{i+1} = step(x_i, eps_theta(x_i, t_i), z_i),   i = 0..T-1,   z_i the noise of DDIM with eta = 1
    (2)  L = -r(c, decode(x_T)),   with gradient through steps i >= k, and no gradient into x_k

So K = T - k steps carry gradient: DRaFT-K with a random K and a stochastic sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.randomness import generator
from rsaft.sampling import Sampling, State, ancestral, checkpointed, initial_noise, step_noises
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Batch, Denoiser, Latents, Sample


@dataclass(frozen=True)
class AlignProp:
    """Settings of AlignProp. The defaults are the authors' code: k normal with mean 42 and deviation 5 of 50 steps.

    Cost for each sample of a batch whose truncation step is k: k denoiser calls without gradient, T - k with gradient
    (each once more with gradient checkpointing), 1 decode and 1 reward with gradient. At T = 50, T - k is 9.1 on
    average.
    """

    # The first step with gradient, k: drawn from a normal of `mean` and `std`, or uniformly from 1..T-1 (the paper's
    # text), or always the given step. A draw outside 1..T-1 is made again.
    truncation: Literal["gaussian", "uniform"] | int = "gaussian"
    mean: float = 0.84  # mean of k / T
    std: float = 0.1  # standard deviation of k / T
    eta: float = 1.0  # noise of each step: 1 is DDPM, 0 the deterministic sampler
    sampling: Sampling = field(default_factory=lambda: Sampling(num_steps=50, guidance=5.0))
    gradient_checkpointing: bool = True  # recompute each denoiser call in the backward pass

    def __post_init__(self) -> None:
        steps = self.sampling.num_steps
        if isinstance(self.truncation, int):
            if not 0 <= self.truncation < steps:
                raise ConfigError(
                    f"algorithm.truncation: the first of {steps} steps with gradient is in 0 <= truncation < {steps}; "
                    f"got {self.truncation}."
                )
        elif steps < 2:
            raise ConfigError(
                f"algorithm.truncation: a random step of 1..T-1 needs T >= 2 sampling steps; got {steps}; set it to 0."
            )
        if not 0 <= self.mean <= 1:
            raise ConfigError(f"algorithm.mean is of k / T, so 0 <= mean <= 1; got {self.mean}.")
        if self.std <= 0:
            raise ConfigError(f"algorithm.std is of k / T, so std > 0; got {self.std}; truncation takes a fixed k.")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"algorithm.eta is a share of DDPM's noise, so 0 <= eta <= 1; got {self.eta}.")

    def probabilities(self) -> Float[Tensor, " s"]:
        """Chance of each step 0..T-1 to be the first with gradient; float64, unnormalised.

        A normal draw is rounded down, and made again until it lies in 1..T-1: the normal's mass in [k, k + 1).
        """
        steps = self.sampling.num_steps
        k = torch.arange(steps, dtype=torch.float64)
        if isinstance(self.truncation, int):
            return (k == self.truncation).double()
        if self.truncation == "uniform":
            return (k >= 1).double()
        low, high = ((edge - self.mean * steps) / (self.std * steps) for edge in (k, k + 1))
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        return torch.where(k >= 1, mass.clamp_min(1e-300), 0.0)

    def rollout(self, backbone: Backbone, batch: Batch) -> AlignPropRollout:
        """Draw the truncation step (the same for all samples of an update) and all noise; encode the prompts."""
        keys = {"seed": batch.seed, "step": batch.step}
        draw = torch.multinomial(
            self.probabilities(), 1, generator=generator(batch.seed, "alignprop-truncation", batch.step)
        )
        x_T = initial_noise(backbone, purpose="rollout", sample_ids=batch.sample_ids, **keys)
        noises = step_noises(
            backbone,
            self.sampling.num_steps if self.eta else 0,
            purpose="alignprop-noise",
            sample_ids=batch.sample_ids,
            **keys,
        )
        return AlignPropRollout(self, backbone, batch, int(draw), x_T, noises)


class AlignPropRollout:
    """A trajectory of AlignProp whose first step with gradient is `first`: nothing is drawn after it is made."""

    def __init__(
        self,
        settings: AlignProp,
        backbone: Backbone,
        batch: Batch,
        first: int,
        x_T: Latents,
        noises: Float[Tensor, "b s c hz wz"],
    ) -> None:
        self.batch = batch
        self.first = first
        self.num_steps = settings.sampling.num_steps
        self._settings = settings
        self._backbone = backbone
        self._x_T = x_T
        self._noises = noises
        self._schedule: Schedule = backbone.schedule(self.num_steps)
        self._denoise: Denoiser = backbone.denoiser(
            batch.prompts,
            guidance=settings.sampling.guidance,
            detach_unconditional=settings.sampling.detach_unconditional,
        )

    @torch.no_grad()
    def prefix(self, start: State | None = None, stop: int | None = None) -> State:
        """The state before the truncation step k (before step `stop`, if that is earlier)."""
        state = State(self._x_T, 0) if start is None else start
        end = self.first if stop is None else min(stop, self.first)
        return State(self._steps(self._denoise, state, end), end)

    def tail(self, prefix: State) -> Sample:
        """Final latents with a graph through steps k..T-1."""
        denoise = checkpointed(self._denoise) if self._settings.gradient_checkpointing else self._denoise
        prefix = self.prefix(prefix)  # finishes one that was stopped early
        x_0 = self._steps(denoise, prefix, self.num_steps)
        return Sample(x_0, self.batch.prompts, torch.arange(len(x_0), device=x_0.device))

    def _steps(self, denoise: Denoiser, state: State, stop: int) -> Latents:
        """Equation (1) from a state to point `stop`."""
        return ancestral(
            denoise, self._schedule, state.x, self._noises, eta=self._settings.eta, start=state.i, stop=stop
        )

    def select(self, rows: Sequence[int]) -> AlignPropRollout:
        index = torch.as_tensor(list(rows), device=self._x_T.device)
        return AlignPropRollout(
            self._settings,
            self._backbone,
            self.batch.select(rows),
            self.first,
            self._x_T[index],
            self._noises[index],
        )
