"""The study's controls and cheaper schemes: their limits, in float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.controls import (
    CoarseFirstPass,
    FriendlySAM,
    LookSAM,
    ProductMetric,
    RandomPerturbation,
    lora_layers,
    product_norm,
    with_steps,
)
from benchmarks.testbed_study import TRAINERS
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.flatten.rsa_ft import KeptEps
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ImageScore, ReFL, WeightedSum, plain_step
from rsaft.sampling import Sampling
from rsaft.types import Step
from tests.helpers import TinyFlow, batch_of, count_calls, toy_reward
from tests.rdrl.toy import Toy

STEPS = 4
STRICT = RSAFT(0.0, 0.1, mode="weight")


SAMPLING = Sampling(STEPS, guidance=1.0)


def update(
    step: Step,
    number: int = 0,
    state: Any = None,
    algorithm: Any = DRaFT(k=1, sampling=SAMPLING),  # noqa: B008
) -> tuple[torch.Tensor, Any]:
    """The gradient of one update as a vector, and the step's state."""
    backbone = TinyFlow(dtype=torch.float64)
    rollout = algorithm.rollout(backbone, batch_of(step=number))
    params = backbone.parameters()
    before = [p.detach().clone() for p in params]
    output = step([rollout], ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0})), params, state)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    return torch.cat([p.grad.flatten() for p in params if p.grad is not None]), output.state


