from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rsaft.rdrl.checkpoint import load_latest
from rsaft.rdrl.signals import StopRequest
from tests.rdrl.conftest import Undisturbed
from tests.rdrl.forked_runs import STEPS, outcome


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_first_signal_is_noted_and_the_old_handlers_come_back(number: signal.Signals, code: int) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert (stop.signal, stop.exit_code) == (None, None)
        signal.raise_signal(number)
        assert (stop.signal, stop.exit_code) == (number, code)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_a_first_signal_stops_at_once(first: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert stop.signal == first
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_changes_nothing() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 143


def test_outside_the_main_thread_handlers_stay_as_they_are() -> None:
    seen: list[object] = []
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with StopRequest() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.exit_code])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, None]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_with_a_checkpoint_at_the_current_step_and_resume_is_exact(
    undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    server, run = undisturbed.server, tmp_path / "stopped"
    pid = server.start("train", folder=undisturbed.folder, run=str(run))
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("train") < 3:
        time.sleep(0.002)
    os.kill(pid, number)
    assert server.wait(pid) == code
    found = load_latest(run / "checkpoints")
    assert found is not None
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found.step == max(r["step"] for r in records if r["kind"] == "train")
    assert 3 <= found.step < STEPS
    assert server.run("train", folder=undisturbed.folder, run=str(run)) == 0
    assert outcome(run) == undisturbed.outcome
