"""ParetoTransport: its gradients, its fixed points, what it leaves alone, and how a batch may be split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.pareto import FrontierStore, ParetoTransport, sinkhorn
from rsaft.types import GroupObjective, Objective, Others
from tests.reference import pareto_transport as reference

NAMES = ("clip", "hps", "ict")
PROMPTS = ("a cat", "a dog", "a hat")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def store() -> FrontierStore:
    """20 offline samples of each prompt; prompts and rewards differ in level and width."""
    width = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    level = random(3, 1, 3, seed=1)
    return FrontierStore(PROMPTS, NAMES, (random(3, 20, 3, seed=0) + level) * width)


@pytest.fixture
def batch(store: FrontierStore) -> tuple[Tensor, list[str]]:
    """Nine samples of two prompts in mixed order: below, among and above the offline ones."""
    prompts = ["a dog", "a cat", "a dog", "a dog", "a cat", "a cat", "a dog", "a dog", "a cat"]
    middle = store.rewards[store.rows(prompts)].mean(dim=1)
    spread = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    shift = torch.tensor([-2.0, -1.0, -0.5, 0.0, -1.5, -0.3, 0.2, 5.0, -1.0], dtype=torch.float64)
    return middle + spread * (shift[:, None] + 0.5 * random(9, 3, seed=2)), prompts


def judged(objective: ParetoTransport, rewards: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their mean."""
    leaf = rewards.clone().requires_grad_()
    losses, _ = objective(leaf, NAMES, prompts)
    (gradient,) = torch.autograd.grad(losses.mean(), leaf)
    return losses.detach(), gradient


def within(values: Tensor, prompts: list[str], prompt: str) -> np.ndarray:
    return values[[i for i, p in enumerate(prompts) if p == prompt]].numpy()


@pytest.mark.parametrize("source", ["any", "all"])
@pytest.mark.parametrize("columns", [NAMES, NAMES[:2]], ids=["three", "two"])
def test_offline_losses_and_gradients_are_the_papers(store, batch, source: str, columns: tuple[str, ...]) -> None:
    rewards, prompts = batch
    objective = ParetoTransport(frontiers=store, source=source, reg=0.3, active=columns)
    losses, gradient = judged(objective, rewards, prompts)
    kept = store.columns(columns)
    scale = store.scales("prompt_pool", PROMPTS, columns)[0].numpy()
    for row, prompt in enumerate(PROMPTS[:2]):
        mine = within(rewards[:, kept], prompts, prompt)
        value, slope = reference.offline(mine, store.rewards[row][:, kept].numpy(), scale, reg=0.3, source=source)
        n = len(mine)
        assert within(losses, prompts, prompt).mean() == pytest.approx(value, rel=1e-5, abs=1e-12)
        found = within(gradient[:, kept], prompts, prompt)
        np.testing.assert_allclose(found * scale, slope * scale * n / len(prompts), rtol=1e-4, atol=1e-7)
    left_out = [k for k in range(3) if k not in kept]
    assert not gradient[:, left_out].any()


def test_online_losses_and_gradients_are_the_papers(store, batch) -> None:
    rewards, prompts = batch
    losses, gradient = judged(ParetoTransport("online", store), rewards, prompts)
    scale = store.scales("prompt_pool", PROMPTS, NAMES)[0].numpy()
    assert losses.count_nonzero() >= 3
    for prompt in PROMPTS[:2]:
        values, slope = reference.online(within(rewards, prompts, prompt), scale)
        np.testing.assert_allclose(within(losses, prompts, prompt), values, rtol=1e-12)
        np.testing.assert_allclose(within(gradient, prompts, prompt), slope / len(prompts), rtol=1e-12)


def entropic_value(samples: Tensor, targets: Tensor, eps: float) -> float:
    """<P, C> + eps KL(P | a b'), P the best plan at this eps."""
    cost = (samples[:, None] - targets).square().sum(dim=-1)
    plan = sinkhorn(cost, reg=eps / float(cost.mean()), tol=1e-13)
    uniform = 1 / cost.numel()
    return float((plan * cost).sum() + eps * (plan * (plan / uniform).log() - plan + uniform).sum())


def unrolled_value(samples: Tensor, targets: Tensor, eps: float) -> float:
    """<P, C>, without the entropy."""
    cost = (samples[:, None] - targets).square().sum(dim=-1)
    return float((sinkhorn(cost, reg=eps / float(cost.mean()), tol=1e-13) * cost).sum())


