"""Selective sharpness weighting: samples at which the reward is sharp count less (the outlook of RSA-FT, Sec. 6).

    w_i = exp(-S1_i / tau) / mean_j exp(-S1_j / tau),  S1_i = r(x_i) - r(x_i + delta_i)

w is a constant to autograd. The mean runs over the global batch, so all sharpness is known before the first backward
pass: each micro-batch is looked at without a graph, and its tail is run again for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft import distributed
from rsaft.flatten.input import Delta, check_precision
from rsaft.flatten.views import slope_of
from rsaft.types import Rollout, Score


@dataclass(frozen=True)
class Look:
    """What a first look at a micro-batch found, at the weights as they are."""

    start: Any  # the rollout's finished prefix
    delta: Tensor  # the worst case at each image
    s1: Float[Tensor, " n"]  # NaN where a reward was not finite


def look(rollout: Rollout, start: Any, score: Score, delta: Delta) -> Look:
    """S1 of each sample of a rollout, without a graph of the network.

    Cost: the prefix from `start`, which need not be run again; the tail and one view without gradient; `delta_steps`
    forwards and backwards of the score, and one more forward.
    """
    start = rollout.prefix(start=start)
    with torch.no_grad():
        sample = rollout.tail(start)
        view = score.view(sample)
    check_precision(view)
    x = view.detach().requires_grad_()
    clean = score(x, sample)
    (g,) = torch.autograd.grad(clean.direction.sum(), x)
    found = delta.worst_case(view, slope_of(score, sample), first=g)
    with torch.no_grad():
        moved = score(view + found, sample)
    s1 = clean.direction.detach() - moved.direction
    return Look(start, found, torch.where(clean.valid & moved.valid, s1, torch.nan))


def sharpness_weights(s1: Float[Tensor, " n"], tau: float) -> Float[Tensor, " n"]:
    """w_i = exp(-S1_i / tau) over its mean; in fp64, because tau may be small.

    Equal S1 give weights of 1, and so does tau -> infinity; tau -> 0 leaves the flattest sample alone.

    Args:
        s1: r(x) - r(x + delta) of each sample.
        tau: in the reward's units, > 0.

    Returns:
        Weights >= 0 with mean 1 over the samples whose S1 is finite; 0 for the others.
    """
    exponent = s1.double() / -tau
    finite = torch.isfinite(exponent)
    log_mean = exponent[finite].logsumexp(dim=0) - math.log(max(int(finite.sum()), 1))
    return torch.where(finite, (exponent - log_mean).exp(), 0.0)


def weights_of_batch(
    s1: Sequence[Float[Tensor, " _"]], tau: float
) -> tuple[list[Float[Tensor, " _"]], dict[str, float]]:
    """The weights of each micro-batch's samples, with mean 1 over those of all processes; and what is logged of them.

    Computed from the S1 of all samples in the order of their ids, whatever the split. Cost: one collective.
    """
    parts = distributed.gathered([float(value) for part in s1 for value in part.cpu()])
    weights = sharpness_weights(torch.tensor([value for part in parts for value in part], dtype=torch.float64), tau)
    first = sum(len(part) for part in parts[: distributed.rank()])
    own = weights[first : first + len(parts[distributed.rank()])].split([len(part) for part in s1])
    logs = {"rsaft/sharpness_weight_min": float(weights.min()), "rsaft/sharpness_weight_max": float(weights.max())}
    return [w.to(part) for w, part in zip(own, s1, strict=True)], logs


def weigh_gradient(view: Tensor, weights: Float[Tensor, " n"]) -> None:
    """Multiply the gradient that will arrive at each sample of `view` by its weight.

    Samples do not interact, so this is the gradient of the weighted mean of their losses. What reaches the parameters
    by another way than `view` (a sample's penalty) is not weighted, and neither is the value of the loss.
    """
    factors = weights.view(-1, *[1] * (view.dim() - 1)).to(view.dtype)
    view.register_hook(lambda gradient: gradient * factors)
