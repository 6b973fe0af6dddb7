"""Exports of every family load in a fresh pipeline as exactly the trained model, and what does not is caught."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from rsaft.backbones import LoRA, load_backbone
from rsaft.backbones.comfyui import COMFYUI_FILE
from rsaft.backbones.export import FORMATS, LORA_FILE, PEFT_FILE, check_format, export
from rsaft.backbones.round_trip import adapter_difference, layer_update, network_difference
from rsaft.errors import ConfigError, ExportError
from tests.helpers import PROMPTS, randomize_

FAMILIES = ("sd", "sdxl", "sd3", "sd35", "flux")
SCALED = LoRA(rank=3, alpha=7)  # alpha / rank is no number of the computer's

# Merging rounds W + dW once more than the adapter; ComfyUI's files of transformers hold B alpha / rank, rounded.
IMAGE_TOLERANCE = {"diffusers": 0.0, "peft": 0.0, "merged": 1e-4, "comfyui": 1e-4}


@pytest.fixture(scope="module")
def trained(tiny_of):
    """A backbone of a family whose adapter does something; made once, since an export leaves it as it was."""

    @cache
    def backbone(family):
        made = load_backbone(tiny_of(family), lora=SCALED)
        randomize_(made.parameters())
        return made

    return backbone


@pytest.fixture(scope="module")
def fully_trained(tiny_of):
    @cache
    def backbone(family):
        made = load_backbone(tiny_of(family))
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(1.1)
        return made

    return backbone


def _fresh(folder):
    """The pipeline as a user loads it, with diffusers alone."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def _images(pipe):
    pipe.set_progress_bar_config(disable=True)
    t5 = {"max_sequence_length": 16} if "transformer" in pipe.components else {}
    source = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(list(PROMPTS[:1]), generator=source, **size, **t5).images


def _load(pipe, folder, format):
    """What the export's own line says, or in ComfyUI's case the nearest that diffusers can do; the pipeline."""
    if format == "merged":
        return _fresh(folder)
    if format == "peft":
        PeftModel.from_pretrained(_network(pipe), str(folder))
    else:
        pipe.load_lora_weights(str(folder), weight_name=COMFYUI_FILE if format == "comfyui" else LORA_FILE)
    return pipe


def _network(pipe):
    return pipe.components.get("unet") or pipe.components["transformer"]


def _reload(backbone, folder, file=LORA_FILE, *, exact=True):
    """Compare a file with the trained adapter, as an export does."""
    return adapter_difference(
        backbone,
        lambda name: backbone.pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=name),
        source=file,
        exact=exact,
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_pipeline_with_the_export_gives_the_trained_images(
    tiny_of, trained, tmp_path, family, format, record_property
):
    backbone = trained(family)
    done = export(backbone, tmp_path / "export", format)
    pipe = _fresh(tiny_of(family))
    base, expected = _images(pipe), _images(backbone.pipe)
    difference = float((_images(_load(pipe, done.folder, format)) - expected).abs().max())
    record_property("network", done.difference)
    record_property("images", difference)
    assert difference <= IMAGE_TOLERANCE[format]
    assert done.difference <= IMAGE_TOLERANCE[format]
    assert (base - expected).abs().max() > 1e-3


@pytest.mark.parametrize("format", ["diffusers", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_trained_network_comes_back_exactly(tiny_of, fully_trained, tmp_path, family, format):
    backbone = fully_trained(family)
    done = export(backbone, tmp_path, format)
    pipe = _fresh(tmp_path if format == "merged" else tiny_of(family))
    base = _images(_fresh(tiny_of(family)))
    if format == "diffusers":
        name = backbone.family.network
        network = type(backbone.network).from_pretrained(tmp_path, subfolder=name)
        setattr(pipe, name, network.eval())
    assert torch.equal(_images(pipe), _images(backbone.pipe))
    assert done.difference == 0.0
    assert not torch.equal(base, _images(pipe))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_an_export_leaves_the_backbone_as_it_was(trained, tmp_path, family, format):
    backbone = trained(family)
    network, parameters = backbone.network, backbone.parameters()
    values = [p.detach().clone() for p in parameters]
    named = [(n, id(p), p.requires_grad) for n, p in network.named_parameters()]
    state, images = torch.get_rng_state(), _images(backbone.pipe)
    export(backbone, tmp_path, format)
    assert backbone.network is network is _network(backbone.pipe)
    assert [(n, id(p), p.requires_grad) for n, p in network.named_parameters()] == named
    assert all(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))
    assert list(network.peft_config) == ["default"]
    assert not any(m.training for m in network.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(_images(backbone.pipe), images)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_weights_are_exported_with_the_same_bytes(trained, tmp_path, format):
    def files(name):
        folder = export(trained("sd3"), tmp_path / name, format).folder
        return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    first = files("0")  # safetensors alone orders its metadata at random
    assert all(files(name) == first for name in "123")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequent_mistake_changes_no_image_and_is_caught(tiny_of, trained, tmp_path, family):
    # PeftModel.save_pretrained, then pipe.load_lora_weights: peft's names are none of diffusers'.
    backbone = trained(family)
    wrong = _fresh(tiny_of(family))
    wrapped = get_peft_model(_network(wrong), LoraConfig(r=3, lora_alpha=7, target_modules=list(backbone.lora.targets)))
    randomize_([p for p in wrapped.parameters() if p.requires_grad])
    wrapped.save_pretrained(str(tmp_path))
    pipe = _fresh(tiny_of(family))
    base = _images(pipe)
    try:
        pipe.load_lora_weights(str(tmp_path), weight_name=PEFT_FILE)
    except (ValueError, KeyError):
        pass  # Flux's loader takes it for another format and stumbles; the others say nothing
    else:
        assert torch.equal(_images(pipe), base)
    images = _images(backbone.pipe)
    with pytest.raises(ExportError, match=r"no adapter is found|does not load back"):
        _reload(backbone, tmp_path, PEFT_FILE)
    assert torch.equal(_images(backbone.pipe), images)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_the_adapters_scale_is_caught(trained, tmp_path, family):
    # save_lora_weights without the adapter's metadata: diffusers then takes alpha for the rank.
    from peft import get_peft_model_state_dict

    backbone = trained(family)
    layers = {f"{backbone.family.network}_lora_layers": get_peft_model_state_dict(backbone.network)}
    backbone.pipe.save_lora_weights(tmp_path, weight_name=LORA_FILE, **layers)
    with pytest.raises(ExportError, match="comes back with another adapter"):
        _reload(backbone, tmp_path)


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
    images = _images(backbone.pipe)
    export(backbone, tmp_path, format)
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(ExportError, match=r"does not load back|comes back with another adapter"):
        _reload(backbone, tmp_path, file, exact=format == "diffusers")
    assert torch.equal(_images(backbone.pipe), images)
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
    with safe_open(export(backbone, tmp_path, "comfyui").folder / COMFYUI_FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    lost = next(iter(sorted(tensors))).partition(".lora_")[0].removesuffix(".alpha")
    from safetensors.torch import save_file

    save_file({name: t for name, t in tensors.items() if not name.startswith(lost)}, tmp_path / "lost.safetensors")
    with pytest.raises(ExportError, match="comes back without its adapter"):
        _reload(backbone, tmp_path, "lost.safetensors", exact=False)


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
