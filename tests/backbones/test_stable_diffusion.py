"""Loading, guidance, precision, and the sampler against `StableDiffusionPipeline.__call__`."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler

import rsaft
from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.rdrl import DRaFT
from rsaft.sampling import Sampling, initial_noise
from tests.helpers import PROMPTS, batch_of, count_calls, gradient_of, randomize_, relative_difference, toy_reward


@pytest.fixture(scope="module")
def float64(tiny_sd):
    backbone = load_backbone(tiny_sd, lora=LoRA(rank=2, alpha=4), dtype="fp64")
    randomize_(backbone.parameters())
    return backbone


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_samples_equal_the_pipelines_images(tiny_sd, tiny_sd_v, kind, guidance, record_property):
    backbone = load_backbone({"eps": tiny_sd, "v": tiny_sd_v}[kind])
    assert isinstance(backbone.pipe.scheduler, DDIMScheduler)
    images = rsaft.sample(backbone, PROMPTS, Sampling(10, guidance=guidance), seed=5)
    latents = initial_noise(backbone, seed=5, purpose="sample", step=0, sample_ids=range(4))
    expected = backbone.pipe(
        list(PROMPTS),
        negative_prompt=[""] * 4,
        num_inference_steps=10,
        guidance_scale=guidance,
        latents=latents,
        output_type="pt",
    ).images
    difference = float((images - expected).abs().max())
    record_property("difference", difference)
    assert difference <= 1e-5


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


def test_a_prompt_over_the_encoders_length_is_truncated(float64):
    long = "cat " * 40
    assert torch.equal(float64.encode([long]).text, float64.encode([long + "dog"]).text)


def test_everything_but_the_adapter_is_frozen_and_in_eval_mode(float64):
    pipe = float64.pipe
    trainable = {n for n, p in pipe.unet.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in n for n in trainable)
    assert not any(p.requires_grad for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
    assert not any(m.training for part in (pipe.unet, pipe.vae, pipe.text_encoder) for m in part.modules())


def test_without_an_adapter_the_whole_denoiser_is_trained(tiny_sd):
    backbone = load_backbone(tiny_sd)
    assert len(backbone.parameters()) == len(list(backbone.network.parameters()))
    assert not any(
        p.requires_grad for part in (backbone.pipe.vae, backbone.pipe.text_encoder) for p in part.parameters()
    )


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.float32), ("fp64", torch.float64)]
)
def test_trained_tensors_latents_and_images_are_at_least_float32(tiny_sd, dtype, expected, lora):
    backbone = load_backbone(tiny_sd, lora=lora, dtype=dtype)
    rollout = DRaFT(sampling=Sampling(2)).rollout(backbone, batch_of())
    sample = rollout.tail(rollout.prefix())
    images = backbone.decode(sample.latents)
    gradient = gradient_of(toy_reward(images, sample.prompts).sum(), backbone.parameters())
    trained = {p.dtype for p in backbone.parameters()}
    assert trained | {backbone.dtype, sample.latents.dtype, images.dtype, gradient.dtype} == {expected}
    assert gradient.norm() > 0


def test_half_precision_computes_in_half_and_stays_near(tiny_sd):
    x = initial_noise(load_backbone(tiny_sd), seed=0, purpose="x", step=0, sample_ids=[0])

    def output(dtype):
        backbone = load_backbone(tiny_sd, lora=LoRA(rank=2, alpha=2), dtype=dtype)
        with torch.no_grad():
            return backbone.denoiser(["a"], guidance=1, detach_unconditional=False)(x, 500.0)

    difference = relative_difference(output("bf16"), output("fp32"))
    assert 1e-5 < difference < 0.05  # bf16 has 8 bits: 2^-8 = 0.004 a rounding


@pytest.mark.parametrize("name", ["nobody/nothing", "missing/folder/of/parts", "x" * 200])
def test_a_model_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ConfigError, match=r"model '.*': no diffusers pipeline .* give a folder") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_pipeline_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no diffusers pipeline"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("family", ["KandinskyPipeline", "WanPipeline"])
def test_a_pipeline_of_another_family_is_refused_by_name(tmp_path, family):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family, "_diffusers_version": "0.42.1"}))
    with pytest.raises(ConfigError, match=rf"its pipeline is a {family}, and supported are .*StableDiffusionPipeline"):
        load_backbone(tmp_path)


def test_an_unknown_precision_is_refused(tiny_sd):
    from rsaft.backbones.load import load_backbone as unchecked

    with pytest.raises(ConfigError, match=r"dtype: found 'int8', allowed are"):
        unchecked.__wrapped__(tiny_sd, dtype="int8")
