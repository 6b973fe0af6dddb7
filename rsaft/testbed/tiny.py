"""Tiny pipelines of every supported family: real components with random weights, built offline in milliseconds.

They exercise the code path of the real checkpoints, and say nothing about images. `rsaft ... --tiny` and the tests use
them: 4-channel 8x8 latents, 16x16 images, prompts of at most 12 CLIP tokens and 16 T5 tokens.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rsaft.testbed.model import build_scheduler, build_tokenizer

Prediction = Literal["epsilon", "v_prediction"]
TinyFamily = Literal["sd", "sdxl", "sd3", "sd35", "flux", "schnell"]
TINY_FAMILIES: tuple[TinyFamily, ...] = get_args(TinyFamily)

CLIP_TOKENS, T5_TOKENS = 12, 16
CLIP_WIDTH, T5_WIDTH = 16, 40  # T5 is wider than both CLIPs side by side, as in SD3


def tiny_pipeline(family: TinyFamily, *, seed: int = 0, prediction_type: Prediction = "epsilon") -> Any:
    """A diffusers pipeline of the family, in eval mode; `save_pretrained` makes a folder that `load_backbone` loads.

    Args:
        family: sd35 is SD3.5 Medium's kind of transformer (RMS-normalised queries and keys, a second attention), flux
            has a guidance embedding, schnell is Flux without one.
        seed: of the weights.
        prediction_type: of sd and sdxl.
    """
    build = {
        "sd": lambda: _sd(prediction_type),
        "sdxl": lambda: _sdxl(prediction_type),
        "sd3": lambda: _sd3(version_3_5=False),
        "sd35": lambda: _sd3(version_3_5=True),
        "flux": lambda: _flux(guidance_embeds=True),
        "schnell": lambda: _flux(guidance_embeds=False),
    }[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = build()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sd(prediction_type: Prediction) -> StableDiffusionPipeline:
    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(cross_attention_dim=CLIP_WIDTH, **_unet_sizes()),
        vae=_vae(),
        scheduler=DDIMScheduler.from_config(build_scheduler().config, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(prediction_type: Prediction) -> StableDiffusionXLPipeline:
    tokenizer = _clip_tokenizer()
    time_width = 8
    unet = UNet2DConditionModel(
        cross_attention_dim=2 * CLIP_WIDTH,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * time_width,
        use_linear_projection=True,
        **_unet_sizes(),
    )
    return StableDiffusionXLPipeline(
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip_with_projection(tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        vae=_vae(),
        scheduler=EulerDiscreteScheduler.from_config(
            build_scheduler().config, timestep_spacing="leading", prediction_type=prediction_type
        ),
        add_watermarker=False,
    )


def _sd3(*, version_3_5: bool) -> StableDiffusion3Pipeline:
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm" if version_3_5 else None,
        dual_attention_layers=(0,) if version_3_5 else (),
    )
    return StableDiffusion3Pipeline(
        text_encoder=_clip_with_projection(clip),
        tokenizer=clip,
        text_encoder_2=_clip_with_projection(clip),
        tokenizer_2=clip,
        text_encoder_3=_t5(t5),
        tokenizer_3=t5,
        transformer=transformer,
        vae=_flow_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(*, guidance_embeds: bool) -> FluxPipeline:
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        text_encoder=_clip(clip),
        tokenizer=clip,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=transformer,
        vae=_flow_vae(),
        # As Flux.1-dev and Flux.1-schnell; but for their 256 and 4096 tokens, here 4 and 64.
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0,
            use_dynamic_shifting=guidance_embeds,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=4,
            max_image_seq_len=64,
        ),
    )


def _unet_sizes() -> dict[str, Any]:
    """Two levels of 8 and 16 channels; attention on the upper one of SD's, as in its middle."""
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


def _vae() -> AutoencoderKL:
    return AutoencoderKL(**_vae_sizes())


def _flow_vae() -> AutoencoderKL:
    """As SD3's and Flux's: a shift, and no convolutions around the latents."""
    return AutoencoderKL(
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, **_vae_sizes()
    )


def _vae_sizes() -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "mid_block_add_attention": False,
    }


def _clip_tokenizer() -> CLIPTokenizer:
    tokenizer = build_tokenizer([])
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the pooled feature is that of this token
        pad_token_id=tokenizer.pad_token_id,
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_clip_config(tokenizer))


def _clip_with_projection(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config(tokenizer))


def _t5_tokenizer() -> T5Tokenizer:
    """One piece a printable ASCII character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    return T5Tokenizer(
        vocab=[*special, *((chr(code), -2.0) for code in range(33, 127))], extra_ids=0, model_max_length=T5_TOKENS
    )


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=10, d_ff=32, num_layers=1, num_heads=2)
    )
