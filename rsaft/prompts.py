"""Prompt files: .txt (one a line), .jsonl ({"prompt": ...} a line), .csv (a column `prompt`); all UTF-8."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rsaft.errors import ConfigError

_log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, in its order, and one sentence on what was odd about it (None: nothing)."""

    prompts: tuple[str, ...]
    note: str | None


def read_prompts(path: Path) -> PromptFile:
    """The prompts of a file: blanks around them are cut, empty ones are left out, repeated ones are kept.

    What is odd about the file is logged as a warning, too.

    Args:
        path: a .txt, .jsonl or .csv file.

    Raises:
        ConfigError: if the file is missing, of another kind, not UTF-8, malformed, or holds no prompt.
    """
    where = f"prompts '{path}'"
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{where}: a file of prompts ends in one of {', '.join(SUFFIXES)}; got '{path.name}'.")
    if not path.is_file():
        raise ConfigError(f"{where}: there is no such file; give a file that ends in {', '.join(SUFFIXES)}.")
    text = _decoded(path.read_bytes(), where)
    read = {".txt": _from_txt, ".jsonl": _from_jsonl, ".csv": _from_csv}[path.suffix.lower()]
    found = [(line, prompt.strip()) for line, prompt in read(text, where)]
    prompts = tuple(prompt for _, prompt in found if prompt)
    if not prompts:
        raise ConfigError(f"{where}: it holds no prompt; write one a line, or name the column 'prompt'.")
    note = _note(where, found)
    if note:
        _log.warning(note)
    return PromptFile(prompts, note)


def _decoded(data: bytes, where: str) -> str:
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{where}, line {number}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
            ) from error
    return data.decode("utf-8-sig")


def _from_txt(text: str, where: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines, which also splits at form feeds and at Unicode's line separators, within a prompt.
    yield from enumerate(text.removesuffix("\n").split("\n"), start=1)


def _from_jsonl(text: str, where: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            yield number, ""
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}, line {number}: this is not JSON: {error}.") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise ConfigError(
                f'{where}, line {number}: an object with a text under "prompt" is expected, as in '
                f'{{"prompt": "a red boot"}}; got {line.strip()!r:.60}.'
            )
        yield number, _encodable(prompt, where, number)


def _from_csv(text: str, where: str) -> Iterator[tuple[int, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if "prompt" not in columns:
            raise ConfigError(f"{where}: a column 'prompt' is expected; its columns are {columns}.")
        for row in reader:
            yield reader.line_num, row["prompt"] or ""
    except csv.Error as error:
        raise ConfigError(f"{where}, line {reader.reader.line_num}: this is not CSV: {error}.") from error


def _encodable(prompt: str, where: str, number: int) -> str:
    """The prompt, unless JSON's escapes made half a character of it, which no file could hold."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}, line {number}: the prompt holds a lone surrogate, which is no character."
        ) from error
    return prompt


def _note(where: str, found: list[tuple[int, str]]) -> str | None:
    empty = [line for line, prompt in found if not prompt]
    seen: set[str] = set()
    repeated = []
    for line, prompt in found:
        if prompt and prompt in seen:
            repeated.append(line)
        seen.add(prompt)
    parts = []
    if empty:
        parts.append(f"{len(empty)} empty (line {empty[0]}{' and on' if len(empty) > 1 else ''}), left out")
    if repeated:
        first = f"line {repeated[0]}{' and on' if len(repeated) > 1 else ''}"
        parts.append(f"{len(repeated)} repeated ({first}), kept: such a prompt is drawn more often")
    return f"{where}: {'; '.join(parts)}." if parts else None
