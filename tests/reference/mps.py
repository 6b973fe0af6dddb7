"""MPS's cross-attention from a state dict under its published names, token by token and head by head."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(weights: dict[str, Tensor], image: Tensor, text: Tensor, read: Tensor, head_width: int) -> Tensor:
    """Image tokens (n, d), text tokens (t, d), which of these may be read (t,) -> image tokens (n, d)."""
    i = 0
    while f"layers.{i}.0.fn.norm.weight" in weights:
        image = image + _read_text(_of(weights, f"layers.{i}.0.fn."), image, text, read, head_width)
        image = image + _read_image(_of(weights, f"layers.{i}.1.fn."), image, head_width)
        i += 1
    return image


def _read_text(w: dict[str, Tensor], image: Tensor, text: Tensor, read: Tensor, head_width: int) -> Tensor:
    x = F.layer_norm(image, image.shape[-1:], w["norm.weight"], w["norm.bias"])
    q, kv = x @ w["to_q.weight"].T, text @ w["to_kv.weight"].T
    k, v = kv[:, :head_width], kv[:, head_width:]
    heads = []
    for start in range(0, q.shape[1], head_width):
        scores = q[:, start : start + head_width] @ k.T / head_width**0.5
        scores[:, ~read] = -torch.inf
        heads.append(scores.softmax(dim=-1) @ v)
    return torch.cat(heads, dim=1) @ w["to_out.weight"].T + _gated(x @ w["ff.0.weight"].T) @ w["ff.2.weight"].T


def _read_image(w: dict[str, Tensor], image: Tensor, head_width: int) -> Tensor:
    x = F.layer_norm(image, image.shape[-1:], w["norm.weight"], w["norm.bias"])
    inner = w["attn_out.weight"].shape[1]
    joined = x @ w["fused_attn_ff_proj.weight"].T
    q, k, v, hidden = joined.split([inner, head_width, head_width, joined.shape[1] - inner - 2 * head_width], dim=1)
    k = _turned(k)
    heads = []
    for start in range(0, inner, head_width):
        scores = _turned(q[:, start : start + head_width]) @ k.T / head_width**0.5
        heads.append(scores.softmax(dim=-1) @ v)
    return torch.cat(heads, dim=1) @ w["attn_out.weight"].T + _gated(hidden) @ w["ff_out.1.weight"].T


def _gated(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * F.silu(x[:, half:])


def _turned(x: Tensor) -> Tensor:
    """Each pair of channels (i, i + d/2) as a complex number, turned by its position's angle."""
    n, d = x.shape
    angles = torch.tensor([[p * 10000 ** (-2 * i / d) for i in range(d // 2)] for p in range(n)], dtype=x.dtype)
    turned = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=1)


def _of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
