"""One small update before a long run tells what training would stumble over."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rsaft.errors import ConfigError, RsaftError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, WeightedSum
from rsaft.rdrl.preflight import StepReport, try_step
from rsaft.rdrl.score import plain_step
from rsaft.sampling import Sampling
from rsaft.types import StepOutput
from tests.helpers import TinyFlow, toy_reward


def attempt(reward: Any = toy_reward, *, step: Any = plain_step, **changes: Any) -> tuple[TinyFlow, StepReport]:
    backbone = TinyFlow()
    settings = {
        "algorithm": DRaFT(sampling=Sampling(num_steps=2, guidance=1.0)),
        "rewards": {"mine": reward},
        "held_out": {},
        "objective": WeightedSum({"mine": 1.0}),
        "prompt": "a cat",
        "trained_on": ["mine"],
    }
    return backbone, try_step(backbone, step=step, **(settings | changes))


@pytest.mark.parametrize("step", [plain_step, RSAFT(rho=0.01, rho_w=0.01)], ids=["plain", "rsaft"])
def test_a_good_run_is_reported_and_leaves_nothing_behind(step: Any):
    backbone, report = attempt(step=step, held_out={"other": lambda images, prompts: images.mean((1, 2, 3))})
    assert list(report.rewards) == ["mine", "other"]
    assert all(math.isfinite(value) for value in report.rewards.values())
    assert report.gradient_norm > 0
    assert all(p.grad is None for p in backbone.parameters())
    untouched = TinyFlow()
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), untouched.parameters(), strict=True))


def nan(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3)) * math.nan


def detached(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.detach().mean((1, 2, 3))


def one_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean()


def huge(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return 5e4 + images.mean((1, 2, 3))


def no_tensor(images: Tensor, prompts: Sequence[str]) -> float:
    return 1.0


def flat(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return 0 * images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (nan, "reward 'mine' gave nan for an image of 'a cat'"),
        (detached, "reward 'mine' is not differentiable"),
        (one_number, "reward 'mine' returned shape () for 1 images"),
        (huge, "reward 'mine' gave 50000"),
        (no_tensor, "reward 'mine' returned float for 1 image"),
        (flat, "check: the gradient of the trainable values has norm 0.0"),
    ],
)
def test_a_reward_that_cannot_be_trained_on_is_one_sentence(reward: Any, sentence: str):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}") as caught:
        attempt(reward)
    assert "\n" not in str(caught.value)


def test_a_reward_without_weight_needs_no_gradient():
    _, report = attempt(
        rewards={"mine": toy_reward, "seen": detached}, objective=WeightedSum({"mine": 1.0}), trained_on=["mine"]
    )
    assert list(report.rewards) == ["mine", "seen"]


def test_a_held_out_reward_is_tried_too():
    with pytest.raises(ConfigError, match=r"^reward 'other' gave"):
        attempt(held_out={"other": nan})


def test_images_that_are_not_finite_are_the_models_fault_and_not_the_rewards():
    def broken(rollouts: Any, score: Any, params: Any, state: Any = None) -> StepOutput:
        sample = rollouts[0].tail(rollouts[0].prefix())
        score(score.view(sample) * math.nan, sample)
        raise AssertionError("not reached")

    with pytest.raises(ConfigError, match=r"^check: the model's image of 'a cat' is not finite"):
        attempt(step=broken)


def test_a_step_that_moves_the_weights_is_refused():
    def eager(rollouts: Any, score: Any, params: Any, state: Any = None) -> StepOutput:
        output = plain_step(rollouts, score, params, state)
        with torch.no_grad():
            params[0].add_(1e-3)
        return output

    with pytest.raises(RsaftError, match=r"^check: the step changed the weights"):
        attempt(step=eager)
