"""Our no-gradient sampling against each pipeline's own `__call__`: same latents, same images."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

import rsaft
from rsaft.backbones import load_backbone
from rsaft.backbones.flux import pack
from rsaft.sampling import Sampling, initial_noise
from rsaft.testbed.tiny import tiny_pipeline
from tests.helpers import PROMPTS

STEPS = 6
PROMPTS = PROMPTS[2:]
FLOW = ("sd3", "sd35", "flux", "schnell")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "clip_sample": False, "set_alpha_to_one": False}


@cache
def _theirs(folder):
    """The pipeline as diffusers alone loads it; with DDIM in place of a scheduler that is not one of ours."""
    index = diffusers.DiffusionPipeline.load_config(folder)
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent)
    if not isinstance(pipe.scheduler, DDIMScheduler | FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _difference(folder, guidance, call, steps=STEPS, **settings):
    """The largest difference of a pixel between our samples and the pipeline's."""
    backbone = load_backbone(folder, **settings)
    images = rsaft.sample(backbone, PROMPTS, Sampling(steps, guidance=guidance), seed=5)
    latents = initial_noise(backbone, seed=5, purpose="sample", step=0, sample_ids=range(len(PROMPTS)))
    height, width = (backbone.pipe.vae_scale_factor * n for n in backbone.latent_shape[1:])
    expected = _theirs(folder)(
        list(PROMPTS),
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=pack(latents) if backbone.family.name == "flux" else latents,
        height=height,
        width=width,
        output_type="pt",
        **call,
    ).images
    assert images.shape == expected.shape
    assert expected.std() > 0.01
    return float((images - expected).abs().max())


CLASSIFIER_FREE = ((1.0, None), (7.5, None), (4.0, "a blurred dog"))


# Guidance is classifier-free but for flux, which embeds it, and schnell, which has none.
@pytest.mark.parametrize(
    ("family", "guidance", "negative"),
    [
        *((family, *rest) for family in ("sd", "sdxl", "sd3", "sd35") for rest in CLASSIFIER_FREE),
        ("flux", 1.0, None),
        ("flux", 3.5, None),
        ("schnell", 1.0, None),
    ],
)
def test_samples_equal_the_pipelines_images(tiny_of, family, guidance, negative, record_property):
    call = {} if negative is None else {"negative_prompt": [negative] * len(PROMPTS)}
    call |= {"max_sequence_length": 16} if family in FLOW else {}
    difference = _difference(tiny_of(family), guidance, call, negative_prompt=negative)
    record_property("difference", difference)
    assert difference <= 1e-5


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "sd35", "flux"])
def test_samples_equal_the_pipelines_images_at_another_resolution(tiny_of, family, record_property):
    call = {"max_sequence_length": 16} if family in FLOW else {}
    difference = _difference(tiny_of(family), 3.0, call, resolution=(24, 16))
    record_property("difference", difference)
    assert difference <= 1e-5


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_samples_equal_the_pipelines_images_with_fewer_t5_tokens(tiny_of, family, record_property):
    short, usual = (
        _difference(tiny_of(family), 3.0, {"max_sequence_length": 5}, max_sequence_length=n) for n in (5, 16)
    )
    record_property("difference", short)
    assert short <= 1e-5
    assert usual > 1e-4  # "a very small house on a hill" has more than 5 tokens


@pytest.mark.parametrize("name", ["sdxl-encodes-empty", "sd3-dynamic", "sd3-without-t5", "sd-v"])
def test_samples_equal_the_pipelines_images_for_other_settings_of_a_checkpoint(
    tiny_of, name, tmp_path, record_property
):
    call = {"max_sequence_length": 16} if name.startswith("sd3") else {}
    if name == "sdxl-encodes-empty":
        pipe = tiny_pipeline("sdxl")
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    elif name == "sd3-dynamic":
        pipe = tiny_pipeline("sd3")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        )
    elif name == "sd3-without-t5":
        pipe = tiny_pipeline("sd3")
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        call = {}
    else:
        pipe = tiny_pipeline("sd", prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    difference = _difference(tmp_path, 3.0, call)
    record_property("difference", difference)
    assert difference <= 1e-5


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **BETAS),  # Stable Diffusion 1.x
        DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction", **BETAS, **ZERO_SNR),
        EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS),  # SDXL's distillates
    ],
    ids=["pndm", "v-zero-terminal-snr", "euler-trailing"],
)
def test_samples_equal_the_pipelines_images_on_a_checkpoints_own_grid(scheduler, tmp_path, record_property):
    pipe = tiny_pipeline("sd", prediction_type=scheduler.config.prediction_type)
    pipe.scheduler = scheduler
    pipe.save_pretrained(tmp_path)
    difference = _difference(tmp_path, 3.0, {}, steps=5)
    record_property("difference", difference)
    assert difference <= 1e-5


def test_samples_equal_the_pipelines_images_of_sd35_larges_kind(tmp_path, record_property):
    pipe = tiny_pipeline("sd35")  # Medium's second attention is taken out, the normalised queries stay
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.register_modules(transformer=type(pipe.transformer)(**config | {"dual_attention_layers": ()}))
    pipe.save_pretrained(tmp_path)
    assert load_backbone(tmp_path).network.config.qk_norm == "rms_norm"
    difference = _difference(tmp_path, 4.5, {"max_sequence_length": 16})
    record_property("difference", difference)
    assert difference <= 1e-5


def test_a_dynamic_shift_gives_another_grid_at_another_resolution(tiny_of):
    grids = [load_backbone(tiny_of("flux"), resolution=pixels).schedule(4).sigmas for pixels in (16, 32)]
    assert grids[0][0] == grids[1][0] == 1
    assert all(small < large for small, large in zip(grids[0][1:-1], grids[1][1:-1], strict=True))
    static = [load_backbone(tiny_of("schnell"), resolution=pixels).schedule(4).sigmas for pixels in (16, 32)]
    assert static[0] == static[1] == pytest.approx((1, 0.75, 0.5, 0.25, 0))
