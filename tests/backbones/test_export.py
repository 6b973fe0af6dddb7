"""Exports of every family load in a fresh pipeline as exactly the trained model, which is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from rsaft.backbones import load_backbone
from rsaft.backbones.comfyui import COMFYUI_FILE
from rsaft.backbones.export import FORMATS, LORA_FILE, check_format, export
from rsaft.errors import ConfigError
from tests.backbones.exports import FAMILIES, SCALED, fresh_pipeline, images_of, network_of
from tests.helpers import randomize_


# Merging rounds W + dW once more than the adapter; ComfyUI's files of transformers hold B alpha / rank, rounded.
def _tolerance(family, format):
    if format == "merged":
        return 1e-4
    return 1e-5 if format == "comfyui" and family in ("sd3", "sd35", "flux") else 0.0


def _load(pipe, folder, format):
    """What the export's own line says, or in ComfyUI's case the nearest that diffusers can do; the pipeline."""
    if format == "merged":
        return fresh_pipeline(folder)
    if format == "peft":
        PeftModel.from_pretrained(network_of(pipe), str(folder))
    else:
        pipe.load_lora_weights(str(folder), weight_name=COMFYUI_FILE if format == "comfyui" else LORA_FILE)
    return pipe


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_pipeline_with_the_export_gives_the_trained_images(
    tiny_of, trained, tmp_path, family, format, record_property
):
    backbone = trained(family)
    done = export(backbone, tmp_path / "export", format)
    pipe = fresh_pipeline(tiny_of(family))
    base, expected = images_of(pipe), images_of(backbone.pipe)
    difference = float((images_of(_load(pipe, done.folder, format)) - expected).abs().max())
    record_property("network", done.difference)
    record_property("images", difference)
    assert difference <= _tolerance(family, format)
    assert done.difference <= _tolerance(family, format)
    assert (base - expected).abs().max() > 1e-3


@pytest.mark.parametrize("format", ["diffusers", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_trained_network_comes_back_exactly(tiny_of, fully_trained, tmp_path, family, format):
    backbone = fully_trained(family)
    done = export(backbone, tmp_path, format)
    pipe = fresh_pipeline(tmp_path if format == "merged" else tiny_of(family))
    base = images_of(fresh_pipeline(tiny_of(family)))
    if format == "diffusers":
        name = backbone.family.network
        network = type(backbone.network).from_pretrained(tmp_path, subfolder=name)
        setattr(pipe, name, network.eval())
    assert torch.equal(images_of(pipe), images_of(backbone.pipe))
    assert done.difference == 0.0
    assert not torch.equal(base, images_of(pipe))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_an_export_leaves_the_backbone_as_it_was(trained, tmp_path, family, format):
    backbone = trained(family)
    network, parameters = backbone.network, backbone.parameters()
    values = [p.detach().clone() for p in parameters]
    named = [(n, id(p), p.requires_grad) for n, p in network.named_parameters()]
    state, images = torch.get_rng_state(), images_of(backbone.pipe)
    export(backbone, tmp_path, format)
    assert backbone.network is network is network_of(backbone.pipe)
    assert [(n, id(p), p.requires_grad) for n, p in network.named_parameters()] == named
    assert all(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))
    assert list(network.peft_config) == ["default"]
    assert not any(m.training for m in network.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images_of(backbone.pipe), images)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_weights_are_exported_with_the_same_bytes(trained, tmp_path, format):
    def files(name):
        folder = export(trained("sd3"), tmp_path / name, format).folder
        return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    first = files("0")  # safetensors alone orders its metadata at random
    assert all(files(name) == first for name in "123")


def test_peft_knows_the_adapter_by_its_config(trained, tmp_path):
    backbone = trained("sd35")
    export(backbone, tmp_path, "peft")
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 7, backbone.source)
    assert config.target_modules == set(backbone.lora.targets)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_half_precision_exports_are_exact_up_to_merging(tiny_of, tmp_path, family, format):
    backbone = load_backbone(tiny_of(family), lora=SCALED, dtype="bf16")
    randomize_(backbone.parameters())
    difference = export(backbone, tmp_path, format).difference
    # merged and ComfyUI's transformers: a few units in bf16's last place, 2^-7
    assert difference <= (0.0 if format in ("diffusers", "peft") else 4 * 2**-7)


def test_without_text_encoders_the_adapter_is_exported_and_a_whole_pipeline_refused(tiny_of, tmp_path):
    backbone = load_backbone(tiny_of("sd3"), lora=SCALED, prompt_cache=tmp_path / "cache")
    randomize_(backbone.parameters())
    backbone.drop_text_encoders()
    assert export(backbone, tmp_path / "adapter").difference == 0.0
    with pytest.raises(ConfigError, match="text encoders were dropped"):
        export(backbone, tmp_path / "merged", "merged")


@pytest.mark.parametrize("lora", [SCALED, None], ids=["lora", "full"])
def test_a_compiled_network_is_exported_without_compiling_it_again(tiny_of, tmp_path, lora):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    backbone = load_backbone(tiny_of("flux"), lora=lora)
    randomize_(backbone.parameters())
    backbone.network.compile(backend=backend)
    assert export(backbone, tmp_path).difference == 0.0
    assert not compiled


def test_the_line_says_how_to_load_it(trained, fully_trained, tmp_path):
    lines = {format: export(trained("sd3"), tmp_path / format, format).load for format in FORMATS}
    assert lines["diffusers"] == f'pipe.load_lora_weights("{tmp_path}/diffusers", weight_name="{LORA_FILE}")'
    assert lines["peft"] == f'PeftModel.from_pretrained(pipe.transformer, "{tmp_path}/peft")'
    assert lines["merged"] == f'pipe = StableDiffusion3Pipeline.from_pretrained("{tmp_path}/merged")'
    assert lines["comfyui"].startswith(f"copy {tmp_path / 'comfyui' / COMFYUI_FILE} into ComfyUI's models/loras")
    full = export(fully_trained("sd3"), tmp_path / "full").load
    assert (
        full == f'pipe.transformer = SD3Transformer2DModel.from_pretrained("{tmp_path}/full", subfolder="transformer")'
    )


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_fits_an_adapter(format):
    assert check_format(format, is_lora=True) == format


@pytest.mark.parametrize(
    ("format", "is_lora", "message"),
    [
        ("onnx", True, "got 'onnx'; there is none; allowed are diffusers, peft, merged, comfyui"),
        ("peft", False, "peft holds an adapter, and the whole network was trained; allowed are diffusers, merged"),
        ("comfyui", False, "comfyui holds an adapter"),
    ],
)
def test_a_format_that_does_not_fit_is_refused_with_those_that_do(format, is_lora, message):
    with pytest.raises(ConfigError, match=message):
        check_format(format, is_lora=is_lora)


def test_a_full_backbone_is_not_exported_as_an_adapter(fully_trained, tmp_path):
    with pytest.raises(ConfigError, match="the whole network was trained"):
        export(fully_trained("sd"), Path(tmp_path), "comfyui")
    assert not list(tmp_path.iterdir())
