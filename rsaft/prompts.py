"""Prompt files, all UTF-8: .txt (one a line), .jsonl (an object a line), .csv and .tsv (with a header).

A table's prompts are under `prompt` or `prompts`, in any case: so the published layouts of DrawBench (Prompts,
Category) and PartiPrompts (Prompt, Category, Challenge, Note) are read as they are.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rsaft.errors import ConfigError

_log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv")
PROMPT_COLUMNS = ("prompt", "prompts")
CATEGORY_COLUMN = "category"
NOT_UTF8 = "it holds bytes that are not UTF-8"
MARKS = 8  # more tokens than any text encoder adds to the prompt's own
SHOWN_LINES = 5  # of each kind of finding, by number


@dataclass(frozen=True)
class Row:
    """One row of a table, or one line of a text file."""

    line: int  # the last one of the row, from 1
    values: dict[str, Any]  # by column, in lower case; of a text file {"prompt": ...}
    fault: str | None = None  # why it cannot be used; then there are no values


@dataclass(frozen=True)
class Finding:
    """Rows of which something is to be said."""

    count: int
    lines: tuple[int, ...]  # the first few
    first: str | None = None  # of broken ones: what is wrong with the first

    def said(self, what: str) -> str:
        """The count and the lines, for a sentence."""
        more = ", ..." if self.count > len(self.lines) else ""
        where = f"line{'s' if self.count > 1 else ''} {', '.join(map(str, self.lines))}{more}"
        return f"{self.count} {what} ({where}{f': {self.first}' if self.first else ''})"


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, in its order, and what was odd about it."""

    prompts: tuple[str, ...]
    note: str | None  # one sentence; None: nothing was odd
    lines: tuple[int, ...] = ()  # of each prompt
    categories: tuple[str | None, ...] = ()  # of each prompt
    findings: dict[str, Finding] = field(default_factory=dict)  # by kind: empty, duplicate, not_utf8, broken

    def report(self) -> dict[str, Any]:
        """For JSON: the number of prompts, and of each kind of finding the count and the first lines."""
        return {"prompts": len(self.prompts), **{kind: asdict(found) for kind, found in self.findings.items()}}


@dataclass(frozen=True)
class TextReader:
    """How much of a prompt a text encoder reads."""

    name: str  # CLIP, T5
    limit: int  # tokens, those that mark the ends included
    count: Callable[[str], int]  # tokens of a prompt, uncut

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt is too long. A short one is not counted: a token holds a byte at least."""
        return len(prompt.encode()) + MARKS > self.limit and self.count(prompt) > self.limit


def read_prompts(path: Path) -> PromptFile:
    """The prompts of a file: blanks around them are cut, repeated ones are kept.

    Empty rows, rows that are not UTF-8 and broken ones are left out, and the file's note, which is logged as a warning
    too, counts them and gives their lines.

    Args:
        path: a .txt, .jsonl, .csv or .tsv file.

    Raises:
        ConfigError: if the file is missing, of another kind, holds no prompt or no such column, or is a CSV file whose
            rows cannot be told apart.
    """
    where = f"prompts '{path}'"
    rows = [_as_prompt(row) for row in read_rows(path, where)]
    good = [row for row in rows if row.fault is None and row.values["prompt"]]
    if not good:
        faulty = next((row for row in rows if row.fault is not None), None)
        if faulty is not None:
            raise ConfigError(f"{where}, line {faulty.line}: {faulty.fault}; the file holds no other prompt.")
        raise ConfigError(f"{where}: it holds no prompt; write one a line, or name the column 'prompt'.")
    findings = _findings(rows)
    note = _note(where, findings)
    if note:
        _log.warning(note)
    return PromptFile(
        prompts=tuple(row.values["prompt"] for row in good),
        note=note,
        lines=tuple(row.line for row in good),
        categories=tuple(row.values["category"] for row in good),
        findings=findings,
    )


def read_rows(path: Path, where: str, columns: Sequence[str] = PROMPT_COLUMNS) -> list[Row]:
    """All rows of a .txt, .jsonl, .csv or .tsv file, the unusable ones with what is wrong with them.

    Args:
        path: the file.
        where: how errors begin.
        columns: a header names one of these at least, in lower case.

    Raises:
        ConfigError: if the file is missing, of another kind, in UTF-16, without such a column, or a CSV file whose
            rows cannot be told apart.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ConfigError(f"{where}: a file of prompts ends in one of {', '.join(SUFFIXES)}; got '{path.name}'.")
    if not path.is_file():
        raise ConfigError(f"{where}: there is no such file; give a file that ends in {', '.join(SUFFIXES)}.")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{where}: it is not UTF-8 but UTF-16; save the file as UTF-8.")
    # A byte that is not UTF-8 becomes half a character, by which its row is known, whatever the file's kind.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    if kind == ".txt":
        return list(_from_txt(text))
    if kind == ".jsonl":
        return list(_from_jsonl(text))
    return list((_from_csv if kind == ".csv" else _from_tsv)(text, where, columns))


def prompt_of(values: dict[str, Any], columns: Sequence[str] = PROMPT_COLUMNS) -> Any:
    """What a row has as its prompt, under the first of these columns that it has; None without any."""
    return next((values[column] for column in columns if column in values), None)


