"""RSA-FT's options of delta, as a step: closed forms, keyed noise, call counts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rsaft.flatten import RSAFT, InputFlattened
from rsaft.flatten.input import Delta
from rsaft.randomness import normal
from rsaft.rdrl import DRaFT, Hinge, ImageScore, Pretraining, ReFL, WeightedSum, plain_step
from rsaft.rdrl.pretraining import save_pairs
from rsaft.sampling import Sampling
from rsaft.types import Batch, Loss, Sample, Step
from tests.flatten.test_rsa_ft import QuadraticScore, linear_problem
from tests.helpers import PROMPTS, Counting, batch_of, count_calls, toy_reward
from tests.rdrl.toy import Toy

SAMPLING = Sampling(num_steps=4, guidance=1.0)
DRAFT = DRaFT(k=2, sampling=SAMPLING)
TWO = [batch_of(PROMPTS[:2]), batch_of(PROMPTS[2:], first_id=2)]


def gradient(
    step: Step,
    batches: Sequence[Batch] = TWO,
    algorithm: Any = DRAFT,
    reward: Any = toy_reward,
    objective: Any = WeightedSum({"toy": 1.0}),  # noqa: B008  frozen
) -> tuple[Tensor, Any]:
    """The gradient of a step as one vector, and what the step returned."""
    toy = Toy("flow")
    score = ImageScore(toy, {"toy": reward}, objective)
    output = step([algorithm.rollout(toy, batch) for batch in batches], score, toy.parameters())
    return torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None]), output


@pytest.mark.parametrize(
    "options", [{}, {"norm": "linf"}, {"project": True}, {"norm": "rms", "project": True}], ids=str
)
@pytest.mark.parametrize("steps", [1, 4])
def test_input_mode_is_the_plain_step_on_the_flattened_reward(steps, options):
    found, _ = gradient(RSAFT(0.3, mode="input", delta_steps=steps, **options))
    expected, _ = gradient(plain_step, reward=InputFlattened(toy_reward, 0.3, delta_steps=steps, **options))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    assert float((found - gradient(plain_step)[0]).norm()) > 1e-4


@pytest.mark.parametrize("delta_from", ["clean", "perturbed"])
@pytest.mark.parametrize("steps", [1, 5])
def test_both_perturbations_with_several_steps_have_their_closed_form(steps, delta_from):
    rollout, score = linear_problem()
    q, a, m = score.q, score.a, rollout.matrix
    x = rollout.noise + m @ rollout.theta.detach()
    g_theta = m.T @ ((a - x) @ q).sum(dim=0)
    eps = -0.2 * g_theta / g_theta.norm()
    at = x if delta_from == "clean" else x + m @ eps
    delta = Delta(0.8, "l2", steps).worst_case(at, lambda y: (a - y) @ q)
    expected = -(m.T @ ((a - (x + m @ eps + delta)) @ q).mean(dim=0))
    RSAFT(0.8, 0.2, delta_steps=steps, delta_from=delta_from)([rollout], score, [rollout.theta])
    torch.testing.assert_close(rollout.theta.grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", ["input", "both"])
def test_smoothing_of_a_quadratic_leaves_the_gradient_without_delta(mode):
    gradients = []
    for step in (RSAFT(0.8, 0.2, mode=mode, smoothing="gaussian"), RSAFT(0.0, 0.2, mode=mode)):
        rollout, score = linear_problem()
        step([rollout], score, [rollout.theta])
        gradients.append(rollout.theta.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-12)


def noisy(sigma: float, pair: int, sign: int, step: int) -> Any:
    """The toy reward of images moved by one draw of their noise, which is keyed by the sample's id."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        ids = [PROMPTS.index(p) for p in prompts]
        how = {"seed": 0, "purpose": f"smoothing-{pair}", "step": step, "sample_ids": ids}
        u = normal(tuple(images.shape[1:]), device=images.device, dtype=images.dtype, **how)
        return toy_reward(images + sign * sigma * u, prompts)

    return reward


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize(("norm", "sigma"), [("rms", 0.2), ("l2", 0.2 / (3 * 6 * 6) ** 0.5)])
def test_smoothing_is_the_mean_of_plain_steps_at_the_keyed_draws(norm, sigma, step):
    batches = [replace(batch, step=step) for batch in TWO]
    found, output = gradient(RSAFT(0.2, norm=norm, mode="input", smoothing="gaussian", draws=4), batches)
    draws = [gradient(plain_step, batches, reward=noisy(sigma, i, sign, step)) for i in (0, 1) for sign in (1, -1)]
    torch.testing.assert_close(found, torch.stack([g for g, _ in draws]).mean(dim=0), rtol=1e-10, atol=1e-14)
    value = sum(loss.value for _, out in draws for loss in out.losses) / 8
    torch.testing.assert_close(sum(loss.value for loss in output.losses) / 2, value, rtol=1e-12, atol=0)


