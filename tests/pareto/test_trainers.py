"""ParetoTransport on every pathwise trainer, plain and with RSA-FT, with a prompt's samples on several processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.pareto.transport_worker import CASES
from tests.rdrl.fork_server import ForkServer

FAST = [case for case in CASES if "/plain/" in case or case.startswith("draft/")]
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in FAST]
Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one process found, and the first and the second of two."""
    cases = CASES if request.config.getoption("--runslow") else FAST
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with ForkServer("tests.pareto.transport_worker") as server:
        started = [server.start("update", out=str(two), cases=cases, rank=rank, world=2) for rank in (0, 1)]
        assert [server.wait(pid) for pid in started] == [0, 0]
        assert server.run("update", out=str(one), cases=cases) == 0
    return load_file(one / "0.safetensors"), load_file(two / "0.safetensors"), load_file(two / "1.safetensors")


@pytest.mark.parametrize("case", [*FAST, *SLOW])
def test_two_processes_that_share_a_prompt_give_the_gradient_of_one(found: Found, case: str) -> None:
    one, *two = found
    assert one[case].abs().max() > 1e-6
    for other in two:
        torch.testing.assert_close(other[case], one[case], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("draft/")])
def test_each_of_two_processes_logs_what_one_does(found: Found, case: str) -> None:
    one, *two = found
    share, source, _, loss = one[f"{case} logs"].tolist()
    assert share == 0.75  # the two hats are masked
    assert source > 0
    assert loss > 0
    for other in two:
        torch.testing.assert_close(other[f"{case} logs"][[0, 3]], one[f"{case} logs"][[0, 3]], rtol=1e-7, atol=0)
