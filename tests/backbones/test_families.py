"""Every family keeps the laws of a rollout, and its adapters lie where its attention is."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum
from rsaft.sampling import Sampling
from rsaft.testbed.tiny import TINY_FAMILIES
from tests import asserts
from tests.helpers import PROMPTS, batch_of, count_calls, randomize_, relative_difference, toy_reward

T = 3


def _sampling(family):
    return Sampling(T, guidance=1.0 if family == "schnell" else 3.0)


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(tiny_of, family):
    backbone = load_backbone(tiny_of(family), lora=LoRA(rank=2, alpha=4), dtype="fp64")
    randomize_(backbone.parameters())
    return backbone


@pytest.fixture
def algorithm(family):
    return DRaFT(k=2, sampling=_sampling(family))


class TestLaws:
    def test_a_tail_called_twice_gives_the_same_bits(self, algorithm, backbone):
        asserts.assert_tail_is_pure(algorithm.rollout(backbone, batch_of()), backbone)

    def test_selected_rows_are_rows_of_the_whole(self, algorithm, backbone):
        asserts.assert_select_gives_rows(algorithm.rollout(backbone, batch_of(PROMPTS)), [3, 1])

    def test_the_split_of_the_batch_is_irrelevant(self, algorithm, backbone):
        asserts.assert_split_is_irrelevant(algorithm, backbone, batch_of(PROMPTS[:3]))

    def test_it_trains_and_leaves_the_weights_alone(self, algorithm, backbone):
        score = ImageScore(backbone, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
        asserts.assert_trains(algorithm, backbone, batch_of(), score)


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "vae_checkpointing", "vae_slicing"])
def test_switches_that_save_memory_change_no_gradient(tiny_of, family, setting):
    algorithm = DRaFT(k=2, sampling=_sampling(family))
    gradients, calls = [], []
    for value in (False, True):
        backbone = load_backbone(tiny_of(family), **{setting: value})
        block = backbone.pipe.vae.decoder.mid_block if setting != "gradient_checkpointing" else _block(backbone.network)
        rollout = algorithm.rollout(backbone, batch_of())
        with count_calls(block) as counted:
            sample = rollout.tail(rollout.prefix())
            gradients.append(asserts.reward_gradient(backbone, sample))
        calls.append(counted.total)
    # Two samples are decoded one by one, or a block with gradient runs once more in the backward pass.
    with_gradient = {"gradient_checkpointing": 2, "vae_checkpointing": 1, "vae_slicing": 1}[setting]
    assert calls[1] == calls[0] + with_gradient
    assert relative_difference(*reversed(gradients)) <= 1e-5


def _block(network):
    """A part that is recomputed as a whole."""
    unet = any(name == "mid_block" for name, _ in network.named_children())
    return network.get_submodule("mid_block.resnets.1" if unet else "transformer_blocks.0")


def test_tiles_are_another_image_of_the_same_size(tiny_of):
    plain, tiled = (load_backbone(tiny_of("sd"), resolution=64, vae_tiling=flag) for flag in (False, True))
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert plain.decode(latents).shape == tiled.decode(latents).shape
    assert (plain.decode(latents) - tiled.decode(latents)).abs().max() > 0


def _adapted(network):
    return {name.removesuffix(".lora_A") for name, _ in network.named_modules() if name.endswith(".lora_A")}


def test_adapters_lie_on_all_of_attentions_projections_and_nothing_else(tiny_of, family):
    plain = load_backbone(tiny_of(family)).network
    expected = {
        f"{name}.{inner}"
        for name, module in plain.named_modules()
        if isinstance(module, Attention | FluxAttention)
        for inner, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    assert _adapted(load_backbone(tiny_of(family), lora=LoRA(rank=2)).network) == expected


def test_every_adapter_gets_a_gradient_but_for_one_whose_output_sd3_drops(tiny_of, family):
    backbone = load_backbone(tiny_of(family), lora=LoRA(rank=2))
    rollout = DRaFT(k=1, sampling=_sampling(family)).rollout(backbone, batch_of())
    sample = rollout.tail(rollout.prefix())
    value = toy_reward(backbone.decode(sample.latents), sample.prompts).sum()
    factors = {name: p for name, p in backbone.network.named_parameters() if "lora_B" in name}
    gradients = torch.autograd.grad(value, list(factors.values()))
    dead = [name for name, g in zip(factors, gradients, strict=True) if g.norm() == 0]
    # SD3's last block computes the text's queries, and drops what they attend to.
    last = ["transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"]
    assert dead == (last if family in ("sd3", "sd35") else [])


@pytest.mark.parametrize("name", ["ff.net.2", "to_q"])
def test_targets_can_be_chosen(tiny_of, family, name):
    adapted = _adapted(load_backbone(tiny_of(family), lora=LoRA(rank=2, targets=(name,))).network)
    assert adapted
    assert all(layer.endswith(name) for layer in adapted)


def test_a_target_that_matches_no_layer_is_refused_beside_one_that_does(tiny_of, family):
    with pytest.raises(ConfigError, match=r"no linear layer ends in one of \['to_z'\]; .*'to_k'") as error:
        load_backbone(tiny_of(family), lora=LoRA(targets=("to_q", "to_z")))
    assert "\n" not in str(error.value)


def test_the_settings_of_the_adapter_name_its_layers(tiny_of):
    assert load_backbone(tiny_of("sd"), lora=LoRA()).lora.targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert "add_q_proj" in load_backbone(tiny_of("sd3"), lora=LoRA()).lora.targets
