"""ImageReward's network as its papers state it, over the published state dict: one image at a time, head by head.

ViT: Dosovitskiy et al., 2021, Eqs. 1-4 (pre-norm). BERT: Devlin et al., 2019, with Vaswani et al., 2017, 3.1-3.3
(post-norm). BLIP: Li et al., 2022, 3.1: in every text block cross-attention to the image's tokens lies between
self-attention and the feed-forward layer. ImageReward: Xu et al., 2023, 3.1: an MLP on the text's first token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROOTS = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.")
MLP = {0: (1024, None), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}  # position: (out, in)


def published_layout(
    *,
    width: int = 1024,
    depth: int = 24,
    side: int = 224,
    patch: int = 16,
    text_width: int = 768,
    text_depth: int = 12,
    vocabulary: int = 30524,
    positions: int = 512,
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of ImageReward.pt; the defaults are the published sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **_norm("norm", width),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
    whole = {ROOTS[0] + name: shape for name, shape in shapes.items()}

    text: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, text_width),
        "embeddings.position_embeddings.weight": (positions, text_width),
        "embeddings.position_ids": (1, positions),
        **_norm("embeddings.LayerNorm", text_width),
    }
    for i in range(text_depth):
        layer = f"encoder.layer.{i}"
        for attention, source in (("attention", text_width), ("crossattention", width)):
            text |= _linear(f"{layer}.{attention}.self.query", text_width, text_width)
            text |= _linear(f"{layer}.{attention}.self.key", text_width, source)
            text |= _linear(f"{layer}.{attention}.self.value", text_width, source)
            text |= _linear(f"{layer}.{attention}.output.dense", text_width, text_width)
            text |= _norm(f"{layer}.{attention}.output.LayerNorm", text_width)
        text |= _linear(f"{layer}.intermediate.dense", 4 * text_width, text_width)
        text |= _linear(f"{layer}.output.dense", text_width, 4 * text_width) | _norm(
            f"{layer}.output.LayerNorm", text_width
        )
    whole |= {ROOTS[1] + name: shape for name, shape in text.items()}

    whole |= _linear("blip.vision_proj", 256, width) | _linear("blip.text_proj", 256, text_width)
    for position, (out, into) in MLP.items():
        whole |= _linear(f"{ROOTS[2]}{position}", out, into or text_width)
    return whole


def random_state(layout: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Values for a layout, large enough for every tensor to move the score, fp32."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in layout.items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
            continue
        value = torch.randn(shape, generator=generator)
        centre = 1.0 if "orm" in name and name.endswith("weight") else 0.0
        fan = math.prod(shape[1:]) if len(shape) > 1 and "embed" not in name else 4
        state[name] = centre + value / math.sqrt(fan)
    return state


def raw_score(state: Mapping[str, Tensor], pixels: Tensor, ids: list[int], head_width: int = 64) -> Tensor:
    """Score before standardisation of one image (3, side, side), normalised, and of one text without padding."""
    vision, text = ({k[len(root) :]: v for k, v in state.items() if k.startswith(root)} for root in ROOTS[:2])
    first = _text(text, torch.tensor(ids), _vit(vision, pixels, head_width), head_width)[0]
    for position in MLP:
        first = first @ state[f"{ROOTS[2]}{position}.weight"].T + state[f"{ROOTS[2]}{position}.bias"]
    return first[0]


def _vit(p: Mapping[str, Tensor], pixels: Tensor, head_width: int) -> Tensor:
    """Tokens (1 + patches, width) of one image."""
    kernel = p["patch_embed.proj.weight"]
    size = kernel.shape[-1]
    rows = [pixels[:, i : i + size, :] for i in range(0, pixels.shape[1], size)]
    patches = [row[:, :, j : j + size] for row in rows for j in range(0, pixels.shape[2], size)]
    tokens = [kernel.flatten(1) @ patch.flatten() + p["patch_embed.proj.bias"] for patch in patches]
    x = torch.stack([p["cls_token"][0, 0], *tokens]) + p["pos_embed"][0]
    for i in range(_depth(p, "blocks.")):
        block = f"blocks.{i}."
        y = _layer_norm(p, f"{block}norm1", x, 1e-6)
        q, k, v = _affine(p, f"{block}attn.qkv", y).chunk(3, dim=1)
        x = x + _affine(p, f"{block}attn.proj", _attend(q, k, v, head_width))
        y = _layer_norm(p, f"{block}norm2", x, 1e-6)
        x = x + _affine(p, f"{block}mlp.fc2", _gelu(_affine(p, f"{block}mlp.fc1", y)))
    return _layer_norm(p, "norm", x, 1e-6)


def _text(p: Mapping[str, Tensor], ids: Tensor, image: Tensor, head_width: int) -> Tensor:
    """Tokens (len(ids), width) of the text that has seen the image."""
    x = p["embeddings.word_embeddings.weight"][ids] + p["embeddings.position_embeddings.weight"][: len(ids)]
    x = _layer_norm(p, "embeddings.LayerNorm", x, 1e-12)
    for i in range(_depth(p, "encoder.layer.")):
        layer = f"encoder.layer.{i}."
        for name, source in (("attention", None), ("crossattention", image)):
            part = f"{layer}{name}."
            seen = x if source is None else source
            q, k, v = (_affine(p, f"{part}self.{n}", s) for n, s in (("query", x), ("key", seen), ("value", seen)))
            y = _affine(p, f"{part}output.dense", _attend(q, k, v, head_width))
            x = _layer_norm(p, f"{part}output.LayerNorm", x + y, 1e-12)
        y = _affine(p, f"{layer}output.dense", _gelu(_affine(p, f"{layer}intermediate.dense", x)))
        x = _layer_norm(p, f"{layer}output.LayerNorm", x + y, 1e-12)
    return x


def _attend(q: Tensor, k: Tensor, v: Tensor, head_width: int) -> Tensor:
    heads = []
    for i in range(0, q.shape[1], head_width):
        part = slice(i, i + head_width)
        weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(head_width))
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, part])
    return torch.cat(heads, dim=1)


def _affine(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _layer_norm(p: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _depth(p: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in p if key.startswith(prefix)})


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
