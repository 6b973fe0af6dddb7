"""Options of flattening, slowly and literally: one sample at a time, weights as a function's argument.

Nothing is shared with `rsaft.flatten`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Images = Callable[[Sequence[Tensor]], Tensor]
"""theta -> images (b, 3, h, w), for fixed noise and prompts, with the whole graph."""


def projected_descent(
    r: Callable[[Tensor], Tensor], x: Tensor, rho: float, norm: str, steps: int, *, box: bool = False
) -> Tensor:
    """delta of one image after `steps` steps of 2.5 rho / steps down r, each projected on the ball (and on [0, 1])."""
    d = x.numel()
    size: dict[str, Callable[[Tensor], float]] = {
        "l2": lambda v: math.sqrt(float((v * v).sum())),
        "rms": lambda v: math.sqrt(float((v * v).sum()) / d),
        "linf": lambda v: float(v.abs().max()),
    }
    length = rho if steps == 1 else 2.5 * rho / steps
    delta = torch.zeros_like(x)
    for _ in range(steps):
        at = (x + delta).detach().requires_grad_()
        (g,) = torch.autograd.grad(r(at[None])[0], at)
        delta = delta - length * (g.sign() if norm == "linf" else g / size[norm](g))
        if size[norm](delta) > rho:
            delta = delta.clamp(-rho, rho) if norm == "linf" else delta * (rho / size[norm](delta))
        if box:
            delta = (x + delta).clamp(0, 1) - x
    return delta


def selective_gradient(
    x_0: Images,
    r: Callable[[Tensor], Tensor],
    theta: Sequence[Tensor],
    *,
    rho: float,
    rho_w: float,
    mode: str,
    tau: float,
) -> list[Tensor]:
    """The gradient of -mean_i w_i r(x_i + delta_i) at theta + eps, w_i = b exp(-S1_i / tau) / sum_j exp(-S1_j / tau).

    S1 is taken at the images of theta + eps, each with its own one-step worst case; the loss's delta is the paper's, at
    the images of theta.
    """
    theta = [t.detach().clone().requires_grad_() for t in theta]
    clean = x_0(theta)
    deltas = _one_steps(r, clean.detach(), rho)
    moved = list(theta)
    if mode in ("weight", "both"):
        g = torch.autograd.grad(r(clean).sum(), theta, allow_unused=True)
        g = [torch.zeros_like(t) if a is None else a for a, t in zip(g, theta, strict=True)]
        norm = math.sqrt(sum(float((a * a).sum()) for a in g))
        moved = [(t - rho_w * a / norm).detach().requires_grad_() for t, a in zip(theta, g, strict=True)]
    images = x_0(moved)
    own = _one_steps(r, images.detach(), rho)
    s1 = [float(r(images.detach())[i] - r((images + own).detach())[i]) for i in range(len(images))]
    lowest = min(s1)
    raw = [math.exp(-(s - lowest) / tau) for s in s1]
    weights = [len(raw) * w / sum(raw) for w in raw]
    shifted = images + deltas if mode in ("input", "both") else images
    total = [torch.zeros_like(t) for t in moved]
    for i, w in enumerate(weights):
        g = torch.autograd.grad(-r(shifted)[i], moved, retain_graph=True, allow_unused=True)
        total = [t if a is None else t + w * a / len(weights) for t, a in zip(total, g, strict=True)]
    return total


def _one_steps(r: Callable[[Tensor], Tensor], images: Tensor, rho: float) -> Tensor:
    """-rho g / |g| of each image; r is evaluated on the whole batch, because it may know each image's prompt."""
    rows = []
    for i in range(len(images)):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(r(x)[i], x)
        rows.append(-rho * g[i] / torch.linalg.vector_norm(g[i]))
    return torch.stack(rows)
