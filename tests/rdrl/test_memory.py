"""The memory estimate: its parts against hand counts, its peaks against what real updates allocate."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rsaft.backbones import LoRA
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.config import Model
from rsaft.config.assemble import load_model
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, plain_step
from rsaft.rdrl.allocations import price
from rsaft.rdrl.memory import MemoryEstimate, Planned, estimate_memory
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from rsaft.testbed.toy import toy_reward
from rsaft.types import Batch
from tests.asserts import assert_estimate_is_allocated

PIXELS = 32
RSA_FT = RSAFT(rho=0.01, rho_w=0.01)
PLAN = Planned(
    algorithm=DRaFT(k=1, lv=1, sampling=Sampling(num_steps=2, guidance=3.0)),
    rewards={"toy": toy_reward},
    held_out={},
    step=plain_step,
    prompts=["a cat", "two dogs"],
    config=TrainConfig(batch_size=4, micro_batch=2, eval_batch=2, ema=0.9),
)


@pytest.fixture(scope="module")
def adapter() -> DiffusersBackbone:
    """A tiny SD3 with an adapter."""
    return load_model(Model("tiny:sd3", lora=LoRA(rank=2), resolution=PIXELS), seed=0)


@pytest.fixture(scope="module")
def whole() -> DiffusersBackbone:
    """The same, trained as a whole."""
    return load_model(Model("tiny:sd3", resolution=PIXELS), seed=0)


@pytest.fixture(scope="module")
def estimate(adapter: DiffusersBackbone) -> MemoryEstimate:
    return estimate_memory(adapter, PLAN)


@pytest.fixture(scope="module")
def whole_estimate(whole: DiffusersBackbone) -> MemoryEstimate:
    return estimate_memory(whole, PLAN)


def num_trainable(backbone: DiffusersBackbone) -> int:
    return sum(p.numel() for p in backbone.parameters())


def test_weights_gradients_moments_and_average_are_what_a_hand_counts(
    adapter: DiffusersBackbone, estimate: MemoryEstimate
):
    update, n = estimate.moments["update"], num_trainable(adapter)
    network = adapter.network
    assert update["denoiser: weights"] == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert update["VAE: weights"] == sum(p.nbytes for p in adapter.pipe.vae.parameters())
    assert update["gradients"] == 4 * n
    assert update["EMA"] == 4 * n
    assert update["optimizer"] == pytest.approx(2 * 4 * n, abs=4 * 16)  # and one step counter for each of 16 parts


def test_rsa_ft_adds_epsilon_kept_weights_and_first_gradients(adapter: DiffusersBackbone, estimate: MemoryEstimate):
    flattened = estimate_memory(adapter, replace(PLAN, step=RSA_FT))
    image = 4 * 3 * PIXELS**2
    n, deltas = num_trainable(adapter), 2 * 4 * image  # 2 micro-batches of (1 + lv) * 2 images
    added = flattened.moments["update"]["step"] - estimate.moments["update"]["step"]
    assert 2 * 4 * n + deltas <= added <= 4 * 4 * n + deltas + 4 * image


def test_more_samples_at_once_need_more(adapter: DiffusersBackbone, estimate: MemoryEstimate):
    larger = estimate_memory(adapter, replace(PLAN, config=replace(PLAN.config, micro_batch=4)))
    part = "denoiser: activations"
    assert larger.peak > estimate.peak
    assert larger.moments["update"][part] == pytest.approx(2 * estimate.moments["update"][part], rel=0.02)


@pytest.mark.slow
def test_the_price_of_many_samples_is_affine(adapter: DiffusersBackbone):
    config = replace(PLAN.config, batch_size=8, micro_batch=8)
    scaled = estimate_memory(adapter, replace(PLAN, config=config))  # prices at 2 and 4
    four = estimate_memory(adapter, replace(PLAN, config=replace(config, batch_size=4, micro_batch=4)))
    two = estimate_memory(adapter, replace(PLAN, config=replace(config, batch_size=2, micro_batch=2)))
    assert scaled.peak == pytest.approx(four.peak + 2 * (four.peak - two.peak), rel=0.01)


@pytest.mark.slow
def test_checkpointing_needs_less_in_the_denoiser_and_in_the_decoder(
    adapter: DiffusersBackbone, estimate: MemoryEstimate
):
    def activations(found: MemoryEstimate) -> int:
        return sum(n for part, n in found.moments["update"].items() if "activations" in part or "pass" in part)

    calls = estimate_memory(adapter, replace(PLAN, algorithm=replace(PLAN.algorithm, gradient_checkpointing=True)))
    assert activations(calls) < 0.9 * activations(estimate)
    for module in (adapter.network, adapter.pipe.vae):
        module.enable_gradient_checkpointing()
        blocks = estimate_memory(adapter, PLAN)
        module.disable_gradient_checkpointing()
        assert activations(blocks) < 0.9 * activations(estimate)


def test_the_whole_network_needs_more_than_an_adapter(
    whole: DiffusersBackbone, whole_estimate: MemoryEstimate, estimate: MemoryEstimate
):
    assert whole_estimate.moments["update"]["gradients"] == 4 * num_trainable(whole)
    assert whole_estimate.peak > estimate.peak


def test_a_save_of_the_whole_network_holds_it_twice_and_its_moving_average_beside_it(
    whole: DiffusersBackbone, whole_estimate: MemoryEstimate, estimate: MemoryEstimate
):
    export, n = whole_estimate.moments["export"], num_trainable(whole)
    assert export["export: network reloaded"] == export["denoiser: weights"]
    assert export["export: weights kept"] == export["EMA"] == 4 * n
    assert export["optimizer"] == pytest.approx(2 * 4 * n, abs=4 * 16)
    assert export.get("gradients", 0) == 0
    assert "export" not in estimate.moments  # an adapter's is small
    sharded = estimate_memory(whole, replace(PLAN, config=replace(PLAN.config, shard=True)), world=2)
    assert "export" not in sharded.moments  # there the CPU compares


@pytest.mark.parametrize(("model", "step"), [("adapter", RSA_FT), ("whole", plain_step)], ids=["rsaft", "plain"])
def test_the_estimate_is_what_real_updates_allocate(model: str, step: Any, request: pytest.FixtureRequest):
    backbone: DiffusersBackbone = request.getfixturevalue(model)
    plan = replace(PLAN, step=step, config=replace(PLAN.config, ema=None))
    batches = [Batch(("a cat", "two dogs"), ids, step=0, seed=0) for ids in ((0, 1), (2, 3))]
    assert_estimate_is_allocated(backbone, plan, batches)


@pytest.mark.slow
def test_each_further_micro_batch_of_rsa_ft_adds_its_delta(adapter: DiffusersBackbone):
    plan = replace(PLAN, step=RSA_FT, config=replace(PLAN.config, micro_batch=1))
    three, eight = (
        estimate_memory(adapter, replace(plan, config=replace(plan.config, batch_size=size))).peak for size in (3, 8)
    )
    assert eight - three == pytest.approx(5 * 4 * 2 * 3 * PIXELS**2, rel=0.1)  # of (1 + lv) images, in float32


class Judge(nn.Module):
    """A reward with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * PIXELS**2, 7, bias=False).requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.layer(images.flatten(1)).tanh().sum(1)


