"""MPS: the cross-attention against a slow twin, which words are read, and the layouts that are published."""

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rewards import MPS
from rsaft.rewards.mps_cross import CrossModel, cross_model_like, our_names
from rsaft.rewards.preprocess import clip_preprocess
from tests.reference.mps import cross_attention
from tests.rewards import layouts
from tests.rewards.layouts import CONTEXT, EMBED, SIDE, TOKENIZER

PROMPTS = ["a cat", "two dogs in a boat"]
REAL = layouts.cross_shapes(layers=4, dim=1024, heads=16, head_width=64)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_cross_attention_computes_what_the_slow_one_does():
    shapes = layouts.cross_shapes(layers=2, dim=EMBED, heads=3, head_width=8)
    weights = {name: value.double() for name, value in layouts.random_weights(shapes, 0).items()}
    model = cross_model_like(our_names(weights), "mps.pt", "MPS").double()
    model.load_state_dict(our_names(weights))
    source = torch.Generator().manual_seed(1)
    image = torch.randn(2, 7, EMBED, generator=source, dtype=torch.float64)
    text = torch.randn(2, 5, EMBED, generator=source, dtype=torch.float64)
    read = torch.tensor([[True, True, False, True, False], [False, False, True, False, False]])
    expected = torch.stack([cross_attention(weights, image[i], text[i], read[i], 8) for i in range(2)])
    torch.testing.assert_close(model(image, text, read), expected, rtol=1e-9, atol=1e-9)


def test_the_score_is_a_hundred_cosines_of_what_the_slow_one_computes(tmp_path):
    reward = MPS(layouts.write_mps(tmp_path), device="cpu", dtype="fp64", threshold=0.5)
    network = reward.clip.network
    cross = layouts.random_weights(layouts.cross_shapes(layers=2, dim=EMBED, heads=2, head_width=8), 0)
    cross = {name: value.double() for name, value in cross.items()}
    expected = []
    with torch.no_grad():
        for image, prompt in zip(images(), PROMPTS, strict=True):
            ids = TOKENIZER([prompt, reward.condition], padding="max_length", truncation=True, max_length=CONTEXT)
            text = network.text_model(input_ids=torch.tensor(ids["input_ids"]))
            words, condition = network.text_projection(text.last_hidden_state)
            near = (words @ condition.T).max(dim=1).values
            seen = network.vision_model(pixel_values=clip_preprocess(image[None], SIDE)).last_hidden_state
            tokens = network.visual_projection(seen)[0]
            read = near / near.max() > 0.5
            assert 0 < read.sum() < CONTEXT
            first = cross_attention(cross, tokens, words, read, 8)[0]
            meaning = network.text_projection(text.pooler_output)[0]
            expected.append(100 * torch.cosine_similarity(first, meaning, dim=0))
    scores = reward(images(), PROMPTS)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", [{"threshold": 0.99}, {"condition": "xyz"}])
def test_threshold_and_condition_change_what_is_read(tmp_path, option):
    layouts.write_mps(tmp_path)
    usual = MPS(tmp_path, device="cpu", dtype="fp64")(images(), PROMPTS)
    assert not torch.allclose(MPS(tmp_path, device="cpu", dtype="fp64", **option)(images(), PROMPTS), usual)


def test_the_authors_own_names_load_as_imscores(tmp_path):
    imscore = MPS(layouts.write_mps(tmp_path / "a"), device="cpu")
    authors = MPS(layouts.write_mps(tmp_path / "b", prefix=""), device="cpu")
    prompts = images().float(), PROMPTS
    assert torch.equal(imscore(*prompts), authors(*prompts))


def test_the_real_layout_fits_name_by_name_and_shape_by_shape():
    with torch.device("meta"):
        weights = our_names({name: torch.empty(shape) for name, shape in REAL.items()})
        model = cross_model_like(weights, "mps.pt", "MPS")
        expected = CrossModel(num_layers=4, dim=1024, heads=16, head_width=64, hidden=4096)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert [m.shape for m in model.state_dict().values()] == [m.shape for m in expected.state_dict().values()]
    assert (model.layers[0].text.heads, model.layers[0].image.heads) == (16, 16)


@pytest.mark.parametrize(
    ("drop", "sentence"),
    [
        ("cross_model.", r"lacks the keys 'cross_model\.\.\.\.'"),
        ("cross_model.layers.0.0.fn.to_q", r"lacks the key 'layers\.0\.0\.fn\.to_q\.weight' of the cross-attention"),
        ("cross_model.layers.1.1.fn.norm.bias", r"lacks the key 'layers\.1\.image\.norm\.bias'"),
        ("model.visual_projection", r"lacks the key 'visual_projection\.weight'"),
    ],
)
def test_a_damaged_file_names_the_key(tmp_path, drop, sentence):
    from safetensors.torch import load_file, save_file

    path = layouts.write_mps(tmp_path, prefix="") / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if not key.startswith(drop)}, path)
    with pytest.raises(ConfigError, match=rf"^MPS: '.*model.safetensors' {sentence}"):
        MPS(tmp_path, device="cpu")


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(ConfigError, match="0 <= threshold < 1; got"):
        MPS(threshold=threshold)
