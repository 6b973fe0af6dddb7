"""Flattening in image space: the reward of the worst image nearby (RSA-FT, Eqs. 12, 15, 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.types import Images, Reward

Norm = Literal["l2", "rms", "linf"]

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
class InputFlattened:
    """r~(x, c) = r(x + delta, c), delta = -rho g / ||g||, g = grad_x r(x, c) (RSA-FT, Eqs. 12, 15, 16).

    Is itself a Reward. Costs one extra forward and backward of `reward`; `delta` is a constant to autograd, and
    x + delta is not clamped.
    """

    reward: Reward
    rho: float  # radius per image, in units of [0, 1] pixels
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        check_radius(self.rho, "rho")

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_precision(images)
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.reward(x, prompts).sum(), x)
        return self.reward(images + worst_case_delta(g, self.rho, self.norm), prompts)
