"""`load_backbone`: a diffusers folder or hub id becomes a Backbone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from rsaft.backbones.compiled import check_compiled
from rsaft.backbones.family import Family
from rsaft.backbones.flux import FLUX
from rsaft.backbones.lora import LoRA, attach
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.backbones.quiet import silent_bars
from rsaft.backbones.sd3 import SD3
from rsaft.backbones.sdxl import SDXL
from rsaft.backbones.stable_diffusion import STABLE_DIFFUSION
from rsaft.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "fp64"]

FAMILIES = (STABLE_DIFFUSION, SDXL, SD3, FLUX)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


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
    resolution: int | tuple[int, int] | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int | None = None,
    prompt_cache: str | os.PathLike[str] | None = None,
    vae_dtype: Precision | None = None,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    vae_checkpointing: bool = False,
    compile: bool = False,
    keep_base: bool = False,
) -> DiffusersBackbone:
    """A Backbone from a diffusers folder or hub id: Stable Diffusion 1.x, 2.x, XL, 3, 3.5, or Flux.1.

    Args:
        path_or_id: a folder with `model_index.json`, or a hub id.
        lora: adapters to train; None trains the whole denoiser.
        dtype: precision of the denoiser's arithmetic and of the text encoders. Trainable tensors, latents and images
            are fp32 all the same (fp64 computes everything in float64, for tests of the maths).
        device: where to put it; the GPU if there is one.
        revision, variant, local_files_only: as in diffusers.
        gradient_checkpointing: recompute the denoiser's blocks in the backward pass (diffusers' own, non-reentrant).
        seed: of the adapter's initial values.
        resolution: height and width of images in pixels, one number for a square; the checkpoint's own by default.
        negative_prompt: text of guidance's unconditional branch. None: the empty text, or zeros where the checkpoint
            was trained so (SDXL).
        max_sequence_length: tokens that T5 reads (SD3: 256 by default, Flux: 512); CLIP always reads 77.
        prompt_cache: folder where encoded prompts are kept; see `DiffusersBackbone.drop_text_encoders`.
        vae_dtype: precision of the decoder; fp32 by default, whatever `dtype` is.
        vae_slicing, vae_tiling: decode image by image, or tile by tile (diffusers' own; tiles change the image).
        vae_checkpointing: recompute the decoder's blocks in the backward pass.
        compile: `torch.compile` the denoiser. On a CPU its gradients are compared with the uncompiled ones at once,
            because torch 2.13 makes wrong ones for some networks there; on a GPU `rsaft check` compares them.
        keep_base: keep a copy of the network as it was loaded, for terms to the base model (`rsaft.rdrl.kl`), where the
            whole network is trained; with an adapter the base is there anyway.

    Raises:
        ConfigError: if there is no such pipeline, its family is not supported, or a setting does not fit it; also if
            torch compiles it wrongly.
    """
    compute = _dtype_of(dtype, "dtype")
    master = torch.promote_types(compute, torch.float32)
    decoder = master if vae_dtype is None else _dtype_of(vae_dtype, "vae_dtype")
    family, absent = _family_of(str(path_or_id), revision, local_files_only)
    _check(family, max_sequence_length, negative_prompt)
    dtypes = dict.fromkeys(family.text_encoders, compute)
    dtypes |= {family.network: master if lora is None else compute, "vae": decoder, "default": master}
    pipe = _load(str(path_or_id), family, absent, dtypes, revision, variant, local_files_only)
    _freeze(pipe, family)
    network = getattr(pipe, family.network)
    _refuse_guidance_input(network, family)
    lora = None if lora is None else replace(lora, targets=lora.targets or family.lora_targets)
    _make_trainable(network, lora, seed=seed, checkpointing=gradient_checkpointing)
    _set_up_decoder(pipe.vae, family, slicing=vae_slicing, tiling=vae_tiling, checkpointing=vae_checkpointing)
    _move(pipe, family, torch.device(device) if device is not None else default_device())
    if compile:
        network.compile()  # in place: the names of its tensors stay
    backbone = DiffusersBackbone(
        pipe,
        family,
        lora=lora,
        source=str(path_or_id),
        compute_dtype=compute,
        resolution=(resolution, resolution) if isinstance(resolution, int) else resolution,
        negative_prompt=negative_prompt,
        max_sequence_length=max_sequence_length,
        prompt_cache=None if prompt_cache is None else Path(prompt_cache),
        keep_base=keep_base,
    )
    if compile and backbone.device.type == "cpu":
        check_compiled(backbone)
    return backbone


def _dtype_of(name: str, setting: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f"{setting}: found '{name}', allowed are {sorted(_DTYPES)}.")
    return _DTYPES[name]


def _family_of(source: str, revision: str | None, local_files_only: bool) -> tuple[Family, list[str]]:
    """The family that the pipeline's `model_index.json` names, and which of its optional parts the checkpoint lacks."""
    from diffusers import DiffusionPipeline

    try:
        with silent_bars():
            index = DiffusionPipeline.load_config(
                source, revision=revision, local_files_only=local_files_only or Path(source).exists()
            )
    except OSError as error:
        raise ConfigError(_why_not_found(source, revision, error)) from error
    for family in FAMILIES:
        if family.pipeline == index["_class_name"]:
            return family, [name for name in family.optional if not (index.get(name) or [None])[0]]
    raise ConfigError(
        f"model '{source}': its pipeline is a {index['_class_name']}, and supported are "
        f"{[family.pipeline for family in FAMILIES]}; convert the checkpoint, or implement the Backbone Protocol for "
        "it."
    )


def _why_not_found(source: str, revision: str | None, error: OSError) -> str:
    """diffusers speaks alike of a repository that is gated and of one that is not there; its error's context knows."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(error.__context__, GatedRepoError):
        return (
            f"model '{source}': the hub keeps it behind a licence; accept that on the model's page, and log in with "
            "`hf auth login`."
        )
    if isinstance(error.__context__, RevisionNotFoundError):
        return f"model '{source}': the hub has no revision '{revision}' of it; give a branch, tag or commit it has."
    return (
        f"model '{source}': no diffusers pipeline (model_index.json) was found there or on the hub; "
        "give a folder saved with save_pretrained, or a hub id."
    )


def _check(family: Family, max_sequence_length: int | None, negative_prompt: str | None) -> None:
    """Settings that mean something to some families only."""
    if max_sequence_length is not None and family.name not in ("sd3", "flux"):
        raise ConfigError(
            f"max_sequence_length is T5's, and {family.pipeline} has none; leave it out: CLIP reads 77 tokens."
        )
    if max_sequence_length is not None and not 1 <= max_sequence_length <= 512:
        raise ConfigError(f"max_sequence_length counts T5's tokens, 1 to 512; got {max_sequence_length}.")
    if negative_prompt is not None and not family.classifier_free:
        raise ConfigError(f"negative_prompt: {family.pipeline} has no unconditional branch; leave it out.")


def _load(
    source: str,
    family: Family,
    absent: list[str],
    dtypes: dict[str, torch.dtype],
    revision: str | None,
    variant: str | None,
    local_files_only: bool,
) -> Any:
    import diffusers

    try:
        with silent_bars():
            pipe = getattr(diffusers, family.pipeline).from_pretrained(
                source,
                dtype=dtypes,
                revision=revision,
                variant=variant,
                local_files_only=local_files_only,
                **family.load_args,
                **dict.fromkeys(absent),  # diffusers wants to be told
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model '{source}': diffusers cannot load this {family.pipeline} (revision {revision}, variant {variant}): "
            f"{reason}{_variants_line(source, variant)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _variants_line(source: str, variant: str | None) -> str:
    """Where a folder's files bear the name of a variant that was not asked for, it is what was meant."""
    weights = [file.name for kind in ("safetensors", "bin") for file in Path(source).glob(f"*/*.*.{kind}")]
    found = sorted({name.split(".")[1].split("-")[0] for name in weights} - {variant})
    return f" (its files are of the variant {found}; set variant to it)" if found else ""


def _refuse_guidance_input(network: Any, family: Family) -> None:
    """A UNet distilled by consistency (LCM) takes guidance as an input, which the families here do not give it.

    Raises:
        ConfigError: if this is one.
    """
    if network.config.get("time_cond_proj_dim") is not None:
        raise ConfigError(
            f"model: this {family.pipeline}'s network takes guidance as an input (time_cond_proj_dim, as in LCM), "
            "which is not supported; use a checkpoint without it."
        )


def _parts(pipe: Any, family: Family) -> list[Any]:
    """The pipeline's neural networks."""
    parts = [getattr(pipe, name) for name in (*family.text_encoders, family.network, "vae")]
    return [part for part in parts if part is not None]


def _freeze(pipe: Any, family: Family) -> None:
    for part in _parts(pipe, family):
        part.requires_grad_(False)
        part.eval()


def _make_trainable(network: Any, lora: LoRA | None, *, seed: int, checkpointing: bool) -> None:
    if lora is None:
        network.requires_grad_(True)
    else:
        attach(network, lora, seed=seed)
        network.eval()  # peft adds its modules in training mode
    if checkpointing:
        network.enable_gradient_checkpointing()


def _set_up_decoder(vae: Any, family: Family, *, slicing: bool, tiling: bool, checkpointing: bool) -> None:
    """Apply the decoder's switches.

    Raises:
        ConfigError: if it would overflow.
    """
    if vae.dtype == torch.float16 and family.vae_overflows and vae.config.force_upcast:
        raise ConfigError(
            f"vae_dtype: this {family.pipeline}'s VAE overflows in fp16; leave vae_dtype out, which keeps it in fp32, "
            "or use a checkpoint whose VAE was made for fp16 (its config says force_upcast: false)."
        )
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    if checkpointing:
        vae.enable_gradient_checkpointing()


def _move(pipe: Any, family: Family, device: torch.device) -> None:
    """Part by part: `pipe.to` warns of half precision on a CPU, which autocast makes possible."""
    for part in _parts(pipe, family):
        part.to(device)
