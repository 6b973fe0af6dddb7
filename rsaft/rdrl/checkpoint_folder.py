"""A run's `checkpoints` folder: which checkpoints it holds, which are pruned, and what a kill left behind."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

from rsaft.errors import CheckpointError
from rsaft.rdrl.manifest import Manifest, read_manifest

TEMPORARY, REPLACED, BEST = ".tmp-", ".replaced-", "best"
_NAME = re.compile(r"(?:\.replaced-)?step-(\d{6,})")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named by; None if it is named otherwise."""
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of the checkpoints, oldest first; what a kill left half-written is not among them."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*step-*"), reverse=True):  # so step-000040 comes before .replaced-step-000040
        step = step_of(path)
        if step is not None and path.is_dir():
            found.setdefault(step, path)
    return [found[step] for step in sorted(found)]


def manifest_if_complete(path: Path) -> Manifest | None:
    """The manifest, if every file is there in its size: a look, without reading the files."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return None
    files = {name: path / name for name in manifest.files}
    complete = all(f.is_file() and f.stat().st_size == manifest.files[name].bytes for name, f in files.items())
    return manifest if complete else None


def clear_leftovers(folder: Path) -> None:
    """Delete what a kill left half-written, and finish or undo a replacement that it interrupted."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_symlink():
            path.unlink()
        else:
            delete(path)
    for path in folder.glob(f"{REPLACED}step-*"):
        final = folder / path.name.removeprefix(REPLACED)
        if final.exists():
            delete(path)
        else:
            path.rename(final)


def link_best(folder: Path, step: int | None) -> None:
    """Let `best` point to that step's checkpoint; without one, as of the untuned model, there is no `best`."""
    link, target = folder / BEST, folder / f"step-{step or 0:06d}"
    made = folder / f"{TEMPORARY}{BEST}-{os.getpid()}"
    try:
        made.unlink(missing_ok=True)
        if target.is_dir():
            made.symlink_to(target.name, target_is_directory=True)
            made.replace(link)
        else:
            link.unlink(missing_ok=True)
    except OSError as error:  # a file system without links, or a folder in the way
        warnings.warn(f"{link} could not be linked to {target.name} ({error.strerror}); the run goes on.", stacklevel=2)


def prune(folder: Path, keep: int, written: Path, stay: Collection[int | None] = ()) -> None:
    """Delete what is older than `written`, but for steps that stay and the newest complete ones: `keep` with `written`.

    A damaged one goes when there are `keep` complete ones after it, and not before: it may be worth a rescue.
    """
    found = list_checkpoints(folder)
    complete = [path for path in found if path != written and manifest_if_complete(path)]
    kept = {written, *complete[max(0, len(complete) - keep + 1) :]}
    if len(kept) < keep:
        return
    oldest_kept = next(i for i, path in enumerate(found) if path in kept)
    kept |= {path for path in found if step_of(path) in stay}
    for i, path in enumerate(found[: found.index(written)]):
        if path not in kept and (path in complete or i < oldest_kept):
            delete(path)


def delete(path: Path) -> None:
    """Delete a folder; renamed first, so that half a deletion is never taken for a checkpoint."""
    doomed = path if path.name.startswith(TEMPORARY) else path.with_name(f"{TEMPORARY}{path.name}")
    try:
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(
            f"{path} could not be deleted ({error.strerror}) and is left behind; delete it by hand if space is short.",
            stacklevel=2,
        )
