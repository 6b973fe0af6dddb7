"""Save what was trained so that diffusers gives exactly the trained model back, and prove it at save time."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rsaft.backbones.lora import ADAPTER
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import ExportError

LORA_FILE = "pytorch_lora_weights.safetensors"
_VERIFY = "rsaft_verify"


def export_weights(backbone: DiffusersBackbone, folder: Path) -> float:
    """Write the trained weights into `folder`, load them back with diffusers, and compare the network's outputs.

    LoRA: `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`; the adapter's metadata goes into
    the file, because without it diffusers loads alpha as rank. Full fine-tuning: `unet/`, for
    `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`.

    Returns:
        The largest absolute difference between the trained and the reloaded network on a fixed input: 0.0.

    Raises:
        ExportError: if the reloaded network differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected = _probe(backbone)
    found = _lora_round_trip(backbone, folder) if backbone.lora else _full_round_trip(backbone, folder)
    difference = float((expected - found).abs().max())
    if difference != 0.0:
        raise ExportError(
            f"export to {folder}: the reloaded network differs from the trained one by {difference:.3g}, and must be "
            "equal; keep the run's own checkpoint and report this."
        )
    return difference


def _lora_round_trip(backbone: DiffusersBackbone, folder: Path) -> torch.Tensor:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe = backbone.pipe
    state = get_peft_model_state_dict(pipe.unet, adapter_name=ADAPTER)
    metadata = _collate_lora_metadata({"unet": pipe.unet})
    for settings in metadata.values():
        settings["target_modules"] = sorted(settings["target_modules"])  # peft keeps a set
    pipe.save_lora_weights(folder, unet_lora_layers=state, weight_name=LORA_FILE, **metadata)
    _sort_header(folder / LORA_FILE)
    with _quiet():
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=_VERIFY)
    if _VERIFY not in pipe.unet.peft_config:
        raise ExportError(
            f"export to {folder}: diffusers finds no adapter in {LORA_FILE}; keep the run's own checkpoint and report "
            "this."
        )
    try:
        pipe.unet.set_adapter(_VERIFY)
        return _probe(backbone)
    finally:
        pipe.unet.set_adapter(ADAPTER)
        pipe.unet.delete_adapters(_VERIFY)


def _sort_header(path: Path) -> None:
    """Write a safetensors file's header again with sorted keys: safetensors orders metadata at random, and the same
    adapter is to give the same bytes.
    """
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors behind it to 8 bytes
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def _full_round_trip(backbone: DiffusersBackbone, folder: Path) -> torch.Tensor:
    network = backbone.network
    network.save_pretrained(folder / "unet", safe_serialization=True)
    reloaded = type(network).from_pretrained(folder, subfolder="unet", dtype=next(network.parameters()).dtype)
    trained = backbone.network
    try:
        backbone.network = reloaded.to(backbone.device).eval()
        return _probe(backbone)
    finally:
        backbone.network = trained


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of diffusers and peft on what is meant here: no text encoder keys, a second adapter."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _probe(backbone: DiffusersBackbone) -> torch.Tensor:
    """The denoiser's output on a fixed input; the empty prompt, because a prompt cache always holds it."""
    noise = torch.randn((1, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    denoise = backbone.denoiser([""], guidance=1.0, detach_unconditional=False)
    return denoise(noise.to(backbone.device, backbone.dtype), 500.0)
