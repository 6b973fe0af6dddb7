"""The four layers of MPS in which an image's tokens read those of its prompt (trainer/models/cross_modeling.py).

Each layer is two residual blocks, and each block computes attention and a gated feed-forward side by side. All heads
share one key and one value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rsaft.errors import ConfigError


class Gated(nn.Module):
    """SwiGLU: the first half of the channels, times SiLU of the second."""

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class ReadText(nn.Module):
    """Attention from image tokens to text tokens, beside a feed-forward."""

    def __init__(self, dim: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_width, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * hidden, bias=False), Gated(), nn.Linear(hidden, dim, bias=False))

    def forward(
        self, image: Float[Tensor, "b n d"], text: Float[Tensor, "b t d"], read: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b n d"]:
        x = self.norm(image)
        k, v = self.to_kv(text).chunk(2, dim=-1)
        seen = _attention(_split(self.to_q(x), self.heads), k, v, read[:, None, None])
        return image + self.to_out(seen) + self.ff(x)


class ReadImage(nn.Module):
    """Attention among image tokens with rotary positions, beside a feed-forward; one projection makes all inputs."""

    def __init__(self, dim: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (heads * head_width, head_width, head_width, 2 * hidden)
        self.norm = nn.LayerNorm(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_width, dim, bias=False)
        self.ff_out = nn.Sequential(Gated(), nn.Linear(hidden, dim, bias=False))

    def forward(self, image: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v, hidden = self.fused_attn_ff_proj(self.norm(image)).split(self.parts, dim=-1)
        seen = _attention(_rotated(_split(q, self.heads)), _rotated(k), v)
        return image + self.attn_out(seen) + self.ff_out(hidden)


class CrossLayer(nn.Module):
    """One of the four layers."""

    def __init__(self, dim: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.text = ReadText(dim, heads, head_width, hidden)
        self.image = ReadImage(dim, heads, head_width, hidden)

    def forward(
        self, image: Float[Tensor, "b n d"], text: Float[Tensor, "b t d"], read: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b n d"]:
        return self.image(self.text(image, text, read))


class CrossModel(nn.Module):
    """Image tokens (b, n, d), text tokens (b, t, d), and which of these are read (b, t) -> image tokens (b, n, d)."""

    def __init__(self, num_layers: int, dim: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(dim, heads, head_width, hidden) for _ in range(num_layers))

    def forward(
        self, image: Float[Tensor, "b n d"], text: Float[Tensor, "b t d"], read: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b n d"]:
        for layer in self.layers:
            image = layer(image, text, read)
        return image


def our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names (`layers.0.1.fn.norm.weight`) become those above; rotary frequencies are computed, not read."""
    places = {"0": "text", "1": "image"}
    return {
        re.sub(r"^(layers\.\d+)\.([01])\.fn\.", lambda found: f"{found[1]}.{places[found[2]]}.", key): value
        for key, value in weights.items()
        if not key.endswith("rotary_emb.inv_freq")
    }


def cross_model_like(weights: Mapping[str, Tensor], path: str, reward: str) -> CrossModel:
    """An untrained CrossModel of the sizes that weights under our names have.

    Raises:
        ConfigError: if a key that says a size is missing.
    """
    try:
        inner, dim = weights["layers.0.text.to_q.weight"].shape
        head_width = weights["layers.0.text.to_kv.weight"].shape[0] // 2
        hidden = weights["layers.0.text.ff.2.weight"].shape[1]
    except KeyError as error:
        published = str(error).replace("text", "0.fn")
        raise ConfigError(f"{reward}: '{path}' lacks the key {published} of the cross-attention.") from error
    num_layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    return CrossModel(num_layers, dim, inner // head_width, head_width, hidden)


def _split(x: Float[Tensor, "b n hd"], heads: int) -> Float[Tensor, "b heads n d"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b t d"],
    v: Float[Tensor, "b t d"],
    read: Bool[Tensor, "b 1 1 t"] | None = None,
) -> Float[Tensor, "b n hd"]:
    """Attention of all heads to one key and value."""
    scores = torch.einsum("bhnd,btd->bhnt", q * q.shape[-1] ** -0.5, k)
    if read is not None:
        scores = scores.masked_fill(~read, -torch.inf)
    return torch.einsum("bhnt,btd->bhnd", scores.softmax(dim=-1), v).transpose(1, 2).flatten(2)


def _rotated(x: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
    """Rotary positions (Su et al., 2021): channel i turns with channel i + d/2, by position / 10000^(2 i / d)."""
    n, d = x.shape[-2:]
    precise = torch.promote_types(x.dtype, torch.float32)
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, device=x.device, dtype=precise) / d)
    angles = torch.arange(n, device=x.device, dtype=precise)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
