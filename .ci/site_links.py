"""A hook of mkdocs: pages link to code as `../rsaft/x.py`, which a code host opens; the site gets a copy of that file.

A page in docs/ links to a file of the repository outside it by a relative path. mkdocs knows only what is in docs/, so
each such file is put into the site as text, `code/rsaft/x.py.txt`, and the link leads there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page with its links to code led to copies; a link to nothing stays, and `--strict` refuses it."""

    def copied(match: re.Match[str]) -> str:
        source = ROOT / match[1]
        if not source.is_file():
            return match[0]
        name = f"code/{match[1]}" + ("" if source.suffix == ".ipynb" else ".txt")
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(source)))
        return f"]({name})"

    return LINK.sub(copied, markdown)
