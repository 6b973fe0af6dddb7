"""The baselines of PG-OT: their formulas, their bounds, and where they stop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.pareto import FrontierStore
from rsaft.pareto.baselines import SeparateConstraints, WeightedSumBound, best_of
from rsaft.rdrl import WeightedSum

PROMPTS, NAMES = ("a cat", "a dog"), ("clip", "hps")
ASKED = ["a dog", "a cat", "a dog"]


@pytest.fixture
def store() -> FrontierStore:
    pool = torch.randn(2, 15, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return FrontierStore(PROMPTS, NAMES, pool * torch.tensor([0.2, 5.0]) + torch.tensor([[[0.0, 3.0]], [[1.0, -2.0]]]))


def rewards() -> Tensor:
    return torch.tensor([[0.1, 1.0], [-0.3, 9.0], [2.5, 30.0]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("form", ["linear", "hinge", "squared"])
def test_a_weighted_sum_is_measured_against_each_prompts_own_bound(store: FrontierStore, form) -> None:
    r = rewards()
    loss, direction = WeightedSumBound({"clip": 3.0, "hps": 1.0}, store, form=form)(r, NAMES, ASKED)
    scale, w = store.scales("prompt_pool", PROMPTS, NAMES)[0], torch.tensor([0.75, 0.25], dtype=torch.float64)
    for i, prompt in enumerate(ASKED):
        best = store.rewards[PROMPTS.index(prompt)].amax(dim=0)
        gap = float((w * (best - r[i].detach()) / scale).sum())
        assert float(loss[i]) == pytest.approx({"linear": gap, "hinge": max(gap, 0), "squared": gap**2}[form])
    torch.testing.assert_close(direction, (w * r / scale).sum(dim=1))


def test_above_its_bound_the_hinge_has_no_gradient_and_the_direction_has(store: FrontierStore) -> None:
    r = rewards()
    loss, direction = WeightedSumBound({"clip": 1.0, "hps": 1.0}, store)(r, NAMES, ASKED)
    (slope,) = torch.autograd.grad(loss.sum(), r, retain_graph=True)
    assert float(loss[2]) == 0
    assert not slope[2].any()
    assert bool((torch.autograd.grad(direction.sum(), r)[0] > 0).all())


def test_a_linear_bound_has_the_gradient_of_the_plain_weighted_sum(store: FrontierStore) -> None:
    r = rewards()
    bounded = WeightedSumBound({"clip": 1.0, "hps": 3.0}, store, form="linear", bound=7.0, normalize="none")
    plain = WeightedSum({"clip": 0.25, "hps": 0.75})
    slopes = [torch.autograd.grad(o(r, NAMES, ASKED)[0].sum(), r)[0] for o in (bounded, plain)]
    assert torch.equal(*slopes)


def test_one_bound_for_all_prompts_is_the_mean_of_theirs(store: FrontierStore) -> None:
    own, one = (
        WeightedSumBound({"clip": 1.0, "hps": 1.0}, store, form="linear", bound=bound)(rewards(), NAMES, ASKED)
        for bound in ("prompt", "mean")
    )
    bounds = own[0] + own[1]
    torch.testing.assert_close(one[0] + one[1], bounds[:2].mean().expand(3))


def test_separate_constraints_pull_each_reward_to_its_own_best(store: FrontierStore) -> None:
    r = rewards()
    loss, direction = SeparateConstraints(store)(r, NAMES, ASKED)
    scale, best = store.scales("prompt_pool", PROMPTS, NAMES)[0], best_of(store, ASKED, NAMES)
    torch.testing.assert_close(loss, ((r - best) / scale).square().sum(dim=1))
    assert torch.equal(direction, -loss)
    (slope,) = torch.autograd.grad(loss.sum(), r)
    torch.testing.assert_close(slope, 2 * (r - best).detach() / scale**2)
    assert bool((slope[2] > 0).all())  # a sample beyond both bounds is pulled back


def test_a_reward_of_another_unit_changes_no_loss(store: FrontierStore) -> None:
    unit = torch.tensor([100.0, 0.01], dtype=torch.float64)
    other = FrontierStore(PROMPTS, NAMES, store.rewards * unit)
    for make in (lambda s: WeightedSumBound({"clip": 1.0, "hps": 2.0}, s), SeparateConstraints):
        here, there = make(store)(rewards(), NAMES, ASKED)[0], make(other)(rewards() * unit, NAMES, ASKED)[0]
        torch.testing.assert_close(here, there)


def test_rewards_and_weights_that_do_not_fit_are_refused(store: FrontierStore) -> None:
    with pytest.raises(ConfigError, match="none is negative, and one is above 0"):
        WeightedSumBound({"clip": 0.0}, store)
    with pytest.raises(ConfigError, match=r"\['hp'\] are not among the rewards"):
        SeparateConstraints(store, active=("hp",))(rewards(), NAMES, ASKED)
