"""A fresh interpreter that imports a test module once and then forks: processes to kill, at milliseconds each.

Run as `python -m tests.rdrl.fork_server MODULE PREPARED`; one JSON request a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

REPOSITORY = Path(__file__).parents[2]


class ForkServer:
    """Starts functions of a module in processes of their own.

    Args:
        module: its dotted name; it is imported once, in the server.
        prepare: arguments of the module's `prepare`, called once in the server; None if it has none.
    """

    def __init__(self, module: str, prepare: dict[str, Any] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rdrl.fork_server", module, json.dumps(prepare)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, function: str, **arguments: Any) -> int:
        """Fork, call `function(**arguments)` there, and return the process id at once."""
        return int(self._ask({"start": function, "arguments": arguments}))

    def wait(self, pid: int) -> int:
        """Wait for a process to end; its exit code, or minus the signal that killed it."""
        return int(self._ask({"wait": pid}))

    def ready(self) -> None:
        """Wait until the module is imported and prepared."""
        self._ask({})

    def run(self, function: str, **arguments: Any) -> int:
        return self.wait(self.start(function, **arguments))

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=20)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _child(module: ModuleType, request: dict[str, Any]) -> int:
    os.dup2(2, 1)  # the pipe on 1 is the server's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        getattr(module, request["start"])(**request["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(name: str, prepared: dict[str, Any] | None) -> None:
    """Answer requests until the other side closes."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(name)
    if prepared is not None:
        module.prepare(**prepared)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                os._exit(_child(module, request))
        elif "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = 0
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
