"""Two processes give one process's update, also where an option looks at the whole batch or draws noise."""

import pytest
import torch
from safetensors.torch import load_file

from tests.flatten.option_worker import STEPS
from tests.rdrl.fork_server import ForkServer


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and the first and the second of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with ForkServer("tests.flatten.option_worker") as server:
        started = [server.start("update", out=str(two), rank=rank, world=2) for rank in (0, 1)]
        assert [server.wait(pid) for pid in started] == [0, 0]
        assert server.run("update", out=str(one)) == 0
    return [load_file(path) for path in (one / "0.safetensors", two / "0.safetensors", two / "1.safetensors")]


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_give_the_gradient_of_one(found, name):
    one, *two = found
    for other in two:
        torch.testing.assert_close(other[name], one[name], rtol=1e-10, atol=1e-14)


def test_each_of_two_processes_logs_the_weights_of_the_whole_batch(found):
    one, *two = found
    for name in ("weights", "weights-input"):
        smallest, largest = one[f"{name}: weights"].tolist()
        assert smallest < 0.9 < 1.1 < largest
        for other in two:
            torch.testing.assert_close(other[f"{name}: weights"], one[f"{name}: weights"], rtol=1e-10, atol=0)
