"""Encoded prompts on disk, one safetensors file each, so that text encoders need not stay in memory.

A file's name is the hash of the prompt's text, the text encoders' weights and tokenizers, and the length that prompts
are cut to: another encoder never reads these files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rsaft.backbones.family import Conditioning, Family, stacked


@dataclass(frozen=True)
class PromptCache:
    """A folder of encoded prompts, and what encoded them."""

    folder: Path
    encoders: str  # hash of the text encoders, tokenizers and length


def open_cache(folder: Path, pipe: Any, family: Family, max_sequence_length: int | None) -> PromptCache:
    """The cache in `folder`, made if it is missing, for these text encoders. Reads all of their weights once."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps([family.name, max_sequence_length]).encode())
    for name in family.text_encoders:
        encoder = getattr(pipe, name)
        for key, value in sorted(encoder.state_dict().items()) if encoder is not None else ():
            digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    for name in family.tokenizers:
        tokenizer = getattr(pipe, name)
        if tokenizer is not None:
            vocabulary = sorted(tokenizer.get_vocab().items())
            digest.update(json.dumps([name, tokenizer.model_max_length, vocabulary]).encode())
    return PromptCache(folder, digest.hexdigest())


def cached(cache: PromptCache, prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning]) -> Conditioning:
    """Conditioning of the prompts; those that the cache lacks, or holds damaged, are encoded and stored."""
    stored = {prompt: _read(_path(cache, prompt)) for prompt in dict.fromkeys(prompts)}
    found = {prompt: conditioning for prompt, conditioning in stored.items() if conditioning is not None}
    missing = [prompt for prompt in stored if prompt not in found]
    if missing:
        fresh = encode(missing)
        fresh = fresh.to(torch.device("cpu"), fresh.text.dtype)
        for i, prompt in enumerate(missing):
            found[prompt] = fresh.row(i)
            _write(_path(cache, prompt), fresh.row(i))
    return stacked([found[prompt] for prompt in prompts])


def _path(cache: PromptCache, prompt: str) -> Path:
    text = json.dumps([cache.encoders, prompt])
    return cache.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def _read(path: Path) -> Conditioning | None:
    """None if there is no file, or it is damaged: safetensors does not notice a flipped bit, so tensors are hashed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return None
    if "text" not in tensors or metadata.get("sha256") != _checksum(tensors):
        return None
    return Conditioning(tensors["text"], tensors.get("pooled"))


def _write(path: Path, conditioning: Conditioning) -> None:
    tensors = {"text": conditioning.text.contiguous()}
    if conditioning.pooled is not None:
        tensors["pooled"] = conditioning.pooled.contiguous()
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same prompt
    save_file(tensors, beside, metadata={"sha256": _checksum(tensors)})
    os.replace(beside, path)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
