"""Files for ComfyUI: its own rule finds every layer's update under its own name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rsaft.backbones import LoRA, load_backbone
from rsaft.backbones.comfyui import COMFYUI_FILE
from rsaft.backbones.export import export
from rsaft.backbones.round_trip import layer_update
from rsaft.errors import ConfigError
from tests.backbones.exports import FAMILIES


def _comfyui_updates(path, network):
    """scale B A of each layer by ComfyUI's rule: alpha / rank if there is an alpha, else 1."""
    tensors = load_file(path)
    down, up = ("lora_down", "lora_up") if network == "unet" else ("lora_A", "lora_B")
    layers = {name.removesuffix(f".{up}.weight") for name in tensors if name.endswith(f".{up}.weight")}
    updates = {}
    for layer in layers:
        a, b = tensors.pop(f"{layer}.{down}.weight"), tensors.pop(f"{layer}.{up}.weight")
        scale = float(tensors.pop(f"{layer}.alpha")) / len(a) if f"{layer}.alpha" in tensors else 1.0
        updates[layer] = scale * (b.double() @ a.double())
    assert tensors == {}
    return updates


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyuis_rule_finds_every_layers_update_under_comfyuis_name(trained, tmp_path, family):
    backbone = trained(family)
    export(backbone, tmp_path, "comfyui")
    is_unet = backbone.family.network == "unet"
    expected = {
        "lora_unet_" + name.replace(".", "_") if is_unet else f"transformer.{name}": layer_update(layer)
        for name, layer in backbone.network.named_modules()
        if "lora_A" in dict(layer.named_children())
    }
    found = _comfyui_updates(tmp_path / COMFYUI_FILE, backbone.family.network)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name].float(), expected[name], rtol=1e-5, atol=1e-7) for name in expected)


def test_comfyuis_names_of_stable_diffusion_are_kohyas(trained, tmp_path):
    export(trained("sd"), tmp_path, "comfyui")
    tensors = load_file(tmp_path / COMFYUI_FILE)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} <= tensors.keys()
    assert {float(t) for name, t in tensors.items() if name.endswith(".alpha")} == {7.0}


def test_an_adapter_on_layers_that_comfyui_has_no_name_for_is_refused(tiny_of, tmp_path):
    backbone = load_backbone(tiny_of("flux"), lora=LoRA(rank=2, targets=("to_q", "x_embedder")))
    with pytest.raises(ConfigError, match=r"format comfyui: .*lies on \['x_embedder'\]; export it in another format"):
        export(backbone, tmp_path, "comfyui")
    assert export(backbone, tmp_path).difference == 0.0
