"""Flattening in weight space: the reward of the worst weights nearby (RSA-FT, Eqs. 14, 17, 18)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rsaft import distributed
from rsaft.errors import ConfigError

_TINY = 1e-12  # floor of the norm: a zero gradient gives a zero perturbation


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """One L2 norm over all tensors, accumulated in fp32 at least; 0-dim.

    Of tensors that are sharded over processes, all of them: it is the norm of the whole ones, on every process.
    """
    squares = [(t if t.dtype == torch.float64 else t.float()).square().sum() for t in map(distributed.local, tensors)]
    total = torch.stack(squares).sum()
    if distributed.is_sharded(tensors[0]):
        distributed.sum_([total])
    return total.sqrt()


def gradients_of(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar; zeros for a tensor that it does not depend on.

    Args:
        value: the scalar.
        tensors: of which gradients are wanted. If they are sharded parameters (with anything before them), their
            gradients are summed over processes, and no `.grad` may hold anything yet.
    """
    if not distributed.is_sharded(tensors[-1]):
        return list(torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True))
    for t in tensors:
        t.retain_grad()
    value.backward()  # FSDP brings gradients to the shards through .grad alone
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return gradients


def worst_case_eps(gradients: Sequence[Tensor], rho_w: float) -> list[Tensor]:
    """eps = -rho_w g / ||g||, one norm over all tensors: the step that lowers the reward most (RSA-FT, Eq. 17).

    Args:
        gradients: g, the gradient of the summed reward, one tensor a parameter.
        rho_w: radius of the perturbation, the L2 norm over all trainable values.

    Returns:
        Constants to autograd. All 0 if the gradient is zero or not finite.
    """
    norm = global_norm(gradients)
    if not bool(torch.isfinite(norm)):
        return [torch.zeros_like(g) for g in gradients]
    scale = -rho_w / norm.clamp_min(_TINY)
    return [(g.detach() * scale).to(g.dtype) for g in gradients]


@contextmanager
def perturbed(params: Sequence[Tensor], eps: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters are theta + eps; afterwards theta again bit for bit, also on an exception.

    Restores by copy: subtracting eps would drift by rounding. Enter it only when no graph that holds the parameters
    is still to be backpropagated; autograd refuses otherwise.

    Args:
        params: tensors to move, in place.
        eps: one perturbation a parameter, of its shape.

    Raises:
        ConfigError: if a parameter is in half precision, where a small eps is rounded away.
    """
    half = sorted({str(p.dtype) for p in params if p.dtype in (torch.float16, torch.bfloat16)})
    if half:
        raise ConfigError(
            f"weight flattening: trainable tensors are {half}, which round a small perturbation away; keep them in "
            "float32 (load_backbone does) and let autocast compute in half precision."
        )
    with kept(params):
        with torch.no_grad():
            for p, e in zip(map(distributed.local, params), map(distributed.local, eps), strict=True):
                p.add_(e)
        yield


@contextmanager
def kept(params: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to the parameters' values inside, afterwards they are what they were, bit for bit."""
    parts = [distributed.local(p.detach()) for p in params]
    saved = [p.clone() for p in parts]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parts, saved, strict=True):
                p.copy_(value)


@torch.no_grad()
def rounding_cosine(params: Sequence[Tensor], eps: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Cosine between eps and what is left of it when theta and theta + eps are rounded to `dtype`.

    1 means that the network sees the intended perturbation; bf16 at norm 1e-2 leaves 0.2 to 0.4 on large models.
    """
    dots, squares, total = [], [], []
    for p, e in zip(map(distributed.local, params), map(distributed.local, eps), strict=True):
        seen = (p + e).to(dtype).to(p.dtype) - p.to(dtype).to(p.dtype)
        dots.append((seen * e).sum())
        squares.append(seen.square().sum())
        total.append(e.square().sum())
    sums = torch.stack([torch.stack(dots).sum(), torch.stack(squares).sum(), torch.stack(total).sum()])
    if distributed.is_sharded(params[0]):
        distributed.sum_([sums])
    return float(sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(_TINY**2))
