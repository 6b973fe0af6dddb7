"""One process alone is the plain case; several are in tests/rdrl/test_processes.py."""

from __future__ import annotations

import pytest
import torch

from rsaft import distributed
from rsaft.errors import ConfigError


def test_alone_a_sum_changes_nothing_and_nothing_is_sharded():
    tensor = torch.arange(3.0)
    distributed.sum_([tensor])
    assert torch.equal(tensor, torch.arange(3.0))
    assert (distributed.world_size(), distributed.rank(), distributed.gathered("part")) == (1, 0, ["part"])
    assert not distributed.is_sharded(tensor)
    assert distributed.local(tensor) is tensor


def test_outside_torchrun_there_is_nobody_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.join(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_a_world_size_without_a_meeting_point_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 .* MASTER_ADDR, MASTER_PORT missing; start with torchrun"):
        distributed.join(torch.device("cpu"))
