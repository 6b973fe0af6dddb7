"""From images to a loss: masking, shapes, precision, and the plain step."""

from __future__ import annotations

import math

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rdrl import DRaFT, Hinge, ImageScore, SoftMin, WeightedSum, plain_step
from rsaft.sampling import Sampling
from rsaft.types import Loss, Sample, Score
from tests.helpers import PROMPTS, Counting, TinyFlow, batch_of, relative_difference, toy_reward

B = 4


@pytest.fixture(scope="module")
def flow():
    return TinyFlow(dtype=torch.float64)


def _sample(b=B):
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(b, 4, 4, 4, generator=source, dtype=torch.float64)
    return Sample(latents, PROMPTS[:b], torch.arange(b))


def _images(b=B):
    return torch.rand(b, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)


def _poisoned(value, bad):
    """The toy reward, but `value` for the prompts `bad`; a NaN also poisons the gradient of its own images."""

    def reward(images, prompts):
        factor = images.new_tensor([value if p in bad else 1.0 for p in prompts])
        return toy_reward(images, prompts) * factor

    return reward


def _value_and_gradient(flow, rewards, objective, images, sample):
    loss = ImageScore(flow, rewards, objective)(images, sample)
    return loss, torch.autograd.grad(loss.value, images)[0]


def test_value_is_the_mean_of_the_objective_and_direction_the_reward(flow):
    images, sample = _images(), _sample()
    loss = ImageScore(flow, {"toy": toy_reward}, WeightedSum({"toy": 2.0}))(images, sample)
    expected = toy_reward(images, PROMPTS)
    torch.testing.assert_close(loss.value, -2 * expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.direction, 2 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.rewards, expected.detach()[:, None], rtol=0, atol=0)
    assert loss.valid.all()
    assert not loss.rewards.requires_grad


def test_view_is_the_decoded_images_with_their_graph(flow):
    sample = _sample()
    sample = Sample(sample.latents.requires_grad_(), sample.prompts, sample.index)
    view = ImageScore(flow, {"toy": toy_reward}, WeightedSum({"toy": 1.0})).view(sample)
    assert torch.equal(view, flow.decode(sample.latents))
    assert view.requires_grad


def test_an_image_score_is_a_score(flow):
    assert isinstance(ImageScore(flow, {"toy": toy_reward}, WeightedSum({"toy": 1.0})), Score)


@pytest.mark.parametrize("objective", [WeightedSum({"toy": 1.0}), Hinge({"toy": 1.0}, margin=2.0), SoftMin({"toy": 1})])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_with_a_non_finite_reward_changes_nothing_of_the_others_gradient(flow, value, objective):
    images, sample = _images(), _sample()
    rows = [0, 2, 3]
    loss, gradient = _value_and_gradient(flow, {"toy": _poisoned(value, {PROMPTS[1]})}, objective, images, sample)
    part = Sample(sample.latents[rows], tuple(PROMPTS[i] for i in rows), torch.arange(3))
    rest = images[rows].detach().requires_grad_()
    alone, alone_gradient = _value_and_gradient(flow, {"toy": toy_reward}, objective, rest, part)
    # The mean is over all 4 samples, where the masked one counts as 0: 3/4 of the mean over the 3 others.
    assert relative_difference(loss.value, 0.75 * alone.value) <= 1e-12
    assert relative_difference(gradient[rows], 0.75 * alone_gradient) <= 1e-12
    assert torch.equal(gradient[1], torch.zeros(3, 8, 8, dtype=torch.float64))
    assert loss.valid.tolist() == [True, False, True, True]


def test_the_direction_of_a_masked_sample_is_zero_and_has_no_gradient(flow):
    images, sample = _images(), _sample()
    score = ImageScore(flow, {"toy": _poisoned(math.nan, {PROMPTS[1]})}, WeightedSum({"toy": 1.0}))
    direction = score(images, sample).direction
    assert direction[1] == 0
    (gradient,) = torch.autograd.grad(direction.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).gt(0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_with_every_sample_masked_value_and_gradients_are_zero_and_finite(flow, value):
    images, sample = _images(), _sample()
    score = ImageScore(flow, {"toy": _poisoned(value, set(PROMPTS))}, WeightedSum({"toy": 1.0}))
    loss = score(images, sample)
    assert loss.value == 0
    assert not loss.valid.any()
    for quantity in (loss.value, loss.direction.sum()):
        (gradient,) = torch.autograd.grad(quantity, images, retain_graph=True)
        assert torch.equal(gradient, torch.zeros_like(images))


def test_non_finite_images_give_a_finite_value(flow):
    images = torch.full((B, 3, 8, 8), math.nan, dtype=torch.float64, requires_grad=True)
    assert ImageScore(flow, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))(images, _sample()).value == 0