def test_smoothing_of_a_hinge_is_the_mean_of_the_draws_losses_not_the_loss_of_their_mean():
    batch, step = [batch_of(PROMPTS[:1])], RSAFT(0.5, norm="rms", mode="input", smoothing="gaussian", draws=2)
    rewards = [float(gradient(plain_step, batch, reward=noisy(0.5, 0, s, 0))[1].losses[0].rewards) for s in (1, -1)]
    margin = sum(rewards) / 2 + 0.1 * abs(rewards[0] - rewards[1])  # one draw is above it
    hinge = Hinge({"toy": 1.0}, margin=margin)
    found, output = gradient(step, batch, objective=hinge)
    parts = [gradient(plain_step, batch, reward=noisy(0.5, 0, s, 0), objective=hinge) for s in (1, -1)]
    torch.testing.assert_close(found, (parts[0][0] + parts[1][0]) / 2, rtol=1e-10, atol=1e-14)
    value = float(output.losses[0].value)
    assert value == pytest.approx((margin - min(rewards)) / 2, rel=1e-12)
    assert value > 2 * (margin - sum(rewards) / 2) > 0


def test_noise_belongs_to_the_update_and_the_sample_and_is_repeated():
    step = RSAFT(0.2, norm="rms", mode="input", smoothing="gaussian")
    first, whole = gradient(step)[0], gradient(step, [batch_of(PROMPTS)])[0]
    assert torch.equal(first, gradient(step)[0])
    torch.testing.assert_close(first, whole, rtol=1e-11, atol=1e-14)
    # Another update draws other noise. The trajectory's noise is another too, so the plain step's change is taken off.
    moved, moved_plain = (gradient(s, [replace(b, step=1) for b in TWO])[0] for s in (step, plain_step))
    assert float(((moved - moved_plain) - (first - gradient(plain_step)[0])).norm()) > 1e-5


def test_smoothing_takes_every_latent_of_draft_lv_and_every_penalty_once(tmp_path):
    smooth = RSAFT(0.2, norm="rms", mode="input", smoothing="gaussian", draws=2)
    _, output = gradient(smooth, algorithm=DRaFT(lv=2, sampling=SAMPLING))
    assert [len(loss.valid) for loss in output.losses] == [2 * 3 * 2] * 2  # draws, latents of a sample, samples
    latents = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    save_pairs(tmp_path / "pairs.safetensors", latents, PROMPTS)
    term = Pretraining(str(tmp_path / "pairs.safetensors"), 0.5)
    with_term, without = (ReFL(last=2, pretrain=p, sampling=SAMPLING) for p in (term, None))
    plain, smoothed = (gradient(s, TWO, with_term)[0] - gradient(s, TWO, without)[0] for s in (plain_step, smooth))
    torch.testing.assert_close(smoothed, plain, rtol=1e-8, atol=1e-12)


@dataclass(frozen=True)
class DecodedScore:
    """r of the decoded image D z, and D z is the view."""

    decoder: Tensor
    score: QuadraticScore

    def view(self, sample: Sample) -> Tensor:
        return sample.latents.flatten(1) @ self.decoder.T

    def __call__(self, view: Tensor, sample: Sample) -> Loss:
        return self.score(view, sample)


