"""The published architectures of the supported families, built with random weights: true size, or reduced in width.

Each description holds what the checkpoints' own config files say. The reduced one keeps the blocks and layers, has
fewer channels, an eighth of the resolution and four sampling steps, and fits a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rsaft.backbones.family import Conditioning, Family
from rsaft.backbones.flux import FLUX
from rsaft.backbones.lora import LoRA, attach
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.backbones.sd3 import SD3
from rsaft.backbones.sdxl import SDXL
from rsaft.backbones.stable_diffusion import STABLE_DIFFUSION
from rsaft.types import Images, Reward

RANK = 8  # of the LoRA on the attention, which is float32


@dataclass(frozen=True)
class Shape:
    """One model: its components' configs, and how it is sampled by default in diffusers."""

    name: str
    family: Family
    network_class: str  # in diffusers
    network: dict[str, Any]  # its config
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text: tuple[int, int]  # tokens, width
    pooled: int | None  # width of the pooled text embedding
    resolution: int  # pixels
    num_steps: int  # of a trajectory, as the guidance below: the pipeline's own defaults
    guidance: float  # for Flux an input of the network; for the others two evaluations a step
    narrow: dict[str, Any]  # what the reduced network's config says instead
    reward: tuple[int, int] = (1024, 24)  # width and layers of the reward's image tower: ViT-L


