"""The plan is that of POT and of the slow twin, at any entropic strength, padded or not, in both precisions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import ot.batch
import pytest
import torch
from torch import Tensor

from rsaft.pareto import sinkhorn
from rsaft.pareto.sinkhorn import _annealed
from tests.reference import pareto as reference

TIGHT = 1e-12  # marginal error at which plans are compared to 1e-9


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


def costs(prompts: int = 3, n: int = 6, m: int = 9, seed: int = 0) -> Tensor:
    """Squared distances from samples to points that are better on average."""
    return squared(random(prompts, n, 4, seed=seed), random(prompts, m, 4, seed=seed + 1) + 1)


def weights(prompts: int, k: int, seed: int) -> Tensor:
    return random(prompts, k, seed=seed).softmax(1)


def error(plan: Tensor, a: Tensor | float, b: Tensor | float) -> float:
    """The largest |row sums - a|_1 + |column sums - b|_1 of the prompts."""
    return float(((plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)).max())


@pytest.mark.parametrize("reg", [10.0, 0.2, 0.05, 0.02])
@pytest.mark.parametrize("uniform", [True, False])
def test_the_plan_is_pots_prompt_by_prompt(reg: float, uniform: bool):
    c = costs()
    a = None if uniform else weights(3, 6, seed=5)
    b = None if uniform else weights(3, 9, seed=6)
    plan = sinkhorn(c, a, b, reg, tol=TIGHT)
    for i in range(3):
        rows = np.full(6, 1 / 6) if a is None else a[i].numpy()
        columns = np.full(9, 1 / 9) if b is None else b[i].numpy()
        eps = reg * float(c[i].mean())
        expected = ot.bregman.sinkhorn_log(rows, columns, c[i].numpy(), eps, numItermax=50_000, stopThr=1e-13)
        np.testing.assert_allclose(plan[i].numpy(), expected, atol=1e-10)


def test_the_plan_is_that_of_pots_batch_solver():
    c = costs()
    c = c / c.mean((1, 2), keepdim=True)  # it has one eps for all prompts
    expected = ot.batch.solve_batch(c, 0.05, method="log_sinkhorn", tol=1e-13, max_iter=20_000, grad="detach").plan
    torch.testing.assert_close(sinkhorn(c, tol=TIGHT), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("reg", [0.5, 0.05])
def test_the_kernel_gives_the_plan_of_the_log_domain_twin(reg: float):
    c, a, b = costs(), weights(3, 6, seed=5), weights(3, 9, seed=6)
    plan = sinkhorn(c, a, b, reg, tol=TIGHT)
    for i in range(3):
        expected = reference.plan(c[i], a[i], b[i], reg * float(c[i].mean()), sweeps=2000)
        torch.testing.assert_close(plan[i], expected, atol=1e-9, rtol=0)


def outliers() -> Tensor:
    """A sample and a target far from all others: the kernel's entries span more than float64 does."""
    x, y = random(2, 6, 4), random(2, 9, 4, seed=1)
    x[:, 0] -= 15
    y[:, 0] += 20
    return squared(x, y)


def test_a_kernel_beyond_the_range_of_float64_gives_pots_plan():
    c = outliers()
    eps = 0.01 * c.mean((1, 2))
    assert float(torch.exp(-(c.amax((1, 2)) - c.amin((1, 2))) / eps).min()) == 0
    plan = sinkhorn(c, reg=0.01, tol=TIGHT)
    for i in range(2):
        expected = ot.bregman.sinkhorn_log(
            np.full(6, 1 / 6), np.full(9, 1 / 9), c[i].numpy(), float(eps[i]), numItermax=200_000, stopThr=1e-13
        )
        np.testing.assert_allclose(plan[i].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reg", [0.05, 0.005])
def test_weights_of_many_magnitudes_keep_their_marginals(dtype: torch.dtype, reg: float):
    a = 10 ** -torch.arange(6.0, dtype=torch.float64)[None].expand(2, -1)
    b = 10 ** -(torch.arange(9.0, dtype=torch.float64) % 5)[None].expand(2, -1)
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    plan = sinkhorn(outliers().to(dtype), a, b, reg, tol=3e-6)
    assert error(plan, a, b) < 5e-6
    assert (plan >= 0).all()


def test_as_reg_goes_to_zero_the_plan_is_the_cheapest_one():
    x, y = random(2, 6, 2), random(2, 6, 2, seed=1)
    c = squared(x, y)
    plan = sinkhorn(c, reg=0.002, tol=1e-8)
    for i in range(2):
        cheapest = ot.emd(np.full(6, 1 / 6), np.full(6, 1 / 6), c[i].numpy())
        np.testing.assert_allclose(plan[i].numpy(), cheapest, atol=1e-4)


def test_as_reg_grows_the_plan_is_the_product_of_its_marginals():
    a, b = weights(3, 6, seed=5), weights(3, 9, seed=6)
    product = a[:, :, None] * b[:, None, :]
    torch.testing.assert_close(sinkhorn(costs(), a, b, reg=1e9, tol=TIGHT), product, atol=1e-9, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 3.0, 1e-15])
