"""From a diffusers scheduler's grid to a Schedule. The grids (spacing, offsets, shifts) stay diffusers' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rsaft.errors import ConfigError
from rsaft.schedules import Prediction, Schedule

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}


def ddim_schedule(scheduler: Any, num_steps: int) -> Schedule:
    """alpha_t = sqrt(alphas_cumprod[t]) on DDIM's grid of `num_steps` timesteps.

    Args:
        scheduler: any diffusers scheduler with a beta schedule; its noise levels and spacing are taken.
        num_steps: steps of the trajectory.

    Raises:
        ConfigError: for a scheduler without betas, a prediction type without a conversion, or more steps than there
            are noise levels.
    """
    if "beta_schedule" not in scheduler.config:
        raise ConfigError(
            f"scheduler: {type(scheduler).__name__} has no beta schedule, from which DDIM takes its noise levels; "
            "use a checkpoint that has one."
        )
    kind = scheduler.config.get("prediction_type")
    if kind not in _PREDICTIONS:
        raise ConfigError(
            f"scheduler.prediction_type: found '{kind}', and the sampler converts {sorted(_PREDICTIONS)}; "
            "use a checkpoint of one of these kinds."
        )
    if num_steps > scheduler.config.num_train_timesteps:
        raise ConfigError(
            f"num_steps: the model was trained with {scheduler.config.num_train_timesteps} noise levels, "
            f"so num_steps <= {scheduler.config.num_train_timesteps}; got {num_steps}."
        )
    scheduler = DDIMScheduler.from_config(scheduler.config)  # set_timesteps below changes it
    scheduler.set_timesteps(num_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    if timesteps[0] >= scheduler.config.num_train_timesteps:
        raise ConfigError(
            f"num_steps: {num_steps} steps with the checkpoint's steps_offset {scheduler.config.steps_offset} start "
            f"past its {scheduler.config.num_train_timesteps} noise levels; take fewer steps."
        )
    cumprod = [float(scheduler.alphas_cumprod[t]) for t in timesteps]
    stride = scheduler.config.num_train_timesteps // num_steps
    last = timesteps[-1] - stride
    cumprod.append(float(scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod))
    return Schedule(
        alphas=tuple(a**0.5 for a in cumprod),
        sigmas=tuple((1 - a) ** 0.5 for a in cumprod),
        timesteps=tuple(float(t) for t in timesteps),
        prediction=_PREDICTIONS[kind],
    )


def flow_schedule(
    scheduler: Any, num_steps: int, *, mu: float | None = None, sigmas: Sequence[float] | None = None
) -> Schedule:
    """sigma_t on the scheduler's grid, alpha_t = 1 - sigma_t.

    Args:
        scheduler: its shift decides the grid.
        num_steps: steps of the trajectory.
        mu: the resolution-dependent shift, for schedulers with dynamic shifting.
        sigmas: the grid before the shift; the scheduler's own by default.

    Raises:
        ConfigError: for a scheduler that is not of the flow-matching kind.
    """
    name = type(scheduler).__name__
    if not name.startswith("FlowMatch"):
        raise ConfigError(
            f"scheduler: found {name}, and a flow model is sampled on the grid of FlowMatchEulerDiscreteScheduler; "
            "give the checkpoint one of that kind."
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(num_steps, mu=mu, sigmas=None if sigmas is None else list(sigmas))
    points = tuple(float(s) for s in scheduler.sigmas)
    return Schedule(
        alphas=tuple(1 - s for s in points),
        sigmas=points,
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        prediction="flow",
    )


def resolution_shift(scheduler: Any, tokens: int) -> float | None:
    """mu, linear in the number of image tokens (Esser et al., 2024, section 5.3.2; diffusers' `calculate_shift`).

    None for a scheduler whose shift does not depend on the resolution.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)
