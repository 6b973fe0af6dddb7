"""S1: by how much a reward falls when an image moves a little against it (RSA-FT, Sec. 3 and Eq. 10).

A reward that rises on one narrow peak is being exploited there, so S1 is watched along a run beside held-out rewards.
Assume no sign: it rose with hacking on one testbed world and fell on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.flatten.input import Norm, check_radius, worst_case_delta
from rsaft.types import Images, Reward


def sharpness(
    reward: Reward, images: Images, prompts: Sequence[str], rho: float, *, norm: Norm = "l2"
) -> Float[Tensor, " b"]:
    """S1 of each image, r(x) - r(x + delta) with one step delta = -rho g / ||g||, g = grad_x r(x) (RSA-FT, Eq. 10).

    Larger is sharper. To first order S1 = rho ||g||; one step is not the minimum over the ball, so S1 may be negative
    where rho is wider than the reward's structure. The generator gets no gradient, and images are not clamped.

    Args:
        reward: differentiable in the images; samples must not interact.
        images: in [0, 1]; half precision is computed in fp32.
        prompts: one an image.
        rho: radius for each image, in units of [0, 1] pixels, >= 0.
        norm: "l2" (the paper's: rho is the L2 norm over channels and pixels), "rms" (rho is the root mean square of
            delta, so it does not depend on the size) or "linf" (delta = -rho sign(g)).

    Returns:
        (b,), without a graph, in the reward's units. Exactly 0 where the gradient is 0; NaN where the gradient or
        either reward is not finite, which touches no other image.

    Raises:
        ValueError: if rho is negative or not finite, the norm is unknown, or the reward is not differentiable.

    Cost: two forwards and one backward of `reward`.
    """
    found = rewards_around(reward, images, prompts, rho, norm=norm)
    return found.centre - found.moved


@dataclass(frozen=True)
class Around:
    """A reward at each image and near it, without a graph."""

    centre: Float[Tensor, " b"]  # r(x)
    moved: Float[Tensor, " b"]  # r(x + delta): S1 is centre - moved
    slope: Float[Tensor, " b"]  # L2 norm of the reward's gradient at x


def rewards_around(reward: Reward, images: Images, prompts: Sequence[str], rho: float, *, norm: Norm = "l2") -> Around:
    """What S1 is made of, and the gradient's norm; arguments and cost as for `sharpness`."""
    check_radius(rho, "rho")
    if norm not in get_args(Norm):
        raise ValueError(f"sharpness: norm is one of {', '.join(get_args(Norm))}; got {norm!r}.")
    x = images.detach()
    x = (x if x.dtype == torch.float64 else x.float()).clone().requires_grad_()
    # Tensors without data are on a device that has no autocast (the memory estimate's).
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        with torch.enable_grad():
            centre = reward(x, prompts)
            if not centre.requires_grad:
                raise ValueError(
                    "sharpness needs the reward's gradient in the images, and this reward gives none; "
                    "leave S1 out for it (sharpness_rho: null)."
                )
            (g,) = torch.autograd.grad(centre.sum(), x, materialize_grads=True)
        delta = worst_case_delta(g, rho, norm)
        with torch.no_grad():
            moved = reward(x.detach() + delta, prompts)
    centre, moved = centre.detach(), moved.detach()
    still = (delta == 0).flatten(1).all(dim=1)  # r(x) - r(x) is 0 whatever the reward's rounding
    finite = torch.isfinite(g).flatten(1).all(dim=1) & torch.isfinite(centre) & torch.isfinite(moved)
    slope = torch.where(finite, g.flatten(1).norm(dim=1), torch.nan)
    return Around(centre, torch.where(finite, torch.where(still, centre, moved), torch.nan), slope)
