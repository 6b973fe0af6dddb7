"""What `load_backbone` makes of a folder, what it refuses, and that it says nothing it need not say."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch

from rsaft.backbones import LoRA, load_backbone
from rsaft.errors import ConfigError
from rsaft.testbed.tiny import TINY_FAMILIES, tiny_pipeline

NAMES = {"sd35": "sd3", "schnell": "flux"}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_family_is_recognised_by_its_pipeline(tiny_of, family):
    backbone = load_backbone(tiny_of(family))
    assert backbone.family.name == NAMES.get(family, family)
    assert backbone.network is getattr(backbone.pipe, backbone.family.network)
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.source == str(tiny_of(family))


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_all_but_what_is_trained_is_frozen_and_everything_is_in_eval_mode(tiny_of, family, lora):
    backbone = load_backbone(tiny_of(family), lora=lora)
    parts = {n: p for n, p in backbone.pipe.components.items() if isinstance(p, torch.nn.Module)}
    assert set(parts) == {*backbone.family.text_encoders, backbone.family.network, "vae"}
    assert not any(module.training for part in parts.values() for module in part.modules())
    trainable = {(n, p) for n, part in parts.items() for p, v in part.named_parameters() if v.requires_grad}
    assert trainable
    assert {n for n, _ in trainable} == {backbone.family.network}
    assert len(trainable) == len(backbone.parameters())
    if lora is not None:
        assert all("lora_" in name for _, name in trainable)
    else:
        assert len(trainable) == len(list(backbone.network.parameters()))


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_loading_says_nothing(tiny_of, family, capfd, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        load_backbone(tiny_of(family), lora=LoRA(rank=2), dtype="fp16")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_real_warning_is_still_heard(tiny_of, monkeypatch):
    import diffusers

    real = diffusers.StableDiffusionPipeline.from_pretrained

    def warns(*args, **kwargs):
        warnings.warn("this checkpoint is odd", FutureWarning, stacklevel=1)
        return real(*args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", warns)
    with pytest.warns(FutureWarning, match="this checkpoint is odd"):
        load_backbone(tiny_of("sd"))


def test_progress_bars_are_as_before_after_loading(tiny_of):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [log.is_progress_bar_enabled() for log in (diffusers_logging, transformers_logging)]
    load_backbone(tiny_of("sd"))
    assert [log.is_progress_bar_enabled() for log in (diffusers_logging, transformers_logging)] == before


@pytest.mark.parametrize(("resolution", "shape"), [(32, (4, 16, 16)), ((24, 16), (4, 12, 8))])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_resolution_is_in_pixels(tiny_of, family, resolution, shape):
    backbone = load_backbone(tiny_of(family), resolution=resolution)
    assert backbone.latent_shape == shape
    images = backbone.decode(torch.zeros(1, *shape))
    assert images.shape[2:] == ((32, 32) if resolution == 32 else (24, 16))


@pytest.mark.parametrize(("family", "multiple"), [("sd", 2), ("sdxl", 2), ("sd3", 4), ("flux", 4)])
def test_a_resolution_that_does_not_divide_is_refused(tiny_of, family, multiple):
    with pytest.raises(ConfigError, match=rf"resolution: .* multiples of {multiple} for this model; got \(15, 15\)"):
        load_backbone(tiny_of(family), resolution=15)
    with pytest.raises(ConfigError, match="resolution"):
        load_backbone(tiny_of(family), resolution=0)


@pytest.mark.parametrize("name", ["nobody/nothing", "missing/folder/of/parts", "x" * 200])
def test_a_model_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ConfigError, match=r"model '.*': no diffusers pipeline .* give a folder") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_pipeline_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no diffusers pipeline"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("family", ["KandinskyPipeline", "WanPipeline", "StableDiffusionInpaintPipeline"])
def test_a_pipeline_of_another_family_is_refused_by_name(tmp_path, family):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family, "_diffusers_version": "0.42.1"}))
    with pytest.raises(ConfigError, match=rf"its pipeline is a {family}, and supported are") as caught:
        load_backbone(tmp_path)
    for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"):
        assert f"'{name}Pipeline'" in str(caught.value)


def test_a_folder_with_a_part_missing_is_one_sentence(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path)
    for file in (tmp_path / "vae").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=r"diffusers cannot load this StableDiffusionPipeline") as caught:
        load_backbone(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_variant_that_is_not_there_is_one_sentence(tiny_of):
    with pytest.raises(ConfigError, match=r"diffusers cannot load .*variant fp16"):
        load_backbone(tiny_of("sd3"), variant="fp16")


def test_a_variant_is_loaded(tmp_path):
    pipe = tiny_pipeline("sd3", seed=3)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = load_backbone(tmp_path, variant="fp16").network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("setting", ["dtype", "vae_dtype"])
def test_an_unknown_precision_is_refused(tiny_of, setting):
    from rsaft.backbones.load import load_backbone as unchecked

    with pytest.raises(ConfigError, match=rf"^{setting}: found 'int8', allowed are"):
        unchecked.__wrapped__(tiny_of("sd"), **{setting: "int8"})


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_length_for_t5_is_refused_where_there_is_none(tiny_of, family):
    with pytest.raises(ConfigError, match=r"max_sequence_length is T5's, and StableDiffusion.* has none; leave it out"):
        load_backbone(tiny_of(family), max_sequence_length=77)


@pytest.mark.parametrize("length", [0, 513])
def test_a_length_outside_of_what_t5_reads_is_refused(tiny_of, length):
    with pytest.raises(ConfigError, match=rf"max_sequence_length counts T5's tokens, 1 to 512; got {length}"):
        load_backbone(tiny_of("sd3"), max_sequence_length=length)


def test_a_negative_prompt_is_refused_where_there_is_no_unconditional_branch(tiny_of):
    with pytest.raises(ConfigError, match=r"negative_prompt: FluxPipeline has no unconditional branch; leave it out"):
        load_backbone(tiny_of("flux"), negative_prompt="blurred")


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_model_with_another_kind_of_scheduler_is_refused(tmp_path, family):
    from diffusers import DDIMScheduler

    pipe = tiny_pipeline(family)
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"scheduler: found DDIMScheduler, .*FlowMatchEulerDiscreteScheduler"):
        load_backbone(tmp_path).schedule(4)