def test_one_non_finite_reward_of_several_masks_the_sample(flow):
    score = ImageScore(
        flow, {"a": toy_reward, "b": _poisoned(math.inf, {PROMPTS[2]})}, WeightedSum({"a": 1.0, "b": 1.0})
    )
    loss = score(_images(), _sample())
    assert loss.valid.tolist() == [True, True, False, True]
    assert loss.rewards.isnan().tolist() == [[False, False], [False, False], [False, True], [False, False]]


@pytest.mark.parametrize("shape", [(B, 1), (1,), ()])
def test_a_reward_of_the_wrong_shape_is_named(flow, shape):
    score = ImageScore(flow, {"sharp": lambda images, prompts: torch.zeros(shape)}, WeightedSum({"sharp": 1.0}))
    with pytest.raises(ConfigError, match=rf"reward 'sharp' returned shape .* for {B} images.*shape \({B},\)"):
        score(_images(), _sample())


def test_rewards_run_outside_autocast(flow):
    seen = []

    def reward(images, prompts):
        seen.append((images.flatten(1) @ images.new_ones(192, 1)).dtype)
        return images.mean((1, 2, 3))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ImageScore(flow, {"r": reward}, WeightedSum({"r": 1.0}))(_images().float(), _sample())
    assert seen == [torch.float32]


def test_a_half_precision_reward_is_taken_in_float32(flow):
    score = ImageScore(flow, {"r": lambda x, p: x.mean((1, 2, 3)).bfloat16()}, WeightedSum({"r": 1.0}))
    assert score(_images(), _sample()).rewards.dtype == torch.float32


def test_every_reward_is_called_once_when_all_are_finite(flow):
    a, b = Counting(), Counting()
    ImageScore(flow, {"a": a, "b": b}, WeightedSum({"a": 1.0}))(_images(), _sample())
    assert (a.calls, b.calls) == (1, 1)


def test_plain_step_adds_to_the_gradient_and_returns_losses_without_graph(flow):
    params = flow.parameters()
    for p in params:
        p.grad = torch.ones_like(p)
    rollout = DRaFT(k=1, sampling=Sampling(2, guidance=1)).rollout(flow, batch_of())
    out = plain_step([rollout], ImageScore(flow, {"toy": toy_reward}, WeightedSum({"toy": 1.0})), params)
    added = torch.cat([p.grad.flatten() - 1 for p in params])
    for p in params:
        p.grad = None
    assert 0 < added.abs().max() < 1
    (loss,) = out.losses
    assert isinstance(loss, Loss)
    assert [t.requires_grad for t in (loss.value, loss.direction, loss.rewards)] == [False] * 3


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda x, p: [1.0] * len(x), "returned list for 4 images"),
        (lambda x, p: x.mean((1, 2, 3)).long(), "returned torch.int64 scores"),
        (lambda x, p: torch.zeros(len(x), device="meta"), "on meta for images on cpu"),
        (lambda x, p: x.detach().mean((1, 2, 3)), "is not differentiable"),
    ],
)
def test_a_reward_that_training_cannot_use_is_named(flow, reward, sentence):
    with pytest.raises(ConfigError, match=f"reward 'mine' .*{sentence}|reward 'mine' {sentence}"):
        ImageScore(flow, {"toy": toy_reward, "mine": reward}, WeightedSum({"toy": 1.0, "mine": 1.0}))(
            _images(), _sample()
        )


def test_a_reward_without_gradient_may_be_measured_if_the_objective_leaves_it_out(flow):
    def black_box(images, prompts):
        return images.detach().mean((1, 2, 3))

    images, rewards = _images(), {"toy": toy_reward, "box": black_box}
    loss = ImageScore(flow, rewards, WeightedSum({"toy": 1.0}))(images, _sample())
    alone = ImageScore(flow, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))(images, _sample())
    assert torch.equal(*(torch.autograd.grad(found.value, images)[0] for found in (loss, alone)))
    torch.testing.assert_close(loss.rewards[:, 1], black_box(images, PROMPTS))
    with torch.no_grad():  # where nothing is backpropagated it may be used, as by policy gradients
        ImageScore(flow, rewards, WeightedSum({"box": 1.0}))(images, _sample())
