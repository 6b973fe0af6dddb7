"""DRTune: two backends with one gradient, memory flat in K, its steps. The laws are in test_trainers.py."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRTune, ImageScore, WeightedSum
from rsaft.rdrl.allocations import Allocations
from rsaft.sampling import Sampling, initial_noise, ode
from rsaft.schedules import Schedule
from rsaft.types import Batch
from tests import asserts
from tests.helpers import PROMPTS, batch_of, gradient_of, randomize_, relative_difference, toy_reward
from tests.rdrl.toy import Network, Toy

KINDS = ("eps", "v", "flow")
CASES = [(4, 1, None), (4, 2, 2), (6, 3, 2), (6, 6, 0), (5, 5, 1), (9, 4, 6)]  # T, K, m


@lru_cache
def _real(folder: str, dtype: str = "fp64") -> Any:
    backbone = load_backbone(folder, lora=LoRA(rank=2, alpha=4), dtype=dtype)
    randomize_(backbone.parameters())
    return backbone


def _backends(k: int, early_stop: int | None, sampling: Sampling) -> tuple[DRTune, DRTune]:
    vjp = DRTune(k=k, early_stop=early_stop, sampling=sampling)
    return vjp, replace(vjp, backend="graph")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "k", "m"), CASES)
def test_the_backends_agree_in_values_and_gradient(kind, T, k, m):
    toy = Toy(kind)
    for step in range(3):
        batch = batch_of(step=step)
        vjp, graph = (a.rollout(toy, batch) for a in _backends(k, m, Sampling(T, guidance=2.0)))
        a, b = vjp.tail(vjp.prefix()), graph.tail(graph.prefix())
        asserts.assert_same_sample(a, b)
        gradients = [asserts.reward_gradient(toy, sample) for sample in (a, b)]
        assert gradients[1].abs().max() > 1e-6
        assert relative_difference(*gradients) <= 1e-12


def test_the_backends_agree_on_a_real_network(tiny_sd_v):
    backbone = _real(str(tiny_sd_v))
    rollouts = [a.rollout(backbone, batch_of()) for a in _backends(3, 2, Sampling(6, guidance=3.0))]
    asserts.assert_same_gradient(*rollouts, backbone, tolerance=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_gives_the_gradients_of_images_and_parameters(kind):
    toy, found = Toy(kind, lora=True), []
    for algorithm in _backends(2, 2, Sampling(4, guidance=2.0)):
        rollout = algorithm.rollout(toy, batch_of())
        sample = rollout.tail(rollout.prefix())
        view = toy.decode(sample.latents)
        found.append(gradient_of(toy_reward(view, sample.prompts).sum(), [view, *toy.parameters()]))
    assert relative_difference(*found) <= 1e-12


@pytest.mark.parametrize("reuse", ["resample", "cached"])
def test_the_backends_agree_under_rsa_ft(reuse):
    toy, found = Toy("v"), []
    score = ImageScore(toy, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
    for algorithm in _backends(2, 2, Sampling(4, guidance=2.0)):
        RSAFT(0.2, 0.1, reuse=reuse)([algorithm.rollout(toy, batch_of())], score, toy.parameters())
        found.append(torch.cat([p.grad.flatten() for p in toy.parameters()]))
        for p in toy.parameters():
            p.grad = None
    assert relative_difference(*found) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["vjp", "graph"])
def test_without_early_stop_it_samples_the_deterministic_trajectory(kind, backend):
    toy, batch = Toy(kind), batch_of()
    rollout = DRTune(k=2, early_stop=0, backend=backend, sampling=Sampling(6, guidance=2.0)).rollout(toy, batch)
    denoise = toy.denoiser(batch.prompts, guidance=2.0, detach_unconditional=False)
    x_T = initial_noise(toy, seed=0, purpose="rollout", step=0, sample_ids=batch.sample_ids)
    with torch.no_grad():
        expected = ode(denoise, toy.schedule(6), x_T, start=0, stop=6)
    assert relative_difference(rollout.tail(rollout.prefix()).latents, expected) <= 1e-12


@pytest.mark.parametrize("early_stop", [0, 2])
def test_adding_1_to_a_training_steps_output_adds_c_to_the_result(early_stop, monkeypatch):
    rollout = DRTune(k=3, early_stop=early_stop, sampling=Sampling(5, guidance=1.0)).rollout(Toy("eps"), batch_of())
    x, outputs, u = rollout.prefix().x, {}, rollout.u

    def recorded(x: Tensor, i: int) -> Tensor:
        outputs[i] = u(x, i)
        return outputs[i]

    with torch.no_grad():
        monkeypatch.setattr(rollout, "u", recorded)
        plain, _ = rollout.sweep(x)
        for step in rollout.train:
            monkeypatch.setattr(rollout, "u", lambda x, i, step=step: outputs[i] + (i == step))
            shifted, _ = rollout.sweep(x)
            torch.testing.assert_close(shifted, plain + rollout.c(step), rtol=0, atol=1e-10)


def _peak_bytes(backbone: Any, algorithm: DRTune) -> int:
    """Of everything that is allocated for the last steps, decoder and reward, and their gradients."""
    rollout = algorithm.rollout(backbone, batch_of())
    prefix, params = rollout.prefix(), backbone.parameters()
    with Allocations() as allocations:
        sample = rollout.tail(prefix)
        toy_reward(backbone.decode(sample.latents), sample.prompts).sum().backward()
    assert max(float(p.grad.abs().max()) for p in params if p.grad is not None) > 0
    for p in params:
        p.grad = None
    return sum(allocations.peak.values())


def test_peak_memory_is_flat_in_the_number_of_training_steps(tiny_sd):
    backbone = _real(str(tiny_sd), "fp32")
    (vjp, _), (_, graph), (eight, _) = (_backends(k, 0, Sampling(8, guidance=3.0)) for k in (1, 2, 8))
    one = _peak_bytes(backbone, vjp)
    assert _peak_bytes(backbone, eight) <= 1.05 * one
    assert _peak_bytes(backbone, graph) >= 2 * one


def _all_weights(folder: str) -> Any:
    """A tiny network that is mostly weights: 0.9 M of them, and activations of a tenth of their size."""
    toy = Toy("eps", dtype=torch.float32)
    toy.network = Network(size=2 * 3 * 3, width=20_000)
    return toy


@pytest.mark.parametrize("load", [partial(load_backbone, dtype="fp32"), _all_weights], ids=["sd", "all weights"])
def test_a_whole_network_adds_at_most_one_set_of_gradients_whatever_the_number_of_training_steps(tiny_sd, load):
    backbone = load(str(tiny_sd))
    one, two, four = (_peak_bytes(backbone, _backends(k, 0, Sampling(4, guidance=3.0))[0]) for k in (1, 2, 4))
    gradients = sum(p.nbytes for p in backbone.parameters())
    assert two - one <= 1.01 * gradients  # the sum is alive during the second call
    assert four - two <= 0.01 * two  # the latents at which the network is called again


def test_a_parameters_hooks_see_its_whole_gradient_once():
    toy = Toy("v")
    p, seen = toy.parameters()[0], []
    p.register_hook(lambda g: seen.append(g.clone()))
    p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    rollout = _backends(3, 2, Sampling(6, guidance=2.0))[0].rollout(toy, batch_of())
    sample = rollout.tail(rollout.prefix())
    toy_reward(toy.decode(sample.latents), sample.prompts).sum().backward()
    assert len(seen) == 2
    assert all(torch.equal(g, p.grad) for g in seen)


def test_the_backends_agree_in_fp16(tiny_sd):
    backbone, found = _real(str(tiny_sd), "fp16"), []
    for algorithm in _backends(2, 0, Sampling(4, guidance=3.0)):
        rollout = algorithm.rollout(backbone, batch_of())
        found.append(asserts.reward_gradient(backbone, rollout.tail(rollout.prefix())))
    assert relative_difference(*found) <= 1e-3  # sums of fp16 gradients, in another order


def test_products_leave_grad_and_hooks_of_the_parameters_alone_also_when_one_fails(monkeypatch):
    toy = Toy("v")
    params = toy.parameters()
    for p in params:
        p.grad = torch.ones_like(p)
        p.register_hook(lambda g: None)
        p.register_post_accumulate_grad_hook(lambda p: None)

    def state() -> list[Any]:
        return [[p.grad, p._backward_hooks, p._post_accumulate_grad_hooks] for p in params]

    def unchanged() -> bool:
        same = all(a is b for old, new in zip(before, state(), strict=True) for a, b in zip(old, new, strict=True))
        return same and all(torch.equal(p.grad, torch.ones_like(p)) for p in params)

    before = state()
    rollout = _backends(3, 2, Sampling(6, guidance=2.0))[0].rollout(toy, batch_of())
    asserts.reward_gradient(toy, rollout.tail(rollout.prefix()))
    assert unchanged()
    sample, u, left = rollout.tail(rollout.prefix()), rollout.u, [1]

    def fails_at_the_second_call(x: Tensor, i: int) -> Tensor:
        if not left:
            raise RuntimeError("the network failed")
        left.pop()
        return u(x, i)

    monkeypatch.setattr(rollout, "u", fails_at_the_second_call)
    with pytest.raises(RuntimeError, match="the network failed"):
        asserts.reward_gradient(toy, sample)
    assert unchanged()


@pytest.mark.parametrize(("T", "k", "m"), [*CASES, (50, 5, 20), (25, 3, 10), (50, 7, None)])
def test_training_steps_are_equally_spaced_in_the_executed_ones(T, k, m):
    algorithm, toy = DRTune(k=k, early_stop=m, sampling=Sampling(T, guidance=1.0)), Toy("flow")
    rollouts = [algorithm.rollout(toy, Batch(("a",), (0,), step, 0)) for step in range(100)]
    for rollout in rollouts:
        assert len(rollout.train) == k
        assert rollout.train.step == rollout.num_steps // k
        assert rollout.train[0] >= 0
        assert rollout.train[-1] < rollout.num_steps
    stops = {rollout.num_steps - 1 for rollout in rollouts}
    assert stops <= set(range(T - max(algorithm.last, 1), T))
    if m == 0:
        assert stops == {T - 1}


def test_every_stop_and_every_offset_is_drawn():
    algorithm, toy = DRTune(k=2, early_stop=3, sampling=Sampling(7, guidance=1.0)), Toy("flow")
    drawn = {
        (r.num_steps, tuple(r.train))
        for r in (algorithm.rollout(toy, Batch(("a",), (0,), step, 0)) for step in range(400))
    }
    assert drawn == {
        *((7, (i, i + 3)) for i in range(4)),
        *((6, (i, i + 3)) for i in range(3)),
        *((5, (i, i + 2)) for i in range(3)),
    }


def test_all_samples_of_an_update_have_the_same_steps():
    toy, algorithm = Toy("eps"), DRTune(k=2, sampling=Sampling(8, guidance=1.0))
    for step in range(5):
        rollouts = [algorithm.rollout(toy, batch_of([p], step=step, first_id=i)) for i, p in enumerate(PROMPTS)]
        assert len({(r.num_steps, r.train) for r in rollouts}) == 1


def test_the_defaults_are_the_second_hand_settings():
    # K = 5 training steps, a stop at one of the last m = 20 of 50 steps.
    algorithm, toy = DRTune(), Toy("flow")
    assert (algorithm.k, algorithm.last, algorithm.sampling.num_steps) == (5, 20, 50)
    rollouts = [algorithm.rollout(toy, Batch(("a",), (0,), step, 0)) for step in range(150)]
    assert {len(rollout.train) for rollout in rollouts} == {5}
    assert {rollout.num_steps - 1 for rollout in rollouts} == set(range(30, 50))


def test_by_default_it_stops_in_the_last_two_fifths_but_never_before_k_steps():
    assert DRTune(k=3, sampling=Sampling(25)).last == 10
    assert DRTune(k=5, sampling=Sampling(6)).last == 2
    assert DRTune(k=5, sampling=Sampling(5)).last == 1


class ZeroTerminal(Toy):
    """Pure noise at the first step: alpha = 0."""

    def schedule(self, num_steps):
        return Schedule((0.0, 0.6, 1.0), (1.0, 0.8, 0.0), (999.0, 500.0), "v")


def test_a_schedule_that_it_cannot_divide_by_is_refused():
    with pytest.raises(ConfigError, match="divides by alpha, which is 0 at this model's first step"):
        DRTune(k=1, sampling=Sampling(2)).rollout(ZeroTerminal("v"), batch_of())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 51}, r"algorithm\.k: .*of 50 sampling steps, so 1 <= k <= 50; got 51\."),
        ({"k": 0}, r"got 0\."),
        ({"early_stop": 47}, r"algorithm\.early_stop: .*makes k = 5 steps, so 0 <= early_stop <= 46; got 47\."),
        ({"early_stop": -1}, r"got -1\."),
        ({"gradient_checkpointing": True}, r"algorithm\.gradient_checkpointing: backend 'vjp' recomputes every"),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        DRTune(**settings)
