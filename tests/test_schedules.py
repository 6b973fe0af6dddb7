"""One algebra: x_t = alpha x_0 + sigma eps is inverted by every kind of prediction."""

from __future__ import annotations

import math

import pytest
import torch

from rsaft.schedules import Schedule

KINDS = ("eps", "v", "flow")


def _schedule(kind):
    """Three steps; the middle level has alpha 0.6 and sigma 0.8 (0.2 for flow)."""
    if kind == "flow":
        return Schedule((0.05, 0.2, 0.6, 1.0), (0.95, 0.8, 0.4, 0.0), (950.0, 800.0, 400.0), "flow")
    return Schedule((0.28, 0.6, 0.8, 1.0), (0.96, 0.8, 0.6, 0.0), (900.0, 600.0, 300.0), kind)


def _latents(seed):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _perfect_prediction(kind, schedule, x_0, eps, i):
    return {"eps": eps, "v": schedule.alphas[i] * eps - schedule.sigmas[i] * x_0, "flow": eps - x_0}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_perfect_prediction_gives_the_clean_latents_and_the_noise_back(kind, i):
    schedule, x_0, eps = _schedule(kind), _latents(0), _latents(1)
    x_t = schedule.add_noise(x_0, eps, i)
    found = schedule.x_0_and_eps(_perfect_prediction(kind, schedule, x_0, eps, i), x_t, i)
    torch.testing.assert_close(found, (x_0, eps), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("i", [0, 1, 2])
def test_the_perfect_prediction_is_the_inverse(kind, i):
    schedule, x_0, eps = _schedule(kind), _latents(0), _latents(1)
    expected = _perfect_prediction(kind, schedule, x_0, eps, i)
    assert torch.equal(schedule.prediction_of(x_0, eps, i), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_its_scale_times_y(kind):
    schedule, x_t = _schedule(kind), _latents(2)
    y, _, _ = schedule.ysu(_latents(3), x_t, 1)
    torch.testing.assert_close(schedule.scale(1) * y, x_t, rtol=0, atol=1e-15)


def test_posterior_deviation_by_hand():
    # Step from (0.6, 0.8) to (0.8, 0.6): sqrt((1 - 0.64) / (1 - 0.36) * (1 - 0.36 / 0.64)), DDIM's Eq. 16.
    assert _schedule("eps").posterior_std(1) == pytest.approx(math.sqrt(0.36 / 0.64 * (1 - 0.36 / 0.64)))
    # Flow, (0.2, 0.8) to (0.6, 0.4): 0.4 / 0.8 sqrt(0.64 - (0.2 / 0.6)^2 0.16).
    assert _schedule("flow").posterior_std(1) == pytest.approx(0.5 * math.sqrt(0.64 - 0.16 / 9))
    # To clean latents there is no noise; from pure noise there is nothing but noise.
    assert _schedule("flow").posterior_std(2) == 0
    assert Schedule((0.0, 0.6), (1.0, 0.4), (1000.0,), "flow").posterior_std(0) == 0.4


def test_add_noise_by_hand():
    x_0, eps = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert _schedule("eps").add_noise(x_0, eps, 1).item() == pytest.approx(0.6 * 2 - 0.8)
    assert _schedule("flow").add_noise(x_0, eps, 1).item() == pytest.approx(0.2 * 2 - 0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_a_straight_line_in_y_and_s(kind):
    schedule, x_t, prediction, i = _schedule(kind), _latents(2), _latents(3), 1
    y, s, u = schedule.ysu(prediction, x_t, i)
    x_0, eps = schedule.x_0_and_eps(prediction, x_t, i)
    x_next = schedule.add_noise(x_0, eps, i + 1)
    y_next, s_next, _ = schedule.ysu(prediction, x_next, i + 1)
    torch.testing.assert_close(y_next, y + (s_next - s) * u, rtol=0, atol=1e-13)
    torch.testing.assert_close(x_0, y - s * u, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_keep_their_dtype(kind):
    x, prediction = _latents(0).float(), _latents(1).float()
    schedule = _schedule(kind)
    x_0, eps = schedule.x_0_and_eps(prediction, x, 0)
    assert {x_0.dtype, eps.dtype, schedule.add_noise(x_0, eps, 1).dtype} == {torch.float32}


def test_v_at_pure_noise_needs_no_division():
    # Zero terminal SNR: alpha = 0, where x_0 = -v.
    schedule = Schedule((0.0, 1.0), (1.0, 0.0), (999.0,), "v")
    x_0, eps = schedule.x_0_and_eps(_latents(0), _latents(1), 0)
    assert torch.equal(x_0, -_latents(0))
    assert torch.equal(eps, _latents(1))


@pytest.mark.parametrize(
    ("alphas", "sigmas", "timesteps"), [((1.0,), (0.0,), ()), ((0.0, 1.0), (1.0,), (1.0,)), ((1.0,), (0.0,), (1.0,))]
)
def test_lengths_that_do_not_fit_are_refused(alphas, sigmas, timesteps):
    with pytest.raises(ValueError, match=r"s \+ 1 alphas and sigmas; got"):
        Schedule(alphas, sigmas, timesteps, "eps")


def test_number_of_steps_is_the_number_of_timesteps():
    assert _schedule("eps").num_steps == 3
    assert math.isclose(_schedule("eps").alphas[1] ** 2 + _schedule("eps").sigmas[1] ** 2, 1)
