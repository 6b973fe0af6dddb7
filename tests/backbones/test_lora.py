"""Adapters: attached where asked, exported so that diffusers gives exactly the trained model back."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rsaft.backbones import LoRA, export_weights, load_backbone
from rsaft.backbones.export import LORA_FILE
from rsaft.errors import ConfigError, ExportError, RsaftError
from tests.helpers import PROMPTS, randomize_

ALPHA_IS_NOT_RANK = LoRA(rank=2, alpha=6)


@pytest.fixture
def trained(tiny_sd):
    """An adapter that does something, and whose scale alpha / rank is 3."""
    backbone = load_backbone(tiny_sd, lora=ALPHA_IS_NOT_RANK)
    randomize_(backbone.parameters())
    return backbone


def _images(pipe):
    pipe.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(0)
    return pipe(list(PROMPTS[:2]), num_inference_steps=3, generator=source, output_type="pt").images


def _fresh(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.unet.eval()
    return pipe


def test_a_fresh_pipeline_with_the_exported_adapter_gives_exactly_the_trained_images(trained, tiny_sd, tmp_path):
    assert export_weights(trained, tmp_path) == 0.0
    fresh = _fresh(tiny_sd)
    untrained = _images(fresh)
    fresh.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    expected = _images(trained.pipe)
    assert (_images(fresh) - expected).abs().max() == 0.0
    assert (untrained - expected).abs().max() > 1e-3


def test_the_adapters_scale_is_in_the_file(trained, tmp_path):
    from safetensors import safe_open

    export_weights(trained, tmp_path)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        assert '"unet.lora_alpha": 6' in file.metadata()["lora_adapter_metadata"]
    assert all(name.startswith("unet.") for name in load_file(tmp_path / LORA_FILE))


def _wrong_keys(pipe, folder):
    """Peft's own keys, without the pipeline's prefix: what `PeftModel.save_pretrained` writes."""

    def save(folder, unet_lora_layers, weight_name, **metadata):
        save_file({f"base_model.model.{k}": v for k, v in unet_lora_layers.items()}, folder / weight_name)

    return save


def _no_scale(pipe, folder):
    """diffusers' keys without the adapter's metadata, so that alpha is taken for the rank."""

    def save(folder, unet_lora_layers, weight_name, **metadata):
        type(pipe).save_lora_weights(folder, unet_lora_layers=unet_lora_layers, weight_name=weight_name)

    return save


@pytest.mark.parametrize("wrong", [_wrong_keys, _no_scale])
def test_a_file_that_does_not_give_the_trained_model_back_is_caught_at_save_time(trained, tmp_path, monkeypatch, wrong):
    before = _images(trained.pipe)
    monkeypatch.setattr(trained.pipe, "save_lora_weights", wrong(trained.pipe, tmp_path), raising=False)
    with pytest.raises(ExportError, match="keep the run's own checkpoint"):
        export_weights(trained, tmp_path)
    assert torch.equal(_images(trained.pipe), before)


def test_keys_without_the_prefix_load_nothing_in_diffusers(trained, tiny_sd, tmp_path):
    # Why the export is verified: diffusers takes such a file without an error.
    state = get_peft_model_state_dict(trained.pipe.unet, adapter_name="default")
    save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, tmp_path / LORA_FILE)
    fresh = _fresh(tiny_sd)
    before = _images(fresh)
    try:
        fresh.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    except ValueError:
        return
    assert torch.equal(_images(fresh), before)


def test_after_an_export_parameters_order_and_gradients_are_as_before(trained, tmp_path):
    before = trained.parameters()
    names = {n: p.requires_grad for n, p in trained.network.named_parameters()}
    values = [p.detach().clone() for p in before]
    export_weights(trained, tmp_path)
    assert [id(p) for p in trained.parameters()] == [id(p) for p in before]
    assert {n: p.requires_grad for n, p in trained.network.named_parameters()} == names
    assert all(torch.equal(p, v) for p, v in zip(before, values, strict=True))
    assert not any(m.training for m in trained.network.modules())
    assert export_weights(trained, tmp_path) == 0.0  # a second time, over the first


def test_an_export_leaves_torchs_global_generator_alone(trained, tmp_path):
    state = torch.get_rng_state()
    export_weights(trained, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_exports_are_exact_in_other_precisions(tiny_sd, tmp_path, dtype):
    backbone = load_backbone(tiny_sd, lora=ALPHA_IS_NOT_RANK, dtype=dtype)
    randomize_(backbone.parameters())
    assert export_weights(backbone, tmp_path) == 0.0


def test_a_fully_trained_unet_comes_back_exactly(tiny_sd, tmp_path):
    backbone = load_backbone(tiny_sd)
    with torch.no_grad():
        for p in backbone.parameters():
            p.mul_(1.1)
    assert export_weights(backbone, tmp_path) == 0.0
    fresh = _fresh(tiny_sd)
    fresh.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").eval()
    assert torch.equal(_images(fresh), _images(backbone.pipe))
    assert backbone.network is backbone.pipe.unet


def test_a_new_adapter_changes_nothing(tiny_sd):
    plain, adapted = load_backbone(tiny_sd), load_backbone(tiny_sd, lora=LoRA(rank=4, alpha=4))
    assert torch.equal(_images(plain.pipe), _images(adapted.pipe))


def test_an_adapters_start_is_fixed_by_its_seed_and_draws_nothing_global(tiny_sd):
    state = torch.get_rng_state()
    a, b, c = (load_backbone(tiny_sd, lora=LoRA(rank=2), seed=s).parameters() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a, c, strict=True))


def test_size_and_scale_of_the_adapter_by_hand(tiny_sd):
    # One factor pair of rank 3 on every to_q, at widths 8 and 16.
    backbone = load_backbone(tiny_sd, lora=LoRA(rank=3, alpha=6, targets=("to_q",)))
    layers = [m for n, m in backbone.network.named_modules() if n.endswith("to_q")]
    assert len(backbone.parameters()) == 2 * len(layers)
    assert {p.shape[0] for n, p in backbone.network.named_parameters() if "lora_A" in n} == {3}
    assert {m.scaling["default"] for m in layers} == {2.0}


def test_targets_that_match_no_layer_are_refused_with_those_there_are(tiny_sd):
    with pytest.raises(ConfigError, match=r"no linear layer ends in one of \['to_z'\].*'to_k', 'to_out.0', 'to_q'"):
        load_backbone(tiny_sd, lora=LoRA(targets=("to_z",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank >= 1; got 0"),
        ({"alpha": 0}, r"alpha > 0; got 0"),
        ({"dropout": 0.1}, r"dropout is 0; got 0\.1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LoRA(**settings)
    assert isinstance(caught.value, RsaftError)


def test_the_same_adapter_is_exported_with_the_same_bytes(tiny_sd, tmp_path):
    backbone = load_backbone(tiny_sd, lora=LoRA(rank=2, alpha=6.0))
    randomize_(backbone.parameters())
    for name in map(str, range(6)):  # safetensors alone orders its metadata at random
        export_weights(backbone, tmp_path / name)
    files = {(tmp_path / name / LORA_FILE).read_bytes() for name in map(str, range(6))}
    assert len(files) == 1
