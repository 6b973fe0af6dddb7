"""SIGKILL at any moment, and the same call again: the result is that of a run that nothing disturbed, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.rdrl.conftest import Undisturbed
from tests.rdrl.forked_runs import outcome


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    undisturbed: Undisturbed, tmp_path: Path, kills: int
) -> None:
    server, draw = undisturbed.server, random.Random(kills)
    survived = runs = 0
    while survived < kills:  # one run after another, each killed until it is through; every second kill inside a save
        run, runs, code = tmp_path / str(runs), runs + 1, -signal.SIGKILL
        while code:
            arguments = {"folder": undisturbed.folder, "run": str(run)}
            if survived >= kills:
                code = server.run("train", **arguments)
            elif survived % 2:
                code = server.run("train", **arguments, die_in_save=draw.randrange(1, 120))
            else:
                pid = server.start("train", **arguments)
                time.sleep(draw.uniform(0.02, 0.5) * undisturbed.seconds)
                os.kill(pid, signal.SIGKILL)
                code = server.wait(pid)
            assert code in (0, -signal.SIGKILL)
            survived += code != 0
        assert outcome(run) == undisturbed.outcome
    assert survived == kills
