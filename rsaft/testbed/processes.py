"""Training runs as processes of their own, side by side, shown as the rows of one progress display."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rsaft.errors import RsaftError
from rsaft.metrics.records import read_records
from rsaft.rdrl.signals import StopRequest

POLL = 0.3  # seconds between two looks at the runs
PATIENCE = 120.0  # seconds that a run gets to save itself after SIGTERM


@dataclass(frozen=True)
class Job:
    """A command that trains one run."""

    command: Sequence[str]
    run_dir: Path  # its metrics.jsonl is what is shown

    @property
    def log(self) -> Path:
        """What the command prints."""
        return self.run_dir.with_suffix(".log")


@dataclass
class Row:
    """One run's row: a bar on a terminal, elsewhere a line for each evaluation."""

    name: str
    job: Job
    bars: Progress
    task: TaskID
    seen: int = field(default=-1)  # step of the last evaluation that was printed

    def show(self) -> None:
        """Read the run's records, and show the newest."""
        path = self.job.run_dir / "metrics.jsonl"
        records = read_records(path) if path.is_file() else []
        done = max((record["step"] for record in records if record["kind"] == "train"), default=0)
        last = next((record for record in reversed(records) if record["kind"] == "eval"), None)
        if last is None:
            return
        text = " · ".join(f"{name} {value:.3f}" for name, value in _means(last).items())
        self.bars.update(self.task, completed=done, text=text)
        if last["step"] > self.seen and not self.bars.console.is_terminal:
            self.bars.console.print(f"{self.name} {last['step']}/{self.bars.tasks[self.task].total:.0f} · {text}")
        self.seen = last["step"]


def run_side_by_side(jobs: Mapping[str, Job], *, total: int, console: Console) -> None:
    """Run all jobs at once, one thread each, until they are done; if one fails, the others are stopped.

    Args:
        jobs: by name; the run directories exist.
        total: updates of a run.
        console: where progress is shown.

    Raises:
        RsaftError: if a job failed.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, when all jobs have saved and stopped.
    """
    children: dict[str, subprocess.Popen[bytes]] = {}
    with StopRequest() as stop, _bars(console) as bars:
        rows = [Row(name, job, bars, bars.add_task(name, total=total, text="loading")) for name, job in jobs.items()]
        try:
            for name, job in jobs.items():
                children[name] = _start(job)
            while stop.signal is None and any(child.poll() is None for child in children.values()):
                if any(child.returncode for child in children.values()):
                    break
                for row in rows:
                    row.show()
                time.sleep(POLL)
            failed = [name for name, child in children.items() if child.poll()]
        finally:
            _stop(children.values())
        for row in rows:
            row.show()
    if stop.exit_code is not None:
        raise SystemExit(stop.exit_code)
    if failed:
        log = jobs[failed[0]].log
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise RsaftError(f"the run '{failed[0]}' failed: {last} (log: {log})")


def _start(job: Job) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with job.log.open("wb") as log:  # a session of its own: Ctrl-C reaches the parent alone, which passes it on once
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _stop(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, by which a run saves itself; SIGKILL for one that does not end."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.terminate()
    for child in running:
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _means(record: Mapping[str, Any]) -> dict[str, float]:
    """Train reward and gold of an evaluation."""
    rewards = {key: value for key, value in record.items() if key.startswith("reward/") or key == "held_out/gold"}
    return {key.split("/")[1]: float(value) for key, value in rewards.items() if value is not None}
