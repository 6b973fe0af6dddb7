"""A folder of images with a prompt for each: from a table beside them, or from one text file an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from rsaft.errors import ConfigError
from rsaft.metrics.scoring import Item, Picture
from rsaft.prompts import CATEGORY_COLUMN, PROMPT_COLUMNS, Row, prompt_of, read_rows

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")
FILE_COLUMNS = ("file_name", "file", "image")
TEXT_COLUMNS = (*PROMPT_COLUMNS, "text", "caption")  # the latter are what image folders of the hub call it
SHOWN_FILES = 5  # in a note


@dataclass(frozen=True)
class ImageFolder:
    """The images that have a prompt, in the order of the table (of their names, with text files)."""

    items: tuple[Item, ...]
    categories: dict[int, str]  # by prompt_id
    source: str  # where the prompts are from
    note: str | None  # what was left out, in one sentence


def read_image_folder(folder: Path) -> ImageFolder:
    """The images of a folder and their prompts; prompt ids count different prompts in order of appearance.

    The table is `metadata.jsonl`, `.csv` or `.tsv`, or the only table there, with the columns file_name (or file,
    image) and prompt (or prompts, text, caption), and optionally seed and category. Without a table, NAME.txt holds the
    prompt of NAME.png. Where seeds do not tell a prompt's images apart, their numbers do.

    Raises:
        ConfigError: if there is no image with a prompt, or several tables.
    """
    where = f"images '{folder}'"
    table = _table(folder, where)
    rows = _text_files(folder) if table is None else read_rows(table, f"{where}, {table.name}", TEXT_COLUMNS)
    found = [(row, _file(folder, row)) for row in rows]
    good = [(row, file) for row, file in found if file is not None and _prompt(row)]
    if not good:
        raise ConfigError(
            f"{where}: no image ({', '.join(IMAGE_SUFFIXES)}) with a prompt was found in it; write metadata.jsonl "
            'there, a line {"file_name": "X.png", "prompt": "a boot"} each, or the prompt of X.png into X.txt.'
        )
    listed = [str(file.relative_to(folder)) for _, file in good if file is not None]
    lost = [row for row, file in found if file is None]
    bare = sorted({path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES} - set(listed))
    ids: dict[str, int] = {}
    for row, _ in good:
        ids.setdefault(_prompt(row), len(ids))
    items = [Item(ids[_prompt(row)], _prompt(row), _seed(row), file) for row, file in good]
    categories = {ids[_prompt(row)]: str(row.values[CATEGORY_COLUMN]) for row, _ in good if row.values.get("category")}
    return ImageFolder(
        tuple(_told_apart(items)),
        categories,
        "one text file an image" if table is None else table.name,
        _note(where, bare, [row.line for row in lost]),
    )


def load_picture(path: Path) -> Picture | None:
    """The image as fp32 in [0, 1], turned as its EXIF data says, without transparency; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # more than 8 bits: convert() would cut it off
                return None
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def matched_ids(items: Sequence[Item], other: Sequence[Item]) -> list[Item]:
    """`items` with the prompt ids that `other` has for the same prompts, and further ones for prompts it lacks."""
    ids = {item.prompt: item.prompt_id for item in other}
    for item in items:
        ids.setdefault(item.prompt, len(ids))
    return [replace(item, prompt_id=ids[item.prompt]) for item in items]


def _table(folder: Path, where: str) -> Path | None:
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())
    named = [path for path in tables if path.stem.lower() == "metadata"]
    chosen = named if named else tables
    if len(chosen) > 1:
        raise ConfigError(
            f"{where}: which table holds the prompts, {' or '.join(path.name for path in chosen)}? Keep one, or call "
            "it metadata.jsonl, .csv or .tsv."
        )
    return chosen[0] if chosen else None


def _text_files(folder: Path) -> list[Row]:
    """A row for each image with a UTF-8 file of its name; line breaks in it become blanks."""
    rows: list[Row] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
        text = path.with_suffix(".txt")
        if text.is_file():
            try:
                prompt = " ".join(text.read_bytes().decode("utf-8-sig").split())
            except UnicodeDecodeError:
                continue
            rows.append(Row(len(rows) + 1, {"file_name": path.name, "prompt": prompt}))
    return rows


def _file(folder: Path, row: Row) -> Path | None:
    """The row's image, if it names one within the folder."""
    name = next((row.values[column] for column in FILE_COLUMNS if row.values.get(column)), None)
    if not isinstance(name, str) or "\0" in name:
        return None
    path = folder / name
    inside = path.resolve().is_relative_to(folder.resolve())
    return path if inside and path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES else None


def _prompt(row: Row) -> str:
    found = prompt_of(row.values, TEXT_COLUMNS)
    return found.strip() if isinstance(found, str) else ""


def _seed(row: Row) -> int:
    value: Any = row.values.get("seed")
    return int(value) if str(value).isdecimal() else 0


def _told_apart(items: Sequence[Item]) -> list[Item]:
    """The items, numbered within their prompt where a seed occurs twice there."""
    times = Counter((item.prompt_id, item.seed) for item in items)
    doubtful = {prompt_id for (prompt_id, _), count in times.items() if count > 1}
    seen: Counter[int] = Counter()
    result = []
    for item in items:
        result.append(replace(item, seed=seen[item.prompt_id]) if item.prompt_id in doubtful else item)
        seen[item.prompt_id] += 1
    return result


def _note(where: str, bare: Sequence[str], lost: Sequence[int]) -> str | None:
    parts = []
    if bare:
        parts.append(f"{len(bare)} images without a usable prompt ({', '.join(bare[:SHOWN_FILES])}), left out")
    if lost:
        lines = ", ".join(map(str, lost[:SHOWN_FILES]))
        parts.append(f"{len(lost)} rows that name no image there (lines {lines}), left out")
    return f"{where}: {'; '.join(parts)}." if parts else None