def test_equal_costs_give_the_product_of_the_marginals(constant: float):
    a, b = weights(3, 6, seed=5), weights(3, 9, seed=6)
    plan = sinkhorn(torch.full((3, 6, 9), constant, dtype=torch.float64), a, b)
    torch.testing.assert_close(plan, a[:, :, None] * b[:, None, :], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
@pytest.mark.parametrize("reg", [0.2, 0.05, 0.01])
def test_rows_sum_to_a_and_columns_to_b(dtype: torch.dtype, bound: float, reg: float):
    a, b = weights(16, 24, seed=5), weights(16, 50, seed=6)
    plan = sinkhorn(costs(16, 24, 50).to(dtype), a.to(dtype), b.to(dtype), reg)
    assert plan.dtype == dtype
    assert error(plan.double(), a, b) < bound


@pytest.mark.parametrize("reg", [0.2, 0.05, 0.01])
def test_a_device_without_float64_gets_the_plan_to_float32s_precision(reg: float):
    c = costs(16, 24, 50)
    log_k = -c / (reg * c.mean((1, 2), keepdim=True))
    a, b = weights(16, 24, seed=5), weights(16, 50, seed=6)
    plan, left = _annealed(log_k.float(), a[:, None].float(), b[:, None].float(), 5e-6, 10_000)
    assert plan.dtype == torch.float32
    assert error(plan.double(), a, b) < 6e-6
    assert left.max() < 5e-6
    torch.testing.assert_close(plan.double(), sinkhorn(c, a, b, reg, tol=TIGHT), atol=5e-6, rtol=0)


def test_permuting_targets_permutes_columns_and_samples_rows():
    c = costs()
    rows, columns = torch.randperm(6), torch.randperm(9)
    plan = sinkhorn(c, tol=TIGHT)
    torch.testing.assert_close(sinkhorn(c[:, :, columns], tol=TIGHT), plan[:, :, columns], atol=1e-10, rtol=0)
    torch.testing.assert_close(sinkhorn(c[:, rows], tol=TIGHT), plan[:, rows], atol=1e-10, rtol=0)


def test_the_unit_of_the_cost_does_not_matter():
    c = costs()
    torch.testing.assert_close(sinkhorn(1e-8 * c, tol=TIGHT), sinkhorn(c, tol=TIGHT), atol=1e-10, rtol=0)


def test_a_single_target_gets_all_mass():
    a = weights(3, 6, seed=5)
    torch.testing.assert_close(sinkhorn(costs(m=1), a), a[:, :, None], atol=1e-12, rtol=0)
    torch.testing.assert_close(sinkhorn(costs(n=1)[0]), torch.full((1, 9), 1 / 9, dtype=torch.float64))


def test_a_padded_batch_gives_each_prompts_own_plan_and_no_mass_to_padding():
    sizes = [(6, 9), (1, 9), (4, 1), (5, 3)]
    c = torch.full((4, 6, 9), math.nan, dtype=torch.float64)
    a, b = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(4, 9, dtype=torch.bool)
    alone = []
    for i, (n, m) in enumerate(sizes):
        own = costs(1, n, m, seed=i)[0]
        c[i, :n, :m], a[i, :n], b[i, :m] = own, True, True
        alone.append(sinkhorn(own, tol=TIGHT))
    plan = sinkhorn(c, a, b, tol=TIGHT)
    a_weights, b_weights = a.double() / a.sum(1, keepdim=True), b.double() / b.sum(1, keepdim=True)
    torch.testing.assert_close(plan, sinkhorn(c, a_weights, b_weights, tol=TIGHT), atol=1e-10, rtol=0)
    for i, (n, m) in enumerate(sizes):
        torch.testing.assert_close(plan[i, :n, :m], alone[i], atol=1e-10, rtol=0)
        assert plan[i, n:].abs().sum() == 0
        assert plan[i, :, m:].abs().sum() == 0


def test_a_prompt_without_samples_or_targets_has_a_plan_of_zeros_and_leaves_the_others_alone():
    c = costs(4)
    a, b = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, 9, dtype=torch.bool)
    a[0], b[1] = False, False
    a[2], b[2] = False, False
    c[:3] = math.inf
    plan = sinkhorn(c, a, b, tol=TIGHT)
    assert torch.equal(plan[:3], torch.zeros_like(plan[:3]))
    torch.testing.assert_close(plan[3], sinkhorn(c[3], tol=TIGHT), atol=1e-10, rtol=0)


