"""Reward soup: one model from several that were each tuned on one reward (Rame et al., 2023; a baseline of PG-OT).

Of adapters, the sum of the products,

    dW = sum_k lambda_k s_k B_k A_k,     s_k = alpha_k / rank_k,

written as one adapter whose factors stand side by side: A = [A_1; A_2; ...], B = [lambda_1 s_1 B_1, lambda_2 s_2 B_2,
...], with the ranks added and scale 1. Merging the factors instead, (sum B_k) (sum A_k), mixes B_1 with A_2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rsaft.backbones.export import LORA_FILE
from rsaft.errors import ConfigError
from rsaft.files import write_atomic

_METADATA = "lora_adapter_metadata"  # diffusers' own name
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class _Adapter:
    tensors: dict[str, Tensor]
    settings: dict[str, object]  # "unet.r", "unet.lora_alpha", ..., as diffusers writes them
    scale: float


def adapter_soup(adapters: Sequence[Path], weights: Sequence[float], out: Path) -> Path:
    """Write the weighted sum of adapters as one adapter, for `pipe.load_lora_weights`.

    Args:
        adapters: folders of `rsaft export --format diffusers`, of one model; a layer may be missing in some.
        weights: lambda_k of each. They need not sum to 1: one weight of 1 gives that adapter back.
        out: a folder.

    Returns:
        The file. Its rank is the sum of the adapters' ranks.

    Raises:
        ConfigError: if a folder holds no such adapter, they are of different networks, or the weights do not fit.
    """
    _check_weights(weights, len(adapters))
    found = [_read(folder) for folder in adapters]
    merged = _side_by_side(found, weights)
    rank = max(tensor.shape[0] for name, tensor in merged.items() if name.endswith(_A))
    for name, tensor in merged.items():  # diffusers wants one rank; a layer that is missing somewhere gets zeros
        missing = rank - tensor.shape[0 if name.endswith(_A) else 1]
        padding = (0, 0, 0, missing) if name.endswith(_A) else (0, missing)
        merged[name] = torch.nn.functional.pad(tensor, padding).contiguous()
    prefix = next(iter(merged)).partition(".")[0]
    targets = sorted({str(t) for one in found for t in _listed(one.settings.get(f"{prefix}.target_modules"))})
    changed = {f"{prefix}.r": rank, f"{prefix}.lora_alpha": rank, f"{prefix}.target_modules": targets}
    text = json.dumps(found[0].settings | changed, indent=2, sort_keys=True)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / LORA_FILE, save(merged, metadata={"format": "pt", _METADATA: text}))
    return out / LORA_FILE


def _side_by_side(found: Sequence[_Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """A and B of every layer, those of the adapters that have it one behind the other."""
    merged: dict[str, Tensor] = {}
    for layer in sorted({name.removesuffix(_A) for one in found for name in one.tensors if name.endswith(_A)}):
        parts = [
            (one.tensors[layer + _A], weight * one.scale * one.tensors[layer + _B])
            for one, weight in zip(found, weights, strict=True)
            if layer + _A in one.tensors
        ]
        sizes = sorted({(a.shape[1], b.shape[0]) for a, b in parts})
        if len(sizes) > 1:
            raise ConfigError(f"soup: the layer {layer} has the sizes {sizes}; take adapters of one model.")
        merged[layer + _A] = torch.cat([a for a, _ in parts])
        merged[layer + _B] = torch.cat([b for _, b in parts], dim=1)
    return merged


def weight_soup(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_k lambda_k theta_k of whole networks, with lambda that sum to 1, summed in fp32 at least.

    Raises:
        ConfigError: if the weights do not sum to 1, or the models have other tensors.
    """
    _check_weights(weights, len(models))
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise ConfigError(f"soup: weights of whole networks sum to 1; got {list(weights)}.")
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.items()} for model in models]
    if any(one != shapes[0] for one in shapes):
        raise ConfigError("soup: the models' tensors differ in name or shape; take models of one base.")
    result = {}
    for name, first in models[0].items():
        exact = torch.promote_types(first.dtype, torch.float32)
        total = torch.stack([w * m[name].to(exact) for w, m in zip(weights, models, strict=True)]).sum(dim=0)
        result[name] = total.to(first.dtype)
    return result


def _read(folder: Path) -> _Adapter:
    """An adapter file with its scale.

    Raises:
        ConfigError: if it is none, or its layers have scales of their own.
    """
    path = folder / LORA_FILE
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it has no iterator
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"soup: {path} is no adapter ({error}); name a folder of `rsaft export`.") from error
    prefix = next(iter(tensors), "").partition(".")[0]
    rank, alpha = (settings or {}).get(f"{prefix}.r"), (settings or {}).get(f"{prefix}.lora_alpha")
    patterns = [key for key in (settings or {}) if key.endswith("_pattern") and settings[key]]
    if not rank or alpha is None or patterns or any(not name.endswith((_A, _B)) for name in tensors):
        raise ConfigError(
            f"soup: {path} does not say one rank and alpha for all of its layers; name a folder that "
            "`rsaft export --format diffusers` wrote."
        )
    return _Adapter(tensors, settings, alpha / rank)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _check_weights(weights: Sequence[float], count: int) -> None:
    if not count or len(weights) != count or not all(math.isfinite(w) for w in weights):
        raise ConfigError(f"soup: one finite weight for each of {count} models; got {list(weights)}.")
