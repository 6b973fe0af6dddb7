"""Save what was trained so that others load exactly the trained model, and prove it at save time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rsaft.backbones.comfyui import COMFYUI_FILE, comfyui_tensors
from rsaft.backbones.lora import ADAPTER
from rsaft.backbones.merged import save_merged
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.backbones.quiet import silent_bars
from rsaft.backbones.round_trip import adapter_difference, network_difference
from rsaft.errors import ConfigError, ExportError

Format = Literal["diffusers", "peft", "merged", "comfyui"]
FORMATS: tuple[Format, ...] = get_args(Format)
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's own names

# Largest difference that is no mistake: merging rounds W + dW, and ComfyUI's files hold a rounded alpha / rank.
_ROUNDING: dict[Format, float] = {"diffusers": 0.0, "peft": 0.0, "merged": 1e-4, "comfyui": 1e-5}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how it is loaded."""

    folder: Path
    difference: float  # largest absolute one between the trained and the reloaded network, on a fixed input
    load: str  # the one line that loads it


def export(backbone: DiffusersBackbone, folder: Path, format: Format = "diffusers") -> Exported:
    """Write the trained weights into `folder`, load them back, and compare the network's outputs.

    - diffusers: an adapter file for `pipe.load_lora_weights`; without an adapter, the network's folder.
    - peft: an adapter for `PeftModel.from_pretrained(pipe.unet, folder)`, or `pipe.transformer`. `load_lora_weights`
      takes no such file.
    - merged: an ordinary pipeline folder, the adapter added to the weights.
    - comfyui: an adapter file for ComfyUI's "Load LoRA".

    The backbone is left as it was. The same weights give the same bytes.

    Raises:
        ConfigError: if there is no such format, or it does not fit this backbone.
        ExportError: if the reloaded network differs: at all for diffusers and peft, by more than rounding for others.
    """
    check_format(format, is_lora=backbone.lora is not None)
    folder.mkdir(parents=True, exist_ok=True)
    difference = _WRITERS[format](backbone, folder)
    allowed = _rounding(backbone, format)
    if not difference <= allowed:
        raise ExportError(
            f"export to {folder}: the reloaded network differs from the trained one by {difference:.3g}, and "
            f"{_limit(allowed)}; keep the run's own checkpoint and report this."
        )
    return Exported(folder, difference, loading_line(backbone, folder, format))


def export_weights(backbone: DiffusersBackbone, folder: Path) -> float:
    """Export a checkpoint's own adapter (or network) in the format diffusers; see `export`.

    Returns:
        The largest absolute difference between the trained and the reloaded network on a fixed input: 0.0.
    """
    return export(backbone, folder).difference


def check_format(format: str, *, is_lora: bool) -> Format:
    """The format, unless it does not exist, or holds an adapter and there is none.

    Raises:
        ConfigError: saying which formats fit.
    """
    fitting: tuple[Format, ...] = FORMATS if is_lora else ("diffusers", "merged")
    for fits in fitting:
        if format == fits:
            return fits
    reason = f"{format} holds an adapter, and the whole network was trained" if format in FORMATS else "there is none"
    raise ConfigError(f"format: got '{format}'; {reason}; allowed are {', '.join(fitting)}.")


def loading_line(backbone: DiffusersBackbone, folder: Path, format: Format = "diffusers") -> str:
    """The line of Python (for ComfyUI, the sentence) that loads an export."""
    network = backbone.family.network
    if format == "merged":
        return f'pipe = {backbone.family.pipeline}.from_pretrained("{folder}")'
    if format == "peft":
        return f'PeftModel.from_pretrained(pipe.{network}, "{folder}")'
    if format == "comfyui":
        return f'copy {folder / COMFYUI_FILE} into ComfyUI\'s models/loras, and choose it in "Load LoRA"'
    if backbone.lora is not None:
        return f'pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")'
    name = type(backbone.network).__name__
    return f'pipe.{network} = {name}.from_pretrained("{folder}", subfolder="{network}")'


