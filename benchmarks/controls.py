"""Controls, and cheaper schemes of weight flattening that are measured here and are not in the library.

A regularizer must beat the first to be more than noise. The others are judged by their cost and outcome in
`docs/testbed.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rsaft.backbones.lora import ADAPTER
from rsaft.errors import ConfigError
from rsaft.flatten import perturbed
from rsaft.flatten.rsa_ft import KeptEps
from rsaft.flatten.weight import global_norm, gradients_of, worst_case_eps
from rsaft.randomness import generator
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ReFL, plain_step
from rsaft.types import Algorithm, Rollout, Score, StepOutput


@dataclass(frozen=True)
class RandomPerturbation:
    """A plain step at theta + eps, eps uniform on the sphere of radius rho_w: RSA-FT's norm without its direction."""

    rho_w: float

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: Any = None
    ) -> StepOutput:
        batch = rollouts[0].batch
        draw = generator(batch.seed, "random-perturbation", batch.step)
        direction = [torch.randn(p.shape, generator=draw).to(p) for p in params]
        norm = global_norm(direction)
        with perturbed(params, [self.rho_w * d / norm for d in direction]):
            return plain_step(rollouts, score, params)


def direction_gradient(rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor]) -> list[Tensor]:
    """g_theta of RSA-FT's first pass: of the directions, summed over the batch. Cost: a plain step."""
    total = [torch.zeros_like(p) for p in params]
    for rollout in rollouts:
        sample = rollout.tail(rollout.prefix())
        for t, g in zip(total, gradients_of(score(score.view(sample), sample).direction.sum(), params), strict=True):
            t.add_(g)
    return total


@dataclass(frozen=True)
class LookSAM:
    """Weight flattening at every n-th update; its part across the plain gradient serves the others (Liu et al., 2022).

    Updates 0, n, ...: g_s at theta + eps; g_v = g_s - (g_s . g) g / |g|^2 is kept. Between: g + alpha |g| g_v / |g_v|.
    Cost: 1 + 1/n plain steps.
    """

    rho_w: float
    every: int
    alpha: float = 0.7

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: KeptEps | None = None
    ) -> StepOutput:
        if state is not None and state.age < self.every:
            output = plain_step(rollouts, score, params)
            scale = self.alpha * global_norm([_grad(p) for p in params]) / global_norm(state.eps).clamp_min(1e-12)
            for p, across in zip(params, state.eps, strict=True):
                _grad(p).add_(across * scale)
            return replace(output, state=replace(state, age=state.age + 1))
        g = direction_gradient(rollouts, score, params)
        with perturbed(params, worst_case_eps(g, self.rho_w)):
            output = plain_step(rollouts, score, params)
        along = sum((_grad(p) * x).sum() for p, x in zip(params, g, strict=True)) / global_norm(g).square()
        return replace(output, state=KeptEps(tuple(_grad(p) - along * x for p, x in zip(params, g, strict=True)), 1))


@dataclass(frozen=True)
class FriendlySAM:
    """Epsilon from what this batch's gradient adds to earlier ones' running mean m: g - sigma m (Li et al., 2024).

    Cost: two plain steps, as strict weight flattening.
    """

    rho_w: float
    sigma: float = 1.0
    decay: float = 0.9

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: KeptEps | None = None
    ) -> StepOutput:
        g = direction_gradient(rollouts, score, params)
        if state is None:
            own, mean = g, g
        else:
            own = [x - self.sigma * m for x, m in zip(g, state.eps, strict=True)]
            mean = [self.decay * m + (1 - self.decay) * x for x, m in zip(g, state.eps, strict=True)]
        with perturbed(params, worst_case_eps(own, self.rho_w)):
            return replace(plain_step(rollouts, score, params), state=KeptEps(tuple(mean), 1))


@dataclass(frozen=True)
class ProductMetric:
    """Epsilon over LoRA's factors, as long as moves the layers' weights W + s B A by rho_w, to first order.

    sqrt(sum over layers of |s (B eA + eB A)|_F^2) = rho_w: what full fine-tuning calls rho_w, whatever the factors' own
    sizes; the direction is that of the factors' gradient. Cost: two plain steps, as strict weight flattening.
    """

    rho_w: float

    def __call__(
        self, rollouts: Sequence[Any], score: Score, params: Sequence[Tensor], state: Any = None
    ) -> StepOutput:
        layers = lora_layers(rollouts[0]._backbone.network, params)
        eps = worst_case_eps(direction_gradient(rollouts, score, params), 1.0)
        scale = self.rho_w / product_norm(layers, params, eps).clamp_min(1e-12)
        with perturbed(params, [e * scale.to(e) for e in eps]):
            return plain_step(rollouts, score, params)