def test_the_weights_of_rewards_are_counted_and_code_that_leaves_torch_is_named(adapter: DiffusersBackbone):
    def through_numpy(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.from_numpy(images.detach().numpy()).mean((1, 2, 3))

    found = estimate_memory(adapter, replace(PLAN, rewards={"judge": Judge()}, held_out={"odd": through_numpy}))
    assert found.moments["update"]["rewards: weights"] == 4 * 7 * 3 * PIXELS**2
    assert found.not_traced == ("odd",)


def test_an_estimate_leaves_the_model_as_it_was(whole: DiffusersBackbone):
    before = copy.deepcopy(whole.network.state_dict())
    estimate_memory(whole, PLAN)
    assert all(p.grad is None for p in whole.parameters())
    assert all(torch.equal(before[name], value) for name, value in whole.network.state_dict().items())
    assert all(p.device.type == "cpu" for p in whole.parameters())


def test_a_price_is_what_autograd_keeps():
    weight = torch.randn(3, 5)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    cost = price(lambda x: (x @ weight).exp(), (4, 3), torch.float32, torch.device("cpu"), True, fake)
    assert (cost.shape, cost.has_gradient, cost.outside) == ((4, 5), True, 4 * 15)
    assert cost.kept == 0  # exp keeps its own result, and the product with a constant nothing but the constant
    assert cost.forward == 4 * 20  # the product, until exp is done
    assert cost.backward == 4 * 20 + 4 * 12  # gradients of product and argument
