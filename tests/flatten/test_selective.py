"""Selective sharpness weighting: weights against closed forms, and the weighted step against the slow twin."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.flatten.input import Delta
from rsaft.flatten.selective import look, sharpness_weights, weigh_gradient, weights_of_batch
from rsaft.metrics import sharpness
from rsaft.rdrl import DRaFT, ImageScore, Pretraining, ReFL, WeightedSum, plain_step
from rsaft.rdrl.pretraining import save_pairs
from rsaft.sampling import Sampling, ode
from rsaft.types import Batch, Step
from tests.helpers import PROMPTS, Counting, batch_of, count_calls, toy_reward
from tests.rdrl.toy import Toy
from tests.reference.flattening import selective_gradient

SAMPLING = Sampling(num_steps=4, guidance=1.0)
DRAFT = DRaFT(k=2, sampling=SAMPLING)
MODES = ["none", "input", "weight", "both"]
TAU = 0.02  # S1 of the four images at rho = 0.3: from 0.086 to 0.109


def gradient(step: Step, batches: Sequence[Batch], algorithm: Any = DRAFT, reward: Any = toy_reward) -> tuple[Any, Any]:
    """The gradient of a step as one vector, and what the step returned."""
    toy = Toy("flow")
    score = ImageScore(toy, {"toy": reward}, WeightedSum({"toy": 1.0}))
    output = step([algorithm.rollout(toy, batch) for batch in batches], score, toy.parameters())
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in toy.parameters()]), output


def split(*sizes: int) -> list[Batch]:
    """The four prompts in micro-batches of these sizes."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [batch_of(PROMPTS[f : f + n], first_id=f) for f, n in zip(firsts, sizes, strict=True)]


