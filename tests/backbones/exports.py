"""Pipelines as a user loads them, their images, and the comparison that an export makes."""

from __future__ import annotations

import diffusers
import torch

from rsaft.backbones import LoRA
from rsaft.backbones.export import LORA_FILE
from rsaft.backbones.round_trip import adapter_difference
from tests.helpers import PROMPTS

FAMILIES = ("sd", "sdxl", "sd3", "sd35", "flux")
SCALED = LoRA(rank=3, alpha=7)  # alpha / rank is no number of the computer's


def fresh_pipeline(folder):
    """The pipeline as a user loads it, with diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def images_of(pipe):
    pipe.set_progress_bar_config(disable=True)
    t5 = {"max_sequence_length": 16} if "transformer" in pipe.components else {}
    source = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(list(PROMPTS[:1]), generator=source, **size, **t5).images


def network_of(pipe):
    return pipe.components.get("unet") or pipe.components["transformer"]


def reload_difference(backbone, folder, file=LORA_FILE, *, exact=True):
    """Compare a file with the trained adapter, as an export does."""
    return adapter_difference(
        backbone,
        lambda name: backbone.pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=name),
        source=file,
        exact=exact,
    )