@dataclass(frozen=True)
class Factors:
    """Where a layer's factors are among the parameters, and its s: the layer's weight is W + s B A."""

    a: int
    b: int
    s: float


def lora_layers(network: Any, params: Sequence[Tensor]) -> list[Factors]:
    """The layers with an adapter of a network of which only adapters are trained.

    Raises:
        ConfigError: if other tensors are trained.
    """
    number = {id(p): i for i, p in enumerate(params)}
    layers = [
        Factors(number[id(m.lora_A[ADAPTER].weight)], number[id(m.lora_B[ADAPTER].weight)], m.scaling[ADAPTER])
        for m in network.modules()
        if isinstance(m, LoraLayer)
    ]
    if 2 * len(layers) != len(params):
        raise ConfigError(
            f"product: it measures LoRA's factors, and {len(params) - 2 * len(layers)} of {len(params)} trained "
            "tensors are none; train an adapter (--lora RANK)."
        )
    return layers


def product_norm(layers: Sequence[Factors], params: Sequence[Tensor], eps: Sequence[Tensor]) -> Tensor:
    """sqrt(sum over layers of |s (B eA + eB A)|_F^2), 0-dim, in float64, from products of rank by rank values alone.

    |B eA|_F^2 = tr(B'B eA eA'), the sum over the entries of B'B times those of eA eA', and so for the other terms.
    """
    squares = []
    for layer in layers:
        a, b, e_a, e_b = (
            t.detach().flatten(1).double() for t in (params[layer.a], params[layer.b], eps[layer.a], eps[layer.b])
        )
        terms = (b.T @ b) * (e_a @ e_a.T) + 2 * (b.T @ e_b) * (e_a @ a.T) + (e_b.T @ e_b) * (a @ a.T)
        squares.append(layer.s**2 * terms.sum())
    return torch.stack(squares).sum().clamp_min(0).sqrt()


@dataclass(frozen=True)
class CoarseFirstPass:
    """Epsilon from a trajectory of fewer sampling steps, from the same noise, by the same trainer (`with_steps`).

    Cost for DRaFT-1: a plain step, and one of `num_steps` steps.
    """

    rho_w: float
    num_steps: int

    def __call__(
        self, rollouts: Sequence[Any], score: Score, params: Sequence[Tensor], state: Any = None
    ) -> StepOutput:
        # Made again from its own settings: a rollout has no public way to be shortened.
        coarse = [with_steps(r._settings, self.num_steps).rollout(r._backbone, r.batch) for r in rollouts]
        eps = worst_case_eps(direction_gradient(coarse, score, params), self.rho_w)
        with perturbed(params, eps):
            return plain_step(rollouts, score, params)


def with_steps(algorithm: Algorithm, num_steps: int) -> Algorithm:
    """The trainer with fewer sampling steps; what it counts in steps shrinks in proportion, to 1 at least.

    ReFL and DRTune without a number of their own, and AlignProp's distributions, are shares of the steps as they are.
    """
    sampling = replace(algorithm.sampling, num_steps=num_steps)

    def scaled(n: int) -> int:
        return max(1, round(n * num_steps / algorithm.sampling.num_steps))

    match algorithm:
        case DRaFT(k=k):
            return replace(algorithm, k=scaled(k), sampling=sampling)
        case ReFL(last=int() as last):
            return replace(algorithm, last=scaled(last), sampling=sampling)
        case AlignProp(truncation=int() as first):
            return replace(algorithm, truncation=min(scaled(first), num_steps - 1), sampling=sampling)
        case DRTune(k=k, early_stop=last):
            last = min(scaled(last), num_steps - scaled(k) + 1) if last else last  # 0: it does not stop early
            return replace(algorithm, k=scaled(k), early_stop=last, sampling=sampling)
        case ReFL() | AlignProp():
            return replace(algorithm, sampling=sampling)
    raise TypeError(f"with_steps: {type(algorithm).__name__} is none of DRaFT, ReFL, AlignProp and DRTune.")


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