def test_padding_has_no_part_in_the_mean_cost():
    c, b = costs(), torch.ones(3, 9, dtype=torch.bool)
    b[:, 5:] = False
    c[:, :, 5:] = 1e6
    torch.testing.assert_close(
        sinkhorn(c, b=b, tol=TIGHT)[:, :, :5], sinkhorn(c[:, :, :5], tol=TIGHT), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_costs_in_half_precision_give_a_plan_in_float32(dtype: torch.dtype):
    c = costs().to(dtype)
    plan = sinkhorn(c)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan, sinkhorn(c.float()))


@pytest.mark.parametrize("shape", [(0, 6, 9), (3, 0, 9), (3, 6, 0), (0, 4)])
def test_nothing_to_transport_is_an_empty_plan(shape: tuple[int, ...]):
    assert sinkhorn(torch.zeros(shape)).shape == shape


def test_the_plan_has_no_graph_by_default_and_the_cost_keeps_its_own():
    c = costs().requires_grad_()
    plan = sinkhorn(c)
    assert not plan.requires_grad
    (plan * c).sum().backward()
    torch.testing.assert_close(c.grad, plan)


def test_unrolled_sweeps_give_the_same_plan_with_its_derivative():
    c = costs(1, 3, 4)[0]
    torch.testing.assert_close(sinkhorn(c, tol=TIGHT, unroll=True), sinkhorn(c, tol=TIGHT), atol=1e-10, rtol=0)
    x = c.clone().requires_grad_()
    target, step = random(3, 4, seed=3), random(3, 4, seed=4)
    step -= step.mean()  # leaves the mean cost, and so eps, as it is
    (sinkhorn(x, reg=0.2, tol=TIGHT, unroll=True) * target).sum().backward()
    h = 1e-5
    up, down = (sinkhorn(c + sign * h * step, reg=0.2, tol=TIGHT) for sign in (1, -1))
    numeric = ((up - down) * target).sum() / (2 * h)
    torch.testing.assert_close((x.grad * step).sum(), numeric, rtol=1e-5, atol=0)


def test_unrolling_leaves_padding_and_empty_prompts_without_nan():
    c = costs(2).requires_grad_()
    a = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    (sinkhorn(c, a, unroll=True) * costs(2, seed=4)).sum().backward()
    assert c.grad.isfinite().all()
    assert c.grad[0, :4].abs().min() > 0
    assert c.grad[0, 4:].abs().sum() == c.grad[1].abs().sum() == 0


def test_too_few_sweeps_are_told_with_the_error_that_is_left():
    c = costs()
    with pytest.warns(UserWarning, match=r"after 3 sweeps the marginals of 3 of 3 prompts are off by up to") as told:
        plan = sinkhorn(c, reg=0.02, max_iter=3)
    left = float(str(told[0].message).split("off by up to ")[1].split(" ")[0])
    assert left == pytest.approx(error(plan, 1 / 6, 1 / 9), rel=0.05)
    assert plan.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.zeros(2, 3, 6, 9)}, r"cost is \(n, m\), or \(P, n, m\)"),
        ({"reg": 0.0}, "reg is a share of the mean cost, finite and > 0; got 0.0"),
        ({"reg": math.nan}, "reg is a share"),
        ({"tol": 0.0}, "tol > 0 and max_iter >= 1"),
        ({"max_iter": 0}, "tol > 0 and max_iter >= 1"),
        ({"a": torch.full((3, 6), 0.5)}, "sum to 1 a prompt .*; a has a least weight of 0.5 and sums from 3 to 3"),
        ({"b": torch.tensor([[-1.0, 2.0] + [0.0] * 7] * 3)}, "b has a least weight of -1"),
        ({"a": torch.full((3, 6), math.nan)}, "a has a least weight of nan"),
        ({"cost": torch.full((3, 6, 9), math.inf)}, "a cost is NaN or infinite"),
        ({"cost": torch.full((3, 6, 9), math.nan)}, "a cost is NaN or infinite"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**{"cost": costs(), **change})
