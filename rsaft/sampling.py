"""The deterministic sampler, written once for every backbone.

With x_t = alpha_t x_0 + sigma_t eps, the step x_s = alpha_s x0_hat + sigma_s eps_hat is DDIM at eta = 0 for eps- and
v-prediction, and Euler's method for flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from rsaft.randomness import normal
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Denoiser, Images, Latents


@dataclass(frozen=True)
class Sampling:
    """How trajectories are sampled."""

    num_steps: int = 50  # sampling steps T of a trajectory
    guidance: float = 7.5  # classifier-free guidance weight w; 1 turns it off
    detach_unconditional: bool = False  # stop the gradient in the unconditional branch (halves guidance's backward)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps counts sampling steps, so num_steps >= 1; got {self.num_steps}.")
        if self.guidance < 0:
            raise ValueError(f"guidance is a weight, so guidance >= 0; got {self.guidance}.")


def ode(denoise: Denoiser, schedule: Schedule, x: Latents, *, start: int, stop: int) -> Latents:
    """Latents at point `stop` from latents `x` at point `start`; gradient mode is the caller's.

    Costs stop - start denoiser calls.

    Raises:
        ValueError: if there is no such stretch of the trajectory.
    """
    if not 0 <= start <= stop <= schedule.num_steps:
        raise ValueError(
            f"a stretch of a trajectory of {schedule.num_steps} steps has 0 <= start <= stop <= "
            f"{schedule.num_steps}; got start {start} and stop {stop}."
        )
    for i in range(start, stop):
        x_0, eps = schedule.x_0_and_eps(denoise(x, schedule.timesteps[i]), x, i)
        x = schedule.add_noise(x_0, eps, i + 1)
    return x


def checkpointed(denoise: Denoiser) -> Denoiser:
    """The denoiser with its activations recomputed in the backward pass: one more call, one call's memory.

    Non-reentrant, because `torch.autograd.grad` does not reach parameters through the reentrant kind. A tail draws
    nothing, so no random state is stashed.
    """

    def recomputed(x_t: Latents, t: float) -> Latents:
        return checkpoint(denoise, x_t, t, use_reentrant=False, preserve_rng_state=False)

    return recomputed


def initial_noise(backbone: Backbone, *, seed: int, purpose: str, step: int, sample_ids: Sequence[int]) -> Latents:
    """x_T for the samples, keyed by (seed, purpose, step, sample id)."""
    return normal(
        backbone.latent_shape,
        seed=seed,
        purpose=purpose,
        step=step,
        sample_ids=sample_ids,
        device=backbone.device,
        dtype=backbone.dtype,
    )


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int,
    sample_ids: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Images:
    """Images of the prompts, without gradient, on the CPU; image i depends on (seed, sample id i, prompt i) alone.

    Args:
        backbone: the model.
        prompts: n prompts.
        sampling: steps and guidance.
        seed: key of the noise, in a stream of its own: never the noise of a training step.
        sample_ids: keys of the noise; 0..n-1 by default.
        batch_size: images at a time.

    Returns:
        (n, 3, h, w) fp32 in [0, 1].
    """
    ids = list(range(len(prompts))) if sample_ids is None else list(sample_ids)
    if not prompts or len(ids) != len(prompts):
        raise ValueError(f"sample needs prompts, and one id for each; got {len(prompts)} prompts and {len(ids)} ids.")
    schedule = backbone.schedule(sampling.num_steps)
    images = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        denoise = backbone.denoiser(
            part, guidance=sampling.guidance, detach_unconditional=sampling.detach_unconditional
        )
        x = initial_noise(backbone, seed=seed, purpose="sample", step=0, sample_ids=ids[first : first + batch_size])
        x = ode(denoise, schedule, x, start=0, stop=schedule.num_steps)
        images.append(backbone.decode(x).cpu())
    return torch.cat(images)