def _to_diffusers(backbone: DiffusersBackbone, folder: Path) -> float:
    if backbone.lora is None:
        backbone.network.save_pretrained(folder / backbone.family.network, safe_serialization=True)
        return _reloaded_network_difference(backbone, folder, backbone.network.state_dict())
    from diffusers.training_utils import _collate_lora_metadata

    pipe, network = backbone.pipe, backbone.family.network
    metadata = _collate_lora_metadata({network: backbone.network})  # without it diffusers takes alpha for the rank
    for settings in metadata.values():
        settings["target_modules"] = sorted(settings["target_modules"])  # peft keeps a set
    layers = {f"{network}_lora_layers": _adapter(backbone)}
    pipe.save_lora_weights(folder, weight_name=LORA_FILE, **layers, **metadata)
    _sort_header(folder / LORA_FILE)
    return _reloaded_by_diffusers(backbone, folder / LORA_FILE, exact=True)


def _to_peft(backbone: DiffusersBackbone, folder: Path) -> float:
    from peft import LoraConfig, PeftModel

    found: LoraConfig = backbone.network.peft_config[ADAPTER]
    config = replace(found, base_model_name_or_path=backbone.source, inference_mode=True)
    config.save_pretrained(str(folder))
    settings = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # peft keeps a set
    (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save({f"base_model.model.{name}": tensor for name, tensor in _adapter(backbone).items()}, folder / PEFT_FILE)
    # PeftModel puts the adapter into the network itself; the wrapper is not needed.
    return adapter_difference(
        backbone,
        lambda name: PeftModel.from_pretrained(backbone.network, str(folder), adapter_name=name),
        source=str(folder / PEFT_FILE),
        exact=True,
    )


def _to_merged(backbone: DiffusersBackbone, folder: Path) -> float:
    return _reloaded_network_difference(backbone, folder, save_merged(backbone, folder))


def _to_comfyui(backbone: DiffusersBackbone, folder: Path) -> float:
    config = backbone.network.peft_config[ADAPTER]
    tensors = comfyui_tensors(
        _adapter(backbone), network=backbone.family.network, rank=config.r, alpha=config.lora_alpha
    )
    _save(tensors, folder / COMFYUI_FILE)
    return _reloaded_by_diffusers(backbone, folder / COMFYUI_FILE, exact=False)  # it reads kohya's names too


_WRITERS: dict[Format, Callable[[DiffusersBackbone, Path], float]] = {
    "diffusers": _to_diffusers,
    "peft": _to_peft,
    "merged": _to_merged,
    "comfyui": _to_comfyui,
}


def _reloaded_by_diffusers(backbone: DiffusersBackbone, file: Path, *, exact: bool) -> float:
    return adapter_difference(
        backbone,
        lambda name: backbone.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name),
        source=str(file),
        exact=exact,
    )


def _reloaded_network_difference(backbone: DiffusersBackbone, folder: Path, written: dict[str, Tensor]) -> float:
    kind, name = type(backbone.network), backbone.family.network
    dtype = next(backbone.network.parameters()).dtype
    with silent_bars():
        reloaded = kind.from_pretrained(folder, subfolder=name, dtype=dtype)
    return network_difference(backbone, reloaded, written, source=str(folder / name))


def _adapter(backbone: DiffusersBackbone) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(backbone.network, adapter_name=ADAPTER)


def _rounding(backbone: DiffusersBackbone, format: Format) -> float:
    """What rounding may do to an output of about 1; the weights are compared besides, and more closely."""
    if _ROUNDING[format] == 0.0:
        return 0.0
    return max(_ROUNDING[format], 32 * torch.finfo(backbone.compute_dtype).eps)


def _limit(allowed: float) -> str:
    return "must be equal" if allowed == 0.0 else f"rounding explains {allowed:.3g}"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _sort_header(path: Path) -> None:
    """Write a safetensors file's header again with sorted keys: safetensors orders metadata at random, and the same
    adapter is to give the same bytes.
    """
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:end])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors behind it to 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