@dataclass(frozen=True)
class WholeScore:
    """The same reward as a function of the latents."""

    decoder: Tensor
    score: QuadraticScore

    def view(self, sample: Sample) -> Tensor:
        return sample.latents

    def __call__(self, view: Tensor, sample: Sample) -> Loss:
        return self.score(view.flatten(1) @ self.decoder.T, sample)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "input"},
        {"mode": "both"},
        {"mode": "both", "delta_from": "perturbed"},
        {"mode": "input", "delta_steps": 3},
        {"mode": "input", "norm": "rms", "smoothing": "gaussian"},
        {"mode": "weight", "sharpness_tau": 5.0},
    ],
    ids=str,
)
def test_a_delta_of_latents_is_that_of_a_reward_that_decodes_them(options):
    decoder = torch.randn(12, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / 12**0.5
    gradients = []
    for space, made in (("latent", DecodedScore), ("image", WholeScore), ("image", DecodedScore)):
        rollout, score = linear_problem()
        RSAFT(0.8, 0.2, space=space, **options)([rollout], made(decoder, score), [rollout.theta])
        gradients.append(rollout.theta.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-12)
    if "smoothing" not in options:  # where noise makes no difference, so space makes none
        assert float((gradients[0] - gradients[2]).norm()) > 1e-3


def test_the_size_of_a_delta_is_logged_in_grey_levels_for_images_alone():
    _, output = gradient(RSAFT(0.2, mode="input", norm="rms"))
    assert output.logs["rsaft/delta_rms_255"] == pytest.approx(0.2 * 255)
    _, output = gradient(RSAFT(0.2, mode="input", norm="rms", space="latent"))
    assert output.logs["rsaft/delta_rms"] == pytest.approx(0.2)
    _, output = gradient(RSAFT(0.2, mode="input", norm="rms", smoothing="gaussian", draws=200), TWO[:1])
    assert output.logs["rsaft/delta_rms_255"] == pytest.approx(0.2 * 255, rel=0.02)  # of 21 600 values


COSTS = [
    # Settings; calls of denoiser and decoder; calls of the reward, and images in them.
    (RSAFT(mode="input", delta_steps=1), 4, 1, 2, 8),
    (RSAFT(mode="input", delta_steps=3), 4, 1, 4, 16),
    (RSAFT(mode="both", delta_steps=1), 8, 2, 2, 8),
    (RSAFT(mode="both", delta_steps=3), 8, 2, 4, 16),
    (RSAFT(mode="both", delta_steps=3, delta_from="perturbed"), 8, 2, 5, 20),
    (RSAFT(mode="input", project=True), 4, 1, 2, 8),
    (RSAFT(mode="input", smoothing="gaussian", draws=6), 4, 1, 1, 24),
    (RSAFT(mode="both", smoothing="gaussian", draws=2), 8, 2, 2, 12),
    (RSAFT(mode="both", smoothing="gaussian", draws=2, delta_from="perturbed"), 8, 2, 2, 12),
    (RSAFT(mode="input", space="latent"), 4, 2, 2, 8),
    (RSAFT(mode="both", space="latent"), 8, 2, 2, 8),
    (RSAFT(mode="weight", space="latent"), 8, 2, 2, 8),
]


@pytest.mark.parametrize(("step", "calls", "decodes", "rewards", "images"), COSTS, ids=lambda v: str(v)[6:80])
def test_calls_equal_the_cost_in_the_docstring(step, calls, decodes, rewards, images):
    toy, reward = Toy("flow"), Counting()
    score = ImageScore(toy, {"toy": reward}, WeightedSum({"toy": 1.0}))
    with count_calls(toy.network) as network, count_calls(toy.decoder) as decoder:
        step([DRAFT.rollout(toy, batch_of(PROMPTS))], score, toy.parameters())
    assert (network.total, decoder.total, reward.calls, reward.images) == (calls, decodes, rewards, images)
