"""The laws that every trainer's rollout keeps (`rsaft.types.Rollout`): one function a law.

Each takes what it needs and raises AssertionError with the law's name. Models in float64 make the tolerances tight:
what differs between two ways to compute the same thing is only the order of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rsaft.rdrl import WeightedSum
from rsaft.rdrl.allocations import Allocations
from rsaft.rdrl.memory import Planned, estimate_memory
from rsaft.rdrl.score import ImageScore, plain_step
from rsaft.types import Algorithm, Backbone, Batch, Rollout, Sample
from tests.helpers import Calls, count_calls, gradient_of, relative_difference, toy_reward

TOLERANCE = 1e-10  # relative, of float64 results whose sums are ordered differently


def reward_gradient(backbone: Backbone, sample: Sample) -> Tensor:
    """Gradient of the summed toy reward of a sample with respect to the trainable tensors, flat."""
    return gradient_of(toy_reward(backbone.decode(sample.latents), sample.prompts).sum(), backbone.parameters())


def assert_same_sample(a: Sample, b: Sample) -> None:
    """Bit for bit the same latents for the same prompts."""
    assert torch.equal(a.latents, b.latents), f"latents differ by {(a.latents - b.latents).abs().max():.3g}"
    assert a.prompts == b.prompts
    assert torch.equal(a.index, b.index)


def assert_tail_is_pure(rollout: Rollout, backbone: Backbone) -> None:
    """The law of closures: a tail called twice gives the same bits, values and gradient, and draws nothing."""
    prefix = rollout.prefix()
    state = torch.get_rng_state()
    first, second = rollout.tail(prefix), rollout.tail(prefix)
    assert_same_sample(first, second)
    assert torch.equal(reward_gradient(backbone, first), reward_gradient(backbone, second))
    assert torch.equal(torch.get_rng_state(), state), "a tail drew from torch's global generator"


def assert_fixed_by_the_batch(algorithm: Algorithm, backbone: Backbone, batch: Batch) -> None:
    """Two rollouts of one batch are the same, whatever was drawn in between."""
    first = algorithm.rollout(backbone, batch)
    torch.rand(7)
    second = algorithm.rollout(backbone, batch)
    assert_same_sample(first.tail(first.prefix()), second.tail(second.prefix()))


def assert_another_step_is_another_draw(algorithm: Algorithm, backbone: Backbone, batch: Batch) -> None:
    """The noise belongs to (seed, step): the next update has other noise."""
    rollouts = [
        algorithm.rollout(backbone, b)
        for b in (
            batch,
            Batch(batch.prompts, batch.sample_ids, batch.step + 1, batch.seed),
            Batch(batch.prompts, batch.sample_ids, batch.step, batch.seed + 1),
        )
    ]
    first, *others = (r.tail(r.prefix()).latents.detach() for r in rollouts)
    for other in others:
        assert (first - other).abs().mean() > 1e-3


def assert_rows_match(part: Sample, whole: Sample, rows: Sequence[int]) -> None:
    """`part` holds the samples of `whole` that belong to `rows` of the batch, in that order."""
    b = int(whole.index.max()) + 1
    repeats = len(whole.index) // b
    where = [r * b + i for r in range(repeats) for i in rows]
    assert relative_difference(part.latents, whole.latents[where]) <= TOLERANCE
    assert part.prompts == tuple(whole.prompts[i] for i in where)
    assert part.index.tolist() == list(range(len(rows))) * repeats


def assert_select_gives_rows(rollout: Rollout, rows: Sequence[int]) -> None:
    """`select(rows)` is the same rollout for these rows; it draws nothing anew."""
    part = rollout.select(rows)
    assert part.batch == rollout.batch.select(rows)
    assert part.num_steps == rollout.num_steps
    assert_rows_match(part.tail(part.prefix()), rollout.tail(rollout.prefix()), rows)


def assert_batch_order_is_irrelevant(
    algorithm: Algorithm, backbone: Backbone, batch: Batch, order: Sequence[int]
) -> None:
    """A permuted or partial batch gives the same samples: a sample's noise is keyed by its id alone."""
    whole, part = algorithm.rollout(backbone, batch), algorithm.rollout(backbone, batch.select(order))
    assert_rows_match(part.tail(part.prefix()), whole.tail(whole.prefix()), order)


