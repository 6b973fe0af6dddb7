"""Dominance is the strict partial order it should be, and frontiers equal those of all pairs and of moocore."""

from __future__ import annotations

import math

import moocore
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsaft.pareto import dominates, finite_rows, non_dominated
from rsaft.pareto.dominance import PAIRWISE, _by_sorting
from tests.reference import pareto as reference

THOUSAND = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0])  # many ties and duplicates
ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def rewards(draw: st.DrawFn, value: st.SearchStrategy[float], least_rows: int = 0) -> Tensor:
    """(n, m) rewards from a few values, so that ties, copies and constant columns abound, or all different."""
    n, m, seed = draw(st.integers(least_rows, 12)), draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(draw(st.lists(value, max_size=5)), dtype=torch.float64)
    if not len(pool):
        return torch.randn(n, m, generator=generator, dtype=torch.float64)
    r = pool[torch.randint(len(pool), (n, m), generator=generator)]
    r[:, : draw(st.integers(0, m - 1))] = pool[0]
    return r


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard(n: int, spread: float) -> Tensor:
    """Points around a sphere: the smaller the spread, the larger the frontier; 0 puts all points on it."""
    x = random((n, 4)).abs()
    return x / x.norm(dim=1, keepdim=True) * (1 + spread * random((n, 1), 1))


def moocore_front(r: Tensor, dedupe: bool = False) -> Tensor:
    return torch.from_numpy(moocore.is_nondominated(r.double().numpy(), maximise=True, keep_weakly=not dedupe))


@settings(THOUSAND, max_examples=300)
@given(r=rewards(FEW | ANY | st.sampled_from([math.inf, -math.inf])), split=st.integers(0, 12))
def test_dominance_is_that_of_a_loop_over_pairs(r: Tensor, split: int):
    a, b = r[:split], r[split:]
    expected = [[reference.dominates(x, y) for y in b] for x in a]
    assert dominates(a, b).tolist() == expected


@THOUSAND
@given(r=rewards(FEW | ANY), data=st.data(), dedupe=st.booleans())
def test_the_frontier_is_that_of_a_loop_over_pairs_by_either_way(r: Tensor, data: st.DataObject, dedupe: bool):
    bits = data.draw(st.just(-1) | st.integers(0, 2**12 - 1))
    counts = [bool(bits >> i & 1) for i in range(len(r))]
    mask = torch.tensor(counts, dtype=torch.bool)
    expected = reference.non_dominated(r, counts, dedupe)
    assert non_dominated(r, mask=mask, dedupe=dedupe).tolist() == expected
    assert _by_sorting(r, mask, dedupe).tolist() == expected  # what long lists go through
    if all(counts):
        assert non_dominated(r, dedupe=dedupe).tolist() == expected


@settings(THOUSAND, max_examples=100)
@given(r=rewards(FEW | ANY, least_rows=1), dedupe=st.booleans())
def test_the_frontier_is_moocores(r: Tensor, dedupe: bool):
    assert torch.equal(non_dominated(r, dedupe=dedupe), moocore_front(r, dedupe))


@pytest.mark.parametrize("dedupe", [False, True])
@pytest.mark.parametrize(
    "r",
    [
        random((3000, 4)),
        random((3000, 4)).float(),
        random((3000, 4)).bfloat16(),  # many ties
        random((3000, 2)),
        random((3000, 1)),
        random((3000, 4)) * torch.tensor([1.0, 1e-3, 1e4, 0.0]),
        random((3000, 4)).mul(2).round(),
        hard(3000, 0.05),
        hard(3000, 0.0),
        torch.ones(3000, 4),
        torch.arange(3000.0)[:, None].expand(-1, 3),
        torch.tensor([[1e308, 1e308], [-1e308, 1e308], [1e308, 5e-324], [1e308, 0.0]], dtype=torch.float64).repeat(
            99, 1
        ),
    ],
    ids=["normal", "float32", "bfloat16", "two", "one", "scales", "grid", "half", "all", "equal", "chain", "extreme"],
)
def test_the_frontier_of_many_rows_is_moocores(r: Tensor, dedupe: bool):
    assert len(r) > PAIRWISE
    assert torch.equal(non_dominated(r, dedupe=dedupe), moocore_front(r, dedupe))


