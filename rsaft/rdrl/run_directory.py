"""A run directory: one process at a time, JSON files that are whole or absent, and records that can be resumed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rsaft
from rsaft.errors import RunDirectoryError
from rsaft.files import write_atomic

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "pillow")


def free_run_dir(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that does not exist; it is not made."""
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run directory, made if missing, for this process alone; however the process ends, it is free again.

    Raises:
        RunDirectoryError: if another process holds it, or it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {run}: it cannot be made or written ({error.strerror}); choose another one."
        ) from error
    try:
        _lock(descriptor, run)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # this frees it; the file stays, since deleting it could let two processes in


def _lock(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode().strip()
        raise RunDirectoryError(
            f"run directory {run}: process {holder or 'that is just starting'} uses it, and a run directory belongs to "
            "one process at a time; wait for that process or stop it, or choose another directory."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {run}: its file system cannot lock files ({error.strerror}); choose one on another disk."
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {run}: it cannot be written ({error.strerror}); free some space, or choose another one."
        ) from error


def write_json_atomic(path: Path, value: object) -> None:
    """Write a JSON file that is whole whenever the process is killed: the old one, or the new one.

    Keys are sorted; floats keep every bit; NaN and infinities become null, which JSON has no words for.
    """
    write_atomic(path, (json.dumps(_finite(value), indent=1, sort_keys=True) + "\n").encode())


def environment() -> dict[str, Any]:
    """What env.json says: versions, platform and devices; no environment variables, host names or paths."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), "rsaft": rsaft.__version__} | _versions(),
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_threads": torch.get_num_threads(),
        },
        "devices": devices or ["cpu"],
        "cuda": torch.version.cuda,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


class JsonLines:
    """An append-only file of JSON records, one a line, in a form that depends on nothing but the records.

    Keys are sorted, floats keep every bit (Python's repr), NaN and infinities are null. A line reaches the operating
    system when `write` returns, so it survives a kill; it survives a power cut once `sync` returned.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Open the file, made if missing.

        Args:
            path: the file.
            resume_step: keep the records with "step" up to this one and drop the others; None starts afresh. A last
                line that a kill left unfinished is dropped.

        Raises:
            RunDirectoryError: if a line before the last is no record with a step.
        """
        self._path = path
        old = path.read_bytes() if path.exists() else b""
        kept = b"" if resume_step is None else _kept_lines(path, old, resume_step)
        if kept != old or not path.exists():
            write_atomic(path, kept)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            ValueError: if it has no whole number as "step".
            RunDirectoryError: if the disk is full.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a record has a whole number as 'step'; got {record.get('step')!r}.")
        line = (json.dumps(_finite(record), sort_keys=True) + "\n").encode()
        with self._errors_reported():
            while line:  # unbuffered, so a full disk may take a part of it
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Make all records durable; call it before a checkpoint is written.

        Raises:
            RunDirectoryError: if the disk is full.
        """
        with self._errors_reported():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing it twice does no harm."""
        self._file.close()

    @contextmanager
    def _errors_reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"{self._path}: a record could not be written ({error.strerror}); the checkpoints are intact: free "
                "some space and run the same command again."
            ) from error


def _kept_lines(path: Path, old: bytes, resume_step: int) -> bytes:
    lines = old.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return b"".join(line for i, line in enumerate(lines) if _step_of(path, i, line) <= resume_step)


def _step_of(path: Path, index: int, line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise RunDirectoryError(
            f"{path}, line {index + 1}: it is no record with a step, so the file is damaged; restore it from a copy, "
            "or move it away to go on without the earlier records."
        ) from None


def _finite(value: Any) -> Any:
    """The value with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _versions() -> dict[str, str | None]:
    """Installed versions, from the packages' metadata: nothing is imported."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