@pytest.mark.parametrize(("unroll", "value"), [(False, entropic_value), (True, unrolled_value)])
def test_the_gradient_is_that_of_a_value_at_fixed_eps(unroll: bool, value: Callable[..., float]) -> None:
    targets = random(5, 2, seed=3)
    targets[:, 1] = -targets[:, 0] + 8  # all on the frontier
    samples = random(4, 2, seed=4) - 3  # all dominated
    store = FrontierStore(("p",), NAMES[:2], targets[None])
    objective = ParetoTransport(frontiers=store, source="any", normalize="none", reg=0.2, unroll=unroll)
    leaf = samples.clone().requires_grad_()
    losses, _ = objective(leaf, NAMES[:2], ["p"] * 4)
    (gradient,) = torch.autograd.grad(losses.mean(), leaf)
    eps, h = 0.2 * float((samples[:, None] - targets).square().sum(dim=-1).mean()), 1e-5
    for i in range(4):
        for k in range(2):
            moved = [samples.index_put((torch.tensor(i), torch.tensor(k)), samples[i, k] + s * h) for s in (1, -1)]
            slope = (value(moved[0], targets, eps) - value(moved[1], targets, eps)) / (2 * h)
            assert float(gradient[i, k]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("strategy", ["offline", "online"])
def test_samples_that_nothing_dominates_have_exactly_zero_with_a_graph(store, strategy) -> None:
    best = store.rewards[0].amax(dim=0) + 1
    rewards = torch.stack([best, best]).requires_grad_()
    losses, direction = ParetoTransport(strategy, store)(rewards, NAMES, ["a cat", "a cat"])
    (gradient,) = torch.autograd.grad(losses.sum() + direction.sum(), rewards)
    assert torch.equal(losses, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(rewards))


def test_one_target_pulls_every_sample_along_the_straight_way() -> None:
    target = torch.tensor([3.0, 4.0], dtype=torch.float64)
    store = FrontierStore(("p",), NAMES[:2], target[None, None])
    samples = random(6, 2, seed=5)
    objective = ParetoTransport(frontiers=store, normalize="none")
    leaf = samples.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf, NAMES[:2], ["p"] * 6)[0].mean(), leaf)
    torch.testing.assert_close(gradient, 2 * (samples - target) / 6, rtol=1e-6, atol=0)
    nearer = objective(samples - 0.1 * gradient, NAMES[:2], ["p"] * 6)[0].mean()
    assert nearer < objective(samples, NAMES[:2], ["p"] * 6)[0].mean()


def test_a_sample_on_the_only_frontier_point_stays_there() -> None:
    store = FrontierStore(("p",), NAMES[:2], torch.ones(1, 1, 2, dtype=torch.float64))
    losses, gradient = ParetoTransport(frontiers=store, normalize="none"), torch.ones(2, 2, dtype=torch.float64)
    leaf = gradient.clone().requires_grad_()
    values, _ = losses(leaf, NAMES[:2], ["p", "p"])
    assert torch.equal(values, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(values.sum(), leaf)[0], torch.zeros(2, 2, dtype=torch.float64))


