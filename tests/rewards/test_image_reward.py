"""ImageReward from tiny checkpoints in the published layout; the real layout on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rsaft
from rsaft.errors import ConfigError
from rsaft.rewards.blip import BlipParts, blip_from_published
from rsaft.rewards.image_reward import MEAN, STD, ImageReward
from rsaft.rewards.preprocess import clip_preprocess
from tests.reference.blip import published_layout, random_state, raw_score

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "on", "hill", "##s"]
PROMPTS = ("a red cat", "dogs", "a cat on a hill on a hill on a red hill")
TINY = published_layout(
    width=128, depth=2, side=32, patch=16, text_width=64, text_depth=2, vocabulary=len(WORDS) + 2, positions=40
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ImageReward as it is published, and its vocabulary beside it. Read it, never write it."""
    made = tmp_path_factory.mktemp("image_reward")
    torch.save(random_state(TINY), made / "ImageReward.pt")
    (made / "med_config.json").write_text(json.dumps({"num_attention_heads": 1, "hidden_act": "gelu"}))
    (made / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def load(folder: Path, **options) -> ImageReward:
    return ImageReward(folder, tokenizer=folder, device="cpu", **options)


def damaged(folder: Path, target: Path, change) -> Path:
    """A copy of the checkpoint with a changed state dict."""
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    change(state)
    torch.save(state, target / "ImageReward.pt")
    return target / "ImageReward.pt"


def test_the_score_is_that_of_a_literal_forward_in_float64(folder, images):
    state = {k: v.double() for k, v in random_state(TINY).items()}
    pixels = clip_preprocess(images.double(), size=32, rounding="torchvision")
    index = {word: i for i, word in enumerate(WORDS)}
    ids = [[index[w] for w in f"[CLS] {text} [SEP]".split()] for text in (PROMPTS[0], "dog ##s", PROMPTS[2])]
    expected = [(raw_score(state, pixels[i], ids[i]) - MEAN) / STD for i in range(3)]
    score = load(folder, dtype="fp64")(images.double(), PROMPTS)
    assert score.std() > 0.1
    torch.testing.assert_close(score, torch.stack(expected), rtol=0, atol=1e-10)


def test_every_tensor_of_the_file_moves_the_score(folder, images):
    still = []
    reward = load(folder)
    before = reward(images, PROMPTS)
    for part in BlipParts._fields:
        for name, p in getattr(reward, part).named_parameters():
            kept = p.data
            p.data = kept + 0.5 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
            if torch.allclose(reward(images, PROMPTS), before, rtol=0, atol=1e-5):
                still.append(name)
            p.data = kept
    assert all(name.endswith("key.bias") for name in still)  # which a softmax over keys does not feel


def test_the_published_layout_fits_with_all_its_parameters():
    layout = published_layout()
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in layout.items() if not name.endswith("position_ids")}
        state["blip.text_encoder.embeddings.position_ids"] = torch.empty(1, 512, dtype=torch.long)
    parts = blip_from_published(state, Path("ImageReward.pt"))
    used = sum(p.numel() for part in parts for p in part.parameters())
    unused = sum(state[k].numel() for k in state if k.startswith(("blip.vision_proj", "blip.text_proj")))
    assert used + unused == 446_665_953
    assert parts.vision.config.num_attention_heads == 16
    assert parts.text.config.num_attention_heads == 12
    assert parts.vision.config.image_size == 224


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.1), ("fp16", 0.02)])
def test_any_dtype_gives_fp32_scores_near_those_of_float64(folder, images, dtype, tolerance):
    score = load(folder, dtype=dtype)(images, PROMPTS)
    exact = load(folder, dtype="fp64")(images.double(), PROMPTS)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, exact.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 0.99), ("fp16", 0.999)])
def test_half_precision_keeps_the_direction_of_the_gradient(folder, images, dtype, least):
    def gradient(precision: str) -> torch.Tensor:
        x = images.clone().requires_grad_()
        return torch.autograd.grad(load(folder, dtype=precision)(x, PROMPTS).sum(), x)[0].flatten()

    assert torch.cosine_similarity(gradient(dtype), gradient("fp32"), dim=0) > least


def test_autocast_leaves_the_last_product_in_fp32(folder, images):
    reward = load(folder, dtype="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = reward(images, PROMPTS)
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())


