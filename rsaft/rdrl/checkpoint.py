"""Checkpoints that survive a kill, a full disk and a damaged file.

A checkpoint is a folder `step-000040`: one safetensors file for each group of tensors, `state.json`, optionally an
exported `adapter/`, and `manifest.json` with the size and sha256 of each. It is written beside, synced, renamed, and
only then is an older one deleted; it is read only after every file agrees with the manifest. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from rsaft.errors import CheckpointError
from rsaft.files import fsync_directory
from rsaft.rdrl.checkpoint_folder import (
    REPLACED,
    TEMPORARY,
    clear_leftovers,
    delete,
    list_checkpoints,
    manifest_if_complete,
    prune,
    step_of,
)
from rsaft.rdrl.manifest import FORMAT_VERSION, MANIFEST, Manifest, seal, verify

__all__ = ["FORMAT_VERSION", "Checkpoint", "list_checkpoints", "load_checkpoint", "load_latest", "save_checkpoint"]

STATE, ADAPTER, _TENSORS = "state.json", "adapter", ".safetensors"
_GROUP = re.compile(r"[A-Za-z0-9_-]+")
_OVERHEAD, _OVERHEAD_PER_TENSOR = 1 << 16, 256  # bytes: headers, manifest, blocks that are not filled


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; the tensors are on the CPU, in the dtypes they were saved in."""

    path: Path
    step: int  # updates done
    tensors: dict[str, dict[str, Tensor]]  # group (weights, ema, optimizer) -> name -> tensor
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()  # one sentence for each newer damaged checkpoint that was passed over


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    pinned: Collection[int] = (),
    export: Callable[[Path], object] | None = None,
) -> Path:
    """Write `folder/step-XXXXXX`, durable when this returns, and then delete all but the `keep` newest.

    Killed at any moment, it leaves a folder that `load_latest` reads. Call it from one process, with the run locked.
    A checkpoint of the same step that holds the same tensors and state stays as it is; another one is replaced.

    Args:
        folder: the run's `checkpoints` folder; made if missing.
        step: updates done, 0 or more.
        tensors: groups of tensors, one file each; views are saved as they look, whatever their storage.
        state: values for JSON: dicts with text keys, lists, text, numbers, None. NaN and infinities come back as such,
            tuples as lists.
        keep: number of complete checkpoints to keep, 1 or more; the one just written always stays.
        best: step of one that stays besides.
        pinned: steps of others that stay.
        export: called with `step-XXXXXX/adapter`, which it may fill with any files.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if it could not be written (disk full, no permission); the earlier ones are intact.
        ValueError: if an argument is not what is said above.
    """
    _check_arguments(step, tensors, keep)
    state_text = _state_text(state)
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}-{os.getpid()}"
    needed = _bytes_needed(folder, tensors, state_text, exporting=export is not None)
    with _disk_errors_reported(final, needed):
        _make_folder(folder)
        clear_leftovers(folder)
        if needed > (free := _free_bytes(folder)):
            raise CheckpointError(_not_written(final, needed, free, "checked before writing"))
        try:
            temporary.mkdir()
            _write_files(temporary, tensors, state_text, export)
            _put_in_place(temporary, final, seal(temporary, step=step, mode_of=STATE))
        finally:
            if temporary.exists():
                delete(temporary)
        fsync_directory(folder)
    prune(folder, keep, final, {best, *pinned})
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`, read after every file was found to agree with the manifest.

    Cost: each file is read twice, once for its sha256.

    Raises:
        CheckpointError: naming the file that is missing, truncated, altered, unlisted or of another format version.
    """
    manifest = verify(path, step=step_of(path))
    files = [name for name in manifest.files if "/" not in name and name.endswith(_TENSORS)]
    try:
        tensors = {name.removesuffix(_TENSORS): safetensors.torch.load_file(path / name) for name in files}
        state = json.loads((path / STATE).read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path}: its files agree with {MANIFEST} and cannot be read all the same ({error}); delete the "
            "folder to resume from an earlier one."
        ) from error
    return Checkpoint(path, manifest.step, tensors, state)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint of a run's `checkpoints` folder; None if there is none at all.

    Damaged ones are passed over, and `skipped` of the result says which and why.

    Raises:
        CheckpointError: if there are checkpoints and every one is damaged.
    """
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            good = load_checkpoint(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return Checkpoint(good.path, good.step, good.tensors, good.state, tuple(skipped))
    if not skipped:
        return None
    raise CheckpointError(
        f"checkpoints in {folder}: all {len(skipped)} are damaged, and one must be good to resume; restore one from a "
        f"copy, or start again in an empty run directory. The newest: {skipped[0]}"
    )


def _check_arguments(step: int, tensors: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
    if step < 0 or keep < 1:
        raise ValueError(f"a checkpoint has step >= 0 and keep >= 1; got step {step} and keep {keep}.")
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise ValueError(f"a group of tensors is a file's name: letters, digits, - and _ only; got {group!r}.")


def _state_text(state: Mapping[str, Any]) -> bytes:
    _check_json(state, "state")
    return (json.dumps(dict(state), indent=1) + "\n").encode()


def _check_json(value: object, where: str) -> None:
    """Refuse what JSON would change or cannot hold."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: JSON keys are text; got {key!r}; use str({key!r}).")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{where}: a checkpoint's state holds numbers, text, lists and dicts; got {type(value).__name__}; put "
            "tensors into `tensors`."
        )


def _bytes_needed(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state_text: bytes, *, exporting: bool
) -> int:
    sizes = [sum(t.numel() * t.element_size() for t in group.values()) for group in tensors.values()]
    exported = _exported_bytes(folder, default=max(sizes, default=0)) if exporting else 0
    overhead = _OVERHEAD + _OVERHEAD_PER_TENSOR * sum(len(group) for group in tensors.values())
    return sum(sizes) + len(state_text) + exported + overhead


def _exported_bytes(folder: Path, default: int) -> int:
    """Size of the newest checkpoint's export: the next one will be as large."""
    for path in reversed(list_checkpoints(folder)):
        if manifest := manifest_if_complete(path):
            return sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(f"{ADAPTER}/"))
    return default


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


@contextmanager
def _disk_errors_reported(final: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(_not_written(final, needed, _free_bytes(final.parent), reason)) from error


def _not_written(final: Path, needed: int, free: int, reason: str) -> str:
    return (
        f"checkpoint {final} was not written: it needs {needed} bytes and {free} bytes are free ({reason}); the "
        "earlier checkpoints are intact: free some space or keep fewer checkpoints, and run the same command again."
    )


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
        fsync_directory(folder.parent)


def _write_files(
    temporary: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state_text: bytes,
    export: Callable[[Path], object] | None,
) -> None:
    for group, named in tensors.items():
        safetensors.torch.save_file(_plain(named), temporary / f"{group}{_TENSORS}")
    (temporary / STATE).write_bytes(state_text)
    if export is not None:
        export(temporary / ADAPTER)


def _plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, as the format demands; only what shares or is strided is copied."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def _put_in_place(temporary: Path, final: Path, written: Manifest) -> None:
    """Rename; a good checkpoint of the same content stays, another one is set aside first and deleted after."""
    if not final.exists():
        temporary.rename(final)
        return
    if _same_content(final, written):
        return
    aside = final.with_name(f"{REPLACED}{final.name}")
    final.rename(aside)
    temporary.rename(final)
    fsync_directory(final.parent)
    delete(aside)


def _same_content(final: Path, written: Manifest) -> bool:
    """Whether `final` is good and has the same tensors and state; the export follows from them."""
    try:
        found = verify(final, step=step_of(final))
    except CheckpointError:
        return False
    return _content(found) == _content(written)


def _content(manifest: Manifest) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in manifest.files.items() if "/" not in name}
