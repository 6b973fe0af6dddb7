"""`load_backbone`: a diffusers folder or hub id becomes a Backbone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from rsaft.backbones.lora import LoRA, attach
from rsaft.backbones.stable_diffusion import StableDiffusion
from rsaft.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "fp64"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SUPPORTED = ("StableDiffusionPipeline",)


def default_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def load_backbone(
    path_or_id: str | os.PathLike[str],
    *,
    lora: LoRA | None = None,
    dtype: Precision = "fp32",
    device: str | torch.device | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> StableDiffusion:
    """A Backbone from a diffusers folder or hub id.

    Args:
        path_or_id: a folder with `model_index.json`, or a hub id.
        lora: adapters to train; None trains the whole denoiser.
        dtype: precision of the denoiser's arithmetic. Trainable tensors, latents and images are fp32 all the same
            (fp64 computes everything in float64, for tests of the maths).
        device: where to put it; the GPU if there is one.
        revision, variant, local_files_only: as in diffusers.
        gradient_checkpointing: recompute the denoiser's blocks in the backward pass (diffusers' own, non-reentrant).
        seed: of the adapter's initial values.

    Raises:
        ConfigError: if there is no such pipeline, or its family is not supported.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: found '{dtype}', allowed are {sorted(_DTYPES)}.")
    try:
        index = DiffusionPipeline.load_config(
            str(path_or_id), revision=revision, local_files_only=local_files_only or Path(path_or_id).exists()
        )
    except OSError as error:
        raise ConfigError(
            f"model '{path_or_id}': no diffusers pipeline (model_index.json) was found there or on the hub; "
            "give a folder saved with save_pretrained, or a hub id."
        ) from error
    family = index["_class_name"]
    if family not in SUPPORTED:
        raise ConfigError(
            f"model '{path_or_id}': its pipeline is a {family}, and supported are {list(SUPPORTED)}; "
            "convert the checkpoint, or implement the Backbone Protocol for it."
        )
    compute = _DTYPES[dtype]
    master = torch.float64 if compute == torch.float64 else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(
        str(path_or_id),
        dtype=master,
        revision=revision,
        variant=variant,
        local_files_only=local_files_only,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
        part.eval()
    if lora is None:
        pipe.unet.requires_grad_(True)
    else:
        if compute != master:
            pipe.unet.to(compute)  # frozen weights may be half; the adapters below are fp32
        attach(pipe.unet, lora, seed=seed)
        pipe.unet.eval()  # peft adds its modules in training mode
    if gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.to(torch.device(device) if device is not None else default_device())
    return StableDiffusion(pipe, lora=lora, compute_dtype=compute, source=str(path_or_id))
