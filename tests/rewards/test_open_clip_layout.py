"""Weights under open_clip's names become transformers' exactly, and shapes tell the architecture."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from rsaft.errors import ConfigError
from rsaft.rewards.open_clip_layout import architecture, to_open_clip, to_transformers
from tests.reference.open_clip import encode_image, encode_text
from tests.rewards.layouts import (
    CONTEXT,
    SIDE,
    TEXT_HEADS,
    TINY,
    VISION_HEADS,
    VIT_H_14,
    VIT_L_14,
    VOCABULARY,
    tiny_open_clip,
)

FILE = Path("weights.pt")


def converted(activation: str = "gelu") -> CLIPModel:
    weights = to_transformers(tiny_open_clip(), FILE, "HPSv2")
    network = CLIPModel(CLIPConfig(**architecture(weights, activation))).eval()
    network.load_state_dict(weights)
    return network.double()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_converted_network_computes_what_open_clip_does(activation):
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.randint(2, VOCABULARY - 1, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((4, 9, CONTEXT - 1)):
        ids[row, end:] = 0  # open_clip pads with 0
        ids[row, end] = VOCABULARY - 1
    weights = {name: value.double() for name, value in tiny_open_clip().items()}
    network, quick = converted(activation), activation == "quick_gelu"
    with torch.no_grad():
        image = network.get_image_features(pixel_values=pixels).pooler_output
        text = network.get_text_features(input_ids=ids).pooler_output
    expected = encode_image(weights, pixels, heads=VISION_HEADS, quick_gelu=quick)
    torch.testing.assert_close(image, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        text, encode_text(weights, ids, heads=TEXT_HEADS, quick_gelu=quick), rtol=1e-9, atol=1e-9
    )


def test_the_two_activations_differ_visibly():
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        a, b = (
            converted(name).get_image_features(pixel_values=pixels).pooler_output for name in ("gelu", "quick_gelu")
        )
    assert (a - b).abs().max() > 1e-3


def test_conversion_there_and_back_changes_no_bit():
    weights = tiny_open_clip()
    back = to_open_clip(to_transformers(weights, FILE, "HPSv2"))
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("shapes", "theirs", "ours", "parameters"),
    [(VIT_H_14, 686, 910, 986_109_441), (VIT_L_14, 446, 590, 427_616_513)],
    ids=["ViT-H-14", "ViT-L-14"],
)
def test_the_real_layouts_convert_key_by_key_and_shape_by_shape(shapes, theirs, ours, parameters):
    with torch.device("meta"):
        weights = to_transformers({name: torch.empty(shape) for name, shape in shapes.items()}, FILE, "HPSv2")
        network = CLIPModel(CLIPConfig(**architecture(weights, "gelu")))
    expected = {name: value.shape for name, value in network.state_dict().items()}
    assert len(shapes) == theirs
    assert {name: value.shape for name, value in weights.items()} == expected
    assert len(expected) == ours
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_the_architecture_of_vit_h_is_laions():
    with torch.device("meta"):
        weights = to_transformers({name: torch.empty(shape) for name, shape in VIT_H_14.items()}, FILE, "HPSv2")
    config = CLIPConfig(**architecture(weights, "gelu"))
    vision, text = config.vision_config, config.text_config
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (
        16,
        32,
        224,
        14,
    )
    assert (text.num_attention_heads, text.num_hidden_layers, text.max_position_embeddings) == (16, 24, 77)
    assert (vision.hidden_act, text.hidden_act, config.projection_dim) == ("gelu", "gelu", 1024)


@pytest.mark.parametrize("key", ["visual.proj", "ln_final.bias", "transformer.resblocks.1.attn.in_proj_weight"])
def test_a_missing_key_is_named_with_its_file(key):
    weights = tiny_open_clip()
    del weights[key]
    with pytest.raises(ConfigError, match=rf"^HPSv2: 'weights.pt' lacks the key '{key}'; "):
        to_transformers(weights, FILE, "HPSv2")


def test_a_key_that_no_clip_has_is_named():
    with pytest.raises(ConfigError, match=r"'weights.pt' holds the key 'extra', which no CLIP of open_clip has"):
        to_transformers(tiny_open_clip() | {"extra": torch.zeros(1)}, FILE, "HPSv2")


def test_the_tiny_layout_has_the_names_of_the_real_one():
    assert set(TINY) < set(VIT_H_14)
