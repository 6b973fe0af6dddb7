"""Objectives: values by hand, monotone in every reward, and directions without hinge or offset."""

from __future__ import annotations

import math

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rdrl import Conservative, Hinge, LogSigmoid, Min, SoftMin, WeightedSum
from rsaft.types import Objective

NAMES = ("a", "b")
WEIGHTS = {"a": 1.0, "b": 0.5}
OBJECTIVES = [
    WeightedSum(WEIGHTS),
    Hinge(WEIGHTS, margin=100.0),
    Hinge(WEIGHTS, margin=0.5, scale=1e-3),
    SoftMin(WEIGHTS),
    SoftMin(WEIGHTS, temperature=0.1),
    LogSigmoid(WEIGHTS, references={"a": 0.3, "b": -1.0}, scale=0.5),
]
NOT_STRICTLY_MONOTONE = [Min(WEIGHTS), Conservative(WEIGHTS), Conservative(WEIGHTS, penalty=0.1, spread="var")]


def _rewards(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_weighted_sum_by_hand():
    loss, direction = WeightedSum(WEIGHTS)(_rewards([1, 4], [-2, 0]), NAMES, ["", ""])
    assert loss.tolist() == [-3, 2]
    assert direction.tolist() == [3, -2]


def test_hinge_by_hand():
    loss, direction = Hinge({"a": 1.0}, margin=2.0, scale=1e-3)(_rewards([0.5], [2.0], [5.0]), ("a",), [""] * 3)
    torch.testing.assert_close(loss, torch.tensor([1.5e-3, 0, 0], dtype=torch.float64), rtol=1e-15, atol=0)
    assert direction.tolist() == [0.5, 2.0, 5.0]


def test_above_the_margin_hinges_loss_is_flat_and_its_direction_is_not():
    rewards = _rewards([5.0, 5.0]).requires_grad_()
    loss, direction = Hinge(WEIGHTS, margin=2.0)(rewards, NAMES, [""])
    assert torch.autograd.grad(loss.sum(), rewards, retain_graph=True)[0].tolist() == [[0, 0]]
    assert torch.autograd.grad(direction.sum(), rewards)[0].tolist() == [[1, 0.5]]


def test_soft_min_by_hand():
    # -log((e^-1 + e^-2) / 2) of weighted rewards 1 and 2
    loss, direction = SoftMin(WEIGHTS)(_rewards([1, 4]), NAMES, [""])
    expected = -math.log((math.exp(-1) + math.exp(-2)) / 2)
    assert direction.item() == pytest.approx(expected, rel=1e-15)
    assert loss.item() == -direction.item()


def test_soft_min_is_the_minimum_when_cold():
    _, direction = SoftMin(WEIGHTS, temperature=1e-3)(_rewards([3, 4], [1, 8]), NAMES, [""] * 2)
    # min + temperature * log 2 (m = 2), for well-separated rewards
    expected = torch.tensor([2, 1], dtype=torch.float64) + 1e-3 * math.log(2)
    torch.testing.assert_close(direction, expected, rtol=0, atol=1e-12)


def test_soft_min_is_the_mean_when_hot():
    _, direction = SoftMin(WEIGHTS, temperature=1e6)(_rewards([3, 4]), NAMES, [""])
    assert direction.item() == pytest.approx(2.5, abs=1e-6)  # mean - variance / (2 temperature)


def test_soft_min_of_equal_rewards_is_that_reward():
    _, direction = SoftMin({"a": 1.0, "b": 1.0})(_rewards([0.3, 0.3]), NAMES, [""])
    assert direction.item() == pytest.approx(0.3, rel=1e-15)


def test_soft_min_lets_the_worst_reward_lead():
    rewards = _rewards([0.0, 2.0]).requires_grad_()
    _, direction = SoftMin({"a": 1.0, "b": 1.0}, temperature=0.5)(rewards, NAMES, [""])
    worst, best = torch.autograd.grad(direction.sum(), rewards)[0][0].tolist()
    assert worst > 0.98
    assert worst + best == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_more_reward_is_never_a_larger_loss_and_always_a_larger_direction(objective):
    rewards = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, direction = objective(rewards, NAMES, [""] * 20)
    for column in range(2):
        more = rewards.clone()
        more[:, column] += 0.1
        new_loss, new_direction = objective(more, NAMES, [""] * 20)
        assert (new_loss <= loss).all()
        assert (new_direction > direction).all()


def test_min_by_hand_sends_its_gradient_to_the_worst_reward():
    rewards = _rewards([3, 4], [1, 8]).requires_grad_()
    loss, direction = Min(WEIGHTS)(rewards, NAMES, [""] * 2)
    assert (direction.tolist(), loss.tolist()) == ([2, 1], [-2, -1])
    assert torch.autograd.grad(direction.sum(), rewards)[0].tolist() == [[0, 0.5], [1, 0]]


def test_soft_min_comes_down_to_min():
    rewards = _rewards([3, 4], [1, 8])
    cold = SoftMin(WEIGHTS, temperature=1e-4)(rewards, NAMES, [""] * 2)[1]
    torch.testing.assert_close(cold, Min(WEIGHTS)(rewards, NAMES, [""] * 2)[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("spread", "expected"), [("std", 2.5 - 0.3 * 0.5), ("var", 2.5 - 0.3 * 0.25)])
def test_conservative_by_hand(spread, expected):
    _, direction = Conservative(WEIGHTS, penalty=0.3, spread=spread)(_rewards([3, 4]), NAMES, [""])
    assert direction.item() == pytest.approx(expected, rel=1e-15)  # weighted rewards 3 and 2


@pytest.mark.parametrize("spread", ["std", "var"])
def test_conservative_without_disagreement_is_the_mean_with_a_finite_gradient(spread):
    rewards = _rewards([0.4, 0.4]).requires_grad_()
    _, direction = Conservative({"a": 1.0, "b": 1.0}, spread=spread)(rewards, NAMES, [""])
    assert direction.item() == pytest.approx(0.4, rel=1e-15)
    assert torch.autograd.grad(direction.sum(), rewards)[0].tolist() == [[0.5, 0.5]]


def test_conservative_puts_agreement_above_a_higher_mean():
    apart, alike = Conservative({"a": 1.0, "b": 1.0}, penalty=1.0)(_rewards([0, 3], [1, 1.4]), NAMES, [""] * 2)[1]
    assert alike > apart


def test_log_sigmoid_by_hand_and_its_slope_fades_above_the_reference():
    rewards = _rewards([2.0, 5.0]).requires_grad_()
    objective = LogSigmoid({"a": 1.0, "b": 0.5}, references={"a": 1.0, "b": 2.0}, scale=2.0)
    _, direction = objective(rewards, NAMES, [""])
    low, high = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.5))
    assert direction.item() == pytest.approx(math.log(low) + 0.5 * math.log(high), rel=1e-14)
    slopes = torch.autograd.grad(direction.sum(), rewards)[0][0].tolist()
    assert slopes == pytest.approx([(1 - low) / 2, 0.5 * (1 - high) / 2], rel=1e-14)


