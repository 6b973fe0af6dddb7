"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, and what a network's output says of x_0 and eps.

One algebra for every backbone (eps- and v-prediction UNets, flow transformers): a schedule and a three-line
conversion are all that differs. Index i = 0..s runs from noise to data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rsaft.types import Latents

Prediction = Literal["eps", "v", "flow"]


@dataclass(frozen=True)
class Schedule:
    """alpha and sigma at the s + 1 points of a trajectory, and the network's timestep at its s steps.

    Python floats: exact in float64, and multiplied into latents of any dtype without a cast.
    """

    alphas: tuple[float, ...]  # s + 1 values, noise to data
    sigmas: tuple[float, ...]  # s + 1 values, noise to data
    timesteps: tuple[float, ...]  # s values, in the network's own units
    prediction: Prediction

    def __post_init__(self) -> None:
        s = len(self.timesteps)
        if s < 1 or len(self.alphas) != s + 1 or len(self.sigmas) != s + 1:
            raise ValueError(
                f"a Schedule of s >= 1 timesteps has s + 1 alphas and sigmas; got {s} timesteps, "
                f"{len(self.alphas)} alphas, {len(self.sigmas)} sigmas."
            )

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def x_0_and_eps(self, prediction: Latents, x_t: Latents, i: int) -> tuple[Latents, Latents]:
        """Clean latents and noise that the network's output at point i implies.

        eps: the output is the noise. v: v = alpha eps - sigma x_0 with alpha^2 + sigma^2 = 1 (Salimans & Ho, 2022).
        flow: v = eps - x_0 with alpha = 1 - sigma.
        """
        alpha, sigma = self.alphas[i], self.sigmas[i]
        if self.prediction == "eps":
            return (x_t - sigma * prediction) / alpha, prediction
        if self.prediction == "v":
            return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
        return x_t - sigma * prediction, x_t + alpha * prediction

    def add_noise(self, x_0: Latents, eps: Latents, i: int) -> Latents:
        """x at point i: alpha_i x_0 + sigma_i eps. With x_0_and_eps it is the deterministic step to point i."""
        return self.alphas[i] * x_0 + self.sigmas[i] * eps

    def prediction_of(self, x_0: Latents, eps: Latents, i: int) -> Latents:
        """The output of a perfect network at point i for known x_0 and eps: the inverse of `x_0_and_eps`."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "v":
            return self.alphas[i] * eps - self.sigmas[i] * x_0
        return eps - x_0

    def scale(self, i: int) -> float:
        """x / y at point i: 1 for flow, alpha for the others."""
        return 1.0 if self.prediction == "flow" else self.alphas[i]

    def ysu(self, prediction: Latents, x_t: Latents, i: int) -> tuple[Tensor, float, Tensor]:
        """The coordinates (y, s, u) in which every step is y' = y + (s' - s) u and x_0 = y - s u.

        Flow: y = x, s = sigma, u = v. Others: y = x / alpha, s = sigma / alpha, u = eps.
        """
        u = prediction if self.prediction == "flow" else self.x_0_and_eps(prediction, x_t, i)[1]
        return x_t / self.scale(i), self.sigmas[i] / self.scale(i), u

    def posterior_std(self, i: int) -> float:
        """Standard deviation of x at point i + 1 given x at point i and x_0: the noise of an ancestral (DDPM) step.

        sigma' / sigma sqrt(sigma^2 - (alpha / alpha')^2 sigma'^2), with ' for point i + 1; with alpha^2 + sigma^2 = 1
        it is sigma_t(1) of DDIM (Song et al., 2021, Eq. 16).
        """
        ratio = self.alphas[i] * self.sigmas[i + 1] / self.alphas[i + 1]
        return self.sigmas[i + 1] / self.sigmas[i] * math.sqrt(max(self.sigmas[i] ** 2 - ratio**2, 0.0))
