"""Prompts to the token ids that CLIP's text tower reads."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import Source

Cleaning = Callable[[str], str]

_FILES = ("tokenizer.json", "vocab.json")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "ʼ": "'"})
_WIDE_OR_JOINED = re.compile("[\uff01-\uffef\u3000\ufb00-\ufb06]+")  # full- and half-width forms, ligatures


@dataclass(frozen=True)
class ClipTokens:
    """Prompts (b,) -> ids (b, length): cut off at `length`, padded to it, begin and end included."""

    tokenizer: Any  # a transformers CLIPTokenizer
    length: int
    clean: Cleaning | None = None  # what the original does with a prompt before it is tokenized

    def __call__(self, prompts: Sequence[str]) -> Int[Tensor, "b n"]:
        texts = [self.clean(prompt) for prompt in prompts] if self.clean else list(prompts)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)


def like_open_clip(text: str) -> str:
    """What open_clip makes of a prompt before it tokenizes it, and transformers does not (`basic_clean`).

    Entities of HTML become characters, curly quotes straight, full-width letters and ligatures plain. open_clip leaves
    this to ftfy, which also repairs text that was decoded wrongly; that is not done here.
    """
    text = html.unescape(html.unescape(text)).translate(_QUOTES)
    text = _WIDE_OR_JOINED.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return " ".join(text.split())


def load_tokens(
    source: Source | None, near: Path, fallback: Source, length: int, reward: str, clean: Cleaning | None = None
) -> ClipTokens:
    """The tokenizer at `source`; else the one in the folder `near`, if there is one; else `fallback`.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    from transformers import CLIPTokenizer

    if source is None:
        source = near if any((near / name).is_file() for name in _FILES) else fallback
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{reward}: no CLIP tokenizer (tokenizer.json, or vocab.json with merges.txt) was found at '{source}'; "
            "put one beside the weights, or give its folder or hub id as tokenizer."
        ) from error
    if len(tokenizer) < 4:  # what transformers makes of a folder without a vocabulary
        raise ConfigError(f"{reward}: the tokenizer at '{source}' has no vocabulary; give its folder or hub id.")
    return ClipTokens(tokenizer, length, clean)


def check_tokens(tokens: ClipTokens, vocabulary: int, eos: int, reward: str) -> None:
    """Refuse a tokenizer whose prompts this network would pool at the wrong place, or not know.

    Args:
        tokens: the tokenizer.
        vocabulary: rows of the network's embedding.
        eos: `eos_token_id` of the network's configuration; 2 means that it pools where the id is largest.
        reward: for the message.

    Raises:
        ConfigError: if they do not fit. The wrong place would give every prompt the same features.
    """
    end, size = tokens.tokenizer.eos_token_id, len(tokens.tokenizer)
    if size > vocabulary:
        raise ConfigError(
            f"{reward}: the tokenizer has {size} tokens and the network knows {vocabulary}; give the tokenizer that "
            "belongs to it."
        )
    ids = tokens(["a"])[0]
    pooled = int(ids.argmax()) if eos == 2 else int((ids == eos).int().argmax())
    if int(ids[pooled]) != end:
        raise ConfigError(
            f"{reward}: the network reads a prompt's meaning at the token {'of the largest id' if eos == 2 else eos}, "
            f"and the tokenizer ends prompts with {end}; set eos_token_id in the checkpoint's config.json, or give the "
            "tokenizer that belongs to it."
        )
