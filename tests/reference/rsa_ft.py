"""RSA-FT's Algorithm 1 as the paper writes it, slowly: whole graphs, weights as a function's argument, one sample.

Nothing is shared with `rsaft.flatten`: the weights are never changed in place, and each gradient has a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generator = Callable[[Sequence[Tensor]], Tensor]
"""theta -> images (b, 3, h, w), for fixed noise and prompts, with the whole graph."""

Reward = Callable[[Tensor], Tensor]
"""images -> (b,)"""


def rsa_ft_gradient(
    x_0: Generator, r: Reward, theta: Sequence[Tensor], rho: float, rho_w: float, mode: str = "both"
) -> list[Tensor]:
    """The gradient of -mean r(x_0(theta + eps) + delta) with respect to theta (Eqs. 15, 17, 19).

    Returns: one tensor a parameter.
    """
    theta = [t.detach().clone().requires_grad_() for t in theta]
    # line 4: delta, for each sample on its own
    images = x_0(theta).detach()
    rows = []
    for i in range(len(images)):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(r(x)[i], x)
        rows.append(-rho * g[i] / torch.linalg.vector_norm(g[i]))
    delta = torch.stack(rows) if mode in ("input", "both") else torch.zeros_like(images)
    # line 6: epsilon, with delta not applied
    g_theta = torch.autograd.grad(r(x_0(theta)).sum(), theta, allow_unused=True)
    g_theta = [torch.zeros_like(t) if g is None else g for g, t in zip(g_theta, theta, strict=True)]
    norm = torch.sqrt(sum((g**2).sum() for g in g_theta))
    eps = [-rho_w * g / norm if mode in ("weight", "both") else torch.zeros_like(g) for g in g_theta]
    # line 7
    moved = [(t + e).detach().requires_grad_() for t, e in zip(theta, eps, strict=True)]
    grads = torch.autograd.grad(-r(x_0(moved) + delta).mean(), moved, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, theta, strict=True)]
