"""What does not load back as the trained model is caught: wrong names, no scale, damaged files."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rsaft.backbones.comfyui import COMFYUI_FILE
from rsaft.backbones.export import LORA_FILE, PEFT_FILE, export
from rsaft.backbones.round_trip import network_difference
from rsaft.errors import ExportError
from tests.backbones.exports import FAMILIES, fresh_pipeline, images_of, network_of, reload_difference
from tests.helpers import randomize_


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequent_mistake_changes_no_image_and_is_caught(tiny_of, trained, tmp_path, family):
    # PeftModel.save_pretrained, then pipe.load_lora_weights: peft's names are none of diffusers'.
    backbone = trained(family)
    wrong = fresh_pipeline(tiny_of(family))
    wrapped = get_peft_model(
        network_of(wrong), LoraConfig(r=3, lora_alpha=7, target_modules=list(backbone.lora.targets))
    )
    randomize_([p for p in wrapped.parameters() if p.requires_grad])
    wrapped.save_pretrained(str(tmp_path))
    pipe = fresh_pipeline(tiny_of(family))
    base = images_of(pipe)
    try:
        pipe.load_lora_weights(str(tmp_path), weight_name=PEFT_FILE)
    except (ValueError, KeyError):
        pass  # Flux's loader takes it for another format and stumbles; the others say nothing
    else:
        assert torch.equal(images_of(pipe), base)
    images = images_of(backbone.pipe)
    with pytest.raises(ExportError, match=r"no adapter is found|does not load back"):
        reload_difference(backbone, tmp_path, PEFT_FILE)
    assert torch.equal(images_of(backbone.pipe), images)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_the_adapters_scale_is_caught(trained, tmp_path, family):
    # save_lora_weights without the adapter's metadata: diffusers then takes alpha for the rank.
    backbone = trained(family)
    layers = {f"{backbone.family.network}_lora_layers": get_peft_model_state_dict(backbone.network)}
    backbone.pipe.save_lora_weights(tmp_path, weight_name=LORA_FILE, **layers)
    with pytest.raises(ExportError, match="comes back with another adapter"):
        reload_difference(backbone, tmp_path)


def _truncate(data):
    return data[: len(data) // 2]


def _zero_the_tail(data):
    return data[:-64] + bytes(64)


def _flip_a_bit(data):
    return data[:-1] + bytes([data[-1] ^ 0x40])


@pytest.mark.parametrize("damage", [_truncate, _zero_the_tail, _flip_a_bit])
@pytest.mark.parametrize(("format", "file"), [("diffusers", LORA_FILE), ("comfyui", COMFYUI_FILE)])
def test_a_damaged_adapter_file_is_caught(trained, tmp_path, format, file, damage):
    backbone = trained("sd3")
    images = images_of(backbone.pipe)
    export(backbone, tmp_path, format)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(ExportError, match=r"does not load back|comes back with another adapter"):
        reload_difference(backbone, tmp_path, file, exact=format == "diffusers")
    assert torch.equal(images_of(backbone.pipe), images)
    assert list(backbone.network.peft_config) == ["default"]


@pytest.mark.parametrize("damage", [_zero_the_tail, _flip_a_bit])
def test_a_damaged_network_file_is_caught(fully_trained, tmp_path, damage):
    backbone = fully_trained("flux")
    export(backbone, tmp_path)
    (file,) = (tmp_path / "transformer").glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    reloaded = type(backbone.network).from_pretrained(tmp_path, subfolder="transformer")
    with pytest.raises(ExportError, match="comes back changed"):
        network_difference(backbone, reloaded, backbone.network.state_dict(), source="here")
    assert backbone.network is backbone.pipe.transformer


@pytest.mark.parametrize("family", ["sd", "sd35"])
def test_an_adapter_that_a_layer_lost_is_caught(trained, tmp_path, family):
    backbone = trained(family)
    tensors = load_file(export(backbone, tmp_path, "comfyui").folder / COMFYUI_FILE)
    lost = next(iter(sorted(tensors))).partition(".lora_")[0].removesuffix(".alpha")
    save_file({name: t for name, t in tensors.items() if not name.startswith(lost)}, tmp_path / "lost.safetensors")
    with pytest.raises(ExportError, match="comes back without its adapter"):
        reload_difference(backbone, tmp_path, "lost.safetensors", exact=False)
