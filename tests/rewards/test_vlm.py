"""VLMReward on tiny Qwen2-VL and Qwen2.5-VL in the published layouts, against transformers' processor and forward."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rsaft
from rsaft.errors import ConfigError
from rsaft.rewards.qwen_patches import qwen_patches, qwen_size
from rsaft.rewards.vlm import VLMReward

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PROMPTS = ("a red cat", "dogs", "a very small house on a hill")
INSTRUCTION = "Rate the image for: {prompt}\nOverall: <|Reward|>\nEND"
WIDTH = 32
FAMILIES = ("qwen2_vl", "qwen2_5_vl")
SMALL = {"min_pixels": 28 * 28, "max_pixels": 56 * 84}


def tokenizer(*more: str) -> Qwen2Tokenizer:
    """Bytes, the words Yes and No, Qwen's special tokens, and more of these."""
    pairs = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    vocabulary = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    made = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=pairs)
    made.add_tokens([*SPECIAL, *more], special_tokens=True)
    return made


def network(family: str, rows: int, seed: int = 0):
    """A network of the family with random weights, in float64."""
    words = tokenizer()
    text = {
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 600,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": words.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": None,
    }
    vision = {"depth": 2, "num_heads": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 48}
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    made = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}[family](
        text_config=text,
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=rows - 1,
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    model = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        filled = model(made).double().eval()
        for name, p in filled.named_parameters():
            if "norm" not in name:  # large enough for the image to be felt at the last token
                p.data.normal_(std=1 / p.shape[-1] ** 0.5)
    return filled


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A hub-like folder of each family, in float64. Read them, never write them."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        network(family, rows=len(tokenizer()) + 3).save_pretrained(made[family])
        tokenizer().save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with HPSv3.safetensors under the names of transformers 4.45, its embeddings cut to the tokenizer."""
    made = tmp_path_factory.mktemp("hpsv3")
    state = network("qwen2_vl", rows=len(tokenizer()) + 1, seed=1).state_dict()
    generator = torch.Generator().manual_seed(2)
    for position, out, into in ((0, 1024, WIDTH), (3, 16, 1024), (5, 2, 16)):
        state[f"rm_head.{position}.weight"] = torch.randn(out, into, generator=generator).double() / into**0.5
        state[f"rm_head.{position}.bias"] = torch.randn(out, generator=generator).double()
    old = {
        k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v for k, v in state.items()
    }
    save_file({key: value.contiguous() for key, value in old.items()}, made / "HPSv3.safetensors")
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 56, 84, generator=torch.Generator().manual_seed(0))


def load(folder: Path, readout: str = "yes_no", **options) -> VLMReward:
    return VLMReward(folder, readout, **({"device": "cpu", "dtype": "fp64"} | SMALL | options))


def load_head(hpsv3: Path, folders: dict[str, Path], **options) -> VLMReward:
    return load(hpsv3, "reward_token", base=folders["qwen2_vl"], template=INSTRUCTION, **options)


def inputs(question: str, image: torch.Tensor, words: Qwen2Tokenizer) -> dict[str, torch.Tensor]:
    """What transformers' own processor gives for one image and Qwen's chat template."""
    seen = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 84})(
        images=[(image * 255).round().byte().permute(1, 2, 0).numpy()], return_tensors="pt"
    )
    places = "<|image_pad|>" * (int(seen["image_grid_thw"].prod()) // 4)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{places}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([words.encode(text)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == words.convert_tokens_to_ids("<|image_pad|>")).int(),
        "pixel_values": seen["pixel_values"].double(),
        "image_grid_thw": seen["image_grid_thw"],
    }


def smooth(height: int, width: int) -> torch.Tensor:
    """An image of sines with little noise, whole 1/255."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    waves = torch.stack([(x * k + y).sin() for k in (1, 2, 3)]) * 0.4 + 0.5
    noise = torch.rand(waves.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    return ((waves + noise).clamp(0, 1) * 255).round()[None] / 255


SIZES = ((448, 448), (512, 512), (333, 517), (100, 60), (28, 300))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bounds", [(56 * 56, 1280 * 28 * 28), (448 * 448, 448 * 448)])
@pytest.mark.parametrize(("exact", "worst"), [(False, 0.0150), (True, 0.0147)])
def test_patches_are_those_of_the_processor_up_to_its_rounding(size, bounds, exact, worst):
    """One unit of 1/255 is 0.0150 in the normalised units of the channel with the smallest deviation."""
    image = smooth(*size)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
    theirs = processor(images=[(image[0] * 255).round().byte().permute(1, 2, 0).numpy()], return_tensors="pt")
    ours = qwen_patches(image, *bounds, exact=exact)
    rows, columns = (side // 14 for side in qwen_size(*size, *bounds))
    assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
    difference = (ours[0] - theirs["pixel_values"]).abs()
    assert difference.max() < 1.1 * worst
    if exact:
        assert (difference > 1e-5).float().mean() < 0.004


def test_an_image_that_needs_no_resize_is_cut_into_the_same_patches():
    image = smooth(84, 56)
    theirs = Qwen2VLImageProcessorPil()((image[0] * 255).round().byte().permute(1, 2, 0).numpy(), return_tensors="pt")
    torch.testing.assert_close(qwen_patches(image, 56 * 56, 1003520)[0], theirs["pixel_values"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_p_yes_is_that_of_transformers_own_forward(folders, images, family):
    images = (images * 255).round() / 255
    scores = load(folders[family])(images.double(), PROMPTS)
    model = network(family, rows=len(tokenizer()) + 3)
    yes, no = (tokenizer().convert_tokens_to_ids(word) for word in ("Yes", "No"))
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = model(
                **inputs(f'Does this figure show "{prompt}"? Please answer yes or no.', images[i], tokenizer())
            ).logits
        p = logits[0, -1].softmax(dim=0)
        torch.testing.assert_close(scores[i], p[yes] / (p[yes] + p[no]), rtol=0, atol=1e-6)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_digit_is_that_of_transformers_own_forward(folders, images, family):
    images = (images * 255).round() / 255
    scores = load(folders[family], "digit", template="Grade {prompt}")(images.double(), PROMPTS)
    model = network(family, rows=len(tokenizer()) + 3)
    digits = tokenizer().convert_tokens_to_ids(list("12345"))
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = model(**inputs(f"Grade {prompt}", images[i], tokenizer())).logits[0, -1, digits]
        p = logits.exp() / logits.exp().sum()
        expected = sum((d + 1) * p[d] for d in range(5))
        torch.testing.assert_close(scores[i], expected, rtol=0, atol=1e-6)
    assert (scores > 1).all()
    assert (scores < 5).all()


def test_the_reward_head_reads_the_reward_token_as_hpsv3_does(hpsv3, folders, images):
    """Positions are a plain sequence: HPSv3's forward hands embeddings to the language model without any."""
    images = (images * 255).round() / 255
    scores = load_head(hpsv3, folders)(images.double(), PROMPTS)
    state = load_file(hpsv3 / "HPSv3.safetensors")
    model = network("qwen2_vl", rows=len(tokenizer()) + 1, seed=1).model
    words = tokenizer("<|Reward|>")
    for i, prompt in enumerate(PROMPTS):
        given = inputs(INSTRUCTION.replace("{prompt}", prompt), images[i], words)
        ids = given["input_ids"]
        with torch.no_grad():
            seen = model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
            embedded = model.language_model.embed_tokens(ids)
            embedded[ids == words.convert_tokens_to_ids("<|image_pad|>")] = seen
            hidden = model.language_model(inputs_embeds=embedded).last_hidden_state
            x = hidden[0, ids[0].tolist().index(words.convert_tokens_to_ids("<|Reward|>"))]
            for position in (0, 3, 5):
                x = x if position == 0 else x.clamp_min(0)
                x = state[f"rm_head.{position}.weight"] @ x + state[f"rm_head.{position}.bias"]
        torch.testing.assert_close(scores[i], x[0], rtol=0, atol=1e-5)
    assert scores.std() > 1e-3


def test_the_names_of_transformers_5_load_as_well(hpsv3, folders, images, tmp_path):
    old = load_file(hpsv3 / "HPSv3.safetensors")
    new = {("model." if k.startswith("visual.") else "") + k: v for k, v in old.items()}
    new = {
        k.replace("model.", "model.language_model.", 1) if k.startswith(("model.l", "model.e", "model.n")) else k: v
        for k, v in new.items()
    }
    assert "model.language_model.norm.weight" in new
    assert "model.visual.merger.ln_q.weight" in new
    save_file(new, tmp_path / "mine.safetensors")
    scores = [load_head(path, folders)(images, PROMPTS) for path in (hpsv3, tmp_path / "mine.safetensors")]
    assert torch.equal(*scores)


def test_grid_positions_differ_from_a_sequence(hpsv3, folders, images):
    scores = [load_head(hpsv3, folders, positions=kind)(images, PROMPTS) for kind in ("grid", "sequence")]
    assert (scores[0] - scores[1]).abs().min() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_log_odds_are_the_logit_of_p(folders, images, family):
    p, odds = (load(folders[family], log_odds=wanted)(images, PROMPTS) for wanted in (False, True))
    torch.testing.assert_close(odds, torch.logit(p), rtol=0, atol=1e-6)


def test_swapped_answers_give_the_complement(folders, images):
    p = load(folders["qwen2_vl"])(images, PROMPTS)
    q = load(folders["qwen2_vl"], answers=("No", "Yes"))(images, PROMPTS)
    torch.testing.assert_close(p + q, torch.ones_like(p))


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "digit", "reward_token"])
def reward(request, folders, hpsv3) -> VLMReward:
    """Each family and each readout, in float64."""
    if request.param == "reward_token":
        return load_head(hpsv3, folders)
    return load(folders["qwen2_vl"], "digit") if request.param == "digit" else load(folders[request.param])


def test_a_batch_equals_its_images_alone(reward, images):
    """The prompts differ in length, so the batch is padded."""
    together = reward(images.double(), PROMPTS)
    alone = torch.cat([reward(images[i : i + 1].double(), PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_each_image_gets_its_own_gradient_and_no_other(reward, images):
    x = images.double().requires_grad_()
    (g,) = torch.autograd.grad(reward(x, PROMPTS)[1], x)
    assert g[1].abs().sum() > 0
    assert g[[0, 2]].abs().sum() == 0


def test_the_gradient_is_that_of_finite_differences(reward, images):
    """Along itself, with a long step: transformers computes norms and softmaxes in fp32 in a float64 network too."""
    x = (0.2 + 0.6 * images.double()).requires_grad_()
    (g,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    step = 1e-2 * g / g.norm()
    slope = (reward(x.detach() + step, PROMPTS) - reward(x.detach() - step, PROMPTS)).sum() / 2e-2
    torch.testing.assert_close(slope, g.norm(), rtol=1e-2, atol=0)


def test_no_weight_gets_a_gradient(reward, images):
    reward(images.requires_grad_(), PROMPTS).sum().backward()
    assert images.grad is not None
    assert [name for name, p in reward.named_parameters() if p.requires_grad or p.grad is not None] == []


def test_train_keeps_eval_mode(reward, images):
    before = reward(images, PROMPTS)
    assert reward.train() is reward
    assert not any(module.training for module in reward.modules())
    assert torch.equal(reward(images, PROMPTS), before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scores_are_fp32_whatever_the_network(folders, hpsv3, images, dtype):
    for make in (lambda d: load(folders["qwen2_vl"], dtype=d), lambda d: load_head(hpsv3, folders, dtype=d)):
        score = make(dtype)(images, PROMPTS)
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, make("fp64")(images, PROMPTS).float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 0.98), ("fp16", 0.999)])
def test_half_precision_keeps_the_direction_of_the_gradient(hpsv3, folders, images, dtype, least):
    def gradient(precision: str) -> torch.Tensor:
        x = images.clone().requires_grad_()
        reward = load_head(hpsv3, folders, dtype=precision)
        return torch.autograd.grad(reward(x, PROMPTS).sum(), x)[0].flatten()

    assert torch.cosine_similarity(gradient(dtype), gradient("fp32"), dim=0) > least


def test_autocast_leaves_the_last_product_in_fp32(hpsv3, folders, images):
    reward = load_head(hpsv3, folders, dtype="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = reward(images, PROMPTS)
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())


def test_eager_attention_has_second_derivatives(folders, images):
    reward = load(folders["qwen2_vl"], attention="eager")
    x = images[:1].double().requires_grad_()
    (g,) = torch.autograd.grad(reward(x, PROMPTS[:1]).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    assert torch.isfinite(h).all()
    assert h.abs().max() > 0


def test_it_is_a_reward_of_the_public_package(folders, images):
    reward = rsaft.rewards.VLMReward(folders["qwen2_vl"], dtype="fp32", device="cpu", **SMALL)
    assert isinstance(reward, rsaft.types.Reward)
    assert reward(images, PROMPTS).shape == (3,)


def test_real_sizes_are_those_of_the_docstring():
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064}
    configs = (
        (Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config={})),
        (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config={"hidden_size": 1280})),
    )
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in model(config).parameters()) for model, config in configs]
    assert sizes == [8_291_375_616, 8_292_166_656]


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((512, 512), (448 * 448, 448 * 448), (448, 448)),
        ((1024, 1024), (56 * 56, 1280 * 784), (980, 980)),
        ((10, 10), (56 * 56, 1280 * 784), (56, 56)),
        ((42, 70), (784, 10**6), (56, 56)),  # 1.5 and 2.5 round to the even 2
    ],
)
def test_sizes_worked_by_hand(size, bounds, expected):
    assert qwen_size(*size, *bounds) == expected


