"""ReFL as the paper states it: every step by DDPM's posterior, then one prediction; the pretraining loss beside it.

Xu et al., 2023, Algorithm 1. A step is Bayes' rule written out: x_s given x_t and x_0 is the product of two normals
(Ho et al., 2020, Eqs. 6 and 7, for any alpha and sigma), without `rsaft.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.draft import Grid, renoise


def level(grid: Grid, i: int) -> tuple[float, float]:
    """alpha and sigma at point i."""
    a = grid.level[i]
    return (1 - a, a) if grid.kind == "flow" else (a**0.5, (1 - a) ** 0.5)


def predicted(grid: Grid, x: Tensor, out: Tensor, i: int) -> Tensor:
    """The clean latents that the network's output at point i implies."""
    alpha, sigma = level(grid, i)
    if grid.kind == "flow":
        return x - sigma * out
    return (x - sigma * out) / alpha if grid.kind == "eps" else alpha * x - sigma * out


def posterior_step(grid: Grid, x: Tensor, out: Tensor, i: int, noise: Tensor) -> Tensor:
    """A draw of x at point i + 1 given x at point i and the predicted x_0."""
    x_0 = predicted(grid, x, out, i)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level(grid, i), level(grid, i + 1)
    if sigma_s == 0:
        return x_0
    a = alpha_t / alpha_s  # x_t given x_s: normal with mean a x_s and variance beta
    beta = sigma_t**2 - a**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + a**2 / beta)
    return variance * (alpha_s / sigma_s**2 * x_0 + a / beta * x) + variance**0.5 * noise


def refl_latents(grid: Grid, denoise: Callable, x_T: Tensor, noises: Tensor, stop: int) -> Tensor:
    """The one-step prediction at step `stop`; all steps before it are detached."""
    x = x_T
    for i in range(stop):
        x = posterior_step(grid, x, denoise(x, grid.timesteps[i]), i, noises[:, i])
    x = x.detach()
    return predicted(grid, x, denoise(x, grid.timesteps[stop]), stop)


def pretraining_loss(grid: Grid, denoise: Callable, x_0: Tensor, eps: Tensor, i: int) -> Tensor:
    """Mean squared error of the network's output for noised latents, at point i."""
    alpha, sigma = level(grid, i)
    target = {"eps": eps, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[grid.kind]
    return torch.nn.functional.mse_loss(denoise(renoise(grid, x_0, eps, i), grid.timesteps[i]), target)
