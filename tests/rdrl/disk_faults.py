"""Faults at the n-th call that changes the disk: what a full disk and a kill do, at every place they can do it."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

CALLS = ("mkdir", "rename", "replace", "fsync", "chmod")
DELETIONS = ("unlink", "rmdir")


@dataclass
class Calls:
    """The number of calls so far, and what happens at each."""

    at_call: Callable[[int], None]
    count: int = 0

    def __call__(self) -> None:
        self.count += 1
        self.at_call(self.count)


def disk_full_from(n: int) -> Callable[[int], None]:
    """The n-th call fails for want of space, and so does every later one."""

    def fail(count: int) -> None:
        if count >= n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


def killed_at(n: int) -> Callable[[int], None]:
    """The process is killed in the n-th call."""

    def kill(count: int) -> None:
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


@contextmanager
def at_disk_calls(at_call: Callable[[int], None], *, deletions: bool) -> Iterator[Calls]:
    """Within, `at_call(n)` runs in the n-th call of the operating system that changes the disk.

    A write is at fault half done. `deletions` counts those too; a full disk does not hinder them.
    """
    calls = Calls(at_call)
    names = CALLS + (DELETIONS if deletions else ())
    before = {name: getattr(os, name) for name in names}
    open_file, save_file = io.open, safetensors.torch.save_file

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            half = super().write(bytes(data)[: len(data) // 2])
            calls()
            return half + super().write(bytes(data)[half:])

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode and "a" not in mode:
            return open_file(path, mode, *args, **kwargs)
        calls()
        file = File(path, mode.replace("b", ""))
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def saved(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls()
        save_file(tensors, path, metadata)
        size = os.path.getsize(path)
        content = Path(path).read_bytes()
        os.truncate(path, size // 2)
        calls()
        with open_file(path, "wb") as file:
            file.write(content)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls()
            return call(*args, **kwargs)

        return wrapper

    try:
        for name in names:
            setattr(os, name, counted(before[name]))
        io.open, safetensors.torch.save_file = opened, saved  # type: ignore[assignment]
        yield calls
    finally:
        for name in names:
            setattr(os, name, before[name])
        io.open, safetensors.torch.save_file = open_file, save_file
