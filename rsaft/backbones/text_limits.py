"""How much of a prompt a pipeline's text encoders read; what is longer is cut by diffusers in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rsaft.backbones.family import Family
from rsaft.backbones.flux import MAX_T5_TOKENS as FLUX_T5_TOKENS
from rsaft.backbones.quiet import silent_truncation
from rsaft.backbones.sd3 import MAX_T5_TOKENS as SD3_T5_TOKENS
from rsaft.prompts import TextReader


def text_readers(pipe: Any, family: Family, max_sequence_length: int | None = None) -> list[TextReader]:
    """The text encoders of a pipeline with their lengths; encoders of one kind and length are given once.

    Args:
        pipe: the pipeline.
        family: of the pipeline.
        max_sequence_length: tokens that T5 reads, as in `load_backbone`.
    """
    readers: dict[tuple[str, int], TextReader] = {}
    for attribute in family.tokenizers:
        tokenizer = getattr(pipe, attribute)
        if tokenizer is None:  # SD3 without its T5
            continue
        is_t5 = "T5" in type(tokenizer).__name__
        limit = tokenizer.model_max_length
        if is_t5:
            most = SD3_T5_TOKENS if family.name == "sd3" else FLUX_T5_TOKENS
            limit = max_sequence_length or min(most, limit)
        name = "T5" if is_t5 else "CLIP"
        readers.setdefault((name, limit), TextReader(name, limit, _counter(tokenizer)))
    return list(readers.values())


def cut_note(readers: Sequence[TextReader], prompts: Sequence[str]) -> str | None:
    """One sentence on the prompts that no text encoder, or not every one, reads to their end; None if all are read."""
    parts = []
    for reader in readers:
        cut = [prompt for prompt in prompts if reader.cuts(prompt)]
        if cut:
            parts.append(
                f"{len(cut)} are longer than the {reader.limit} tokens that {reader.name} reads ({cut[0]!r:.60})"
            )
    return f"prompts: of {len(prompts)}, {'; '.join(parts)}; they are cut there." if parts else None


def _counter(tokenizer: Any) -> Callable[[str], int]:
    def count(prompt: str) -> int:
        with silent_truncation():
            return len(tokenizer(prompt).input_ids)

    return count
