"""Writing files that are whole or absent whenever the process is killed or the disk is full. Knows only the errors."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from rsaft.errors import RunDirectoryError


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file whole: written beside, synced, renamed. Its folder is made if it is missing.

    Raises:
        RunDirectoryError: if it cannot be written; what was there before is intact, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and not path.is_file():  # a folder, or a device, which a rename would replace
            raise OSError(0, "it is there, and no plain file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = "its folder is a file" if isinstance(error, FileExistsError) else error.strerror
        raise RunDirectoryError(
            f"{path} could not be written ({reason}); what was there before is intact: free some space, or "
            "choose a place that can be written."
        ) from error


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