def s1(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_sharpness_gives_every_sample_weight_one():
    torch.testing.assert_close(sharpness_weights(s1(0.3, 0.3, 0.3), 0.01), s1(1, 1, 1), rtol=1e-14, atol=0)


def test_an_infinite_temperature_gives_every_sample_weight_one():
    torch.testing.assert_close(sharpness_weights(s1(0.1, -0.4, 0.9), 1e15), s1(1, 1, 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_temperature_of_zero_leaves_the_flattest_sample_alone(offset):
    torch.testing.assert_close(sharpness_weights(s1(0.3, -0.1, 0.2) + offset, 1e-6), s1(0, 3, 0), rtol=0, atol=1e-6)


def test_weights_are_the_exponentials_over_their_mean():
    raw = torch.exp(-s1(0.1, 0.2, 0.4) / 0.3)
    weights = sharpness_weights(s1(0.1, 0.2, 0.4), 0.3)
    torch.testing.assert_close(weights, raw / raw.mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-14, atol=0)
    assert bool((weights.diff() < 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_sample_without_a_finite_sharpness_weighs_nothing_and_the_others_have_mean_one(bad):
    weights = sharpness_weights(s1(0.1, bad, 0.4), 0.3)
    torch.testing.assert_close(weights[[0, 2]], sharpness_weights(s1(0.1, 0.4), 0.3), rtol=1e-14, atol=0)
    assert float(weights[1]) == 0.0
    assert torch.equal(sharpness_weights(s1(bad, bad), 0.3), s1(0, 0))


@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (1, 1, 1, 1)])
def test_weights_of_micro_batches_are_those_of_the_whole_batch(sizes):
    values = s1(0.1, -0.2, 0.4, 0.0)
    weights, logs = weights_of_batch(values.float().split(sizes), 0.3)
    whole = sharpness_weights(values.float(), 0.3)
    assert [len(w) for w in weights] == list(sizes)
    assert torch.equal(torch.cat(weights), whole.float())
    assert logs == {
        "rsaft/sharpness_weight_min": float(whole.min()),
        "rsaft/sharpness_weight_max": float(whole.max()),
    }


def test_a_weighted_view_has_its_value_and_its_gradient_times_the_weights():
    x = torch.rand(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = s1(0.0, 0.5, 2.5)
    view = 2 * x
    weigh_gradient(view, weights)
    value = view.square().sum()
    (g,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(g, 8 * x * weights.view(3, 1, 1, 1), rtol=1e-14, atol=0)
    assert torch.equal(value, (2 * x).square().sum())


def test_the_sharpness_that_is_looked_at_is_the_metrics():
    toy = Toy("flow")
    score = ImageScore(toy, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
    rollout = DRAFT.rollout(toy, batch_of(PROMPTS))
    found = look(rollout, None, score, Delta(0.3))
    images = score.view(rollout.tail(rollout.prefix())).detach()
    torch.testing.assert_close(found.s1, sharpness(toy_reward, images, PROMPTS, 0.3), rtol=1e-10, atol=1e-14)
    assert not found.s1.requires_grad
    assert not found.delta.requires_grad


def literal(mode: str, tau: float) -> Tensor:
    """The slow twin's gradient for the four prompts as one batch."""
    toy, batch = Toy("flow"), batch_of(PROMPTS)
    names = [name for name, p in toy.network.named_parameters() if p.requires_grad]
    schedule, text = toy.schedule(SAMPLING.num_steps), toy.encode(PROMPTS)
    x_T = DRAFT.rollout(toy, batch)._x_T
    middle = SAMPLING.num_steps - DRAFT.k

    def x_0(theta: Sequence[Tensor]) -> Tensor:
        def denoise(x: Tensor, t: float) -> Tensor:
            return functional_call(toy.network, dict(zip(names, theta, strict=True)), (x, t, text))

        start = ode(denoise, schedule, x_T, start=0, stop=middle).detach()
        return toy.decode(ode(denoise, schedule, start, start=middle, stop=SAMPLING.num_steps))

    found = selective_gradient(
        x_0, lambda x: toy_reward(x, PROMPTS), toy.parameters(), rho=0.3, rho_w=0.1, mode=mode, tau=tau
    )
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_equals_the_slow_twin_whatever_the_micro_batches(mode, sizes):
    found, output = gradient(RSAFT(0.3, 0.1, mode=mode, sharpness_tau=TAU), split(*sizes))
    torch.testing.assert_close(found, literal(mode, TAU), rtol=1e-9, atol=1e-13)
    plain, _ = gradient(RSAFT(0.3, 0.1, mode=mode), split(*sizes))
    assert float((found - plain).norm()) > 0.05 * float(plain.norm())
    assert output.logs["rsaft/sharpness_weight_min"] < 0.9 < 1.1 < output.logs["rsaft/sharpness_weight_max"]


@pytest.mark.parametrize("mode", MODES)
def test_an_infinite_temperature_gives_the_gradient_without_weights(mode):
    found, output = gradient(RSAFT(0.3, 0.1, mode=mode, sharpness_tau=1e15), split(2, 2))
    plain, before = gradient(RSAFT(0.3, 0.1, mode=mode), split(2, 2))
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-14)
    assert all(torch.equal(a.value, b.value) for a, b in zip(output.losses, before.losses, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_temperature_of_zero_trains_on_the_flattest_sample_alone(mode):
    found, _ = gradient(RSAFT(0.3, 0.0, mode=mode, sharpness_tau=1e-7), split(2, 2))
    alone = [gradient(RSAFT(0.3, 0.0, mode=mode), [batch_of([p], first_id=i)])[0] for i, p in enumerate(PROMPTS)]
    matches = [torch.allclose(found, g, rtol=1e-8, atol=1e-12) for g in alone]
    assert sum(matches) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "both", "delta_from": "perturbed"},
        {"mode": "both", "reuse": "cached"},
        {"mode": "weight", "eps_share": 0.5},
        {"mode": "weight", "eps_every": 2},
        {"mode": "input", "delta_steps": 3},
        {"mode": "input", "smoothing": "gaussian"},
        {"mode": "input", "space": "latent"},
    ],
    ids=str,
)
def test_with_every_other_option_micro_batches_give_the_whole_batchs_gradient(options):
    step = RSAFT(0.3, 0.1, sharpness_tau=TAU, **options)
    whole, parts = (gradient(step, batches)[0] for batches in (split(4), split(2, 2)))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-13)
    plain, _ = gradient(RSAFT(0.3, 0.1, **options), split(4))
    assert float((whole - plain).norm()) > 0.01 * float(plain.norm())


def test_draft_lv_weighs_each_of_its_images():
    algorithm = DRaFT(lv=2, sampling=SAMPLING)
    whole, output = gradient(RSAFT(0.3, 0.1, sharpness_tau=TAU), split(4), algorithm)
    parts, _ = gradient(RSAFT(0.3, 0.1, sharpness_tau=TAU), split(2, 2), algorithm)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-13)
    assert output.losses[0].direction.shape == (12,)


def test_a_masked_sample_changes_no_other_samples_weight():
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        bad = torch.tensor([p == PROMPTS[1] for p in prompts])
        return torch.where(bad, torch.nan, toy_reward(images, prompts))

    found, output = gradient(RSAFT(0.3, mode="input", sharpness_tau=TAU), split(4), reward=broken)
    kept = [0, 2, 3]
    batch = Batch(tuple(PROMPTS[i] for i in kept), tuple(kept), step=0, seed=0)
    alone, _ = gradient(RSAFT(0.3, mode="input", sharpness_tau=TAU), [batch])
    torch.testing.assert_close(found, alone * 3 / 4, rtol=1e-9, atol=1e-13)  # the loop divides by the share
    assert output.losses[0].valid.tolist() == [True, False, True, True]


def test_the_pretraining_term_is_not_weighted(tmp_path):
    latents = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    save_pairs(tmp_path / "pairs.safetensors", latents, PROMPTS)
    with_term, without = (
        ReFL(last=2, pretrain=p, sampling=SAMPLING)
        for p in (Pretraining(str(tmp_path / "pairs.safetensors"), 0.5), None)
    )
    term = gradient(plain_step, split(2, 2), with_term)[0] - gradient(plain_step, split(2, 2), without)[0]
    step = RSAFT(0.3, mode="none", sharpness_tau=TAU)
    weighted = gradient(step, split(2, 2), with_term)[0] - gradient(step, split(2, 2), without)[0]
    torch.testing.assert_close(weighted, term, rtol=1e-8, atol=1e-12)


COSTS = [
    # Settings, calls beyond those without weights: of the denoiser, of them with gradient, of decoder and reward.
    (RSAFT(mode="none"), 2, 0, 1, 2),
    (RSAFT(mode="input"), 2, 0, 1, 1),
    (RSAFT(mode="input", delta_steps=3), 2, 0, 1, 1),
    (RSAFT(mode="input", smoothing="gaussian"), 2, 0, 1, 2),
    (RSAFT(mode="input", space="latent"), 2, 0, 1, 1),
    (RSAFT(mode="weight"), 2, 0, 1, 2),
    (RSAFT(mode="weight", delta_steps=3), 2, 0, 1, 4),
    (RSAFT(mode="weight", eps_share=0.25), 2, 0, 1, 2),
    (RSAFT(mode="both"), 2, 0, 1, 2),
    (RSAFT(mode="both", reuse="cached"), 2, 0, 1, 2),
    (RSAFT(mode="both", delta_from="perturbed"), 2, 0, 1, 1),
]


@pytest.mark.parametrize(("step", "calls", "with_grad", "decodes", "rewards"), COSTS, ids=lambda v: str(v)[6:80])
def test_weights_cost_a_tail_without_gradient_and_their_reward_passes(step, calls, with_grad, decodes, rewards):
    found = []
    for made in (step, replace(step, sharpness_tau=TAU)):
        toy, reward = Toy("flow"), Counting()
        score = ImageScore(toy, {"toy": reward}, WeightedSum({"toy": 1.0}))
        rollouts = [DRAFT.rollout(toy, batch) for batch in split(4)]
        with count_calls(toy.network) as network, count_calls(toy.decoder) as decoder:
            made(rollouts, score, toy.parameters())
        found.append((network.total, network.with_grad, decoder.total, reward.calls))
    assert tuple(b - a for a, b in zip(*found, strict=True)) == (calls, with_grad, decodes, rewards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharpness_tau": 0.0}, r"^sharpness_tau is a temperature, so 0 < sharpness_tau; got 0\.0; null is off\.$"),
        ({"sharpness_tau": -1.0}, "^sharpness_tau is a temperature"),
        ({"sharpness_tau": float("inf")}, "^sharpness_tau is a temperature"),
        ({"sharpness_tau": 1.0, "rho": 0.0}, r"^sharpness_tau .* rho is 0; set rho > 0\.$"),
        ({"sharpness_tau": 1.0, "eps_group": "micro_batch"}, r"^sharpness_tau: .* set eps_group to global\.$"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RSAFT(**settings)
