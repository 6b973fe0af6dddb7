"""The hypervolume: closed forms, what changes it and what does not, and an independent library."""

import itertools

import moocore
import pytest
import torch
from torch import Tensor

from rsaft.metrics import hypervolume


def points(n: int, m: int, seed: int) -> Tensor:
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeros(m: int) -> Tensor:
    return torch.zeros(m, dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_one_sample_is_its_box(m: int):
    point, reference = points(1, m, 0) + 1, points(1, m, 1)[0]
    assert float(hypervolume(point, reference)) == pytest.approx(float((point[0] - reference).prod()))


def test_two_boxes_count_what_they_share_once():
    r = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0]], dtype=torch.float64)
    assert float(hypervolume(r, zeros(3))) == pytest.approx(6 + 4 - 2)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_it_is_the_inclusion_exclusion_of_the_boxes(m: int):
    r, total = points(6, m, 2), 0.0
    for k in range(1, 7):
        for chosen in itertools.combinations(range(6), k):
            total += (-1) ** (k + 1) * float(r[list(chosen)].amin(dim=0).prod())
    assert float(hypervolume(r, zeros(m))) == pytest.approx(total)


@pytest.mark.parametrize(("n", "m"), [(40, 2), (30, 3), (20, 4), (12, 5)])
def test_it_is_that_of_moocore(n: int, m: int):
    r, reference = points(n, m, 3), points(1, m, 4)[0] * 0.3
    wanted = moocore.hypervolume(r.numpy(), ref=reference.numpy(), maximise=True)
    assert float(hypervolume(r, reference)) == pytest.approx(wanted, rel=1e-12)


def test_copies_dominated_samples_and_order_change_nothing_and_a_new_sample_can_only_add():
    r = points(8, 3, 5)
    whole = float(hypervolume(r, zeros(3)))
    more = torch.cat([r, r[:2], 0.5 * r[:1]]).flip(0)
    assert float(hypervolume(more, zeros(3))) == pytest.approx(whole, rel=1e-12)
    growing = [float(hypervolume(r[: k + 1], zeros(3))) for k in range(8)]
    assert growing == sorted(growing)


def test_samples_below_the_reference_are_worth_nothing():
    r = torch.tensor([[2.0, -1.0], [0.0, 5.0]], dtype=torch.float64)
    assert float(hypervolume(r, zeros(2))) == 0
    assert float(hypervolume(r[:0], zeros(2))) == 0


def test_what_is_no_set_of_points_is_refused():
    with pytest.raises(ValueError, match="a reference"):
        hypervolume(points(2, 0, 0), zeros(0))
    with pytest.raises(ValueError, match="not finite"):
        hypervolume(torch.tensor([[1.0, torch.nan]]), torch.zeros(2))
