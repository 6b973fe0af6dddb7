"""An adapter under the names that ComfyUI reads (comfy/lora.py, comfy/weight_adapter/lora.py of ComfyUI, 2026).

- Stable Diffusion and SDXL: kohya's names, `lora_unet_<layer with underscores>` with `.lora_down.weight`,
  `.lora_up.weight` and `.alpha`. ComfyUI scales by alpha / rank, and does not read diffusers' own names of a UNet.
- SD3 and Flux: diffusers' names, `transformer.<layer>.lora_A.weight` and `.lora_B.weight`. ComfyUI knows no metadata
  and diffusers' SD3 no `.alpha`, so B is stored multiplied by alpha / rank, and both take the scale for 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rsaft.errors import ConfigError

COMFYUI_FILE = "comfyui_lora.safetensors"
_LAYERS = {  # where ComfyUI's tables of layers end
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding."),
    "transformer": ("transformer_blocks.", "single_transformer_blocks."),
}


def comfyui_tensors(adapter: Mapping[str, Tensor], *, network: str, rank: int, alpha: float) -> dict[str, Tensor]:
    """The tensors of a LoRA file for ComfyUI.

    Args:
        adapter: peft's names, `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
        network: "unet" or "transformer".
        rank, alpha: of the adapter, the same on every layer.

    Raises:
        ConfigError: if the adapter lies on a layer whose name in ComfyUI is not known.
    """
    unknown = sorted({name.partition(".lora_")[0] for name in adapter if not name.startswith(_LAYERS[network])})
    if unknown:
        raise ConfigError(
            f"format comfyui: names are known for layers in {list(_LAYERS[network])}, and the adapter lies on "
            f"{unknown}; export it in another format, or train with other lora.targets."
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        layer, _, factor = name.partition(".lora_")
        if network == "transformer":
            tensors[f"transformer.{name}"] = tensor * (alpha / rank) if factor == "B.weight" else tensor
        else:
            key = "lora_unet_" + layer.replace(".", "_")
            tensors[f"{key}.{'lora_down' if factor == 'A.weight' else 'lora_up'}.weight"] = tensor
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors
