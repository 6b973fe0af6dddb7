"""Exported weights put into a freshly loaded model: an adapter of diffusers or peft, or a network's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from rsaft.backbones.export import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.backbones.quiet import silent_bars, silent_reload
from rsaft.errors import ConfigError

Kind = Literal["diffusers", "peft", "network"]


def exported_kind(folder: Path) -> Kind | None:
    """Which export a folder holds; None: none, or a whole pipeline."""
    if (folder / "model_index.json").is_file():
        return None
    if (folder / LORA_FILE).is_file():
        return "diffusers"
    if (folder / PEFT_FILE).is_file() and (folder / PEFT_CONFIG).is_file():
        return "peft"
    networks = [folder / name / "config.json" for name in ("unet", "transformer")]
    return "network" if any(path.is_file() for path in networks) else None


def exported_digest(folder: Path) -> str:
    """sha256 of the files of weights.

    Raises:
        ConfigError: if one of them is no safetensors file, or is empty.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                empty = not list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model '{path}': it cannot be read ({error}); export it again.") from error
        if empty:
            raise ConfigError(f"model '{path}': there is no tensor in it; export it again.")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def peft_base(folder: Path) -> str | None:
    """The model that a peft adapter says it was trained on."""
    try:
        settings = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return base if isinstance(base, str) and base else None


def put_exported(backbone: DiffusersBackbone, folder: Path, kind: Kind) -> None:
    """Put the weights into a model that was loaded without an adapter.

    Raises:
        ConfigError: if they do not fit it, or nothing was loaded, of which diffusers would say nothing.
    """
    network = backbone.network
    try:
        # peft draws initial values before it loads the file's
        with silent_reload(), silent_bars(), torch.random.fork_rng(devices=[]):
            if kind == "diffusers":
                backbone.pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
            elif kind == "peft":
                from peft import PeftModel

                PeftModel.from_pretrained(network, str(folder))  # into the network itself; the wrapper is not needed
            else:
                trained = type(network).from_pretrained(folder, subfolder=backbone.family.network)
                network.load_state_dict(trained.state_dict())
    except (ValueError, RuntimeError, LookupError, OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model '{folder}': it does not fit the base '{backbone.source}' ({reason}); name its own with --base."
        ) from error
    network.requires_grad_(False)
    network.eval()
    if kind != "network" and not any("lora_" in name for name, _ in network.named_parameters()):
        raise ConfigError(
            f"model '{folder}': nothing of it fits the base '{backbone.source}'; name its own base with --base."
        )
