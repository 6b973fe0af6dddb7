"""The deterministic sampler and the ancestral one, each written once for every backbone.

With x_t = alpha_t x_0 + sigma_t eps, the step x_s = alpha_s x0_hat + sigma_s eps_hat is DDIM at eta = 0 for eps- and
v-prediction, and Euler's method for flow matching. With eta > 0, a part of eps_hat is replaced by fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rsaft.randomness import normal
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Denoiser, Images, Latents


@dataclass(frozen=True)
class Sampling:
    """How trajectories are sampled."""

    num_steps: int = 50  # sampling steps T of a trajectory
    guidance: float = 7.5  # classifier-free guidance weight w; 1 turns it off. Flux: what the network is told
    detach_unconditional: bool = False  # stop the gradient in the unconditional branch (halves guidance's backward)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps counts sampling steps, so num_steps >= 1; got {self.num_steps}.")
        if self.guidance < 0:
            raise ValueError(f"guidance is a weight, so guidance >= 0; got {self.guidance}.")


@dataclass(frozen=True)
class State:
    """A point of a trajectory: latents x before step i."""

    x: Latents
    i: int


def ode(denoise: Denoiser, schedule: Schedule, x: Latents, *, start: int, stop: int) -> Latents:
    """Latents at point `stop` from latents `x` at point `start`; gradient mode is the caller's.

    Costs stop - start denoiser calls.

    Raises:
        ValueError: if there is no such stretch of the trajectory.
    """
    _check_stretch(schedule, start, stop)
    for i in range(start, stop):
        x_0, eps = schedule.x_0_and_eps(denoise(x, schedule.timesteps[i]), x, i)
        x = schedule.add_noise(x_0, eps, i + 1)
    return x


def ancestral(
    denoise: Denoiser,
    schedule: Schedule,
    x: Latents,
    noises: Float[Tensor, "b s c hz wz"],
    *,
    eta: float,
    start: int,
    stop: int,
) -> Latents:
    """`ode` with fresh noise z in every step: DDIM with eta > 0 (Song et al., 2021, Eqs. 12 and 16); eta = 1 is DDPM.

        x_{i+1} = alpha_{i+1} x_0 + sqrt(sigma_{i+1}^2 - std_i^2) eps + std_i z_i,   std_i = eta posterior_std(i)

    Whatever std_i, x_{i+1} has the noise level sigma_{i+1}; so the formula holds for flow models too, where
    eta = 1 is the ancestral step of x_t = (1 - sigma) x_0 + sigma eps. eta = 0 is `ode` bit for bit.

    Costs stop - start denoiser calls. Draws nothing: z_i is `noises[:, i]`.

    Args:
        denoise: the guided network.
        schedule: the trajectory.
        x: latents at point `start`.
        noises: standard normal, one for each step that is made.
        eta: share of the ancestral noise, in [0, 1].
        start, stop: the stretch, as for `ode`.

    Raises:
        ValueError: if there is no such stretch of the trajectory.
    """
    if eta == 0:
        return ode(denoise, schedule, x, start=start, stop=stop)
    _check_stretch(schedule, start, stop)
    for i in range(start, stop):
        x_0, eps = schedule.x_0_and_eps(denoise(x, schedule.timesteps[i]), x, i)
        std = eta * schedule.posterior_std(i)
        kept = math.sqrt(max(schedule.sigmas[i + 1] ** 2 - std**2, 0.0))
        x = schedule.alphas[i + 1] * x_0 + kept * eps + std * noises[:, i]
    return x


def _check_stretch(schedule: Schedule, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= schedule.num_steps:
        raise ValueError(
            f"a stretch of a trajectory of {schedule.num_steps} steps has 0 <= start <= stop <= "
            f"{schedule.num_steps}; got start {start} and stop {stop}."
        )


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


def step_noises(
    backbone: Backbone, num_steps: int, *, seed: int, purpose: str, step: int, sample_ids: Sequence[int]
) -> Float[Tensor, "b s c hz wz"]:
    """The noises of `ancestral` for steps 0..num_steps - 1, keyed by (seed, purpose, step, sample id)."""
    return normal(
        (num_steps, *backbone.latent_shape),
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
