"""Gold at matched train reward, and bootstrap intervals, on numbers that can be checked by hand."""

import math

import numpy as np
import pytest
import torch

from rsaft.metrics import at_matched_reward, common_levels, first_crossing, mean_interval, paired_bootstrap

NAN = math.nan


def test_the_measure_is_linear_between_two_evaluations():
    assert at_matched_reward([0.0, 1.0, 2.0], [0.4, 0.6, 0.2], [0.0, 0.5, 1.0, 1.75]) == [
        pytest.approx(value) for value in (0.4, 0.5, 0.6, 0.3)
    ]


def test_only_the_first_crossing_counts():
    train, gold = [0.0, 1.0, 0.2, 1.0], [0.4, 0.8, 0.0, 0.0]
    assert at_matched_reward(train, gold, [0.5]) == [pytest.approx(0.6)]


def test_after_a_dip_the_passage_is_taken_between_neighbouring_evaluations():
    assert at_matched_reward([0.0, 0.4, 0.2, 1.0], [0.0, 0.4, 0.6, 0.2], [0.6]) == [pytest.approx(0.4)]


def test_a_level_outside_the_range_has_no_value():
    assert at_matched_reward([0.5, 1.0], [0.4, 0.6], [0.2, 1.1]) == [None, None]
    assert at_matched_reward([], [], [0.2]) == [None]


def test_evaluations_that_are_not_finite_are_left_out():
    assert at_matched_reward([0.0, NAN, 1.0], [0.0, 0.9, 1.0], [0.5]) == [pytest.approx(0.5)]
    assert at_matched_reward([0.0, 0.5, 1.0], [0.0, NAN, 1.0], [0.75]) == [pytest.approx(0.75)]
    assert first_crossing([NAN, 0.0, NAN, 1.0], 0.25) == (1, 3, 0.25)


def test_curves_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one measure a train reward"):
        at_matched_reward([0.0], [0.0, 1.0], [0.0])


def test_common_levels_are_reached_by_every_run():
    curves = [[0.02, 0.5, 1.03, 0.9], [0.11, 0.3, 0.83]]
    levels = common_levels(curves, count=4)
    assert levels == [0.2, 0.4, 0.6, 0.8]
    for curve in curves:
        assert None not in at_matched_reward(curve, curve, levels)


@pytest.mark.parametrize("curves", [[], [[]], [[0.0, 1.0], [2.0, 3.0]], [[NAN]], [[1.0, 0.5]]])
def test_without_a_common_range_there_is_no_level(curves):
    assert common_levels(curves) == []


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("start", [-0.7, 0.0, 3.3])
def test_common_levels_lie_in_range_at_any_scale(scale, start):
    curve = [start * scale, (start + 0.93) * scale]
    levels = common_levels([curve])
    assert 1 <= len(levels) <= 4
    assert all(curve[0] < level <= curve[1] for level in levels)


def test_the_paired_interval_ignores_what_the_pairs_share():
    draw = torch.Generator().manual_seed(0)
    shared = 100 * torch.randn(60, generator=draw)
    gain = 0.5 + 0.1 * torch.randn(60, generator=draw)
    mean, low, high = paired_bootstrap(shared + gain, shared, seed=0)
    assert low < mean < high
    assert high - low < 0.1
    assert low < 0.5 < high


def test_equal_differences_give_a_point():
    a = torch.arange(5.0)
    assert paired_bootstrap(a + 0.25, a, seed=0) == (0.25, 0.25, 0.25)
    assert mean_interval(torch.tensor([2.0]), seed=0) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("n", [7, 40])
def test_the_interval_depends_on_the_seed_alone(n):
    a = torch.randn(n, generator=torch.Generator().manual_seed(3))
    assert mean_interval(a, seed=1) == mean_interval(a, seed=1)
    assert mean_interval(a, seed=1) != mean_interval(a, seed=2)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(120):
        _, low, high = mean_interval(torch.from_numpy(draw.exponential(size=40)), seed=trial, resamples=500)
        hits += low <= 1.0 <= high
    assert hits / 120 > 0.85  # nominal .95, a skewed law with n = 40, and a binomial error of .02


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="all finite"):
        paired_bootstrap(torch.tensor([1.0, NAN]), torch.zeros(2), seed=0)
