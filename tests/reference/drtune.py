"""DRTune as the paper's algorithm has it: one loop over the steps, with stop-gradients, in x and not in y.

Wu et al., 2024: the network's input is detached at every step, its output outside the training steps; the state keeps
its gradient; at the stop step the reward sees the predicted x_0. v-prediction is turned into eps first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from tests.reference.draft import Grid


def drtune_latents(
    grid: Grid, denoise: Callable, x_T: Tensor, stop: int, train: Collection[int], early: bool
) -> Tensor:
    """The prediction at step `stop`, or without early stop the final latents."""
    x = x_T
    for i, t in enumerate(grid.timesteps):
        a, b = grid.level[i], grid.level[i + 1]
        out = denoise(x.detach(), t)
        if grid.kind == "v":
            out = a**0.5 * out + (1 - a) ** 0.5 * x.detach()
        if i not in train:
            out = out.detach()
        if early and i == stop:
            return x - a * out if grid.kind == "flow" else (x - (1 - a) ** 0.5 * out) / a**0.5
        if grid.kind == "flow":
            x = x + (b - a) * out
        else:
            x = (b / a) ** 0.5 * x + ((1 - b) ** 0.5 - (b / a) ** 0.5 * (1 - a) ** 0.5) * out
    return x
