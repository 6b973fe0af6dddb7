"""DRaFT-K and DRaFT-LV (Clark et al., 2024, "Directly fine-tuning diffusion models on differentiable rewards").

DRaFT-K backpropagates the reward through the last K of T sampling steps. DRaFT-LV takes K = 1 and adds n one-step
predictions from the final sample noised again to the last level: 1 + n gradients for one trajectory, less variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rsaft.errors import ConfigError
from rsaft.randomness import normal
from rsaft.sampling import Sampling, State, checkpointed, initial_noise, ode
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Batch, Denoiser, Latents, Sample


@dataclass(frozen=True)
class DRaFT:
    """Settings of DRaFT-K (lv = 0) and DRaFT-LV (k = 1, lv = n extra samples; the authors use n = 2).

    Cost for each sample of a batch: T - k denoiser calls without gradient, k + lv with gradient (each once more with
    gradient checkpointing), and 1 + lv decodes and rewards with gradient.
    """

    k: int = 1  # last sampling steps that carry gradient
    lv: int = 0  # extra one-step predictions (DRaFT-LV)
    sampling: Sampling = field(default_factory=Sampling)
    gradient_checkpointing: bool = False  # recompute each denoiser call in the backward pass

    def __post_init__(self) -> None:
        steps = self.sampling.num_steps
        if not 1 <= self.k <= steps:
            raise ConfigError(
                f"algorithm.k: DRaFT keeps gradients for the last k of {steps} steps, "
                f"so 1 <= k <= {steps}; got {self.k}."
            )
        if self.lv < 0:
            raise ConfigError(f"algorithm.lv counts extra samples, so lv >= 0; got {self.lv}.")
        if self.lv and self.k != 1:
            raise ConfigError(
                f"algorithm.k: DRaFT-LV (lv = {self.lv}) is defined for k = 1; got {self.k}; set lv to 0."
            )

    def rollout(self, backbone: Backbone, batch: Batch) -> DRaFTRollout:
        """Draw all noise of the batch, and encode its prompts."""
        noises = [
            normal(
                backbone.latent_shape,
                seed=batch.seed,
                purpose=f"draft-lv-{j}",
                step=batch.step,
                sample_ids=batch.sample_ids,
                device=backbone.device,
                dtype=backbone.dtype,
            )
            for j in range(self.lv)
        ]
        x_T = initial_noise(backbone, seed=batch.seed, purpose="rollout", step=batch.step, sample_ids=batch.sample_ids)
        return DRaFTRollout(self, backbone, batch, x_T, noises)


class DRaFTRollout:
    """A trajectory of DRaFT: nothing is drawn after it is made."""

    def __init__(
        self, settings: DRaFT, backbone: Backbone, batch: Batch, x_T: Latents, noises: Sequence[Latents]
    ) -> None:
        self.batch = batch
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
        """The state before the last k steps (before step `stop`, if that is earlier)."""
        state = State(self._x_T, 0) if start is None else start
        end = self.num_steps - self._settings.k
        end = end if stop is None else min(stop, end)
        return State(ode(self._denoise, self._schedule, state.x, start=state.i, stop=end), end)

    def tail(self, prefix: State) -> Sample:
        """Final latents with a graph through the last k steps; with lv, (1 + lv) b of them, the plain ones first."""
        denoise = checkpointed(self._denoise) if self._settings.gradient_checkpointing else self._denoise
        prefix = self.prefix(prefix)  # finishes one that was stopped early: only the last k steps carry gradient
        x_0 = ode(denoise, self._schedule, prefix.x, start=prefix.i, stop=self.num_steps)
        latents, last = [x_0], self.num_steps - 1
        for noise in self._noises:
            x_last = self._schedule.add_noise(x_0.detach(), noise, last)
            latents.append(ode(denoise, self._schedule, x_last, start=last, stop=self.num_steps))
        repeats = len(latents)
        index = torch.arange(len(self.batch.prompts), device=x_0.device).repeat(repeats)
        return Sample(torch.cat(latents), self.batch.prompts * repeats, index)

    def select(self, rows: Sequence[int]) -> DRaFTRollout:
        index = torch.as_tensor(list(rows), device=self._x_T.device)
        return DRaFTRollout(
            self._settings,
            self._backbone,
            self.batch.select(rows),
            self._x_T[index],
            [noise[index] for noise in self._noises],
        )
