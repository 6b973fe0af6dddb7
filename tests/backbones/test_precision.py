"""Half-precision networks: what is half, what stays fp32, and how near the result is."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError, NonFiniteError
from rsaft.rdrl import DRaFT
from rsaft.sampling import Sampling, initial_noise
from rsaft.testbed.tiny import tiny_pipeline
from tests.helpers import batch_of, gradient_of, randomize_, relative_difference, toy_reward

FAMILIES = ("sd", "sdxl", "sd3", "sd35", "flux")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _gradient(backbone):
    """Images and gradient of the toy reward through two sampling steps."""
    rollout = DRaFT(sampling=Sampling(2, guidance=3.0)).rollout(backbone, batch_of())
    sample = rollout.tail(rollout.prefix())
    images = backbone.decode(sample.latents)
    gradient = gradient_of(toy_reward(images, sample.prompts).sum(), backbone.parameters())
    return sample.latents, images, gradient


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("family", "dtype"), [*product(FAMILIES, ("bf16", "fp16")), ("sd", "fp32"), ("sd", "fp64"), ("flux", "fp64")]
)
def test_trained_tensors_latents_images_and_gradients_are_at_least_float32(tiny_of, family, dtype, lora):
    backbone = load_backbone(tiny_of(family), lora=lora, dtype=dtype)
    latents, images, gradient = _gradient(backbone)
    trained = {p.dtype for p in backbone.parameters()}
    expected = torch.float64 if dtype == "fp64" else torch.float32
    assert trained | {backbone.dtype, latents.dtype, images.dtype, gradient.dtype, backbone.pipe.vae.dtype} == {
        expected
    }
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_under_an_adapter_the_frozen_network_and_the_text_encoders_are_stored_in_half(tiny_of, family, dtype):
    backbone = load_backbone(tiny_of(family), lora=LoRA(rank=2), dtype=dtype)
    assert {p.dtype for p in backbone.network.parameters() if not p.requires_grad} == {HALF[dtype]}
    assert {getattr(backbone.pipe, name).dtype for name in backbone.family.text_encoders} == {HALF[dtype]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.05), ("fp16", 0.01)])  # a rounding is 2^-9 or 2^-12
def test_half_precision_computes_in_half_and_stays_near(tiny_of, family, dtype, bound):
    def output(dtype):
        backbone = load_backbone(tiny_of(family), lora=LoRA(rank=2, alpha=2), dtype=dtype)
        randomize_(backbone.parameters())
        x = initial_noise(backbone, seed=0, purpose="x", step=0, sample_ids=[0])
        with torch.no_grad():
            return backbone.denoiser(["a"], guidance=1, detach_unconditional=False)(x, 500.0)

    assert 1e-5 < relative_difference(output(dtype), output("fp32")) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_in_bf16_points_the_same_way(tiny_of, family):
    gradients = []
    for dtype in ("bf16", "fp32"):
        backbone = load_backbone(tiny_of(family), lora=LoRA(rank=2, alpha=2), dtype=dtype)
        randomize_(backbone.parameters())
        gradients.append(_gradient(backbone)[2])
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98  # 0.5 % of noise in each of some ten layers


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=2)], ids=["full", "lora"])
@pytest.mark.parametrize(("family", "recompute"), [("sd", False), ("sd", True), ("sd3", False)])
def test_a_small_gradient_does_not_underflow_in_fp16(tiny_of, family, lora, recompute):
    gradients = []
    for settings in ({"dtype": "fp16", "vae_dtype": "fp16"}, {"dtype": "fp32"}):
        backbone = load_backbone(tiny_of(family), lora=lora, **settings)
        if lora is not None:
            randomize_(backbone.parameters())
        algorithm = DRaFT(k=2, sampling=Sampling(2, guidance=3.0), gradient_checkpointing=recompute)
        rollout = algorithm.rollout(backbone, batch_of())
        sample = rollout.tail(rollout.prefix())
        value = 1e-3 * toy_reward(backbone.decode(sample.latents), sample.prompts).mean()  # its gradient is about 1e-7
        gradients.append(gradient_of(value, backbone.parameters()).double())
    assert torch.cosine_similarity(*gradients, dim=0, eps=0) > 0.99
    assert float(gradients[0].norm() / gradients[1].norm()) == pytest.approx(1, abs=0.05)


def test_gradients_at_the_latents_are_not_scaled_in_fp16(tiny_of):
    gradients = []
    for settings in ({"dtype": "fp16", "vae_dtype": "fp16"}, {"dtype": "fp32"}):
        backbone = load_backbone(tiny_of("sd"), **settings)
        x = initial_noise(backbone, seed=0, purpose="x", step=0, sample_ids=[0]).requires_grad_()
        out = backbone.decode(backbone.denoiser(["a"], guidance=1, detach_unconditional=False)(x, 500.0))
        gradients.append(gradient_of(1e-3 * toy_reward(out, ["a"]).sum(), [x]))
    assert relative_difference(*gradients) < 0.05


def test_backward_and_grad_agree_in_fp16(tiny_of):
    backbone = load_backbone(tiny_of("sd"), lora=LoRA(rank=2, alpha=2), dtype="fp16")
    by_grad = _gradient(backbone)[2]
    rollout = DRaFT(sampling=Sampling(2, guidance=3.0)).rollout(backbone, batch_of())
    sample = rollout.tail(rollout.prefix())
    toy_reward(backbone.decode(sample.latents), sample.prompts).sum().backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in backbone.parameters()]), by_grad)


def test_the_decoder_stays_in_float32_unless_it_is_asked_not_to(tiny_of):
    assert load_backbone(tiny_of("sdxl"), dtype="fp16").pipe.vae.dtype == torch.float32
    half = load_backbone(tiny_of("sd3"), dtype="bf16", vae_dtype="bf16")
    assert half.pipe.vae.dtype == torch.bfloat16
    latents = torch.zeros(1, 4, 8, 8)
    assert half.decode(latents).dtype == torch.float32


def test_sdxls_own_decoder_is_refused_in_fp16(tiny_of):
    with pytest.raises(ConfigError, match=r"vae_dtype: .*StableDiffusionXLPipeline's VAE overflows in fp16; leave"):
        load_backbone(tiny_of("sdxl"), dtype="fp16", vae_dtype="fp16")
    assert load_backbone(tiny_of("sdxl"), vae_dtype="bf16").pipe.vae.dtype == torch.bfloat16  # has fp32's range


def test_sdxls_decoder_made_for_fp16_is_accepted(tmp_path):
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(force_upcast=False)  # as in the fp16-fix checkpoint
    pipe.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, dtype="fp16", vae_dtype="fp16")
    assert backbone.pipe.vae.dtype == torch.float16
    assert backbone.decode(torch.ones(1, 4, 8, 8)).isfinite().all()


def test_a_half_precision_decoder_that_overflows_is_named(tiny_of):
    backbone = load_backbone(tiny_of("sd"), vae_dtype="fp16")
    backbone.pipe.vae.decoder.conv_out.bias.data.fill_(float(torch.finfo(torch.float16).max))
    backbone.pipe.vae.decoder.conv_out.weight.data.mul_(1e4)
    with pytest.raises(
        NonFiniteError, match=r"vae: AutoencoderKL in float16 .* not finite; .* vae_dtype fp32"
    ) as error:
        backbone.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert "\n" not in str(error.value)


def test_latents_that_are_not_finite_are_left_to_the_rewards_guard(tiny_of):
    for vae_dtype in ("fp32", "fp16"):
        backbone = load_backbone(tiny_of("sd"), vae_dtype=vae_dtype)
        assert not backbone.decode(torch.full((1, 4, 8, 8), float("nan"))).isfinite().any()
