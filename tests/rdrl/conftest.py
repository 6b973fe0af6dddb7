"""What the tests that end processes share: a server with the model loaded, and a run that nothing disturbed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rdrl.fork_server import ForkServer
from tests.rdrl.forked_runs import outcome


@dataclass(frozen=True)
class Undisturbed:
    """A finished run, and where to start others like it."""

    server: ForkServer
    folder: str  # the model
    outcome: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="session")
def undisturbed(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    run, folder = tmp_path_factory.mktemp("undisturbed") / "run", str(tiny_sd)
    with ForkServer("tests.rdrl.forked_runs", {"folder": folder}) as server:
        server.ready()
        begun = time.monotonic()
        assert server.run("train", folder=folder, run=str(run)) == 0
        yield Undisturbed(server, folder, outcome(run), time.monotonic() - begun)