def test_log_sigmoid_far_below_its_references_is_a_weighted_sum():
    far = LogSigmoid(WEIGHTS, references={"a": 1e3, "b": 1e3})(_rewards([1, 4], [2, 0]), NAMES, [""] * 2)[1]
    plain = WeightedSum(WEIGHTS)(_rewards([1, 4], [2, 0]), NAMES, [""] * 2)[1]
    torch.testing.assert_close(far, plain - 1.5e3, rtol=0, atol=1e-9)


def test_a_weight_without_a_reference_is_named():
    with pytest.raises(ConfigError, match=r"references: \['b'\] have a weight"):
        LogSigmoid(WEIGHTS, references={"a": 0.0})


@pytest.mark.parametrize(
    "make", [lambda: Conservative(WEIGHTS, penalty=-1.0), lambda: LogSigmoid(WEIGHTS, {"a": 0, "b": 0}, scale=0.0)]
)
def test_a_setting_out_of_range_is_refused(make):
    with pytest.raises(ConfigError, match=r"got (-1|0)\.0"):
        make()


@pytest.mark.parametrize("objective", OBJECTIVES + NOT_STRICTLY_MONOTONE, ids=str)
def test_samples_do_not_interact(objective):
    rewards = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, direction = objective(rewards, NAMES, [""] * 6)
    part_loss, part_direction = objective(rewards[2:4], NAMES, [""] * 2)
    assert torch.equal(part_loss, loss[2:4])
    assert torch.equal(part_direction, direction[2:4])


@pytest.mark.parametrize(
    "objective",
    [
        WeightedSum({"a": 1.0}),
        Hinge({"a": 1.0}, margin=9.0),
        SoftMin({"a": 1.0}),
        Min({"a": 1.0}),
        Conservative({"a": 1.0}),
        LogSigmoid({"a": 1.0}, references={"a": 0.0}),
    ],
    ids=str,
)
def test_a_reward_without_a_weight_is_measured_and_not_trained_on(objective):
    rewards = _rewards([1, 4]).requires_grad_()
    loss, direction = objective(rewards, NAMES, [""])
    for value in (loss, direction):
        assert torch.autograd.grad(value.sum(), rewards, retain_graph=True)[0][0, 1] == 0


@pytest.mark.parametrize(
    "objective",
    [
        WeightedSum({"c": 1.0}),
        Hinge({"c": 1.0}, margin=2.0),
        SoftMin({"c": 1.0}),
        Min({"c": 1.0}),
        Conservative({"c": 1.0}),
        LogSigmoid({"c": 1.0}, references={"c": 0.0}),
    ],
    ids=str,
)
def test_a_weight_of_an_unknown_reward_is_named(objective):
    with pytest.raises(ConfigError, match=r"\['c'\] are not among the rewards \['a', 'b'\]"):
        objective(_rewards([1, 4]), NAMES, [""])


@pytest.mark.parametrize(
    "make",
    [WeightedSum, lambda w: Hinge(w, margin=2.0), SoftMin, Min, Conservative, lambda w: LogSigmoid(w, references={})],
)
def test_an_objective_without_weights_is_refused(make):
    with pytest.raises(ConfigError, match="weights"):
        make({})


def test_soft_min_refuses_a_temperature_of_zero():
    with pytest.raises(ConfigError, match=r"temperature > 0; got 0"):
        SoftMin(WEIGHTS, temperature=0)


@pytest.mark.parametrize("objective", OBJECTIVES + NOT_STRICTLY_MONOTONE, ids=str)
def test_each_is_an_objective_and_float64_stays_float64(objective):
    assert isinstance(objective, Objective)
    assert {t.dtype for t in objective(_rewards([1, 4]), NAMES, [""])} == {torch.float64}
