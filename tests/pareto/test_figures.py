"""Pictures and the table of a FrontierStore: what is drawn is what is there, counted back from the axes."""

from __future__ import annotations

import io

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from rsaft.pareto import FrontierStore, non_dominated
from rsaft.pareto.figures import (
    COLUMNS,
    MOST_BOUNDS,
    MOST_PAIRS,
    bounds,
    frontier_figure,
    frontier_picture,
    shortened,
    spread,
)
from rsaft.pareto.summary import markdown, summarize

NAMES = ("clip", "hps", "ict")


def store(prompts: int = 5, samples: int = 20, rewards: int = 3, seed: int = 0) -> FrontierStore:
    drawn = torch.randn(prompts, samples, rewards, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn += torch.arange(prompts)[:, None, None]  # bounds of their own
    return FrontierStore(tuple(f"prompt {i}" for i in range(prompts)), tuple(f"r{k}" for k in range(rewards)), drawn)


def points(axes: Axes, number: int) -> Tensor:
    """The points of a scatter."""
    return torch.as_tensor(axes.collections[number].get_offsets().data)


def test_each_panel_has_all_samples_those_on_the_frontier_and_the_steps_of_its_pair():
    found = store()
    panels = frontier_figure(found).axes
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert len(panels) == len(pairs) * COLUMNS + 1
    for number, axes in enumerate(panels[:-1]):
        pair, row = pairs[number // COLUMNS], (0, 2, 4)[number % COLUMNS]
        values = found.rewards[row]
        assert torch.equal(points(axes, 0), values[:, pair])
        assert torch.equal(points(axes, 1), values[non_dominated(values)][:, pair])
        x, y = (torch.as_tensor(line) for line in axes.lines[0].get_data())
        assert {*zip(x.tolist(), y.tolist(), strict=True)} == {
            tuple(point) for point in values[non_dominated(values[:, pair])][:, pair].tolist()
        }
        assert bool((x.diff() > 0).all())
        assert bool((y.diff() < 0).all())
        assert axes.lines[0].get_drawstyle() == "steps-pre"
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"r{pair[0]}", f"r{pair[1]}")


def test_samples_that_do_not_count_are_not_drawn():
    broken = store().rewards.clone()
    broken[0, 3, 1] = torch.nan
    axes = frontier_figure(FrontierStore(tuple("abcde"), NAMES, broken)).axes[0]
    assert len(points(axes, 0)) == 19


@pytest.mark.parametrize(("prompts", "drawn"), [(1, 1), (5, 5), (90, MOST_BOUNDS)])
def test_the_last_panel_has_an_ideal_and_a_nadir_for_each_prompt_and_reward(prompts: int, drawn: int):
    axes = frontier_figure(store(prompts)).axes[-1]
    high, low = points(axes, 1), points(axes, 2)
    assert len(high) == len(low) == drawn * 3
    assert torch.equal(high[:, 0], low[:, 0])
    assert bool((high[:, 1] >= low[:, 1]).all())
    for k in range(3):
        ideals = high[k::3, 1]
        assert bool((ideals.diff() >= 0).all())  # by their ideal


def test_bounds_are_those_of_the_frontier_and_not_of_all_samples():
    values = torch.tensor([[[3.0, 1.0], [1.0, 3.0], [0.0, 0.0]]], dtype=torch.float64)
    ideal, nadir = bounds(FrontierStore(("a",), ("x", "y"), values))
    assert (ideal.tolist(), nadir.tolist()) == ([[3.0, 3.0]], [[1.0, 1.0]])


@pytest.mark.parametrize(("rewards", "samples"), [(1, 5), (2, 1), (6, 4)])
def test_any_number_of_rewards_and_samples_makes_a_picture(rewards: int, samples: int):
    found = store(prompts=2, samples=samples, rewards=rewards)
    panels = min(rewards * (rewards - 1) // 2, MOST_PAIRS)
    assert len(frontier_figure(found).axes) == panels * 2 + 1


def test_a_prompt_may_hold_anything_and_the_picture_is_the_same_each_time():
    odd = FrontierStore(("$x_{$ a\n\\frac", "猫" * 50), ("a_$b", "c"), store(2, 5, 2).rewards)
    picture = frontier_picture(odd)
    assert picture == frontier_picture(odd)
    assert Image.open(io.BytesIO(picture)).size[0] >= 1400  # 18 cm wide in print at 200 dpi


def test_rows_are_spread_over_all_and_titles_are_one_line():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10, 3) == [0, 4, 9]
    assert shortened("a\nb  c") == "a b c"
    assert len(shortened("a" * 99)) < 40


def test_the_summary_counts_frontiers_and_correlates_within_prompts():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    rewards = torch.stack([torch.stack([x, -2 * x, 0 * x], dim=1), torch.stack([x + 9, -2 * x + 9, 0 * x + 9], dim=1)])
    found = summarize(FrontierStore(("a", "b"), NAMES, rewards))
    assert (found.prompts, found.samples, found.finite, found.size, found.share) == (2, 4, 8, 4.0, 1.0)
    torch.testing.assert_close(found.deviations, torch.tensor([1.25**0.5, 2 * 1.25**0.5, 0.0], dtype=torch.float64))
    assert float(found.correlations[0, 1]) == pytest.approx(-1.0)  # across prompts it would be positive
    assert found.correlations[2].isnan().all()
    assert "| clip | 1.12 | 1.00 | -1.00 | - |" in markdown(found)
    assert "| 2 | 4 | 4.00 | 100.0% |" in markdown(found)


def test_the_summary_leaves_out_what_is_not_finite_and_says_so():
    rewards = store().rewards.clone()
    rewards[0, 3, 1], rewards[2, 0, 0] = torch.inf, torch.nan
    found = summarize(FrontierStore(tuple("abcde"), NAMES, rewards))
    assert found.finite == 98
    clean = FrontierStore(("a",), NAMES, rewards[1:2])
    sizes = [int(non_dominated(r[r.isfinite().all(dim=1)]).sum()) for r in rewards]
    assert found.size == sum(sizes) / 5
    assert found.share == pytest.approx(sum(sizes) / 98)
    torch.testing.assert_close(
        summarize(clean).deviations, clean.scales("prompt_pool", ["a"], NAMES)[0], rtol=1e-12, atol=0
    )
    assert "20 (2 of 100 left out)" in markdown(found)
