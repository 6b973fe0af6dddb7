"""What `load_backbone` makes of a folder, what it refuses, and that it says nothing it need not say."""

from __future__ import annotations

import json
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file

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


def test_a_resolution_past_sd3s_table_of_positions_is_refused(tiny_of):
    with pytest.raises(ConfigError, match=r"table of positions ends at 32 pixels .*; got \(32, 64\)"):
        load_backbone(tiny_of("sd3"), resolution=(32, 64))


@pytest.mark.parametrize("name", ["nobody/nothing", "missing/folder/of/parts", "x" * 200])
def test_a_model_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ConfigError, match=r"model '.*': no diffusers pipeline .* give a folder") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "message"),
    [("GatedRepoError", "behind a licence; accept .* `hf auth login`"), ("RevisionNotFoundError", "no revision 'v9'")],
)
def test_a_hub_that_refuses_a_model_says_why(monkeypatch, reason, message):
    def refused(*args, **kwargs):
        raise getattr(errors, reason)("401 or 404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", refused)
    with pytest.raises(ConfigError, match=rf"model 'some/model': .*{message}") as caught:
        load_backbone("some/model", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub as a download leaves it: nobody/tiny with two revisions, of other weights each."""
    repository = tmp_path / "models--nobody--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, name in enumerate(("main", "v2")):
        commit = str(seed) * 40
        (repository / "refs" / name).write_text(commit)
        tiny_pipeline("sd", seed=seed).save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("v2", 1), ("1" * 40, 1)])
def test_a_hub_id_with_a_revision_is_loaded_from_the_local_files_in_silence(hub, revision, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone("nobody/tiny", revision=revision, local_files_only=True)
    expected = tiny_pipeline("sd", seed=seed).unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.network.state_dict().items())
    assert backbone.source == "nobody/tiny"


def test_a_hub_id_that_is_not_in_the_local_files_is_one_sentence(hub):
    with pytest.raises(ConfigError, match=r"model 'nobody/other': no diffusers pipeline") as caught:
        load_backbone("nobody/other", local_files_only=True)
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


def test_files_of_a_variant_that_was_not_asked_for_are_named(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ConfigError, match=r"its files are of the variant \['fp16'\]; set variant"):
        load_backbone(tmp_path)


def _same_weights(folder, pipe, **settings):
    loaded = load_backbone(folder, **settings).pipe
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return all(
        torch.equal(getattr(loaded, name).state_dict()[key], value)
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    )


def test_weights_in_several_files_and_variants_of_some_parts_are_loaded(tmp_path):
    # As SD3's on the hub: variants of the text encoders alone, T5 and the transformer in several files.
    pipe = tiny_pipeline("sd3", seed=3)
    pipe.save_pretrained(tmp_path)
    for folder, part, settings in (
        ("transformer", pipe.transformer, {"max_shard_size": "20KB"}),
        ("text_encoder", pipe.text_encoder, {"variant": "fp16"}),
        ("text_encoder_2", pipe.text_encoder_2, {"variant": "fp16"}),
        ("text_encoder_3", pipe.text_encoder_3, {"variant": "fp16", "max_shard_size": "10KB"}),
    ):
        (whole,) = (tmp_path / folder).glob("*.safetensors")
        part.save_pretrained(tmp_path / folder, **settings)
        if folder == "transformer":
            whole.unlink()
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    assert len(list((tmp_path / "text_encoder_3").glob("model.fp16-*.safetensors"))) > 1
    assert _same_weights(tmp_path, pipe, variant="fp16")
    assert _same_weights(tmp_path, pipe)


def test_a_checkpoint_with_bin_files_and_a_safety_checker_is_loaded_without_it(tmp_path):
    # As Stable Diffusion 1.5 was published: pickled weights with position_ids, a checker and its feature extractor.
    pipe = tiny_pipeline("sd", seed=3)
    pipe.save_pretrained(tmp_path)
    for file in list(tmp_path.rglob("*.safetensors")):
        tensors, name = load_file(file), "diffusion_pytorch_model.bin"
        if file.stem == "model":
            tensors = {f"text_model.{key}": value for key, value in tensors.items()}
            tensors["text_model.embeddings.position_ids"], name = torch.arange(12)[None], "pytorch_model.bin"
        torch.save(tensors, file.with_name(name))
        file.unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert _same_weights(tmp_path, pipe)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_network_that_takes_guidance_as_an_input_is_refused(tmp_path, family):
    pipe = tiny_pipeline(family)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    pipe.unet = type(pipe.unet)(**config | {"time_cond_proj_dim": 8})
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"network takes guidance as an input \(time_cond_proj_dim, as in LCM\)"):
        load_backbone(tmp_path)


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
