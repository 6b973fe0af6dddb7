"""Stop a run by a signal, at the next step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rsaft import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM and Ctrl-C ask for a stop instead of stopping; a second Ctrl-C stops at once.

    The loop looks at `signal` between steps, saves and ends. The handlers that were there before come back on exit.
    Outside the main thread, where Python allows no handlers, this does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the first one received
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int | None:
        """What a shell expects of a process that a signal ended: 143 after SIGTERM, 130 after Ctrl-C; None before."""
        return None if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = int(number)


def agreed(signal: int | None) -> int | None:
    """The largest signal that any process received, so that all stop at the same step."""
    numbers = [s for s in distributed.gathered(signal) if s is not None]
    return max(numbers, default=None)
