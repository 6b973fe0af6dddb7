"""CLIP as open_clip computes it, from a state dict under open_clip's names: head by head, in the weights' dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def encode_image(weights: Weights, pixels: Tensor, *, heads: int, quick_gelu: bool = False) -> Tensor:
    patches = weights["visual.conv1.weight"]
    x = F.conv2d(pixels, patches, stride=patches.shape[-1]).flatten(2).mT
    first = weights["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + weights["visual.positional_embedding"]
    x = _norm(weights, "visual.ln_pre", x)
    x = _blocks(weights, "visual.transformer.resblocks", x, heads, quick_gelu, causal=False)
    return _norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]


def encode_text(weights: Weights, ids: Tensor, *, heads: int, quick_gelu: bool = False) -> Tensor:
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = _blocks(weights, "transformer.resblocks", x, heads, quick_gelu, causal=True)
    x = _norm(weights, "ln_final", x)
    return x[torch.arange(len(x)), ids.argmax(dim=1)] @ weights["text_projection"]


def _blocks(weights: Weights, prefix: str, x: Tensor, heads: int, quick_gelu: bool, *, causal: bool) -> Tensor:
    i = 0
    while f"{prefix}.{i}.ln_1.weight" in weights:
        block = f"{prefix}.{i}"
        x = x + _attention(weights, f"{block}.attn", _norm(weights, f"{block}.ln_1", x), heads, causal)
        h = _linear(weights, f"{block}.mlp.c_fc", _norm(weights, f"{block}.ln_2", x))
        h = h * torch.sigmoid(1.702 * h) if quick_gelu else 0.5 * h * (1 + torch.erf(h / 2**0.5))
        x = x + _linear(weights, f"{block}.mlp.c_proj", h)
        i += 1
    return x


def _attention(weights: Weights, name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    joined = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
    width = x.shape[-1]
    q, k, v = joined[..., :width], joined[..., width : 2 * width], joined[..., 2 * width :]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    seen = []
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[..., part] @ k[..., part].mT / (width // heads) ** 0.5
        if causal:
            scores = scores.masked_fill(future, -torch.inf)
        seen.append(scores.softmax(dim=-1) @ v[..., part])
    return _linear(weights, f"{name}.out_proj", torch.cat(seen, dim=-1))


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