OBJECTIVES = {
    "offline": {},
    "offline-all": {"source": "all", "active": NAMES[:2]},
    "hinge": {"cost": "hinge"},
    "masked": {"cost": "dominance_masked"},
    "minmax": {"normalize": "minmax"},
    "online": {"strategy": "online"},
}


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_two_processes_have_the_losses_and_gradients_of_one(store, batch, options) -> None:
    rewards, prompts = batch
    objective = ParetoTransport(frontiers=store, **options)
    losses, gradient = judged(objective, rewards, prompts)
    assert losses.any()
    for own, rest in ((slice(0, 5), slice(5, 9)), (slice(5, 9), slice(0, 5))):
        leaf = rewards[own].clone().requires_grad_()
        others = Others(rewards[rest], tuple(prompts[rest]))
        part, direction, _ = objective.judge(leaf, NAMES, prompts[own], others)
        (slope,) = torch.autograd.grad(part.sum() / 9, leaf)
        torch.testing.assert_close(part.detach(), losses[own], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slope, gradient[own], rtol=1e-9, atol=1e-12)
        assert torch.equal(direction, -part)


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_permuting_the_batch_permutes_losses_and_gradients(store, batch, options) -> None:
    rewards, prompts = batch
    order = [3, 8, 0, 5, 1, 7, 2, 6, 4]
    objective = ParetoTransport(frontiers=store, **options)
    losses, gradient = judged(objective, rewards, prompts)
    moved, slope = judged(objective, rewards[order], [prompts[i] for i in order])
    torch.testing.assert_close(moved, losses[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, gradient[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", ["prompt_pool", "global", "minmax"])
def test_the_unit_and_the_zero_of_a_reward_change_no_loss(store, batch, normalize) -> None:
    rewards, prompts = batch
    unit, zero = torch.tensor([100.0, 0.01, 3.0], dtype=torch.float64), torch.tensor([5.0, -70.0, 0.3])
    objective = ParetoTransport(frontiers=store, normalize=normalize)
    other = replace(objective, frontiers=FrontierStore(PROMPTS, NAMES, store.rewards * unit + zero))
    losses, gradient = judged(objective, rewards, prompts)
    moved, slope = judged(other, rewards * unit + zero, prompts)
    torch.testing.assert_close(moved, losses, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(slope * unit, gradient, rtol=1e-6, atol=1e-9)


def test_without_normalisation_the_reward_of_the_largest_scale_has_nearly_all_of_the_gradient(store, batch) -> None:
    rewards, prompts = batch
    width = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    raw, scaled = (
        (judged(ParetoTransport(frontiers=store, normalize=kind), rewards, prompts)[1] * width).abs().sum(dim=0)
        for kind in ("none", "prompt_pool")
    )
    assert raw[2] / raw.sum() > 0.99
    assert scaled.max() / scaled.sum() < 0.6


def test_a_removed_reward_leaves_the_frontier_of_the_others(store, batch) -> None:
    rewards, prompts = batch
    two = FrontierStore(PROMPTS, NAMES[:2], store.rewards[..., :2])
    losses, _ = judged(ParetoTransport(frontiers=store, active=NAMES[:2]), rewards, prompts)
    alone, _ = ParetoTransport(frontiers=two)(rewards[:, :2], NAMES[:2], prompts)
    torch.testing.assert_close(losses, alone)


def test_hinge_pulls_no_reward_down_to_its_target(store, batch) -> None:
    rewards, prompts = batch
    _, gradient = judged(ParetoTransport(frontiers=store, cost="hinge"), rewards, prompts)
    assert bool((gradient <= 0).all())
    assert bool((judged(ParetoTransport(frontiers=store), rewards, prompts)[1] > 0).any())


def test_the_masked_plan_moves_samples_only_to_what_dominates_them(store, batch) -> None:
    rewards, prompts = batch
    lowered = [
        ParetoTransport(frontiers=store, cost=cost).judge(rewards, NAMES, prompts, None)[2]["pareto/lowered"]
        for cost in ("sqeuclidean", "dominance_masked")
    ]
    assert lowered[0] > 0
    assert lowered[1] == 0


def test_the_share_of_samples_with_a_target_is_logged(store) -> None:
    low, high = store.rewards[0].amin(dim=0) - 1, store.rewards[0].amax(dim=0) + 1
    rewards = torch.stack([low, high, low, low])
    logs = ParetoTransport(frontiers=store).judge(rewards, NAMES, ["a cat"] * 4, None)[2]
    assert logs == {"pareto/source": 0.75, "pareto/lowered": 0.0}


def test_targets_of_the_same_update_are_constants() -> None:
    rewards = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    losses, _ = ParetoTransport("online")(rewards, NAMES[:2], ["p", "p"])
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    assert torch.equal(gradient, torch.tensor([[-2.0, -2.0], [0.0, 0.0]], dtype=torch.float64))


def test_it_is_an_objective_that_wants_its_groups_together(store) -> None:
    objective = ParetoTransport(frontiers=store)
    assert isinstance(objective, GroupObjective)
    assert isinstance(objective, Objective)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "pareto.frontiers: the offline strategy needs them"),
        ({"strategy": "online", "normalize": "minmax"}, "pareto.normalize: 'minmax' takes its scales"),
        ({"strategy": "online", "unroll": True}, "pareto.unroll: this plan is found without sweeps"),
        ({"strategy": "online", "reg": 0.0}, "pareto.reg is a share of the mean cost"),
        ({"strategy": "online", "active": ()}, "pareto.active: no reward is left"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ParetoTransport(**options)


def test_unknown_prompts_and_rewards_are_refused_by_name(store, batch) -> None:
    rewards, _ = batch
    with pytest.raises(ConfigError, match="there is none for the prompt 'a fox'"):
        ParetoTransport(frontiers=store)(rewards[:1], NAMES, ["a fox"])
    with pytest.raises(ConfigError, match=r"pareto.active: \['hp'\] are not among the rewards"):
        ParetoTransport(frontiers=store, active=("hp",))(rewards[:1], NAMES, ["a cat"])
    with pytest.raises(ConfigError, match=r"built without \['hp'\]"):
        ParetoTransport(frontiers=store)(rewards[:1], ("clip", "hps", "hp"), ["a cat"])
