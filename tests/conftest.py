"""Every test runs offline, on one thread, with deterministic kernels; `--runslow` adds the long ones."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import beartype
import pytest
import torch

# The annotations of rsaft are checked by `beartype.beartype`; as PEP 484 has it, an int is welcome as a float.
beartype.beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False  # the costly part, and only a debugging aid


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine. Not an OSError, so that no library takes it for a dead network."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", default=False, help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: needs --runslow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _is_loopback(host: Any) -> bool:
    if host in (None, "", b"", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Unix sockets and this machine's own addresses can be reached (gloo needs them)."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(family: int, host: Any) -> None:
        if family != socket.AF_UNIX and not _is_loopback(host):
            raise NetworkBlockedError(f"a test tried to reach {host!r}; tests work offline.")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(self.family, address[0])
        return connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(self.family, address[0])
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(socket.AF_UNSPEC, host)
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(autouse=True)
def torch_defaults_restored() -> Iterator[None]:
    """A test that changes the default dtype, the threads or the determinism leaks it to no other test."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Stable Diffusion pipeline with random weights and eps-prediction. Read it, never write it."""
    from tests.helpers import tiny_sd_folder

    return tiny_sd_folder(tmp_path_factory.mktemp("tiny_sd") / "eps")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v-prediction."""
    from tests.helpers import tiny_sd_folder

    return tiny_sd_folder(tmp_path_factory.mktemp("tiny_sd") / "v", prediction_type="v_prediction")
