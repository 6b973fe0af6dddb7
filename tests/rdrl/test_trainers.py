"""What holds for every pathwise trainer: the law of a rollout, the reference's gradient, the stated cost, RSA-FT.

On a toy of one hidden layer with real noise levels and real adapters, eps, v and flow, adapters and the whole network;
the two that matter most also on real tiny networks. Float64.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig

from rsaft import distributed
from rsaft.backbones import LoRA, load_backbone
from rsaft.config import to_dict, validate
from rsaft.flatten import RSAFT
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ImageScore, ReFL, WeightedSum, plain_step
from rsaft.types import Algorithm, Batch, Rollout
from tests import asserts
from tests.helpers import (
    PROMPTS,
    Counting,
    TinyFlow,
    batch_of,
    count_calls,
    gradient_of,
    randomize_,
    relative_difference,
    toy_reward,
)
from tests.rdrl.toy import Toy
from tests.rdrl.trainers import TRAINERS, T, reference_images
from tests.reference.rsa_ft import rsa_ft_gradient

KINDS = ("eps", "v", "flow")
WEIGHTS = ("lora", "full")
STEPS = range(2)  # updates, each with draws of its own

TOYS = [f"{kind}-{weights}" for kind in KINDS for weights in WEIGHTS]

every_trainer = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(params=TOYS)
def toy(request):
    """A toy of each kind, with adapters and without; its parameters have no `.grad`."""
    return _toy(request.param)


@pytest.fixture(params=["eps-full", "v-lora", "flow-full"])
def kind(request):
    """A toy of each kind, for what cannot depend on which weights are trained."""
    return _toy(request.param)


@lru_cache
def _made(name: str) -> Toy:
    kind, weights = name.split("-")
    return Toy(kind, lora=weights == "lora")


def _toy(name: str = "v-lora") -> Toy:
    return _without_grad(_made(name))


def _without_grad(backbone: Any) -> Any:
    for p in backbone.parameters():
        p.grad = None
    return backbone


@lru_cache
def _real(kind: str, weights: str, folder: str | None) -> Any:
    """A tiny real network, every trainable value non-zero."""
    if kind == "flow":
        backbone = TinyFlow(dtype=torch.float64)
        if weights == "lora":
            backbone.network.requires_grad_(False)
            backbone.network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
            backbone.network.double().eval()
    else:
        backbone = load_backbone(folder, lora=LoRA(rank=2, alpha=4) if weights == "lora" else None, dtype="fp64")
    if weights == "lora":
        randomize_(backbone.parameters())
    return backbone


@pytest.fixture(params=[(kind, weights) for kind in KINDS for weights in WEIGHTS], ids="-".join)
def real(request, tiny_sd, tiny_sd_v):
    kind, weights = request.param
    return kind, _without_grad(_real(kind, weights, {"eps": str(tiny_sd), "v": str(tiny_sd_v), "flow": None}[kind]))


def _score(backbone: Any, reward: Any = toy_reward) -> ImageScore:
    return ImageScore(backbone, {"toy": reward}, WeightedSum({"toy": 1.0}))


def _gradient(step: Any, backbone: Any, rollouts: list[Rollout], reward: Any = toy_reward) -> torch.Tensor:
    """What a step leaves in `.grad`, flat."""
    step(rollouts, _score(backbone, reward), backbone.parameters())
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in backbone.parameters()]
    _without_grad(backbone)
    return torch.cat([g.flatten() for g in found])


def _reference_gradient(backbone: Any, kind: str, algorithm: Algorithm, batch: Batch, **options: Any) -> torch.Tensor:
    """Of minus the mean reward, by the trainer's reference."""
    theta = [p.detach().clone().requires_grad_() for p in backbone.parameters()]
    images = reference_images(backbone, kind, algorithm, batch, **options)(theta)
    return gradient_of(-toy_reward(images, batch.prompts * (len(images) // len(batch.prompts))).mean(), theta)


@every_trainer
def test_gradient_equals_the_references(name, toy):
    for step in STEPS:
        algorithm, batch = TRAINERS[name], batch_of(step=step, seed=1)
        ours = _gradient(plain_step, toy, [algorithm.rollout(toy, batch)])
        theirs = _reference_gradient(toy, toy.kind, algorithm, batch)
        assert theirs.abs().max() > 1e-6
        assert relative_difference(ours, theirs) <= 1e-10


@pytest.mark.parametrize("name", ["refl", "alignprop", "drtune-vjp"])  # DRaFT: test_draft.py
def test_gradient_equals_the_references_on_real_networks(name, real):
    (kind, backbone), algorithm, batch = real, TRAINERS[name], batch_of(step=1, seed=1)
    ours = _gradient(plain_step, backbone, [algorithm.rollout(backbone, batch)])
    theirs = _reference_gradient(backbone, kind, algorithm, batch)
    assert theirs.abs().max() > 1e-7
    assert relative_difference(ours, theirs) <= 1e-9


@every_trainer
def test_a_detached_unconditional_branch_has_no_gradient(name, kind):
    batch = batch_of(step=1, seed=1)
    sampling = replace(TRAINERS[name].sampling, detach_unconditional=True)
    algorithm = replace(TRAINERS[name], sampling=sampling)
    ours = _gradient(plain_step, kind, [algorithm.rollout(kind, batch)])
    theirs = _reference_gradient(kind, kind.kind, algorithm, batch, detach_unconditional=True)
    whole = _gradient(plain_step, kind, [TRAINERS[name].rollout(kind, batch)])
    assert relative_difference(ours, theirs) <= 1e-10
    assert relative_difference(ours, whole) > 1e-3


@every_trainer
def test_a_tail_called_twice_gives_the_same_bits(name, toy):
    asserts.assert_tail_is_pure(TRAINERS[name].rollout(toy, batch_of()), toy)


@pytest.mark.parametrize("name", ["refl", "alignprop", "drtune-vjp"])
def test_a_tail_called_twice_gives_the_same_bits_on_real_networks(name, tiny_sd):
    backbone = _real("eps", "lora", str(tiny_sd))
    asserts.assert_tail_is_pure(TRAINERS[name].rollout(backbone, batch_of()), backbone)


@every_trainer
def test_a_rollout_is_fixed_by_its_batch(name, kind):
    asserts.assert_fixed_by_the_batch(TRAINERS[name], kind, batch_of())
    asserts.assert_another_step_is_another_draw(TRAINERS[name], kind, batch_of())


@every_trainer
def test_samples_depend_on_their_ids_alone(name, toy):
    batch = batch_of(PROMPTS[:3])
    asserts.assert_select_gives_rows(TRAINERS[name].rollout(toy, batch), [2, 1])
    asserts.assert_batch_order_is_irrelevant(TRAINERS[name], toy, batch, [2, 0])
    asserts.assert_split_is_irrelevant(TRAINERS[name], toy, batch)


@every_trainer
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, kind):
    algorithm, batch = TRAINERS[name], batch_of(PROMPTS, step=2)
    whole, parts = (
        _gradient(plain_step, kind, [algorithm.rollout(kind, batch.select(rows)) for rows in split])
        for split in ([[0, 1, 2, 3]], [[2, 3], [0, 1]])
    )
    assert relative_difference(parts, whole) <= asserts.TOLERANCE


@every_trainer
def test_a_stopped_prefix_goes_on_to_the_same_state(name, kind):
    for step in STEPS:
        asserts.assert_prefix_resumes(TRAINERS[name].rollout(kind, batch_of(step=step)))


@every_trainer
def test_an_unfinished_prefix_adds_no_step_with_gradient(name, kind):
    for step in STEPS:
        rollout = TRAINERS[name].rollout(kind, batch_of(step=step))
        whole, early = rollout.tail(rollout.prefix()), rollout.tail(rollout.prefix(stop=0))
        assert torch.equal(asserts.reward_gradient(kind, early), asserts.reward_gradient(kind, whole))


@every_trainer
def test_the_prefix_builds_no_graph(name, kind):
    asserts.assert_prefix_has_no_gradient(TRAINERS[name].rollout(kind, batch_of()), kind.network)


def _stated_calls(algorithm: Any, rollout: Any) -> dict[str, int]:
    """The cost table of the trainer's docstring: network calls of prefix, tail and backward pass."""
    again = algorithm.gradient_checkpointing
    match algorithm:
        case ReFL():
            return {"prefix": rollout.stop, "tail": 1, "recomputed": int(again)}
        case DRaFT(k=k, lv=lv):
            return {"prefix": T - k, "tail": k + lv, "recomputed": again * (k + lv)}
        case AlignProp():
            k = T - rollout.first
            return {"prefix": T - k, "tail": k, "recomputed": again * k}
        case DRTune(k=k):
            prefix, tail = rollout.train[0], rollout.num_steps - rollout.train[0]
            if algorithm.backend == "vjp":
                return {"prefix": prefix, "tail": 0, "without": tail, "recomputed": k}
            return {"prefix": prefix, "tail": k, "without": tail - k, "recomputed": again * k}
    raise AssertionError(algorithm)


def _with_checkpointing(algorithm: Any, flag: bool) -> Any:
    return replace(algorithm, gradient_checkpointing=flag)


CHECKPOINTED = [name for name in TRAINERS if name != "drtune-vjp"]


@every_trainer
def test_only_the_planned_steps_carry_gradient_at_the_stated_cost(name, toy):
    algorithms = [TRAINERS[name]]
    if name in CHECKPOINTED:
        algorithms.append(_with_checkpointing(TRAINERS[name], not TRAINERS[name].gradient_checkpointing))
    for algorithm in algorithms:
        for step in STEPS:
            rollout = algorithm.rollout(toy, batch_of(step=step))
            asserts.assert_calls(rollout, toy, toy.network, **_stated_calls(algorithm, rollout))


@every_trainer
def test_a_micro_batch_costs_one_decode_and_one_reward_call(name):
    toy, reward = _toy(), Counting()
    rollouts = [TRAINERS[name].rollout(toy, batch_of(first_id=i)) for i in (0, 2)]
    with count_calls(toy.decoder) as decodes:
        plain_step(rollouts, _score(toy, reward), toy.parameters())
    copies = 3 if name == "draft-lv" else 1
    assert decodes.rows == [2 * copies] * 2
    assert (reward.calls, reward.images) == (2, 4 * copies)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_changes_no_bit(name, toy):
    plain, again = (_with_checkpointing(TRAINERS[name], flag).rollout(toy, batch_of(step=2)) for flag in (False, True))
    asserts.assert_same_gradient(plain, again, toy)


@every_trainer
def test_rsa_ft_equals_the_paper_literal_algorithm(name, toy):
    algorithm, batch = TRAINERS[name], batch_of(step=1, seed=1)
    images = reference_images(toy, toy.kind, algorithm, batch)

    def reward(x: torch.Tensor) -> torch.Tensor:
        return toy_reward(x, batch.prompts * (len(x) // len(batch.prompts)))

    ours = _gradient(RSAFT(0.2, 0.1), toy, [algorithm.rollout(toy, batch)])
    theirs = torch.cat([g.flatten() for g in rsa_ft_gradient(images, reward, toy.parameters(), rho=0.2, rho_w=0.1)])
    assert relative_difference(ours, theirs) <= 1e-9
    assert relative_difference(ours, _gradient(plain_step, toy, [algorithm.rollout(toy, batch)])) > 1e-6


@every_trainer
def test_rsa_ft_with_radius_zero_is_the_plain_step_bit_for_bit(name, toy):
    rollouts = [TRAINERS[name].rollout(toy, batch_of(step=1))]
    plain = _gradient(plain_step, toy, rollouts)
    for mode, reuse in [("input", "resample"), ("both", "resample"), ("weight", 2 if toy.kind == "v" else "cached")]:
        assert torch.equal(_gradient(RSAFT(0.0, 0.0, mode=mode, reuse=reuse), toy, rollouts), plain)


def _rank(rank: int, world: int, folder: str) -> None:
    """One process: its half of the batch with every trainer on every toy, gradients averaged; the first writes them."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    ids = range(4)[rank * 4 // world : (rank + 1) * 4 // world]
    batch, found = batch_of(PROMPTS, step=1).select(ids), {}
    for (name, algorithm), which in product(TRAINERS.items(), TOYS):
        toy = _toy(which)
        gradient = [_gradient(RSAFT(0.2, 0.1), toy, [algorithm.rollout(toy, batch)])]
        distributed.sum_(gradient)
        found[name, which] = gradient[0] / world
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """The gradients of RSA-FT, by trainer and toy, that two processes find together."""
    folder = str(tmp_path_factory.mktemp("two"))
    processes = [get_context("fork").Process(target=_rank, args=(rank, 2, folder), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    return torch.load(f"{folder}/gradients.pt")


@every_trainer
@pytest.mark.parametrize("which", TOYS)
def test_two_processes_give_the_gradient_of_one(name, which, of_two_processes):
    toy = _toy(which)
    one = _gradient(RSAFT(0.2, 0.1), toy, [TRAINERS[name].rollout(toy, batch_of(PROMPTS, step=1))])
    assert relative_difference(of_two_processes[name, which], one) <= asserts.TOLERANCE


class FailsAtCall:
    """A reward that raises at its n-th call."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, images, prompts):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the reward failed")
        return toy_reward(images, prompts)


@every_trainer
def test_rsa_ft_restores_the_weights_bit_for_bit_also_after_an_exception(name, toy):
    before = [p.detach().clone() for p in toy.parameters()]
    rollouts = [TRAINERS[name].rollout(toy, batch_of())]
    _gradient(RSAFT(0.2, 0.1), toy, rollouts)
    assert all(torch.equal(p, old) for p, old in zip(toy.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="the reward failed"):
        _gradient(RSAFT(0.2, 0.1), toy, rollouts, reward=FailsAtCall(2))  # inside theta + eps
    assert all(torch.equal(p, old) for p, old in zip(toy.parameters(), before, strict=True))


@every_trainer
def test_weights_changed_before_the_backward_pass_are_an_error(name):
    toy = Toy("eps")
    rollout = TRAINERS[name].rollout(toy, batch_of())
    if TRAINERS[name].gradient_checkpointing:
        rollout = _with_checkpointing(TRAINERS[name], False).rollout(toy, batch_of())  # it would recompute with them
    sample = rollout.tail(rollout.prefix())
    with torch.no_grad():
        for p in toy.parameters():
            p.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        asserts.reward_gradient(toy, sample)


@every_trainer
def test_it_trains_and_leaves_the_weights_alone(name):
    asserts.assert_trains(TRAINERS[name], _toy(), batch_of(), _score(_toy()))


@every_trainer
def test_float32_latents_stay_float32(name):
    toy = Toy("v", dtype=torch.float32)
    rollout = TRAINERS[name].rollout(toy, batch_of())
    assert rollout.tail(rollout.prefix()).latents.dtype == torch.float32


@every_trainer
def test_a_trainers_settings_are_a_frozen_dataclass_with_defaults(name):
    kind = type(TRAINERS[name])
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    assert {"sampling", "gradient_checkpointing"} <= {f.name for f in fields(kind)}


@every_trainer
def test_a_trainer_is_named_in_yaml_and_resolved_settings_give_it_back(name):
    algorithm = {"type": name.split("-")[0], **asdict(TRAINERS[name])}
    config = {
        "model": {"path": "testbed:fashion"},
        "prompts": {"train": "testbed:fashion"},
        "algorithm": algorithm,
        "rewards": {"proxy": {"type": "testbed", "world": "fashion"}},
        "objective": {"type": "hinge", "weights": {"proxy": 1.0}, "margin": 2.0, "scale": 1e-3},
    }
    found = validate(config)
    assert found.algorithm == TRAINERS[name]
    assert to_dict(found)["algorithm"] == algorithm