def test_impossible_sizes_are_refused(folders):
    with pytest.raises(ConfigError, match="a side may be 200 times the other"):
        qwen_size(10, 2010, 784, 10**6)
    with pytest.raises(ConfigError, match="784 <= min_pixels <= max_pixels"):
        load(folders["qwen2_vl"], min_pixels=1000, max_pixels=900)


def test_a_special_token_in_a_prompt_is_refused(reward, images):
    with pytest.raises(ValueError, match=r"'a <\|image_pad\|>' holds the special token"):
        reward(images, ("a", "a <|image_pad|>", "b"))


def test_a_second_reward_token_is_refused(hpsv3, folders, images):
    with pytest.raises(ValueError, match=r"holds the special token '<\|Reward\|>'"):
        load_head(hpsv3, folders)(images, ("a", "b", "<|Reward|>"))


def test_a_prompt_over_the_context_is_refused(reward, images):
    with pytest.raises(ValueError, match="600 are allowed"):
        reward(images, ("a", "b", "c" * 600))


def test_braces_in_a_prompt_are_text(folders, images):
    assert load(folders["qwen2_vl"])(images, ("{0}", "{prompt}", "}{")).shape == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "digit", "log_odds": True}, "answers and log_odds belong to the readout yes_no"),
        ({"readout": "reward_token"}, "template has no default"),
        ({"readout": "reward_token", "template": "{prompt}"}, r"<\|Reward\|> once in it"),
        ({"answers": ("Yes", "Never")}, "an answer is one token, and 'Never' is 5 of this tokenizer's"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(folders, options, message):
    with pytest.raises(ConfigError, match=message):
        load(folders["qwen2_vl"], **options)


def damaged(folder: Path, target: Path, name: str, change) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    state = load_file(folder / name)
    change(state)
    save_file(state, target / name, metadata={"format": "pt"})
    return target


def test_a_missing_key_of_the_network_is_named(folders, tmp_path):
    old = "model.layers.1.mlp.up_proj.weight"
    folder = damaged(folders["qwen2_vl"], tmp_path, "model.safetensors", lambda state: state.pop(old))
    with pytest.raises(
        ConfigError, match=rf"'{folder}' lacks the key '{old.replace('model.', 'model.language_model.')}'"
    ):
        load(folder)


def test_a_key_of_another_shape_is_named(folders, tmp_path):
    old = "visual.merger.mlp.2.bias"
    folder = damaged(folders["qwen2_vl"], tmp_path, "model.safetensors", lambda s: s.update({old: torch.zeros(5)}))
    with pytest.raises(ConfigError, match=rf"'{folder}', key 'model.{old}' has the shape \(5,\)"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rm_head.3.weight", None, "lacks the matrix 'rm_head.3.weight'"),
        ("rm_head.3.bias", None, "lacks the key 'rm_head.3.bias'"),
        ("rm_head.7.bias", torch.zeros(2), "holds the key 'rm_head.7.bias'"),
        ("rm_head.5.bias", torch.zeros(3), "key 'rm_head.5.bias' has the shape"),
        ("model.norm.weight", None, "lacks the key 'model.language_model.norm.weight'"),
        ("model.norm.scale", torch.zeros(3), "holds the unknown key"),
        ("model.embed_tokens.weight", torch.zeros(9, WIDTH), "embed_tokens.weight of 9 rows"),
    ],
)
def test_what_is_wrong_in_a_reward_file_is_named(hpsv3, folders, tmp_path, key, value, message):
    def change(state):
        state.pop(key, None)
        if value is not None:
            state[key] = value

    folder = damaged(hpsv3, tmp_path, "HPSv3.safetensors", change)
    with pytest.raises(ConfigError, match=rf"{folder / 'HPSv3.safetensors'}.*{message}"):
        load_head(folder, folders)


def test_a_damaged_reward_file_is_named(hpsv3, folders, tmp_path):
    whole = (hpsv3 / "HPSv3.safetensors").read_bytes()
    (tmp_path / "HPSv3.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"'{tmp_path / 'HPSv3.safetensors'}' cannot be read"):
        load_head(tmp_path, folders)


def test_another_family_is_refused(tmp_path, folders):
    shutil.copytree(folders["qwen2_vl"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert, and supported are qwen2_vl, qwen2_5_vl"):
        load(tmp_path)


def test_an_absent_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="vlm: "):
        load(tmp_path)
    with pytest.raises(ConfigError, match="vlm: "):
        load("nobody/nothing")


def test_gradients_are_finite_at_black_and_white(folders):
    x = torch.stack([torch.zeros(3, 60, 90), torch.ones(3, 60, 90)]).requires_grad_()
    (g,) = torch.autograd.grad(load(folders["qwen2_vl"], dtype="fp32")(x, ["a", "b"]).sum(), x)
    assert np.isfinite(g.numpy()).all()
    assert (g.flatten(1).abs().sum(dim=1) > 0).all()
