"""The models that `benchmarks.flatten_cost` measures on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from rsaft import testbed
from rsaft.backbones import load_backbone
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.types import Reward


@dataclass(frozen=True)
class Problem:
    """A model with its reward and batch."""

    title: str
    backbone: DiffusersBackbone
    reward: Reward
    prompts: Sequence[str]
    batch_size: int
    num_steps: int


def fashion(num_steps: int, batch_size: int) -> Problem:
    bed = testbed.load("fashion")
    title = f"fashion testbed, T = {num_steps}, batch {batch_size}, full fine-tuning"
    return Problem(title, bed.backbone, bed.reward, bed.prompts_train, batch_size, num_steps)


def narrow_sd15(num_steps: int, batch_size: int) -> Problem:
    """Stable Diffusion 1.5's blocks at a twentieth of its width, on 16x16 latents (128x128 images)."""
    tiny = testbed.load("fashion").backbone.pipe
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        cross_attention_dim=tiny.text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
    )
    pipe = StableDiffusionPipeline(
        vae, tiny.text_encoder, tiny.tokenizer, unet, tiny.scheduler, None, None, requires_safety_checker=False
    )
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        backbone = load_backbone(folder)
    critic = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 7, 4, 3),
        torch.nn.SiLU(),
        torch.nn.Conv2d(32, 64, 5, 4, 2),
        torch.nn.SiLU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(1024, 1),
    )
    critic.requires_grad_(False).to(backbone.device)
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    title = f"SD1.5-shaped UNet, {millions:.1f} M parameters, 128 px, T = {num_steps}, batch {batch_size}"
    return Problem(title, backbone, lambda x, p: critic(x)[:, 0], ["a photo"], batch_size, num_steps)


PROBLEMS = {"fashion": (fashion, 50), "narrow": (narrow_sd15, 20)}  # with the sampling steps of each