_VAE_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_VAE_16 = _VAE_LEVELS | {
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD3_VAE = _VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_SD3_NETWORK = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
_SD3_NARROW = {"attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}

SD15 = Shape(
    name="SD1.5",
    family=STABLE_DIFFUSION,
    network_class="UNet2DConditionModel",
    network={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # for the UNets diffusers means the number of heads
    },
    vae=_VAE_LEVELS | {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
    scheduler=_BETAS | {"set_alpha_to_one": False, "clip_sample": False},
    text=(77, 768),
    pooled=None,
    resolution=512,
    num_steps=50,
    guidance=7.5,
    narrow={"block_out_channels": (32, 64, 128, 128)},
)
SDXL_BASE = Shape(
    name="SDXL",
    family=SDXL,
    network_class="UNet2DConditionModel",
    network={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=_VAE_LEVELS | {"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025},
    scheduler=_BETAS | {"set_alpha_to_one": False, "clip_sample": False},
    text=(77, 2048),
    pooled=1280,
    resolution=1024,
    num_steps=50,
    guidance=5.0,
    narrow={"block_out_channels": (32, 64, 128), "attention_head_dim": (2, 4, 8)},
)
SD3_MEDIUM = Shape(
    name="SD3 medium",
    family=SD3,
    network_class="SD3Transformer2DModel",
    network=_SD3_NETWORK
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    vae=_SD3_VAE,
    scheduler={"shift": 3.0},
    text=(333, 4096),  # CLIP's 77 tokens and T5's 256
    pooled=2048,
    resolution=1024,
    num_steps=28,
    guidance=7.0,
    narrow=_SD3_NARROW,
)
SD35_MEDIUM = replace(
    SD3_MEDIUM,
    name="SD3.5 medium",
    network=SD3_MEDIUM.network
    | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
)
SD35_LARGE = replace(
    SD3_MEDIUM,
    name="SD3.5 large",
    network=SD3_MEDIUM.network
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
)
FLUX_DEV = Shape(
    name="Flux.1-dev",
    family=FLUX,
    network_class="FluxTransformer2DModel",
    network={
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
        "guidance_embeds": True,
    },
    vae=_VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    scheduler={"shift": 3.0, "use_dynamic_shifting": True},
    text=(512, 4096),
    pooled=768,
    resolution=1024,
    num_steps=28,
    guidance=3.5,
    narrow={"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)},
)
SHAPES = {shape.name: shape for shape in (SD15, SDXL_BASE, SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE, FLUX_DEV)}


def reduced(shape: Shape) -> Shape:
    """The same blocks with fewer channels, an eighth of the resolution, four sampling steps."""
    return replace(
        shape,
        network={**shape.network, **shape.narrow},
        vae={**shape.vae, "block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
        resolution=shape.resolution // 8,
        num_steps=4,
        reward=(64, 24),
    )


def build_backbone(
    shape: Shape,
    *,
    device: str,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    compile: bool = False,
) -> DiffusersBackbone:
    """The model with random weights and a LoRA, as `load_backbone` makes it of a checkpoint; "meta" holds no values.

    It has no text encoders: `encode` gives random embeddings of the right shape, as if prompts were cached.

    Args:
        shape: what to build.
        device: where the weights are made and stay.
        dtype: of the frozen network, and of its arithmetic.
        vae_dtype: of the decoder.
        checkpointing: recompute the network's and the decoder's blocks in the backward pass.
        compile: `torch.compile` the network.
    """
    family = replace(shape.family, encode=lambda pipe, prompts, length: _embeddings(shape, len(prompts)))
    network = build_network(shape, device=device, dtype=dtype)
    vae = _made(AutoencoderKL, shape.vae, device, vae_dtype)
    lora = LoRA(rank=RANK, alpha=RANK, targets=family.lora_targets)
    with torch.device(device):  # peft moves its factors to the layer's device, but not to meta
        attach(network, lora, seed=0)
    network.eval()
    if checkpointing:
        network.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    if compile:
        network.compile()
    return DiffusersBackbone(
        _pipeline(shape, network, vae),
        family,
        lora=lora,
        source=shape.name,
        compute_dtype=dtype,
        resolution=(shape.resolution, shape.resolution),
    )


def build_network(shape: Shape, *, device: str, dtype: torch.dtype) -> Any:
    """The frozen UNet or transformer alone, without an adapter."""
    return _made(getattr(diffusers, shape.network_class), shape.network, device, dtype)


def build_reward(shape: Shape, *, device: str) -> Reward:
    """A float32 CLIP ViT-L/14 at 224 px with random weights and one fixed direction; narrow where the model is.

    A stand-in for what HPSv2, PickScore or ImageReward cost: they are ViT-H/14, ViT-H/14 and ViT-L/16.
    """
    width, layers = shape.reward
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        patch_size=14,
        image_size=224,
        projection_dim=768,
    )
    with torch.device(device):
        torch.manual_seed(0)
        tower = CLIPVisionModelWithProjection(config).requires_grad_(False).eval()

    def reward(images: Images, prompts: Sequence[str]) -> torch.Tensor:
        pixels = functional.interpolate(images, size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        return tower(pixel_values=2 * pixels - 1).image_embeds.mean(dim=1)

    return reward


def _made(kind: Any, config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A frozen model with random weights, made on its device in its dtype: a float32 copy might not fit."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model: nn.Module = kind.from_config(config)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).eval()


def _embeddings(shape: Shape, n: int) -> Conditioning:
    """The same for every prompt, so that a rollout may be made twice."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(shape.text, generator=generator).expand(n, -1, -1)
    pooled = None if shape.pooled is None else torch.randn(shape.pooled, generator=generator).expand(n, -1)
    return Conditioning(text, pooled)


def _pipeline(shape: Shape, network: Any, vae: Any) -> Any:
    kind = DDIMScheduler if shape.family.network == "unet" else FlowMatchEulerDiscreteScheduler
    parts = dict.fromkeys((*shape.family.text_encoders, *shape.family.tokenizers))
    if shape.family.name == "sd":
        parts |= {"safety_checker": None, "feature_extractor": None}
    return getattr(diffusers, shape.family.pipeline)(
        **parts,
        **{shape.family.network: network},
        vae=vae,
        scheduler=kind(**shape.scheduler),
        **({"requires_safety_checker": False} if shape.family.name == "sd" else {}),
        **({"add_watermarker": False} if shape.family.name == "sdxl" else {}),
    )