def test_a_batch_equals_its_images_alone(folder, images):
    reward = load(folder, dtype="fp64")
    together = reward(images.double(), PROMPTS)
    alone = torch.cat([reward(images[i : i + 1].double(), PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_each_image_gets_its_own_gradient_and_no_other(folder, images):
    reward = load(folder)
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(reward(x, PROMPTS)[1], x)
    assert g[1].abs().sum() > 0
    assert g[[0, 2]].abs().sum() == 0


def test_the_gradient_is_that_of_finite_differences(folder, images):
    reward = load(folder, dtype="fp64")
    x = (0.2 + 0.6 * images.double()).requires_grad_()
    (g,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    h = 1e-5
    slope = (reward(x.detach() + h * direction, PROMPTS) - reward(x.detach() - h * direction, PROMPTS)).sum() / (2 * h)
    torch.testing.assert_close((g * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_no_weight_gets_a_gradient(folder, images):
    reward = load(folder)
    reward(images.requires_grad_(), PROMPTS).sum().backward()
    assert images.grad is not None
    assert [name for name, p in reward.named_parameters() if p.requires_grad or p.grad is not None] == []


def test_train_keeps_eval_mode(folder, images):
    reward = load(folder)
    before = reward(images, PROMPTS)
    assert reward.train() is reward
    assert not any(module.training for module in reward.modules())
    assert torch.equal(reward(images, PROMPTS), before)


def test_text_beyond_35_tokens_is_cut_off(folder, images):
    reward = load(folder)
    long = " ".join(["cat"] * 33)
    assert torch.equal(reward(images, [long] * 3), reward(images, [long + " dog"] * 3))
    shorter = " ".join(["cat"] * 32)
    assert not torch.equal(reward(images, [shorter] * 3), reward(images, [shorter + " dog"] * 3))


def test_case_does_not_matter(folder, images):
    reward = load(folder)
    assert torch.equal(reward(images, ["A RED cat"] * 3), reward(images, ["a red cat"] * 3))


def test_it_is_a_reward_of_the_public_package(folder, images):
    reward = rsaft.rewards.ImageReward(folder / "ImageReward.pt", tokenizer=folder, device="cpu")
    assert isinstance(reward, rsaft.types.Reward)
    assert torch.equal(reward(images, PROMPTS), load(folder)(images, PROMPTS))


def test_one_prompt_for_each_image(folder, images):
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        load(folder)(images, PROMPTS[:2])


def test_a_missing_key_is_named(folder, tmp_path):
    key = "blip.text_encoder.encoder.layer.1.crossattention.self.value.bias"
    file = damaged(folder, tmp_path, lambda state: state.pop(key))
    with pytest.raises(ConfigError, match=rf"'{file}' lacks the key '{key}'"):
        ImageReward(file, tokenizer=folder)


def test_an_unknown_key_is_named(folder, tmp_path):
    file = damaged(folder, tmp_path, lambda state: state.update({"blip.extra.weight": torch.zeros(1)}))
    with pytest.raises(ConfigError, match=rf"'{file}' holds 1 keys like 'blip.extra.weight'"):
        ImageReward(file, tokenizer=folder)


def test_a_key_of_another_shape_is_named(folder, tmp_path):
    key = "mlp.layers.4.weight"
    file = damaged(folder, tmp_path, lambda state: state.update({key: torch.zeros(64, 127)}))
    with pytest.raises(ConfigError, match=rf"'{file}', key '{key}' has the shape \(64, 127\), .* needs \(64, 128\)"):
        ImageReward(file, tokenizer=folder)


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(1)}}, tmp_path / "ImageReward.pt")
    with pytest.raises(ConfigError, match=r"lacks the key 'blip.text_encoder.embeddings.word_embeddings.weight'"):
        ImageReward(tmp_path, tokenizer=folder)


def test_a_damaged_file_is_named(folder, tmp_path):
    whole = (folder / "ImageReward.pt").read_bytes()
    (tmp_path / "ImageReward.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"'{tmp_path / 'ImageReward.pt'}' cannot be read"):
        ImageReward(tmp_path, tokenizer=folder)


class Loaded:
    """What a malicious checkpoint would run."""

    def __reduce__(self):
        return (print, ("run",))


def test_code_in_a_checkpoint_is_not_run(folder, tmp_path, capsys):
    torch.save({"blip": Loaded()}, tmp_path / "ImageReward.pt")
    with pytest.raises(ConfigError, match="holds Python objects besides tensors"):
        ImageReward(tmp_path, tokenizer=folder)
    assert "run" not in capsys.readouterr().out


def test_a_missing_vocabulary_is_one_sentence(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"the vocabulary of bert-base-uncased: the folder .* holds none of"):
        ImageReward(folder, tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="the vocabulary of bert-base-uncased: 'nobody/nothing' is no file"):
        ImageReward(folder, tokenizer="nobody/nothing")


def test_a_vocabulary_of_another_network_is_refused(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(ConfigError, match=r"has 13 tokens .* the checkpoint embeds 14"):
        ImageReward(folder, tokenizer=tmp_path)


def test_an_absent_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"ImageReward.pt"):
        ImageReward(tmp_path)
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        ImageReward("nobody/nothing")