def assert_split_is_irrelevant(algorithm: Algorithm, backbone: Backbone, batch: Batch) -> None:
    """The reward's gradient over the batch is the sum over its samples one at a time."""
    whole = algorithm.rollout(backbone, batch)
    parts = [algorithm.rollout(backbone, batch.select([i])) for i in range(len(batch.prompts))]
    together = reward_gradient(backbone, whole.tail(whole.prefix()))
    apart = torch.stack([reward_gradient(backbone, r.tail(r.prefix())) for r in parts]).sum(0)
    assert relative_difference(apart, together) <= TOLERANCE


def assert_prefix_resumes(rollout: Rollout) -> None:
    """A prefix stopped before any step and gone on from is the whole prefix, bit for bit."""
    whole = rollout.tail(rollout.prefix())
    for stop in range(rollout.num_steps + 1):
        assert_same_sample(rollout.tail(rollout.prefix(start=rollout.prefix(stop=stop))), whole)


def assert_prefix_has_no_gradient(rollout: Rollout, network: nn.Module) -> None:
    """No call of the prefix builds a graph, even if the caller forgot `no_grad`."""
    with torch.enable_grad(), count_calls(network) as calls:
        rollout.prefix()
    assert calls.with_grad == 0


def assert_calls(
    rollout: Rollout,
    backbone: Backbone,
    network: nn.Module,
    *,
    prefix: int,
    tail: int,
    without: int = 0,
    recomputed: int = 0,
) -> None:
    """Network calls: `prefix` without gradient; in the tail `tail` with and `without` without gradient, and
    `recomputed` in the backward pass.
    """
    with count_calls(network) as calls:
        state = rollout.prefix()
    assert (calls.without_grad, calls.with_grad) == (prefix, 0), "calls (without, with gradient) of the prefix"
    with count_calls(network) as calls:
        sample = rollout.tail(state)
    assert (calls.without_grad, calls.with_grad) == (without, tail), "calls (without, with gradient) of the tail"
    with count_calls(network) as calls:
        reward_gradient(backbone, sample)
    assert calls.total == recomputed, "calls in the backward pass"


def assert_same_gradient(a: Rollout, b: Rollout, backbone: Backbone, *, tolerance: float = 0.0) -> None:
    """Two rollouts (with and without gradient checkpointing, say) agree in values and gradient."""
    first, second = a.tail(a.prefix()), b.tail(b.prefix())
    assert relative_difference(first.latents, second.latents) <= tolerance
    assert relative_difference(reward_gradient(backbone, first), reward_gradient(backbone, second)) <= tolerance


def assert_trains(algorithm: Algorithm, backbone: Backbone, batch: Batch, score: ImageScore) -> None:
    """Every parameter that the loss depends on gets a gradient, some of it non-zero, and keeps its value."""
    params = backbone.parameters()
    before = [p.detach().clone() for p in params]
    plain_step([algorithm.rollout(backbone, batch)], score, params)
    norm = sum(float(p.grad.norm()) ** 2 for p in params if p.grad is not None) ** 0.5
    assert 0 < norm < float("inf"), f"gradient norm {norm}"
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)), "a step changed the weights"
    for p in params:
        p.grad = None


__all__ = [name for name in dir() if name.startswith("assert_")] + ["TOLERANCE", "Calls", "reward_gradient"]


def assert_estimate_is_allocated(backbone: Backbone, plan: Planned, batches: Sequence[Batch]) -> None:
    """What one update of the plan is estimated to take, weights and optimizer apart, is what its step allocates."""
    score = ImageScore(backbone, plan.rewards, WeightedSum({"toy": 1.0}))
    rollouts = [plan.algorithm.rollout(backbone, batch) for batch in batches]
    with Allocations() as real:
        plan.step(rollouts, score, backbone.parameters(), None)
    for p in backbone.parameters():
        p.grad = None
    estimated = estimate_memory(backbone, plan).moments["update"]
    apart = sum(n for part, n in estimated.items() if "weights" in part or part == "optimizer")
    assert sum(estimated.values()) - apart == pytest.approx(sum(real.peak.values()), rel=0.05)