def test_dominance_is_irreflexive_antisymmetric_and_transitive():
    r = random((60, 3)).round()
    d = dominates(r, r)
    assert d.any()
    assert not d.diagonal().any()
    assert not (d & d.T).any()
    two_steps = (d.double() @ d.double()) > 0
    assert two_steps.any()
    assert not (two_steps & ~d).any()


@pytest.mark.parametrize("n", [50, 1000])
def test_the_frontier_does_not_change_under_increasing_transforms_of_each_reward(n: int):
    r = random((n, 4)).round(decimals=1)
    moved = torch.stack([r[:, 0].exp(), 1e-4 * r[:, 1], r[:, 2] ** 3, torch.atan(r[:, 3]) + 7], 1)
    front = non_dominated(r)
    assert 0 < front.sum() < n
    assert torch.equal(non_dominated(moved), front)


@pytest.mark.parametrize("n", [40, 700])
def test_the_frontier_of_a_union_is_that_of_the_frontiers(n: int):
    a, b = random((n, 3), 1).round(decimals=1), random((n, 3), 2).round(decimals=1)
    union, fronts = torch.cat([a, b]), torch.cat([a[non_dominated(a)], b[non_dominated(b)]])
    assert torch.equal(union[non_dominated(union)], fronts[non_dominated(fronts)])


def test_two_independent_rewards_have_a_frontier_of_the_harmonic_number():
    n, prompts = 50, 4000
    size = non_dominated(random((prompts, n, 2))).sum(1).double()
    standard_error = float(size.std()) / prompts**0.5
    harmonic = sum(1 / k for k in range(1, n + 1))
    assert harmonic == pytest.approx(4.50, abs=0.005)
    assert float(size.mean()) == pytest.approx(harmonic, abs=3 * standard_error)


@pytest.mark.parametrize("n", [20, PAIRWISE + 20])
@pytest.mark.parametrize("dedupe", [False, True])
def test_prompts_of_a_batch_do_not_touch_each_other_and_padding_does_nothing(n: int, dedupe: bool):
    r, mask = random((5, n, 3)).round(decimals=1), random((5, n), 1) > 0
    mask[3] = False
    r[~mask] = torch.tensor([math.nan, math.inf, 1e30]).double()
    together = non_dominated(r, mask=mask, dedupe=dedupe)
    for prompt, counts, front in zip(r, mask, together, strict=True):
        alone = torch.zeros_like(counts)
        if counts.any():
            alone[counts] = moocore_front(prompt[counts], dedupe)
        assert torch.equal(front, alone)


def test_a_masked_row_dominates_nothing():
    r = torch.tensor([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    assert non_dominated(r, mask=torch.tensor([False, True, True])).tolist() == [False, True, False]


def test_copies_of_a_frontier_point_all_stay_unless_deduped():
    r = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert non_dominated(r).tolist() == [True, False, True, True]
    assert non_dominated(r, dedupe=True).tolist() == [True, False, False, False]
    first_is_masked = torch.tensor([False, True, True, True])
    assert non_dominated(r, mask=first_is_masked, dedupe=True).tolist() == [False, False, True, False]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (0, 5, 3), (0, 300, 3)])
def test_no_rows_have_no_frontier(shape: tuple[int, ...]):
    assert non_dominated(torch.zeros(shape)).shape == shape[:-1]


@pytest.mark.parametrize("n", [3, PAIRWISE + 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused_or_dropped_with_their_number(n: int, bad: float):
    r = torch.arange(float(n))[:, None].repeat(1, 2)
    r[-1, 1] = bad
    with pytest.raises(ValueError, match=f"1 of {n} rows hold a reward that is NaN or infinite.*finite_rows"):
        non_dominated(r)
    mask, dropped = finite_rows(r)
    assert dropped == 1
    assert non_dominated(r, mask=mask).nonzero().tolist() == [[n - 2]]
    assert finite_rows(r, mask)[1] == 0


def test_a_comparison_with_nan_is_refused():
    r = torch.tensor([[math.nan, 1.0]])
    with pytest.raises(ValueError, match="a reward is NaN"):
        dominates(r, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="a reward is NaN"):
        dominates(torch.zeros(1, 2), r)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"two matrices \(n, m\) and \(k, m\)"):
        dominates(torch.zeros(3, 0), torch.zeros(3, 0))
    with pytest.raises(ValueError, match="m >= 1 rewards"):
        non_dominated(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"r is \(n, m\) or \(P, n, m\)"):
        non_dominated(torch.zeros(2, 3, 4, 5))
