"""The guards that every other test relies on."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from tests.conftest import NetworkBlockedError


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_another_machine_cannot_be_reached(address):
    with socket.socket() as s, pytest.raises(NetworkBlockedError, match="tests work offline"):
        s.connect(address)


def test_names_of_other_machines_are_not_looked_up():
    with pytest.raises(NetworkBlockedError, match=r"example\.org"):
        socket.create_connection(("example.org", 443), timeout=1)


def test_loopback_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_the_hub_is_offline_and_torch_runs_on_one_thread():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_slow_tests_run_only_when_asked_for(request):
    assert request.config.getoption("--runslow")
