"""Flattening in image space: the reward of the worst image nearby, or of its neighbours' mean (RSA-FT, Eqs. 12-16)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.randomness import normal
from rsaft.types import Images, Reward

Norm = Literal["l2", "rms", "linf"]
Smoothing = Literal["gaussian"]

_TINY = 1e-12  # floor of a norm: a zero gradient gives a zero perturbation


def worst_case_delta(gradient: Float[Tensor, "b ..."], rho: float, norm: Norm = "l2") -> Float[Tensor, "b ..."]:
    """delta = -rho g / ||g|| for each sample: the step that lowers the reward most within rho (RSA-FT, Eq. 15).

    Args:
        gradient: g, the gradient of each sample's reward with respect to that sample.
        rho: radius in units of [0, 1] pixels, in the sense of `norm`.
        norm: "l2" is the paper's radius over the whole image. "rms" makes rho the root mean square per value, so that
            it means the same at every size. "linf" is -rho sign(g).

    Returns:
        A constant to autograd, fp32 at least. 0 for a sample whose gradient is zero or not finite.
    """
    g = gradient.detach()
    g = g if g.dtype == torch.float64 else g.float()
    flat = g.flatten(1)
    finite = torch.isfinite(flat).all(dim=1, keepdim=True)
    flat = torch.where(finite, flat, 0.0)
    if norm == "linf":
        return (-rho * flat.sign()).view_as(g)
    radius = rho if norm == "l2" else rho * flat.shape[1] ** 0.5
    return (-radius * flat / flat.norm(dim=1, keepdim=True).clamp_min(_TINY)).view_as(g)


def check_radius(rho: float, name: str) -> None:
    """Raises: ConfigError unless `rho` can be a radius."""
    if not 0 <= rho < float("inf"):
        raise ConfigError(f"{name} is a radius, so {name} >= 0 and finite; got {rho}.")


def check_precision(view: Tensor) -> None:
    """Raises: ConfigError if what is perturbed is in half precision, where a small delta is rounded away."""
    if view.dtype in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"input flattening: images are {view.dtype}, where rounding leaves a perturbation of norm 1e-2 a cosine of "
            "0.1 to 0.6 with itself; decode to float32."
        )


@dataclass(frozen=True)
class Delta:
    """Where an image is moved to: the settings, and the mathematics, that InputFlattened and RSAFT share."""

    rho: float
    norm: Norm = "l2"
    delta_steps: int = 1
    smoothing: Smoothing | None = None
    draws: int = 4
    project: bool = False

    def __post_init__(self) -> None:
        check_radius(self.rho, "rho")
        if self.delta_steps < 1:
            raise ConfigError(f"delta_steps counts gradient steps, so delta_steps >= 1; got {self.delta_steps}.")
        if self.draws < 2 or self.draws % 2:
            raise ConfigError(f"draws: noise is drawn in pairs u and -u, so draws is 2, 4, 6, ...; got {self.draws}.")
        if self.smoothing is not None and self.delta_steps > 1:
            raise ConfigError(
                f"delta_steps: {self.delta_steps} steps search for the worst image, and smoothing takes a mean over "
                "noise instead; set delta_steps to 1, or smoothing to null."
            )
        if self.smoothing is not None and self.norm == "linf":
            raise ConfigError("norm: Gaussian noise has no largest value, so linf is no size of it; set l2 or rms.")

    def worst_case(
        self, x: Float[Tensor, "b ..."], slope: Callable[[Tensor], Tensor], first: Tensor | None = None
    ) -> Float[Tensor, "b ..."]:
        """The perturbation that lowers the reward most: Eq. 15, or projected gradient descent from it.

        n steps are 2.5 rho / n long, each followed by the projection on the ball of radius rho (Madry et al., 2018).
        One step is Eq. 15 itself.

        Args:
            x: what is moved.
            slope: the gradient of each sample's reward at a point. Called `delta_steps` times, once less with `first`.
            first: the gradient at x, if it is known.
        """
        length = self.rho if self.delta_steps == 1 else 2.5 * self.rho / self.delta_steps
        delta = worst_case_delta(slope(x) if first is None else first, length, self.norm)
        delta = self._inside(x, delta)
        for _ in range(self.delta_steps - 1):
            delta = self._inside(x, delta + worst_case_delta(slope(x + delta), length, self.norm))
        return delta

    def gaussian(self, x: Float[Tensor, "b ..."], noise: Callable[[int], Tensor]) -> Float[Tensor, "n ..."]:
        """sigma u and -sigma u for each standard normal u: `draws` perturbations of x, n = draws b, draw after draw.

        sigma = rho / sqrt(d) for the norm "l2" of d values, and rho for "rms": rho is the root mean square of the
        perturbation's norm, so a worst case and a mean of the same rho look equally far. In pairs, because u and -u
        cancel the noise of the gradient's first order, sigma H u, exactly.

        Args:
            x: what is moved.
            noise: the u of a pair, by its number; broadcast against x.
        """
        sigma = self.rho if self.norm == "rms" else self.rho / x[0].numel() ** 0.5
        pairs = [sigma * noise(i).to(x).expand_as(x) for i in range(self.draws // 2)]
        return torch.cat([self._inside(x, sign * u) for u in pairs for sign in (1, -1)])

    def _inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """Delta within its radius, if steps may have left it, and x + delta within [0, 1], if asked."""
        if self.delta_steps > 1:
            delta = _onto_ball(delta, self.rho, self.norm)
        if self.project:  # a value of x that is outside already is not moved further out, so no |delta| grows here
            x = x.detach()
            delta = delta.clamp(min=(-x).clamp(max=0), max=(1 - x).clamp(min=0))
        return delta


def _onto_ball(delta: Tensor, rho: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return delta.clamp(-rho, rho)
    flat = delta.flatten(1)
    radius = rho if norm == "l2" else rho * flat.shape[1] ** 0.5
    return (flat * (radius / flat.norm(dim=1, keepdim=True).clamp_min(_TINY)).clamp(max=1)).view_as(delta)


def repeated(x: Float[Tensor, "b ..."], times: int) -> Float[Tensor, "n ..."]:
    """The whole batch several times, one after the other."""
    return x.repeat(times, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class InputFlattened:
    """r~(x, c) = r(x + delta, c), delta = -rho g / ||g||, g = grad_x r(x, c) (RSA-FT, Eqs. 12, 15, 16).

    Is itself a Reward. `delta` is a constant to autograd, and x + delta is not clamped unless `project` is set. Costs
    `delta_steps` extra forwards and backwards of `reward`. With `smoothing="gaussian"` r~ is the mean of r(x + sigma u)
    over `draws` fixed u (the paper's outlook): none extra, but `draws` times as many images in the one call.
    """

    reward: Reward
    rho: float  # radius per image, in units of [0, 1] pixels; sigma of the noise follows from it (Delta.gaussian)
    norm: Norm = "l2"
    delta_steps: int = 1  # of projected gradient descent; 1 is the paper's
    smoothing: Smoothing | None = None  # the mean over Gaussian noise instead of the worst case
    draws: int = 4  # of smoothing, in pairs u and -u
    project: bool = False  # keep x + delta in [0, 1]
    seed: int = 0  # of smoothing: the same u for every image and at every call, because a reward is a function

    def __post_init__(self) -> None:
        self._delta  # noqa: B018  checks the settings

    @property
    def _delta(self) -> Delta:
        return Delta(self.rho, self.norm, self.delta_steps, self.smoothing, self.draws, self.project)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_precision(images)
        if self.smoothing == "gaussian":
            moved = repeated(images, self.draws) + self._delta.gaussian(images, self._noise(images))
            return self.reward(moved, [*prompts] * self.draws).view(self.draws, -1).mean(dim=0)

        def slope(at: Tensor) -> Tensor:
            with torch.enable_grad():
                x = at.detach().requires_grad_()
                (g,) = torch.autograd.grad(self.reward(x, prompts).sum(), x)
            return g

        return self.reward(images + self._delta.worst_case(images, slope), prompts)

    def _noise(self, images: Images) -> Callable[[int], Tensor]:
        shape, device = tuple(images.shape[1:]), images.device
        return lambda i: normal(shape, seed=self.seed, purpose=f"smoothing-{i}", step=0, sample_ids=[0], device=device)
