"""S1 against closed forms in float64."""

import pytest
import torch

from rsaft.flatten.input import InputFlattened
from rsaft.metrics import sharpness

torch.set_num_threads(1)
PROMPTS = ["a", "b", "c", "d"]
SIZE = (4, 3, 5, 5)
DIM = 75


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed: int = 1):
    w = torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (lambda x, prompts: x.flatten(1) @ w + 3.0), w


@pytest.mark.parametrize(
    ("norm", "radius"),
    [("l2", lambda w: w.norm()), ("rms", lambda w: w.norm() * DIM**0.5), ("linf", lambda w: w.abs().sum())],
)
def test_sharpness_of_a_linear_reward_is_rho_times_the_dual_norm_of_its_weights(norm, radius):
    reward, w = linear()
    found = sharpness(reward, images(), PROMPTS, 0.1, norm=norm)
    torch.testing.assert_close(found, (0.1 * radius(w)).expand(4))


def test_sharpness_of_a_quadratic_matches_its_closed_form():
    draw = torch.Generator().manual_seed(2)
    root = torch.randn(DIM, DIM, generator=draw, dtype=torch.float64)
    Q, a = root @ root.T / DIM, torch.rand(DIM, generator=draw, dtype=torch.float64)

    def reward(x, prompts):
        offset = x.flatten(1) - a
        return -0.5 * ((offset @ Q) * offset).sum(1)

    g = (a - images().flatten(1)) @ Q
    rho = 0.3
    length = g.norm(dim=1)
    exact = rho * length + 0.5 * rho**2 * ((g @ Q) * g).sum(1) / length**2
    torch.testing.assert_close(sharpness(reward, images(), PROMPTS, rho), exact)


def test_sharpness_is_negative_where_the_radius_is_wider_than_the_structure():
    def wave(x, prompts):
        return torch.sin(x[:, 0, 0, 0] * 2 * torch.pi * 10)

    x = torch.full(SIZE, 0.99, dtype=torch.float64)  # sin just below 0 and rising: a step of 0.075 lands on a crest
    assert (sharpness(wave, x, PROMPTS, 0.065) < 0).all()


def test_sharpness_over_rho_tends_to_the_gradient_norm():
    def reward(x, prompts):
        return torch.tanh(x.flatten(1).square().sum(1) / 20)

    x = images().requires_grad_()
    (g,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    found = sharpness(reward, x, PROMPTS, 1e-6) / 1e-6
    torch.testing.assert_close(found, g.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-7)  # first order in rho


def test_sharpness_is_the_reward_less_the_flattened_reward():
    def reward(x, prompts):
        return torch.sin(3 * x).flatten(1).sum(1)

    flat = InputFlattened(reward, rho=0.2)
    torch.testing.assert_close(
        sharpness(reward, images(), PROMPTS, 0.2), reward(images(), PROMPTS) - flat(images(), PROMPTS)
    )


def test_radius_zero_and_zero_gradient_give_exactly_zero():
    reward, _ = linear()
    assert torch.equal(sharpness(reward, images(), PROMPTS, 0.0), torch.zeros(4, dtype=torch.float64))
    flat = sharpness(lambda x, prompts: (x * 0).flatten(1).sum(1) + 7.0, images(), PROMPTS, 0.5)
    assert torch.equal(flat, torch.zeros(4, dtype=torch.float64))


def test_an_image_that_is_not_finite_is_nan_and_touches_no_other():
    reward, _ = linear()
    x = images()
    x[1, 0, 0, 0] = torch.nan
    found = sharpness(lambda y, prompts: reward(y, prompts) * y.flatten(1).sum(1), x, PROMPTS, 0.1)
    assert found.isnan().tolist() == [False, True, False, False]
    clean = sharpness(lambda y, prompts: reward(y, prompts) * y.flatten(1).sum(1), images(), PROMPTS, 0.1)
    torch.testing.assert_close(found[[0, 2, 3]], clean[[0, 2, 3]], rtol=0, atol=0)


def test_sharpness_gives_no_gradient_to_the_generator_or_the_reward():
    weight = torch.ones(DIM, dtype=torch.float64, requires_grad=True)
    x = images().requires_grad_()
    found = sharpness(lambda y, prompts: y.flatten(1) @ weight, x, PROMPTS, 0.1)
    assert not found.requires_grad
    assert weight.grad is None
    assert x.grad is None


def test_sharpness_works_inside_no_grad():
    reward, w = linear()
    with torch.no_grad():
        torch.testing.assert_close(sharpness(reward, images(), PROMPTS, 0.1), (0.1 * w.norm()).expand(4))


def test_half_precision_images_are_perturbed_in_fp32():
    reward, w = linear()
    found = sharpness(lambda x, prompts: reward(x.double(), prompts), images().half(), PROMPTS, 1e-3)
    torch.testing.assert_close(found, (1e-3 * w.norm()).expand(4), rtol=1e-3, atol=0)  # fp32 rounding of x + delta


def test_sharpness_costs_two_forwards():
    reward, _ = linear()
    calls = []
    sharpness(lambda x, prompts: (calls.append(1), reward(x, prompts))[1], images(), PROMPTS, 0.1)
    assert len(calls) == 2


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(rho):
    with pytest.raises(ValueError, match="radius"):
        sharpness(linear()[0], images(), PROMPTS, rho)


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(ValueError, match="gradient in the images"):
        sharpness(lambda x, prompts: x.detach().flatten(1).sum(1), images(), PROMPTS, 0.1)
