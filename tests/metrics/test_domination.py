"""JDR and JCR: what counts as a win on every reward, and what follows."""

import itertools

import pytest
import torch
from torch import Tensor

from rsaft.metrics import joint_collapse_rate, joint_domination_rate, null_rate, tie_rate, win_rate

BASE = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
TUNED = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)


def normal(seed: int, n: int, m: int) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("mode", "jdr", "jcr"), [("strict", 0.25, 0.25), ("pareto", 0.5, 0.25)])
def test_a_tie_is_no_win_unless_pareto_and_mixed_changes_count_in_neither(mode, jdr: float, jcr: float):
    assert float(joint_domination_rate(TUNED, BASE, mode=mode)) == jdr
    assert float(joint_collapse_rate(TUNED, BASE, mode=mode)) == jcr
    assert float(tie_rate(TUNED, BASE)) == 0.25


@pytest.mark.parametrize("mode", ["strict", "pareto"])
def test_a_model_against_itself_neither_dominates_nor_collapses(mode):
    assert float(joint_domination_rate(TUNED, TUNED, mode=mode)) == 0
    assert float(joint_collapse_rate(TUNED, TUNED, mode=mode)) == 0
    assert float(tie_rate(TUNED, TUNED)) == 1


@pytest.mark.parametrize("m", [1, 2, 4])
def test_exchangeable_independent_rewards_give_two_to_the_minus_m_each(m: int):
    n = 40_000
    a, b = normal(0, n, m), normal(1, n, m)
    error = 4 * (2**-m * (1 - 2**-m) / n) ** 0.5  # four standard errors
    assert float(joint_domination_rate(a, b)) == pytest.approx(2**-m, abs=error)
    assert float(joint_collapse_rate(a, b)) == pytest.approx(2**-m, abs=error)


@pytest.mark.parametrize("mode", ["strict", "pareto"])
def test_the_null_rate_is_the_mean_over_all_exchanges_of_pairs(mode):
    a, b = normal(6, 3, 2).round(), normal(7, 3, 2).round()  # with ties
    rates = []
    for bits in itertools.product([False, True], repeat=3):
        swap = torch.tensor(bits)[:, None]
        rates.append(float(joint_domination_rate(torch.where(swap, b, a), torch.where(swap, a, b), mode=mode)))
    assert float(null_rate(a, b, mode=mode)) == pytest.approx(sum(rates) / 8)


def test_the_null_rate_of_equal_rewards_is_a_half():
    a, b = normal(8, 100, 1), normal(9, 100, 1)
    assert float(null_rate(a.expand(-1, 4), b.expand(-1, 4))) == 0.5


def test_another_reward_can_only_lower_both_rates():
    a, b = normal(2, 500, 5), normal(3, 500, 5)
    for rate in (joint_domination_rate, joint_collapse_rate):
        rates = [float(rate(a[:, :m], b[:, :m])) for m in range(1, 6)]
        assert rates == sorted(rates, reverse=True)


def test_only_the_order_of_each_reward_matters():
    a, b = normal(4, 500, 3), normal(5, 500, 3)
    assert torch.equal(joint_domination_rate(a, b), joint_domination_rate(a.exp(), b.exp()))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (TUNED[:0], BASE[:0], "not empty"),
        (TUNED[:, :0], BASE[:, :0], "not empty"),
        (TUNED, BASE * torch.nan, "NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: Tensor, b: Tensor, message: str):
    for rate in (joint_domination_rate, joint_collapse_rate, tie_rate, win_rate):
        with pytest.raises(ValueError, match=message):
            rate(a, b)


def test_a_win_rate_counts_scores_one_by_one_and_no_ties():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert float(win_rate(a, b)) == 0.5
    assert [float(win_rate(a[:, k : k + 1], b[:, k : k + 1])) for k in range(2)] == [1.0, 0.0]
