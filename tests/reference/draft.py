"""DRaFT-K and DRaFT-LV as the paper states them: one unrolled graph, no sharing, no tricks.

Clark et al., 2024, Algorithm 1. The steps are written from DDIM (Song et al., 2021, Eq. 12 with eta = 0),
v-prediction (Salimans & Ho, 2022, Appendix D) and Euler's method for flow matching, without `rsaft.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Levels of a trajectory: s + 1 values of `level` (alpha-bar for DDIM, sigma for flow), s network timesteps."""

    kind: str  # "eps", "v" or "flow"
    level: Sequence[float]
    timesteps: Sequence[float]


def ddim_grid(scheduler, num_steps: int, kind: str) -> Grid:
    """Leading spacing with offset 1 and the last step to alpha-bar_0, as Stable Diffusion samples."""
    stride = 1000 // num_steps
    timesteps = [stride * (num_steps - 1 - i) + 1 for i in range(num_steps)]
    alpha_bar = scheduler.alphas_cumprod.double()
    return Grid(kind, [float(alpha_bar[t]) for t in [*timesteps, 0]], timesteps)


def flow_grid(scheduler, num_steps: int) -> Grid:
    """The scheduler's own levels."""
    scheduler.set_timesteps(num_steps)
    return Grid("flow", scheduler.sigmas.tolist(), scheduler.timesteps.tolist())


def step(grid: Grid, x: Tensor, out: Tensor, i: int) -> Tensor:
    """One deterministic step from level i to level i + 1."""
    a, b = grid.level[i], grid.level[i + 1]
    if grid.kind == "flow":
        return x + (b - a) * out
    if grid.kind == "eps":
        x_0, eps = (x - (1 - a) ** 0.5 * out) / a**0.5, out
    else:
        x_0, eps = a**0.5 * x - (1 - a) ** 0.5 * out, a**0.5 * out + (1 - a) ** 0.5 * x
    return b**0.5 * x_0 + (1 - b) ** 0.5 * eps


def renoise(grid: Grid, x_0: Tensor, noise: Tensor, i: int) -> Tensor:
    """The forward process to level i."""
    a = grid.level[i]
    if grid.kind == "flow":
        return (1 - a) * x_0 + a * noise
    return a**0.5 * x_0 + (1 - a) ** 0.5 * noise


def guided(network: Callable[[Tensor, float, Tensor], Tensor], cond: Tensor, uncond: Tensor, w: float):
    """Classifier-free guidance by two separate calls."""
    return lambda x, t: (1 - w) * network(x, t, uncond) + w * network(x, t, cond)


def final_latents(grid: Grid, denoise: Callable, x_T: Tensor, k: int) -> Tensor:
    """The whole trajectory with gradient mode on; the state is detached before step T - K."""
    x, num_steps = x_T, len(grid.timesteps)
    for i in range(num_steps):
        if i == num_steps - k:
            x = x.detach()
        x = step(grid, x, denoise(x, grid.timesteps[i]), i)
    return x


def draft_gradient(
    grid: Grid,
    denoise: Callable,
    decode: Callable[[Tensor], Tensor],
    reward: Callable[[Tensor, Sequence[str]], Tensor],
    x_T: Tensor,
    noises: Sequence[Tensor],
    prompts: Sequence[str],
    params: Sequence[Tensor],
    k: int,
) -> Tensor:
    """Gradient of the loss, minus the mean reward over samples and, for DRaFT-LV, over 1 + n predictions of each."""
    z_0 = final_latents(grid, denoise, x_T, k)
    total = reward(decode(z_0), prompts).mean()
    last = len(grid.timesteps) - 1
    for noise in noises:
        x = renoise(grid, z_0.detach(), noise, last)
        total = total + reward(decode(step(grid, x, denoise(x, grid.timesteps[last]), last)), prompts).mean()
    loss = -total / (1 + len(noises))
    grads = torch.autograd.grad(loss, list(params), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params, strict=True)])