def over_long(prompts: Sequence[str], lines: Sequence[int], reader: TextReader) -> Finding | None:
    """The prompts of which a text encoder reads the beginning only; None if there are none."""
    found = [line for prompt, line in zip(prompts, lines, strict=True) if reader.cuts(prompt)]
    return _finding(found) if found else None


def _from_txt(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        yield Row(number, {}, NOT_UTF8) if _is_half(line) else Row(number, {"prompt": line})


def _from_jsonl(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        if _is_half(line):
            yield Row(number, {}, NOT_UTF8)
        elif not line.strip():
            yield Row(number, {"prompt": ""})
        else:
            yield _from_json(number, line)


def _from_json(number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"this is not JSON: {error}")
    if not isinstance(row, dict):
        return Row(number, {}, f'an object is expected, as in {{"prompt": "a red boot"}}; got {line.strip()!r:.60}')
    return Row(number, {key.strip().lower(): value for key, value in row.items()})


def _from_csv(text: str, where: str, columns: Sequence[str]) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = _header(next(reader, []), where, columns)
        for fields in reader:
            yield _from_fields(reader.line_num, header, fields)
    except csv.Error as error:  # from here on, no one can say where a row ends
        raise ConfigError(f"{where}, line {reader.line_num}: this is not CSV: {error}.") from error


def _from_tsv(text: str, where: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows as they are published: a line each, quotes left alone; what a spreadsheet quoted is taken out again."""
    lines = _lines(text)
    first = next(lines)[1].rstrip("\r").split("\t")
    quoted = all(_is_quoted(name) for name in first)  # then every field is
    header = _header([_unquoted(name, quoted) for name in first], where, columns)
    for number, line in lines:
        yield _from_fields(number, header, [_unquoted(value, quoted) for value in line.rstrip("\r").split("\t")])


def _from_fields(number: int, header: list[str], fields: list[str]) -> Row:
    if any(map(_is_half, fields)):
        return Row(number, {}, NOT_UTF8)
    if len(fields) > len(header):
        found = f"{len(fields)} fields, and the header names {len(header)}"
        return Row(number, {}, f"{found}; quote a field that holds the separator")
    return Row(number, dict.fromkeys(header, "") | dict(zip(header, fields, strict=False)))


def _header(names: list[str], where: str, columns: Sequence[str]) -> list[str]:
    header = [name.strip().lower() for name in names]
    if not set(columns) & set(header):
        raise ConfigError(f"{where}: a column 'prompt' is expected; its columns are {names}.")
    return header


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines, which also splits at form feeds and at Unicode's line separators, within a prompt.
    return enumerate(text.removesuffix("\n").split("\n"), start=1)


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == '"' and '"' not in value[1:-1].replace('""', "")


def _unquoted(value: str, quoted: bool) -> str:
    """The field without quotes around it, if all fields have them or it holds doubled ones."""
    undo = _is_quoted(value) and (quoted or '""' in value[1:-1])
    return value[1:-1].replace('""', '"') if undo else value


def _is_half(text: str) -> bool:
    """Whether there is a surrogate in it: half a character, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _as_prompt(row: Row) -> Row:
    """The row's prompt and category, or what is wrong with them."""
    if row.fault is not None:
        return row
    prompt, category = prompt_of(row.values), row.values.get(CATEGORY_COLUMN)
    if not isinstance(prompt, str):
        found = f"got the keys {list(row.values)}" if prompt is None else f"got {prompt!r:.60}"
        return Row(row.line, {}, f'an object with a text under "prompt" is expected; {found}')
    if _is_half(prompt):  # JSON's escapes can spell one
        return Row(row.line, {}, "the prompt holds a lone surrogate, which is no character")
    return Row(row.line, {"prompt": prompt.strip(), "category": str(category) if category else None})


def _findings(rows: Sequence[Row]) -> dict[str, Finding]:
    faults = [row for row in rows if row.fault is not None]
    prompts = [row for row in rows if row.fault is None]
    seen: set[str] = set()
    repeated = []
    for row in prompts:
        prompt = row.values["prompt"]
        if prompt and prompt in seen:
            repeated.append(row.line)
        seen.add(prompt)
    broken = [row for row in faults if row.fault != NOT_UTF8]
    found = {
        "empty": _finding([row.line for row in prompts if not row.values["prompt"]]),
        "duplicate": _finding(repeated),
        "not_utf8": _finding([row.line for row in faults if row.fault == NOT_UTF8]),
        "broken": _finding([row.line for row in broken], broken[0].fault if broken else None),
    }
    return {kind: finding for kind, finding in found.items() if finding.count}


def _finding(lines: Sequence[int], first: str | None = None) -> Finding:
    return Finding(len(lines), tuple(lines[:SHOWN_LINES]), first)


def _note(where: str, findings: dict[str, Finding]) -> str | None:
    words = {
        "empty": ("empty", "left out"),
        "duplicate": ("repeated", "kept: such a prompt counts more often"),
        "not_utf8": ("not UTF-8", "left out"),
        "broken": ("broken", "left out"),
    }
    parts = [f"{found.said(words[kind][0])}, {words[kind][1]}" for kind, found in findings.items()]
    return f"{where}: {'; '.join(parts)}." if parts else None
