"""What holds for every reward on CLIP, loaded from a tiny file in the layout that is published."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rsaft import rewards
from rsaft.errors import ConfigError
from rsaft.flatten import InputFlattened
from rsaft.rdrl.allocations import price
from rsaft.rewards.clip_tokens import like_open_clip
from rsaft.rewards.preprocess import clip_preprocess, hpsv2_preprocess
from rsaft.types import Reward
from tests.reference.open_clip import encode_image, encode_text
from tests.rewards import layouts
from tests.rewards.layouts import CONTEXT, SIDE, TEXT_HEADS, TOKENIZER, VISION_HEADS

PROMPTS = ["a cat", "two dogs", "rain on a house, and many more letters than fit"]
NAMES = ["HPSv2", "PickScore", "CLIPScore", "AestheticScore", "ICT", "HP", "MPS"]
READS_NO_PROMPT = {"AestheticScore", "HP"}

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each reward as it is published, written once. Read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    layouts.write_hpsv2(root / "HPSv2")
    layouts.write_transformers(root / "PickScore")
    layouts.write_transformers(root / "CLIPScore", activation="quick_gelu", eos=TOKENIZER.eos_token_id)
    layouts.write_aesthetic(root / "AestheticScore")
    layouts.write_ict(root / "ICT")
    layouts.write_hp(root / "HP")
    layouts.write_mps(root / "MPS")
    return {name: root / name for name in NAMES}


@pytest.fixture
def make(folders: dict[str, Path]) -> Make:
    def make(name: str, **options: Any) -> Any:
        if name == "AestheticScore":
            options = {"clip": folders[name] / "clip"} | options
        return getattr(rewards, name)(folders[name], device="cpu", **options)

    return make


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 40, 56, generator=torch.Generator().manual_seed(0)).to(dtype)


every_reward = pytest.mark.parametrize("name", NAMES)


@every_reward
def test_scores_are_one_fp32_number_an_image_and_differ(make, name):
    scores = make(name)(images(), PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert len(set(scores.tolist())) == 3


@every_reward
def test_a_reward_meets_the_protocol_and_is_a_function_of_its_inputs(make, name):
    reward = make(name)
    assert isinstance(reward, Reward)
    assert torch.equal(reward(images(), PROMPTS), reward(images(), PROMPTS))


@every_reward
def test_the_gradient_reaches_each_image_and_no_other(make, name):
    x = images().requires_grad_()
    scores = make(name, dtype="fp64")(x, PROMPTS)
    for i in range(3):
        (g,) = torch.autograd.grad(scores[i], x, retain_graph=True)
        norms = g.flatten(1).norm(dim=1)
        assert norms[i] > 0
        assert torch.isfinite(g).all()
        assert (norms > 0).sum() == 1


@every_reward
def test_an_image_alone_scores_as_in_a_batch(make, name):
    reward = make(name, dtype="fp64")
    together = reward(images(), PROMPTS)
    alone = torch.cat([reward(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@every_reward
def test_the_prompt_counts_where_there_is_one_to_read(make, name):
    reward = make(name)
    same = torch.equal(reward(images(), PROMPTS), reward(images(), ["another", "yet another", "third"]))
    assert same == (name in READS_NO_PROMPT)


@every_reward
def test_no_weight_gets_a_gradient(make, name):
    reward = make(name)
    reward(images().requires_grad_(), PROMPTS).sum().backward()
    assert len(list(reward.parameters())) > 0
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())


@every_reward
def test_train_leaves_every_part_in_eval_mode(make, name):
    reward = make(name)
    before = reward(images(), PROMPTS)
    assert reward.train() is reward
    assert not any(module.training for module in reward.modules())
    assert torch.equal(reward(images(), PROMPTS), before)


@every_reward
@pytest.mark.parametrize("dtype", ["bf16", "fp16", torch.bfloat16])
def test_a_half_precision_network_gives_fp32_scores_and_gradients(make, name, dtype):
    reward = make(name, dtype=dtype)
    assert reward.clip.network.visual_projection.weight.dtype in (torch.bfloat16, torch.float16)
    x = images().requires_grad_()
    scores = reward(x, PROMPTS)
    (g,) = torch.autograd.grad(scores.sum(), x)
    assert (scores.dtype, g.dtype) == (torch.float32, torch.float32)
    assert torch.isfinite(g).all()
    assert (g.flatten(1).norm(dim=1) > 0).all()


@every_reward
def test_a_float64_network_gives_float64_scores_close_to_those_of_fp32(make, name):
    scores = make(name, dtype="fp64")(images(dtype=torch.float64), PROMPTS)
    assert scores.dtype == torch.float64
    expected = make(name)(images(), PROMPTS).double()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))


@every_reward
def test_a_reward_can_be_flattened(make, name):
    reward = make(name)
    lower = InputFlattened(reward, rho=0.05)(images(), PROMPTS)
    assert (lower < reward(images(), PROMPTS)).all()


@every_reward
def test_any_size_of_image_is_read(make, name):
    reward = make(name)
    for height, width in ((SIDE, SIDE), (20, 90), (200, 64)):
        assert torch.isfinite(reward(torch.rand(1, 3, height, width), ["a"])).all()


@every_reward
def test_images_of_half_precision_are_read(make, name):
    scores = make(name)(images(dtype=torch.bfloat16), PROMPTS)
    assert scores.dtype == torch.float32


@every_reward
@pytest.mark.parametrize("prompts", [["one"], "abc", [*PROMPTS, "four"]], ids=["too few", "a text", "too many"])
def test_a_prompt_is_needed_for_each_image(make, name, prompts):
    with pytest.raises(ValueError, match=f"^{name}: one prompt for each image is needed; got 3 images and "):
        make(name)(images(), prompts)


@every_reward
def test_an_unknown_precision_is_refused(folders, name):
    from rsaft.rewards.frozen import network_dtype

    with pytest.raises(ConfigError, match=f"^{name}: dtype is one of fp32, bf16, fp16, fp64; got 'int8'"):
        network_dtype.__wrapped__("int8", name)


@every_reward
def test_a_folder_without_weights_is_refused_in_one_sentence(tmp_path, name):
    with pytest.raises(ConfigError, match=f"^{name}: the folder '.*' holds none of "):
        getattr(rewards, name)(tmp_path)


FILES = {
    "HPSv2": ("HPS_v2.1_compressed.pt", "visual.proj"),
    "ICT": ("pytorch_model.bin", "visual_projection.weight"),
    "HP": ("hp_backbone/pytorch_model.bin", "vision_model.encoder.layers.1.mlp.fc2.bias"),
    "AestheticScore": ("sac+logos+ava1-l14-linearMSE.pth", "layers.4.weight"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_names_file_and_key(tmp_path, name):
    file, key = FILES[name]
    {"HPSv2": layouts.write_hpsv2, "ICT": layouts.write_ict, "HP": layouts.write_hp}.get(name, layouts.write_aesthetic)(
        tmp_path
    )
    weights = torch.load(tmp_path / file, weights_only=True)
    weights = weights.get("state_dict", weights)
    del weights[key]
    torch.save(weights, tmp_path / file)
    options = {"clip": tmp_path / "clip"} if name == "AestheticScore" else {}
    with pytest.raises(ConfigError, match=f"^{name}: '.*{Path(file).name.replace('+', '.')}' lacks the key '{key}'"):
        getattr(rewards, name)(tmp_path, device="cpu", **options)


def test_weights_that_are_no_clip_are_refused(tmp_path):
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "model.bin")
    with pytest.raises(
        ConfigError, match=r"^PickScore: '.*model.bin' holds neither .* its first key is 'encoder.weight'"
    ):
        rewards.PickScore(tmp_path / "model.bin")


def test_hpsv2_is_the_cosine_that_open_clip_computes(make):
    weights = {name: value.half().double() for name, value in layouts.tiny_open_clip().items()}
    x = images(dtype=torch.float64)
    image = encode_image(weights, hpsv2_preprocess(x, size=SIDE), heads=VISION_HEADS)
    ids = TOKENIZER([like_open_clip(p) for p in PROMPTS], padding="max_length", truncation=True, max_length=CONTEXT)
    text = encode_text(weights, torch.tensor(ids["input_ids"]), heads=TEXT_HEADS)
    expected = torch.nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(make("HPSv2", dtype="fp64")(x, PROMPTS), expected, rtol=0, atol=1e-9)


def test_hpsv2_takes_the_file_of_its_version(tmp_path):
    layouts.write_hpsv2(tmp_path, seed=0)
    layouts.write_hpsv2(tmp_path, seed=1, version="2.0")
    new, old = (rewards.HPSv2(tmp_path, version=v, device="cpu")(images(), PROMPTS) for v in ("2.1", "2.0"))
    assert not torch.allclose(new, old)


def test_hpsv2_without_antialiasing_is_another_score(make):
    x = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(make("HPSv2")(x, PROMPTS), make("HPSv2", antialias=False)(x, PROMPTS))


def expected_cosine(folder: Path) -> Tensor:
    """By transformers alone, from a folder that it saved."""
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(folder).double().eval()
    ids = TOKENIZER(PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        pixels = clip_preprocess(images(dtype=torch.float64), SIDE)
        image = network.get_image_features(pixel_values=pixels).pooler_output
        text = network.get_text_features(input_ids=ids["input_ids"]).pooler_output
    return torch.nn.functional.cosine_similarity(image, text)


def test_pickscore_is_a_hundred_cosines(make, folders):
    scores = make("PickScore", dtype="fp64")(images(dtype=torch.float64), PROMPTS)
    torch.testing.assert_close(scores, 100 * expected_cosine(folders["PickScore"]), rtol=1e-6, atol=1e-6)


def test_the_scale_of_pickscore_is_not_rounded_with_its_weights(make):
    assert make("PickScore", dtype="bf16").clip.scale == pytest.approx(100, rel=1e-6)  # bf16 has 98.9


def test_ict_is_the_plain_cosine(make, folders):
    scores = make("ICT", dtype="fp64")(images(dtype=torch.float64), PROMPTS)
    torch.testing.assert_close(scores, expected_cosine(folders["PickScore"]), rtol=1e-6, atol=1e-6)


def test_the_scales_of_clip_score_are_those_of_torchmetrics_and_of_the_paper(make, folders):
    x, cosine = images(dtype=torch.float64), expected_cosine(folders["CLIPScore"])
    assert (cosine > 0).any()
    for scale, expected in (
        ("cosine", cosine),
        ("torchmetrics", 100 * cosine.clamp_min(0)),
        ("hessel", 2.5 * cosine.clamp_min(0)),
    ):
        scores = make("CLIPScore", dtype="fp64", scale=scale)(x, PROMPTS)
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


def test_clip_score_reads_the_activation_in_config_json_or_is_told(make, folders, tmp_path):
    layouts.save_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folders["CLIPScore"] / "model.safetensors").read_bytes())
    told = rewards.CLIPScore(tmp_path, activation="quick_gelu", device="cpu")(images(), PROMPTS)
    wrong = rewards.CLIPScore(tmp_path, device="cpu")(images(), PROMPTS)
    torch.testing.assert_close(told, make("CLIPScore")(images(), PROMPTS))
    assert not torch.allclose(wrong, told, rtol=0, atol=1e-5)


def test_the_aesthetic_score_is_affine_in_the_unit_feature(make):
    reward = make("AestheticScore", dtype="fp64")
    e = torch.nn.functional.normalize(torch.randn(4, layouts.EMBED, dtype=torch.float64), dim=1)
    a, b, c, d = reward.head(torch.stack([e[0], e[1], e[0] + e[1], torch.zeros_like(e[0])]))
    torch.testing.assert_close(c - d, (a - d) + (b - d), rtol=1e-9, atol=1e-9)


def test_the_aesthetic_head_needs_the_clip_that_it_was_made_for(folders, tmp_path):
    torch.save(layouts.head_weights(widths=(32, 16, 8, 8, 4, 1)), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"reads features of 32 values, and the CLIP at .* gives 24"):
        rewards.AestheticScore(tmp_path / "other.pth", clip=folders["AestheticScore"] / "clip", device="cpu")


def test_hp_is_a_sigmoid_of_features_that_are_not_normalised(make):
    reward = make("HP", dtype="fp64")
    x = images(dtype=torch.float64)
    features = reward.clip.image_features(clip_preprocess(x, SIDE))
    assert (features.norm(dim=1) - 1).abs().min() > 0.1
    weights, h = {k: v.double() for k, v in layouts.head_weights().items()}, features
    for i in (0, 2, 4, 6, 7):
        h = h @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
    torch.testing.assert_close(reward(x, PROMPTS), h.sigmoid().flatten(), rtol=1e-9, atol=1e-9)


def test_hp_needs_its_folder(folders):
    with pytest.raises(ConfigError, match=r"^HP: two files are needed, .*; give their folder"):
        rewards.HP(folders["HP"] / "hp_backbone" / "pytorch_model.bin")


@pytest.mark.parametrize("name", sorted(READS_NO_PROMPT))
def test_a_reward_without_prompts_keeps_no_text_tower(make, name):
    assert not any("text_model" in key for key in make(name).state_dict())


def test_every_public_name_has_a_file(make):
    assert set(NAMES) <= set(rewards.__all__)
    assert {getattr(rewards, name).__name__ for name in NAMES} == set(NAMES)


@every_reward
def test_the_docstring_says_what_a_user_must_know(name):
    text = getattr(rewards, name).__doc__
    for part in ("Checkpoint:", "Scale:", "Text:", "Preprocessing:", "Cost:", "GB"):
        assert part in text


def test_features_are_taken_from_what_either_transformers_returns():
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from rsaft.rewards.clip_features import pooled

    features = torch.ones(2, 3)
    assert pooled(features) is features  # transformers 4
    assert pooled(BaseModelOutputWithPooling(pooler_output=features)) is features  # transformers 5


def test_importing_rewards_loads_no_library_and_naming_one_no_transformers():
    code = (
        "import rsaft.rewards, sys; print([m for m in ('torch', 'transformers') if m in sys.modules]);"
        "rsaft.rewards.HPSv2, rsaft.rewards.MPS; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "False", ""]


@pytest.mark.slow
def test_the_price_of_a_reward_can_be_rehearsed_without_data(make):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for name in NAMES:
        reward = make(name)
        cost = price(
            partial(reward, prompts=["a", "b"]), (2, 3, 64, 64), torch.float32, torch.device("cpu"), True, fake
        )
        assert (cost.shape, cost.has_gradient) == ((2,), True)
        assert cost.outside >= sum(p.nbytes for p in reward.clip.network.vision_model.parameters())
