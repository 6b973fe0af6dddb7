"""DRTune: two backends with one gradient, memory flat in K, its steps. The laws are in test_trainers.py."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRTune, ImageScore, WeightedSum
from rsaft.sampling import Sampling, initial_noise, ode
from rsaft.schedules import Schedule
from rsaft.types import Batch
from tests import asserts
from tests.helpers import PROMPTS, batch_of, gradient_of, randomize_, relative_difference, toy_reward
from tests.rdrl.toy import Toy

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


class Ledger:
    """Bytes of tensors that autograd holds at a time: those that it saved and has not let go of, each storage once."""

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}  # address -> [bytes, holders]
        self.peak = 0

    def pack(self, tensor: Tensor) -> Held:
        storage = tensor.untyped_storage()
        self.held.setdefault(storage.data_ptr(), [storage.nbytes(), 0])[1] += 1
        self.peak = max(self.peak, sum(size for size, _ in self.held.values()))
        return Held(tensor, self)

    def drop(self, tensor: Tensor) -> None:
        entry = self.held[tensor.untyped_storage().data_ptr()]
        entry[1] -= 1
        if not entry[1]:
            del self.held[tensor.untyped_storage().data_ptr()]


class Held:
    """A saved tensor that tells its ledger when it is let go of."""

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        self.tensor, self.ledger = tensor, ledger

    def __del__(self) -> None:
        self.ledger.drop(self.tensor)


def _peak_bytes(backbone: Any, algorithm: DRTune) -> int:
    """Of forward and backward pass through trajectory, decoder and reward."""
    ledger = Ledger()
    rollout = algorithm.rollout(backbone, batch_of())
    prefix = rollout.prefix()
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda held: held.tensor):
        sample = rollout.tail(prefix)
        gradient = asserts.reward_gradient(backbone, sample)
    assert gradient.abs().max() > 0
    return ledger.peak


def test_peak_memory_is_flat_in_the_number_of_training_steps(tiny_sd):
    backbone = _real(str(tiny_sd), "fp32")
    one, eight = (_backends(k, 0, Sampling(8, guidance=3.0)) for k in (1, 8))
    assert _peak_bytes(backbone, eight[0]) <= 1.05 * _peak_bytes(backbone, one[0])
    assert _peak_bytes(backbone, eight[1]) >= 4 * _peak_bytes(backbone, one[1])  # the ledger sees the graph's growth


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


def test_by_default_it_stops_in_the_last_two_fifths_but_never_before_k_steps():
    assert DRTune().last == 20
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
