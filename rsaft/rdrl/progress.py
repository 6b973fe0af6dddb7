"""What a person sees of a run: a progress bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Context manager; `show` after every update. Silent on all ranks but the first."""

    def __init__(self, *, done: int, total: int, visible: bool, label: str, unit: str | None = None) -> None:
        """With a unit, such as "images", the line says how many are done a second."""
        self._label = label
        self._unit = unit
        self._total = total
        self._visible = visible
        self._begun = time.monotonic()
        self._first = done
        self._last_line = self._begun
        self._held_out = ""
        self._bar: Progress | None = None
        if visible and sys.stderr.isatty():
            from rich.console import Console

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def evaluated(self, means: Mapping[str, float]) -> None:
        """Remember the held-out rewards of the last evaluation for the line."""
        held_out = {k.split("/", 1)[1]: v for k, v in means.items() if k.startswith("held_out/")}
        self._held_out = " ".join(f"{name} {value:.3f}" for name, value in held_out.items())
        if "gauge/gap" in means:
            alarm = f", HACKED? keep {means['gauge/keep_step']:.0f}" if means["gauge/alarm"] else ""
            self._held_out += f" · gap {means['gauge/gap']:.2f} of {means['gauge/gain']:.2f}{alarm}"

    def show(self, step: int, record: Mapping[str, float | int | str | None]) -> None:
        """Move to `step`, with the rewards and the gradient norm of its record."""
        if not self._visible:
            return
        rewards = {k.split("/", 1)[1]: v for k, v in record.items() if k.startswith("reward/")}
        text = " ".join(f"{name} {value:.3f}" for name, value in rewards.items() if isinstance(value, float))
        norm = record.get("grad_norm")
        text += f" |g| {norm:.2g}" if isinstance(norm, float) else ""
        now = time.monotonic()
        if self._unit and now > self._begun:
            text += f" · {(step - self._first) / (now - self._begun):.3g} {self._unit}/s"
        if self._held_out:
            text += f" · held out: {self._held_out}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total:
            left = (now - self._begun) / max(step - self._first, 1) * (self._total - step)
            print(f"{self._label} {step}/{self._total} · {text} · {left:.0f} s left", file=sys.stderr, flush=True)
            self._last_line = now
