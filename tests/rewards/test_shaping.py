"""Rewards around rewards: values by hand, monotone, limits."""

import math

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rewards.shaping import PAR, Clipped, Standardized, min_max, standardized
from rsaft.types import Reward

PROMPTS = ["a", "b", "a"]


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def images(*levels: float) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


REFERENCES = {"a": [0.2, 0.6], "b": [0.5]}
SHAPED = [Standardized(red, 0.3, 0.1), min_max(red, 0.2, 0.6), PAR(red, REFERENCES, k=4.0), Clipped(red, -5.0, 5.0)]


def test_values_by_hand():
    x = images(0.2, 0.5, 0.8)
    torch.testing.assert_close(Standardized(red, 0.3, 0.1)(x, PROMPTS), torch.tensor([-1.0, 2.0, 5.0]).double())
    torch.testing.assert_close(min_max(red, 0.2, 0.6)(x, PROMPTS), torch.tensor([0.0, 0.75, 1.5]).double())
    torch.testing.assert_close(Clipped(red, 0.3, 0.6)(x, PROMPTS), torch.tensor([0.3, 0.5, 0.6]).double())
    first, second, _ = PAR(red, REFERENCES, k=4.0)(x, PROMPTS).tolist()
    assert first == pytest.approx((0.5 + 1 / (1 + math.exp(1.6))) / 2)
    assert second == pytest.approx(0.5)


@pytest.mark.parametrize("reward", SHAPED, ids=lambda r: type(r).__name__)
def test_each_is_a_reward_that_grows_with_the_one_inside(reward):
    assert isinstance(reward, Reward)
    less, more = reward(images(0.3, 0.3, 0.3), PROMPTS), reward(images(0.4, 0.4, 0.4), PROMPTS)
    assert (more > less).all()


def test_pars_slope_is_k_s_one_minus_s_and_fades_far_above_the_references():
    x = images(0.5, 3.0).requires_grad_()
    slopes = torch.autograd.grad(PAR(red, {"b": [0.5]}, k=4.0)(x, ["b", "b"]).sum(), x)[0].sum((1, 2, 3))
    torch.testing.assert_close(slopes[0], torch.tensor(4.0 * 0.25, dtype=torch.float64))
    assert slopes[1] < 1e-3


def test_par_with_a_steep_preference_is_the_share_of_references_beaten():
    shares = PAR(red, {"a": [0.1, 0.2, 0.3, 0.4]}, k=1e4)(images(0.25, 0.35, 0.9), ["a"] * 3)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.75, 1.0]).double())


def test_standardized_has_mean_0_and_deviation_1_on_its_reference_set():
    x = torch.rand(20, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = standardized(red, x, ["a"] * 20)(x, ["a"] * 20)
    torch.testing.assert_close(found.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.std(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 3])
def test_equal_reference_scores_are_refused(count):
    with pytest.raises(ConfigError, match=f"scores of {count} reference images have deviation 0.0"):
        standardized(red, images(*[0.5] * count), ["a"] * count)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Standardized(red, 0.0, 0.0), "std > 0; got 0.0"),
        (lambda: Clipped(red, 1.0, 1.0), "low < high; got 1.0 and 1.0"),
        (lambda: min_max(red, 1.0, 0.0), "std > 0; got -1.0"),
        (lambda: PAR(red, {"a": []}), "no score for the prompt 'a'"),
        (lambda: PAR(red, REFERENCES, k=0.0), "k > 0; got 0.0"),
        (lambda: PAR(red, REFERENCES)(images(0.5), ["c"]), "no reference scores for the prompt 'c'"),
    ],
)
def test_what_makes_no_sense_is_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()
