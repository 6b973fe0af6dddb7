"""Weight perturbation: norm, restoration, rounding."""

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.flatten import perturbed, worst_case_eps
from rsaft.flatten.weight import global_norm, rounding_cosine


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in ((4, 3), (5,), (2, 2, 2))]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t) for t in tensors(0)]


def test_epsilon_has_one_norm_over_all_tensors_and_points_down():
    g = tensors(1, torch.float64)
    eps = worst_case_eps(g, 0.25)
    torch.testing.assert_close(global_norm(eps), torch.tensor(0.25, dtype=torch.float64), rtol=1e-12, atol=0)
    ratio = torch.cat([(e / x).flatten() for e, x in zip(eps, g, strict=True)])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-12, atol=0)
    assert float(ratio[0]) < 0
    assert not any(e.requires_grad for e in eps)


def test_scaling_the_gradient_leaves_epsilon_unchanged():
    g = tensors(1, torch.float64)
    for a, b in zip(worst_case_eps([4 * x for x in g], 0.1), worst_case_eps(g, 0.1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_or_non_finite_gradient_gives_no_epsilon(bad):
    g = [torch.zeros_like(t) for t in tensors(1)]
    g[1][2] = bad
    assert all(bool((e == 0).all()) for e in worst_case_eps(g, 0.1))


def test_inside_the_weights_are_moved_and_afterwards_restored_bit_for_bit():
    params = parameters()
    before = [p.detach().clone() for p in params]
    eps = worst_case_eps(tensors(1), 0.1)
    with perturbed(params, eps):
        assert all(torch.equal(p, b + e) for p, b, e in zip(params, before, eps, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_an_exception_restores_the_weights():
    params = parameters()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="inside"), perturbed(params, tensors(1)):
        raise RuntimeError("inside")
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_thousand_perturbations_do_not_drift():
    params = parameters()
    before = [p.detach().clone() for p in params]
    for seed in range(1000):
        with perturbed(params, tensors(seed)):
            pass
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_gradient_mode_inside_is_the_callers():
    params = parameters()
    with perturbed(params, tensors(1)):
        assert torch.is_grad_enabled()
        sum((p**2).sum() for p in params).backward()
    assert all(p.grad is not None for p in params)
    with torch.no_grad(), perturbed(params, tensors(1)):
        assert not torch.is_grad_enabled()


def test_perturbing_under_a_live_graph_is_refused_by_autograd():
    params = parameters()
    loss = sum((p**2).sum() for p in params)
    with perturbed(params, tensors(1)), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_half_precision_weights_are_refused():
    params = [torch.nn.Parameter(t) for t in tensors(0, torch.bfloat16)]
    with pytest.raises(ConfigError, match="keep them in float32"), perturbed(params, params):
        pass


def test_rounding_to_float32_keeps_epsilon_and_bfloat16_does_not():
    source = torch.Generator().manual_seed(0)
    params = [0.02 * torch.randn(800_000, generator=source)]
    eps = worst_case_eps([torch.randn(800_000, generator=source)], 1e-2)
    assert rounding_cosine(params, eps, torch.float32) > 0.999
    assert rounding_cosine(params, eps, torch.bfloat16) < 0.6
