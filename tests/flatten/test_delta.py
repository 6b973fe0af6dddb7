"""The options of a flattened reward, several steps, Gaussian smoothing and projection, against closed forms."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.flatten import InputFlattened, worst_case_delta
from rsaft.flatten.input import Delta
from tests.helpers import Counting, toy_reward
from tests.reference.flattening import projected_descent

PROMPTS = ["a", "bb", "ccc", "dddd"]
SHAPE = (4, 3, 4, 4)
D = 48
NORMS = ["l2", "rms", "linf"]


def images(seed: int = 0) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(seed: int = 1) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(x: Tensor, prompts: object = None) -> Tensor:
    return x.flatten(1) @ vector() + 2.0


def bowl(x: Tensor, prompts: object = None) -> Tensor:
    """-|x - a|^2 / 2: concave, with Q = I."""
    return -0.5 * (x.flatten(1) - vector(3)).square().sum(1)


def toy(x: Tensor, prompts: object = None) -> Tensor:
    """The toy reward of one prompt, so that a sample's reward does not depend on its place."""
    return toy_reward(x, ["a cat"] * len(x))


def slope_of(reward: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(at: Tensor) -> Tensor:
        x = at.detach().requires_grad_()
        return torch.autograd.grad(reward(x).sum(), x)[0]

    return slope


def size(delta: Tensor, norm: str) -> Tensor:
    flat = delta.flatten(1)
    return {"l2": flat.norm(dim=1), "rms": flat.square().mean(1).sqrt(), "linf": flat.abs().amax(1)}[norm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_one_step_is_equation_15_bit_for_bit(norm, dtype):
    x = images().to(dtype)
    expected = toy(x + worst_case_delta(slope_of(toy)(x), 0.3, norm))
    assert torch.equal(InputFlattened(toy, 0.3, norm, delta_steps=1)(x, PROMPTS), expected)
    assert torch.equal(InputFlattened(toy, 0.3, norm)(x, PROMPTS), expected)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(
    ("norm", "dual"), [("l2", vector().norm()), ("rms", vector().norm() * D**0.5), ("linf", vector().abs().sum())]
)
def test_any_number_of_steps_on_a_linear_reward_lowers_it_by_rho_times_the_dual_norm(norm, dual, steps):
    flat = InputFlattened(linear, 0.2, norm, delta_steps=steps)
    torch.testing.assert_close(linear(images()) - flat(images(), PROMPTS), (0.2 * dual).expand(4), rtol=1e-12, atol=0)
    one, many = (Delta(0.2, norm, n).worst_case(images(), slope_of(linear)) for n in (1, steps))
    torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_steps_on_a_round_bowl_reach_the_minimum_on_the_sphere(steps):
    x, a, rho = images().flatten(1), vector(3), 0.7
    away = (x - a) / (x - a).norm(dim=1, keepdim=True)
    lowest = -0.5 * ((x - a).norm(dim=1) + rho).square()
    found = Delta(rho, "l2", steps).worst_case(images(), slope_of(bowl))
    torch.testing.assert_close(found.flatten(1), rho * away, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        InputFlattened(bowl, rho, delta_steps=steps)(images(), PROMPTS), lowest, rtol=1e-12, atol=0
    )


def stretched(x: Tensor, prompts: object = None) -> Tensor:
    """A concave quadratic whose axes have curvatures from 0.1 to 5."""
    q = torch.linspace(0.1, 5, D, dtype=torch.float64)
    return -0.5 * (q * (x.flatten(1) - 0.2 * vector(3)).square()).sum(1)


def test_more_steps_on_a_stretched_bowl_go_lower_and_end_with_the_gradient_along_delta():
    # At the minimum over the ball the gradient is normal to the sphere. The path is 2.5 rho long whatever the steps, so
    # they come near and do not converge.
    x = images()
    deltas = [Delta(4.0, "l2", steps).worst_case(x, slope_of(stretched)) for steps in (1, 3, 10, 30)]
    rewards = [stretched(x + delta) for delta in deltas]
    assert all(bool((more < less).all()) for less, more in itertools.pairwise(rewards))
    gradients = [slope_of(stretched)(x + delta) for delta in deltas]
    off = [1 - torch.cosine_similarity(-g.flatten(1), d.flatten(1)) for g, d in zip(gradients, deltas, strict=True)]
    assert bool((off[-1] < 0.1 * off[0]).all())


@pytest.mark.parametrize(("norm", "steps", "project"), [*itertools.product(NORMS, [1, 2, 7], [False, True])])
def test_steps_equal_the_slow_twin(norm, steps, project):
    rho = {"l2": 1.5, "rms": 0.25, "linf": 0.25}[norm]
    found = Delta(rho, norm, steps, project=project).worst_case(images(), slope_of(toy))
    expected = torch.stack([projected_descent(toy, x, rho, norm, steps, box=project) for x in images()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_a_sample_whose_gradient_is_not_finite_stays_and_the_others_go_on():
    def broken(x: Tensor, prompts: object = None) -> Tensor:
        factor = torch.ones(4, dtype=x.dtype)
        factor[1] = torch.nan
        return factor * toy(x)

    found, whole = (Delta(0.5, "l2", 4).worst_case(images(), slope_of(r)) for r in (broken, toy))
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert torch.equal(found[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_step_costs_one_forward_and_backward_of_the_reward(steps):
    reward = Counting(toy)
    InputFlattened(reward, 0.1, delta_steps=steps)(images(), PROMPTS)
    assert (reward.calls, reward.images) == (1 + steps, 4 * (1 + steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_pixels_in_the_unit_box_and_delta_in_its_radius(norm, steps, dtype):
    x = images().to(dtype)
    x[0], x[1] = 0.0, 1.0
    rho = {"l2": 3.0, "rms": 0.4, "linf": 0.4}[norm]
    free, found = (Delta(rho, norm, steps, project=p).worst_case(x, slope_of(toy)) for p in (False, True))
    assert bool(((x + free < 0) | (x + free > 1)).any())
    assert bool(((x + found >= 0) & (x + found <= 1)).all())
    assert bool((size(found, norm) <= rho * (1 + 1e-6)).all())


def test_projection_moves_nothing_that_stays_inside():
    x = 0.4 + 0.2 * images()
    free, found = (Delta(0.1, "l2", 3, project=p).worst_case(x, slope_of(toy)) for p in (False, True))
    assert torch.equal(free, found)


def test_projection_moves_no_pixel_that_is_outside_further_out_and_none_back_in():
    x = 4 * images() - 1.5
    found = Delta(0.4, "linf", project=True).worst_case(x, slope_of(toy))
    assert bool((size(found, "linf") <= 0.4).all())
    assert bool((found[x < 0] >= 0).all())
    assert bool((found[x > 1] <= 0).all())


def test_projection_is_off_unless_asked_and_lets_the_gradient_through():
    x = torch.ones(SHAPE, dtype=torch.float64, requires_grad=True)
    assert not InputFlattened(bowl, 0.1).project
    (g,) = torch.autograd.grad(InputFlattened(linear, 0.1, project=True)(x, PROMPTS).sum(), x)
    torch.testing.assert_close(g.flatten(1), vector().expand(4, -1), rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "sigma"), [("l2", 0.3 / D**0.5), ("rms", 0.3)])
def test_noise_has_the_radius_as_the_root_mean_square_of_its_norm(norm, sigma):
    source = torch.Generator().manual_seed(0)
    delta = Delta(0.3, norm, smoothing="gaussian", draws=2000).gaussian(
        images(), lambda i: torch.randn(SHAPE, generator=source)
    )
    assert delta.shape == (8000, *SHAPE[1:])
    assert float(delta.std()) == pytest.approx(sigma, rel=0.01)  # of 192 000 independent values: 0.2 %
    assert float(size(delta, norm).square().mean().sqrt()) == pytest.approx(0.3, rel=0.01)


def test_smoothing_leaves_a_linear_reward_and_its_gradient_alone():
    x = images().requires_grad_()
    flat = InputFlattened(linear, 0.5, "rms", smoothing="gaussian", draws=2)(x, PROMPTS)
    torch.testing.assert_close(flat, linear(x), rtol=1e-12, atol=0)
    (g,) = torch.autograd.grad(flat.sum(), x)
    torch.testing.assert_close(g.flatten(1), vector().expand(4, -1), rtol=1e-12, atol=1e-15)


def test_smoothing_a_quadratic_shifts_it_by_half_the_variance_times_its_trace_and_keeps_its_gradient():
    # r(x + sigma u) = r(x) + sigma g'u - sigma^2 u'Qu / 2; a pair u, -u leaves r(x) - sigma^2 u'Qu / 2 exactly.
    x, sigma, draws = images().requires_grad_(), 0.3, 2048
    flat = InputFlattened(stretched, sigma, "rms", smoothing="gaussian", draws=draws)(x, PROMPTS)
    q = torch.linspace(0.1, 5, D, dtype=torch.float64)
    error = 0.5 * sigma**2 * math.sqrt(2 * float(q.square().sum()) / (draws / 2))  # of the mean of u'Qu / 2
    fall = (stretched(x) - flat).detach()
    torch.testing.assert_close(fall, (0.5 * sigma**2 * q.sum()).expand(4), rtol=0, atol=4 * error)
    assert 4 * error < 0.05 * float(0.5 * sigma**2 * q.sum())
    torch.testing.assert_close(fall, fall[:1].expand(4), rtol=1e-10, atol=0)  # the same u for every image
    found, plain = (torch.autograd.grad(value.sum(), x)[0] for value in (flat, stretched(x)))
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_smoothing_a_gaussian_bump_gives_the_wider_and_lower_bump(at):
    # A exp(-y^2 / 2 s^2), y the first pixel less 0.5: mean A s / sqrt(s^2 + v) exp(-y^2 / 2 (s^2 + v)), v = sigma^2.
    A, s, sigma, draws = 2.0, 0.4, 0.3, 20_000

    def bump(x: Tensor, prompts: object = None) -> Tensor:
        return A * torch.exp(-(x[:, 0, 0, 0] - 0.5).square() / (2 * s**2))

    def mean(width: float) -> float:
        """Mean of exp(-y^2 / 2 width^2) over the noise."""
        total = width**2 + sigma**2
        return width / math.sqrt(total) * math.exp(-(at**2) / (2 * total))

    settings = Delta(sigma, "rms", smoothing="gaussian", draws=draws)
    us = torch.randn(draws // 2, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.full((1, 3, 1, 1), 0.5 + at, dtype=torch.float64, requires_grad=True)
    flat = bump(x + settings.gaussian(x, lambda i: us[i])).mean()
    (g,) = torch.autograd.grad(flat, x)
    variance = A**2 * (mean(s / math.sqrt(2)) - mean(s) ** 2)
    # Pairs at most double the variance of a mean of draws.
    assert flat.item() == pytest.approx(A * mean(s), abs=4 * math.sqrt(2 * variance / draws))
    slope = -A * mean(s) * at / (s**2 + sigma**2)
    assert float(g[0, 0, 0, 0]) == pytest.approx(slope, abs=0.05)  # of slopes up to 2.2
    assert abs(flat.item() - bump(x).item()) > 0.05


def test_pairs_take_most_of_the_noise_out_of_the_gradient():
    x = images()
    source = torch.Generator().manual_seed(0)
    us = torch.randn(400, *SHAPE, generator=source, dtype=torch.float64)
    sigma, slope = 0.02, slope_of(toy)
    single = torch.stack([(slope(x + sigma * us[2 * i]) + slope(x + sigma * us[2 * i + 1])) / 2 for i in range(200)])
    paired = torch.stack([(slope(x + sigma * us[i]) + slope(x - sigma * us[i])) / 2 for i in range(200)])
    assert float(paired.var(dim=0).sum()) < 0.05 * float(single.var(dim=0).sum())
    torch.testing.assert_close(paired.mean(dim=0), single.mean(dim=0), rtol=0, atol=4 * float(single.std(0).max()) / 14)


def test_a_smoothed_reward_is_a_function_of_the_image_and_of_the_seed():
    flat = InputFlattened(toy, 0.5, smoothing="gaussian")
    assert torch.equal(flat(images(), PROMPTS), flat(images(), PROMPTS))
    torch.testing.assert_close(flat(images()[2:], PROMPTS[2:]), flat(images(), PROMPTS)[2:], rtol=1e-14, atol=0)
    other = InputFlattened(toy, 0.5, smoothing="gaussian", seed=1)
    assert float((other(images(), PROMPTS) - flat(images(), PROMPTS)).abs().max()) > 1e-6


def test_a_smoothed_reward_gives_each_copy_its_images_prompt():
    seen: list[str] = []

    def reading(x: Tensor, prompts: list[str]) -> Tensor:
        seen.extend(prompts)
        return torch.tensor([float(len(p)) for p in prompts], dtype=x.dtype) + 0 * x.sum((1, 2, 3))

    flat = InputFlattened(reading, 0.5, smoothing="gaussian", draws=6)(images(), PROMPTS)
    torch.testing.assert_close(flat, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), rtol=1e-15, atol=0)
    assert seen == PROMPTS * 6


def test_smoothing_costs_one_call_of_the_reward_on_as_many_images_as_draws():
    reward = Counting(toy)
    InputFlattened(reward, 0.1, smoothing="gaussian", draws=6)(images(), PROMPTS)
    assert (reward.calls, reward.images) == (1, 24)


def test_projected_noise_stays_in_the_unit_box():
    seen = []

    def watching(x: Tensor, prompts: object) -> Tensor:
        seen.append(x)
        return toy(x)

    InputFlattened(watching, 0.5, "rms", smoothing="gaussian", project=True)(images(), PROMPTS)
    assert 0.0 == float(seen[0].min()) < float(seen[0].max()) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta_steps": 0}, r"^delta_steps counts gradient steps, so delta_steps >= 1; got 0\.$"),
        ({"draws": 3}, r"^draws: noise is drawn in pairs u and -u, so draws is 2, 4, 6, \.\.\.; got 3\.$"),
        ({"draws": 0}, r"^draws: .* got 0\.$"),
        ({"smoothing": "gaussian", "delta_steps": 3}, r"^delta_steps: 3 steps .* set delta_steps to 1, or smoothing"),
        ({"smoothing": "gaussian", "norm": "linf"}, r"^norm: Gaussian noise has no largest value.* set l2 or rms\.$"),
        ({"rho": -1.0}, "^rho is a radius"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    for made in (lambda **s: InputFlattened(toy, **s), Delta):
        with pytest.raises(ConfigError, match=message):
            made(**{"rho": 0.1} | settings)
