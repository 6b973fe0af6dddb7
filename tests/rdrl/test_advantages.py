"""Advantages: means of groups, invariances, and samples that take no part."""

import pytest
import torch

from rsaft.rdrl.advantages import History, gdpo, group_rank, group_zscore, running_zscore

GROUP = torch.tensor([7, 7, 7, 2, 2, 2])


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_group_zscore_by_hand():
    found = group_zscore(torch.tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([0, 0, 1, 1]), eps=0.0 + 1e-12)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]))


def test_each_group_has_mean_0_and_deviation_1():
    found = group_zscore(rewards(), GROUP, eps=0)
    for number in (7, 2):
        own = found[number == GROUP]
        torch.testing.assert_close(own.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15)
        torch.testing.assert_close(own.std(correction=0), torch.ones((), dtype=torch.float64))


def test_dividing_by_the_deviation_over_all_keeps_each_groups_mean_at_0():
    r = rewards()
    found = group_zscore(r, GROUP, eps=0, global_std=True)
    torch.testing.assert_close(found[:3], (r[:3] - r[:3].mean()) / r.std(correction=0))


@pytest.mark.parametrize("advantage", [lambda r: group_zscore(r, GROUP, eps=0), lambda r: group_rank(r, GROUP)])
def test_scale_and_offset_of_a_reward_do_not_matter(advantage):
    torch.testing.assert_close(advantage(3 * rewards() + 5), advantage(rewards()))


def test_a_rank_survives_every_increasing_transform_and_a_zscore_does_not():
    r = rewards()
    assert torch.equal(group_rank(r.exp(), GROUP), group_rank(r, GROUP))
    assert not torch.allclose(group_zscore(r.exp(), GROUP), group_zscore(r, GROUP))


def test_ranks_by_hand_with_a_tie_and_a_group_of_one():
    found = group_rank(torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([0, 0, 0, 1]))
    assert found.tolist() == [-1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("advantage", [group_zscore, group_rank])
def test_a_sample_without_a_finite_reward_gets_0_and_disturbs_nobody(advantage):
    r = rewards()
    broken = torch.cat([r[:3], torch.tensor([torch.nan], dtype=torch.float64), r[3:]])
    group = torch.cat([GROUP[:3], GROUP[:1], GROUP[3:]])
    found = advantage(broken, group)
    assert found[3] == 0
    torch.testing.assert_close(torch.cat([found[:3], found[4:]]), advantage(r, GROUP))


def test_all_samples_broken_is_all_zeros():
    nothing = torch.full((4,), torch.nan)
    for found in (group_zscore(nothing, GROUP[:4]), group_zscore(nothing, GROUP[:4], global_std=True)):
        assert found.tolist() == [0, 0, 0, 0]


def test_gdpo_of_one_reward_is_its_zscore():
    r = rewards()
    found = gdpo(r[:, None], torch.ones(1), GROUP, eps=0)
    torch.testing.assert_close(found, group_zscore(r, GROUP, eps=0))


def test_in_gdpo_a_large_unit_does_not_drown_a_reward():
    pair = torch.stack([rewards(0), rewards(1)], dim=1)
    weights = torch.tensor([1.0, 1.0])
    scaled = pair * torch.tensor([1.0, 1e3])
    torch.testing.assert_close(gdpo(scaled, weights, GROUP, eps=0), gdpo(pair, weights, GROUP, eps=0))
    summed = group_zscore(scaled @ weights.double(), GROUP, eps=0)
    torch.testing.assert_close(summed, group_zscore(pair[:, 1], GROUP, eps=0), rtol=0, atol=1e-2)


def test_gdpo_leaves_out_a_sample_with_one_broken_reward():
    pair = torch.stack([rewards(0), rewards(1)], dim=1)
    pair[4, 1] = torch.inf
    found = gdpo(pair, torch.ones(2), GROUP)
    kept = torch.tensor([0, 1, 2, 3, 5])
    assert found[4] == 0
    torch.testing.assert_close(found[kept], gdpo(pair[kept], torch.ones(2), GROUP[kept]))


def test_running_zscores_use_the_batch_until_a_prompt_has_enough_of_its_own():
    r = rewards()
    found, history = running_zscore(r, GROUP, History(), size=4, least=4, eps=0)
    torch.testing.assert_close(found, (r - r.mean()) / r.std(correction=0))
    again = rewards(1)
    found, history = running_zscore(again, GROUP, history, size=4, least=4, eps=0)
    own = torch.cat([r[2:3], again[:3]])  # the last four of prompt 7
    torch.testing.assert_close(found[:3], (again[:3] - own.mean()) / own.std(correction=0))
    assert history.rewards[7] == tuple(own.tolist())


def test_a_broken_reward_is_not_kept():
    r = rewards()
    r[1] = torch.nan
    found, history = running_zscore(r, GROUP, History())
    assert found[1] == 0
    assert len(history.rewards[7]) == 2
