"""What the command line says of an error that a user can cause."""

from __future__ import annotations

import sys
import time

from rsaft.cli.arguments import rank
from rsaft.errors import ConfigError, RsaftError

HEAD_START = 3.0  # seconds that the first process has to speak, before another one ends


def complain(error: RsaftError | OSError) -> None:
    """Say on the error stream what went wrong, once for all processes where they fail alike."""
    process = rank()
    text = error if isinstance(error, RsaftError) else _sentence(error)
    if process == 0:
        print(f"rsaft: {text}", file=sys.stderr)
    elif isinstance(error, ConfigError):  # the same on every process; torchrun ends all when the first one ends
        time.sleep(HEAD_START)
    else:
        print(f"rsaft, process {process}: {text}", file=sys.stderr)


def _sentence(error: OSError) -> str:
    """What the operating system, or a library in its name, said."""
    if error.strerror is None or isinstance(error, ConnectionError | TimeoutError):
        return " ".join(str(error).split()) or type(error).__name__
    where = f"'{error.filename}': " if error.filename else ""
    return f"{where}{error.strerror}; name a path that can be read and written, on a disk with free space."
