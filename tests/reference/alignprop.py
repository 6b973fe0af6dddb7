"""AlignProp as the authors' loop has it: the whole trajectory, the network's output detached in the first k steps.

Prabhudesai et al., 2023, with DDIM at eta = 1 written as DDPM's posterior.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tests.reference.draft import Grid
from tests.reference.refl import posterior_step


def alignprop_latents(grid: Grid, denoise: Callable, x_T: Tensor, noises: Tensor, k: int) -> Tensor:
    """Final latents with gradient through steps k..T-1."""
    x = x_T
    for i, t in enumerate(grid.timesteps):
        out = denoise(x, t)
        x = posterior_step(grid, x, out.detach() if i < k else out, i, noises[:, i])
    return x
