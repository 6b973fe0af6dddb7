"""Prompts encoded once, kept on disk, and used without the text encoders."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import rsaft
from rsaft.backbones import LoRA, export_weights, load_backbone
from rsaft.config import build_trainer, validate
from rsaft.errors import ConfigError
from rsaft.sampling import Sampling
from rsaft.testbed.tiny import TINY_FAMILIES, tiny_pipeline
from tests.helpers import PROMPTS, count_calls


def _encoder_calls(backbone, prompts):
    """The conditioning, and how many calls of text encoders it took."""
    with ExitStack() as stack:
        encoders = [getattr(backbone.pipe, name) for name in backbone.family.text_encoders]
        counts = [stack.enter_context(count_calls(encoder)) for encoder in encoders]
        conditioning = backbone.encode(prompts)
    return conditioning, sum(count.total for count in counts)


def _equal(a, b):
    return torch.equal(a.text, b.text) and (a.pooled is b.pooled is None or torch.equal(a.pooled, b.pooled))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_prompt_is_encoded_once(tiny_of, tmp_path, family):
    backbone = load_backbone(tiny_of(family), prompt_cache=tmp_path)
    fresh = load_backbone(tiny_of(family)).encode(PROMPTS)
    first, calls = _encoder_calls(backbone, PROMPTS)
    assert calls == len(backbone.family.text_encoders)
    again, none = _encoder_calls(backbone, PROMPTS)
    elsewhere, neither = _encoder_calls(load_backbone(tiny_of(family), prompt_cache=tmp_path), PROMPTS)
    assert none == neither == 0
    assert all(_equal(other, fresh) for other in (first, again, elsewhere))
    assert len(list(tmp_path.iterdir())) == len(PROMPTS)  # one file each, and no temporary one


def test_repeated_and_reordered_prompts_get_their_own_rows(tiny_of, tmp_path):
    backbone = load_backbone(tiny_of("sd3"), prompt_cache=tmp_path)
    plain = load_backbone(tiny_of("sd3"))
    backbone.encode([PROMPTS[2]])
    wanted = [PROMPTS[1], PROMPTS[2], PROMPTS[1], PROMPTS[0]]
    found, calls = _encoder_calls(backbone, wanted)
    assert calls == 3
    torch.testing.assert_close(found.text, plain.encode(wanted).text, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, plain.encode(wanted).pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_the_cache_keeps_the_encoders_precision(tiny_of, tmp_path, dtype):
    backbone = load_backbone(tiny_of("sdxl"), prompt_cache=tmp_path, dtype=dtype)
    assert _equal(backbone.encode(PROMPTS), load_backbone(tiny_of("sdxl"), dtype=dtype).encode(PROMPTS))
    assert _equal(backbone.encode(PROMPTS), load_backbone(tiny_of("sdxl"), dtype=dtype).encode(PROMPTS))


def _flip_a_bit(data):
    return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], _flip_a_bit, lambda data: b"", lambda data: b"not safetensors" * 9]
)
def test_a_damaged_entry_is_encoded_again(tiny_of, tmp_path, damage):
    backbone = load_backbone(tiny_of("sd"), prompt_cache=tmp_path)
    good = backbone.encode(PROMPTS[:1])
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(damage(data))
    again, calls = _encoder_calls(backbone, PROMPTS[:1])
    assert (calls, _equal(again, good)) == (1, True)
    assert _encoder_calls(backbone, PROMPTS[:1])[1] == 0


def test_entries_of_other_encoders_precisions_and_lengths_are_never_taken(tiny_of, tmp_path):
    other = tmp_path / "other"
    tiny_pipeline("sd3", seed=1).save_pretrained(other)
    cache = tmp_path / "cache"
    settings = [
        (tiny_of("sd3"), {}),
        (tiny_of("sd3"), {"max_sequence_length": 5}),
        (tiny_of("sd3"), {"dtype": "bf16"}),
        (other, {}),
    ]
    for number, (folder, setting) in enumerate(settings, start=1):
        _, calls = _encoder_calls(load_backbone(folder, prompt_cache=cache, **setting), PROMPTS[:1])
        assert calls == 3
        assert len(list(cache.iterdir())) == number


@pytest.mark.parametrize(("family", "guidance"), [("sd", 3.0), ("sdxl", 3.0), ("sd3", 3.0), ("flux", 3.0)])
def test_images_are_the_same_without_the_text_encoders(tiny_of, tmp_path, family, guidance):
    sampling = Sampling(2, guidance=guidance)
    expected = rsaft.sample(load_backbone(tiny_of(family)), PROMPTS, sampling, seed=0)
    backbone = load_backbone(tiny_of(family), prompt_cache=tmp_path)
    backbone.cache_prompts(PROMPTS)
    backbone.drop_text_encoders()
    assert all(getattr(backbone.pipe, name) is None for name in backbone.family.text_encoders)
    difference = (rsaft.sample(backbone, PROMPTS, sampling, seed=0) - expected).abs().max()
    assert difference <= 1e-6  # another batch of prompts in the encoder rounds differently


def test_dropped_text_encoders_leave_memory(tiny_of, tmp_path):
    import gc
    import weakref

    backbone = load_backbone(tiny_of("flux"), prompt_cache=tmp_path)
    encoders = [weakref.ref(getattr(backbone.pipe, name)) for name in backbone.family.text_encoders]
    backbone.drop_text_encoders()
    gc.collect()
    assert [encoder() for encoder in encoders] == [None, None]


def test_a_prompt_that_is_not_cached_is_one_sentence_then(tiny_of, tmp_path):
    backbone = load_backbone(tiny_of("sd"), prompt_cache=tmp_path)
    backbone.cache_prompts(["a cat"])
    backbone.drop_text_encoders()
    with pytest.raises(ConfigError, match=r"prompt 'a dog': it is not in the prompt cache, .* cache_prompts") as error:
        backbone.encode(["a cat", "a dog"])
    assert "\n" not in str(error.value)


def test_a_negative_prompt_is_cached_with_the_others(tiny_of, tmp_path):
    backbone = load_backbone(tiny_of("sd"), prompt_cache=tmp_path, negative_prompt="blurred")
    backbone.cache_prompts(["a cat"])
    backbone.drop_text_encoders()
    assert rsaft.sample(backbone, ["a cat"], Sampling(2, guidance=3.0), seed=0).isfinite().all()


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_an_adapter_is_exported_without_the_text_encoders(tiny_of, tmp_path, family):
    backbone = load_backbone(tiny_of(family), lora=LoRA(rank=2, alpha=6), prompt_cache=tmp_path / "prompts")
    backbone.drop_text_encoders()
    assert export_weights(backbone, tmp_path / "exported") == 0.0


def test_without_a_cache_nothing_can_be_cached_or_dropped(tiny_of):
    backbone = load_backbone(tiny_of("sd"))
    for call in (lambda: backbone.cache_prompts(["a"]), backbone.drop_text_encoders):
        with pytest.raises(ConfigError, match=r"has no prompt cache; give load_backbone a prompt_cache"):
            call()
    assert backbone.pipe.text_encoder is not None


def _config(tmp_path, **model):
    (tmp_path / "train.txt").write_text("a cat\na dog\n")
    (tmp_path / "eval.txt").write_text("a house\n")
    return validate(
        {
            "model": {"path": "tiny:sd3", "lora": {"rank": 2}, **model},
            "prompts": {"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.txt")},
            "algorithm": {"type": "draft", "sampling": {"num_steps": 2}},
            "rewards": {"toy": {"type": "rsaft.testbed.toy:toy_reward"}},
            "objective": {"type": "weighted_sum", "weights": {"toy": 1.0}},
            "train": {"steps": 1, "batch_size": 2, "eval_samples": 2},
        }
    )


def test_a_run_caches_its_prompts_and_trains_without_the_text_encoders(tmp_path):
    config = _config(tmp_path, prompt_cache=str(tmp_path / "cache"), drop_text_encoders=True)
    trainer = build_trainer(config, tmp_path / "run")
    assert trainer.backbone.pipe.text_encoder is None
    assert len(list((tmp_path / "cache").iterdir())) == 4  # with the empty prompt
    assert trainer.fit().step == 1


def test_a_run_without_a_cache_cannot_drop_its_text_encoders(tmp_path):
    with pytest.raises(ConfigError, match=r"no prompt cache; give load_backbone a prompt_cache"):
        build_trainer(_config(tmp_path, drop_text_encoders=True), tmp_path / "run")
