"""Input flattening against closed forms (float64)."""

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.flatten import InputFlattened, worst_case_delta
from rsaft.types import Reward
from tests.helpers import Counting, toy_reward

PROMPTS = ["a", "bb", "ccc", "dddd"]


def images(n: int = 4, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(3 * size * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flattened_reward_is_exact_on_a_linear_reward():
    w = weights()
    flat = InputFlattened(lambda x, prompts: x.flatten(1) @ w, rho=0.1)(images(), PROMPTS)
    torch.testing.assert_close(flat, images().flatten(1) @ w - 0.1 * w.norm(), rtol=0, atol=1e-12)


def test_input_flattening_leaves_the_gradient_of_a_linear_reward_alone():
    w = weights()
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(InputFlattened(lambda x, prompts: x.flatten(1) @ w, rho=0.7)(x, PROMPTS).sum(), x)
    torch.testing.assert_close(g.flatten(1), w.expand(4, -1), rtol=0, atol=0)


@pytest.mark.parametrize("rho", [0.01, 0.5, 3.0])
def test_flattened_concave_quadratic_has_its_closed_form(rho):
    # r = -(x - a)' Q (x - a) / 2: r(x) - r~(x) = rho |g| + rho^2 g'Qg / (2 |g|^2), gradient Q (a - x - delta).
    n = 3 * 4 * 4
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = root @ root.T / n + torch.eye(n, dtype=torch.float64)
    a = weights(size=4, seed=3)

    def reward(x, prompts):
        d = x.flatten(1) - a
        return -0.5 * torch.einsum("bi,ij,bj->b", d, q, d)

    x = images(size=4).requires_grad_()
    flat = InputFlattened(reward, rho=rho)(x, PROMPTS)
    (found,) = torch.autograd.grad(flat.sum(), x)
    g = (a - x.detach().flatten(1)) @ q
    norm = g.norm(dim=1, keepdim=True)
    drop = rho * norm[:, 0] + 0.5 * rho**2 * torch.einsum("bi,ij,bj->b", g, q, g) / norm[:, 0] ** 2
    torch.testing.assert_close(reward(x.detach(), None) - flat.detach(), drop, rtol=1e-10, atol=1e-10)
    expected = (a - x.detach().flatten(1) + rho * g / norm) @ q
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
def test_delta_has_its_radius_in_every_sample(norm):
    g = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    delta = worst_case_delta(g, 0.3, norm)
    size = {
        "l2": delta.flatten(1).norm(dim=1),
        "rms": delta.square().mean((1, 2, 3)).sqrt(),
        "linf": delta.abs().amax((1, 2, 3)),
    }[norm]
    torch.testing.assert_close(size, torch.full((5,), 0.3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not delta.requires_grad
    assert bool(((delta * g).sum((1, 2, 3)) < 0).all())


@pytest.mark.parametrize("norm", ["l2", "rms", "linf"])
def test_scaling_the_reward_leaves_delta_unchanged(norm):
    g = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(worst_case_delta(8 * g, 0.1, norm), worst_case_delta(g, 0.1, norm), rtol=1e-15, atol=0)


def test_permuting_the_batch_permutes_delta():
    g = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(worst_case_delta(g[order], 0.1), worst_case_delta(g, 0.1)[order])


def test_another_sample_leaves_a_delta_unchanged():
    g = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(worst_case_delta(g, 0.1)[:3], worst_case_delta(g[:3], 0.1))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_or_non_finite_gradient_gives_that_sample_no_delta(bad):
    g = torch.randn(3, 3, 4, 4)
    g[1] = 0.0
    g[1, 0, 0, 0] = bad
    delta = worst_case_delta(g, 0.1)
    assert float(delta[1].abs().max()) == 0.0
    torch.testing.assert_close(delta[[0, 2]].flatten(1).norm(dim=1), torch.full((2,), 0.1))


def test_flattened_reward_is_lower_for_a_small_radius():
    x = images()
    assert bool((InputFlattened(toy_reward, rho=1e-4)(x, PROMPTS) < toy_reward(x, PROMPTS)).all())


def test_radius_zero_is_the_reward_itself_bit_for_bit():
    x = images()
    assert torch.equal(InputFlattened(toy_reward, rho=0.0)(x, PROMPTS), toy_reward(x, PROMPTS))


def test_flattened_reward_costs_two_calls_of_the_reward():
    reward = Counting()
    InputFlattened(reward, rho=0.1)(images(), PROMPTS)
    assert (reward.calls, reward.images) == (2, 8)


def test_flattened_reward_is_itself_a_reward():
    assert isinstance(InputFlattened(toy_reward, rho=0.1), Reward)


def test_flattened_reward_works_without_gradient_mode():
    with torch.no_grad():
        inside = InputFlattened(toy_reward, rho=0.1)(images(), PROMPTS)
    torch.testing.assert_close(inside, InputFlattened(toy_reward, rho=0.1)(images(), PROMPTS))


@pytest.mark.parametrize("size", [224, 512])
def test_addition_in_float32_keeps_a_small_delta(size):
    g = torch.randn(1, 3, size, size).exp() * torch.randn(1, 3, size, size).sign()
    delta = worst_case_delta(g, 1e-2)
    image = torch.rand(1, 3, size, size)
    left = (image + delta) - image
    cosine = float((left * delta).sum() / (left.norm() * delta.norm()))
    assert cosine > 0.99
    half = image.bfloat16()
    lost = ((half + delta.bfloat16()) - half).float()
    assert float((lost * delta).sum() / (lost.norm() * delta.norm()).clamp_min(1e-12)) < 0.5


def test_half_precision_images_are_refused():
    with pytest.raises(ConfigError, match="decode to float32"):
        InputFlattened(toy_reward, rho=0.1)(images().bfloat16(), PROMPTS)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(rho):
    with pytest.raises(ConfigError, match="rho is a radius"):
        InputFlattened(toy_reward, rho=rho)