@pytest.mark.parametrize(
    "scheme", [LookSAM(0.1, every=1), FriendlySAM(0.1), CoarseFirstPass(0.1, STEPS)], ids=lambda s: type(s).__name__
)
def test_at_its_limit_a_scheme_is_strict_weight_flattening(scheme: Step):
    expected, _ = update(STRICT)
    torch.testing.assert_close(update(scheme)[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "algorithm",
    [
        DRaFT(k=3, sampling=SAMPLING),
        ReFL(last=2, sampling=SAMPLING),
        AlignProp(truncation=3, sampling=SAMPLING),
        DRTune(k=2, early_stop=3, sampling=SAMPLING),
        DRTune(k=3, early_stop=0, sampling=SAMPLING),
    ],
)
def test_a_coarse_first_pass_of_every_trainer_ends_at_strict_weight_flattening(algorithm: Any):
    strict, coarse = (
        update(STRICT, 1, algorithm=algorithm)[0],
        update(CoarseFirstPass(0.1, 2), 1, algorithm=algorithm)[0],
    )
    assert not torch.allclose(coarse, strict, rtol=0, atol=1e-9)
    whole = update(CoarseFirstPass(0.1, STEPS), 1, algorithm=algorithm)[0]
    torch.testing.assert_close(whole, strict, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("algorithm", "counts"),
    [
        (DRaFT(k=1), {"k": 1}),
        (DRaFT(k=20), {"k": 1}),
        (ReFL(sampling=Sampling(40)), {"last": None, "first_stop": 2}),
        (ReFL(last=20, sampling=Sampling(40)), {"last": 2}),
        (AlignProp(truncation=49), {"truncation": 2}),
        (AlignProp(), {"truncation": "gaussian", "mean": 0.84}),
        (DRTune(), {"k": 1, "early_stop": None, "last": 1}),
        (DRTune(k=40, early_stop=11), {"k": 2, "early_stop": 1}),
        (DRTune(k=48, early_stop=3), {"k": 3, "early_stop": 1}),
        (DRTune(early_stop=0), {"k": 1, "early_stop": 0}),
    ],
)
def test_in_three_steps_a_trainer_counts_in_proportion(algorithm: Any, counts: dict[str, Any]):
    coarse = with_steps(algorithm, 3)
    assert coarse.sampling == replace(algorithm.sampling, num_steps=3)
    assert {name: getattr(coarse, name) for name in counts} == counts


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_studys_trainers_have_a_coarse_first_pass_of_three_steps(trainer: str):
    assert with_steps(TRAINERS[trainer], 3).sampling.num_steps == 3


@pytest.mark.parametrize(
    "scheme",
    [RandomPerturbation(0.0), LookSAM(0.0, every=1), FriendlySAM(0.0), CoarseFirstPass(0.0, 2)],
    ids=lambda s: type(s).__name__,
)
def test_with_radius_0_a_scheme_is_the_plain_step(scheme: Step):
    assert torch.equal(update(scheme)[0], update(plain_step)[0])


def test_fsam_without_its_mean_is_strict_at_every_update():
    _, state = update(FriendlySAM(0.1, sigma=0.0))
    torch.testing.assert_close(update(FriendlySAM(0.1, sigma=0.0), 1, state)[0], update(STRICT, 1)[0])
    assert not torch.allclose(update(FriendlySAM(0.1), 1, state)[0], update(STRICT, 1)[0])


def test_what_looksam_keeps_lies_across_the_plain_gradient():
    plain, _ = update(plain_step)
    strict, state = update(LookSAM(0.1, every=5))
    across = torch.cat([t.flatten() for t in state.eps])
    assert abs(float(across @ plain)) < 1e-12 * float(across.norm() * plain.norm())
    torch.testing.assert_close(across + (strict @ plain) / (plain @ plain) * plain, strict)


def test_between_its_updates_looksam_adds_the_kept_part_at_alpha_times_the_plain_norm():
    _, state = update(LookSAM(0.1, every=2, alpha=0.3))
    plain, _ = update(plain_step, 1)
    found, then = update(LookSAM(0.1, every=2, alpha=0.3), 1, state)
    torch.testing.assert_close((found - plain).norm(), 0.3 * plain.norm())
    assert isinstance(then, KeptEps)
    assert then.age == 2  # so the next update is a full one
    torch.testing.assert_close(update(LookSAM(0.1, every=2, alpha=0.3), 2, then)[0], update(STRICT, 2)[0])


@torch.no_grad()
def dense_change(toy: Toy, eps: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far eps moves the layers' weights to first order, from the weights themselves: s (B + eB)(A + eA) - ..."""
    moved = dict(zip(map(id, toy.parameters()), eps, strict=True))
    squares = []
    for layer in (toy.network.inner, toy.network.outer):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        e_a, e_b = moved[id(a)], moved[id(b)]
        change = 2 * ((b + e_b) @ (a + e_a) - b @ a - e_b @ e_a)  # s = alpha / rank = 2
        squares.append(change.square().sum())
    return torch.stack(squares).sum().sqrt()


def test_the_product_norm_is_the_dense_weights_norm():
    toy, source = Toy("v", lora=True), torch.Generator().manual_seed(0)
    eps = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in toy.parameters()]
    layers = lora_layers(toy.network, toy.parameters())
    found = product_norm(layers, toy.parameters(), eps)
    torch.testing.assert_close(found, dense_change(toy, eps), rtol=1e-10, atol=0)
    with torch.no_grad():  # the same layers from other factors: what moves them is measured alike
        for layer in layers:
            for values in (toy.parameters(), eps):
                values[layer.a].mul_(3)
                values[layer.b].div_(3)
    torch.testing.assert_close(product_norm(layers, toy.parameters(), eps), found, rtol=1e-10, atol=0)


@pytest.mark.parametrize("b", [1.0, 0.0], ids=["trained", "new"])  # a new adapter has B = 0
def test_the_product_metric_moves_the_dense_weights_by_its_radius_along_the_factors_gradient(b: float):
    toy = Toy("v", lora=True)
    for layer in lora_layers(toy.network, toy.parameters()):
        toy.parameters()[layer.b].data.mul_(b)

    def gradient(step: Step) -> torch.Tensor:
        for p in toy.parameters():
            p.grad = None
        rollout = DRaFT(k=1, sampling=SAMPLING).rollout(toy, batch_of())
        step([rollout], ImageScore(toy, {"toy": toy_reward}, WeightedSum({"toy": 1.0})), toy.parameters())
        return torch.cat([p.grad.flatten() for p in toy.parameters()])

    plain = gradient(plain_step)
    unit = [p.grad / plain.norm() for p in toy.parameters()]  # of the loss, which is minus the reward
    radius = float(0.1 / dense_change(toy, unit))
    torch.testing.assert_close(
        gradient(ProductMetric(0.1)), gradient(RSAFT(0.0, radius, mode="weight")), rtol=1e-10, atol=1e-13
    )
    assert not torch.allclose(gradient(ProductMetric(0.1)), gradient(STRICT), rtol=1e-6, atol=0)
    assert torch.equal(gradient(ProductMetric(0.0)), plain)


def test_the_product_metric_refuses_a_network_without_an_adapter():
    with pytest.raises(ConfigError, match=r"product: .* 6 of 6 trained tensors are none; train an adapter"):
        lora_layers(Toy("v").network, Toy("v").parameters())


def test_a_random_perturbation_moves_the_weights_by_its_radius_in_another_direction():
    plain, random, strict = (update(s)[0] for s in (plain_step, RandomPerturbation(0.1), STRICT))
    assert not torch.allclose(random, plain)
    assert not torch.allclose(random, strict)


@pytest.mark.parametrize(
    ("scheme", "calls"), [(plain_step, STEPS), (STRICT, 2 * STEPS), (CoarseFirstPass(0.1, 2), STEPS + 2)]
)
def test_a_coarse_first_pass_costs_its_own_steps_alone(scheme: Step, calls: int):
    backbone = TinyFlow(dtype=torch.float64)
    rollout = DRaFT(k=1, sampling=SAMPLING).rollout(backbone, batch_of())
    with count_calls(backbone.network) as counted:
        scheme([rollout], ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0})), backbone.parameters())
    assert counted.total == calls
