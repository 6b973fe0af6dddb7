"""The manifest of a checkpoint: size and sha256 of every file, and of itself, so that damage is never silent."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

import rsaft
from rsaft.errors import CheckpointError
from rsaft.files import fsync_directory

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_OWN_DIGEST = "manifest_sha256"
_WAY_OUT = "delete the folder to resume from an earlier one, or restore it from a copy."


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint must consist of; names are relative, with / between folders."""

    step: int
    files: Mapping[str, Entry]


def seal(folder: Path, *, step: int, mode_of: str) -> Manifest:
    """Sync every file of `folder`, write `manifest.json` over them, and sync the folders.

    Every file gets the permissions of the file `mode_of`: some writers make theirs unreadable for others.

    Raises:
        CheckpointError: if there is a symbolic link.
    """
    mode = (folder / mode_of).stat().st_mode & 0o777
    files: dict[str, Entry] = {}
    for name in _names(folder):
        if (folder / name).is_symlink():
            raise CheckpointError(
                f"checkpoint {folder}: the export wrote {name} as a link, and a checkpoint holds plain files only; "
                "let it copy the file."
            )
        (folder / name).chmod(mode)
        files[name] = Entry(*_digest(folder / name, sync=True))
    manifest = Manifest(step, files)
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {name: asdict(entry) for name, entry in files.items()},
        "versions": {
            "python": platform.python_version(),
            "rsaft": rsaft.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    (folder / MANIFEST).write_bytes(_text(body))
    _digest(folder / MANIFEST, sync=True)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_directory(path)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest, if it is whole.

    Raises:
        CheckpointError: if it is missing, altered or of another format version.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        body = json.loads(raw)
    except FileNotFoundError:
        raise _damaged(folder, MANIFEST, "is missing") from None
    except OSError as error:
        raise _damaged(folder, MANIFEST, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        found = "truncated or altered: it is no JSON" if raw else "truncated: it is empty"
        raise _damaged(folder, MANIFEST, f"is {found}") from error
    if not isinstance(body, dict):
        raise _damaged(folder, MANIFEST, "is altered: it is no JSON object")
    found_version = body.get("format_version")
    if isinstance(found_version, int) and found_version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder}: {MANIFEST} has format version {found_version}; this rsaft reads {FORMAT_VERSION}: "
            "resume it with the rsaft that wrote it, or delete the folder to resume from an earlier one."
        )
    digest = body.pop(_OWN_DIGEST, None)
    if raw != _text(body):
        raise _damaged(folder, MANIFEST, f"is altered: it does not agree with its own sha256 {digest}")
    return Manifest(body["step"], {name: Entry(**entry) for name, entry in body["files"].items()})


def verify(folder: Path, *, step: int | None) -> Manifest:
    """The manifest, once every file was found to agree with it. Cost: reads every file.

    Args:
        folder: the checkpoint.
        step: the step that the folder's name says; None if it says none.

    Raises:
        CheckpointError: naming the first file that is missing, truncated, altered or not listed.
    """
    manifest = read_manifest(folder)
    if step not in (None, manifest.step):
        raise _damaged(folder, MANIFEST, f"is that of step {manifest.step}, and the folder's name must say the same")
    try:
        found = set(_names(folder)) - {MANIFEST}
        for name, entry in manifest.files.items():
            if name not in found:
                raise _damaged(folder, name, "is missing")
            _check_file(folder, name, entry)
    except OSError as error:
        raise _damaged(folder, str(error.filename or "a file"), f"cannot be read ({error.strerror})") from error
    if unlisted := sorted(found - set(manifest.files)):
        raise _damaged(folder, unlisted[0], f"is not listed in {MANIFEST}, and a checkpoint holds nothing else")
    return manifest


def _check_file(folder: Path, name: str, entry: Entry) -> None:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise _damaged(folder, name, "is not a plain file")
    size = path.stat().st_size
    if size < entry.bytes:
        raise _damaged(folder, name, f"is truncated: {size} of {entry.bytes} bytes")
    if size > entry.bytes:
        raise _damaged(folder, name, f"is altered: {size} bytes instead of {entry.bytes}")
    digest, _ = _digest(path)
    if digest != entry.sha256:
        raise _damaged(folder, name, f"is altered: its sha256 is {digest[:12]}.. instead of {entry.sha256[:12]}..")


def _names(folder: Path) -> list[str]:
    """Relative names of everything below `folder` that is no folder; a link to a folder counts as a file."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _digest(path: Path, *, sync: bool = False) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return digest, file.tell()


def _text(body: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: the body with its own digest. Canonical, so that any changed byte shows."""
    plain = json.dumps(body, indent=1, sort_keys=True)
    sealed = {**body, _OWN_DIGEST: hashlib.sha256(plain.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def _damaged(folder: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder}: {name} {what}; {_WAY_OUT}")
