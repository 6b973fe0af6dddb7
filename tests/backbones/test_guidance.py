"""Guidance: two branches, or an input of the network; and what the network is told."""

from __future__ import annotations

import pytest
import torch

import rsaft
from rsaft.backbones import LoRA, load_backbone
from rsaft.backbones.flux import pack, positions, unpack
from rsaft.errors import ConfigError
from rsaft.sampling import Sampling, initial_noise
from tests.helpers import PROMPTS, count_calls, gradient_of, randomize_, relative_difference


@pytest.fixture(scope="module")
def float64(tiny_sd):
    backbone = load_backbone(tiny_sd, lora=LoRA(rank=2, alpha=4), dtype="fp64")
    randomize_(backbone.parameters())
    return backbone


def _at(backbone):
    x = initial_noise(backbone, seed=0, purpose="x", step=0, sample_ids=[0, 1])
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return x, weight


def test_guidance_is_uncond_plus_w_times_the_difference(float64):
    x, _ = _at(float64)

    def at(guidance):
        denoise = float64.denoiser(PROMPTS[:2], guidance=guidance, detach_unconditional=False)
        with torch.no_grad():
            return denoise(x, 500.0)

    uncond, cond = at(0.0), at(1.0)
    assert relative_difference(at(3.0), uncond + 3 * (cond - uncond)) <= 1e-12
    assert (cond - uncond).abs().max() > 1e-3


def test_a_detached_unconditional_branch_changes_no_value(float64):
    x, _ = _at(float64)
    with torch.no_grad():
        full, detached = (
            float64.denoiser(PROMPTS[:2], guidance=7.5, detach_unconditional=flag)(x, 500.0) for flag in (False, True)
        )
    assert relative_difference(detached, full) <= 1e-12


def test_with_a_detached_unconditional_branch_the_gradient_is_w_times_that_of_the_conditional_one(float64):
    x, weight = _at(float64)

    def gradient(guidance, detach):
        out = float64.denoiser(PROMPTS[:2], guidance=guidance, detach_unconditional=detach)(x, 500.0)
        return gradient_of((weight * out).sum(), float64.parameters())

    detached, cond, full = gradient(7.5, True), gradient(1.0, False), gradient(7.5, False)
    assert relative_difference(detached, 7.5 * cond) <= 1e-10
    uncond = gradient(0.0, False)
    assert relative_difference(full, 7.5 * cond - 6.5 * uncond) <= 1e-10


@pytest.mark.parametrize(
    ("guidance", "detach", "rows"), [(1.0, False, [2]), (7.5, False, [4]), (7.5, True, [2, 2]), (1.0, True, [2])]
)
def test_network_calls_of_one_guided_evaluation(float64, guidance, detach, rows):
    x, _ = _at(float64)
    denoise = float64.denoiser(PROMPTS[:2], guidance=guidance, detach_unconditional=detach)
    with count_calls(float64.network) as calls:
        denoise(x, 500.0)
    assert calls.rows == rows


def test_prompts_are_encoded_once_for_a_trajectory(float64):
    with count_calls(float64.pipe.text_encoder) as calls, torch.no_grad():
        rsaft.sample(float64, PROMPTS[:2], Sampling(3), seed=0)
    assert calls.total == 2  # the prompts, and the empty one


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_prompt_over_the_encoders_length_is_cut_in_silence(tiny_of, family, caplog):
    backbone, long = load_backbone(tiny_of(family)), "cat " * 40
    cut, longer, other = (backbone.encode([p]).text for p in (long, long + "dog", "dog " + long))
    assert torch.equal(cut, longer)
    assert not torch.equal(cut, other)
    assert caplog.records == []


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_negative_prompt_takes_the_place_of_the_empty_one(tiny_of, family):
    x, _ = _at(load_backbone(tiny_of(family)))

    def at(**settings):
        backbone = load_backbone(tiny_of(family), **settings)
        with torch.no_grad():
            return backbone.denoiser(["a cat", "rain"], guidance=0.0, detach_unconditional=False)(x, 500.0)

    usual, empty, negative = at(), at(negative_prompt=""), at(negative_prompt="a dog")
    assert torch.equal(usual, empty) == (family != "sdxl")  # SDXL was trained with zeros, not with the empty prompt
    assert (negative - empty).abs().max() > 1e-4


def test_flux_is_told_its_guidance_in_one_call(tiny_of):
    backbone = load_backbone(tiny_of("flux"))
    x, _ = _at(backbone)
    outputs = []
    for guidance in (1.0, 3.5):
        with count_calls(backbone.network) as calls, torch.no_grad():
            denoise = backbone.denoiser(PROMPTS[:2], guidance=guidance, detach_unconditional=False)
            outputs.append(denoise(x, 500.0))
        assert calls.total == 1
    assert relative_difference(*outputs) > 1e-4


def test_without_an_unconditional_branch_there_is_none_to_detach(tiny_of):
    backbone = load_backbone(tiny_of("flux"))
    with pytest.warns(UserWarning, match=r"sampling.detach_unconditional: FluxPipeline has no .* leave it out"):
        backbone.denoiser(["a cat"], guidance=3.5, detach_unconditional=True)


def test_flux_without_a_guidance_embedding_refuses_guidance(tiny_of):
    backbone = load_backbone(tiny_of("schnell"))
    with pytest.raises(ConfigError, match=r"sampling.guidance: .* no guidance embedding .* guidance is 1; got 3.5"):
        rsaft.sample(backbone, ["a cat"], Sampling(2, guidance=3.5), seed=0)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 16, 6, 10)])
def test_packing_is_undone_by_unpacking(shape):
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    tokens = pack(x)
    assert tokens.shape == (shape[0], shape[2] * shape[3] // 4, 4 * shape[1])
    assert torch.equal(unpack(tokens, shape), x)
    first = x[0, :, :2, :2].flatten()  # the first token is the first patch, channel by channel
    assert torch.equal(tokens[0, 0], first)


def test_positions_are_zero_row_and_column_of_each_token():
    assert positions(torch.zeros(1, 4, 4, 6)).tolist() == [[0, r, c] for r in range(2) for c in range(3)]
