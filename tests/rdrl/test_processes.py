"""Two processes give one process's run: same prompts, same noise, same update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rdrl.process_worker import main

CASES = ["full-plain", "full-rsaft", "full-share", "full-every", "lora-plain", "lora-rsaft"]


@pytest.fixture(scope="module")
def runs(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    main(tiny_sd, one, CASES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.rdrl.process_worker", str(tiny_sd), str(two), ",".join(CASES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one(runs, case):
    one, two = (load_file(folder / f"{case}.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_the_records_of_one(runs, case):
    one, two = (
        [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()] for folder in runs
    )
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "reward/toy"):
            assert b.get(key) == pytest.approx(a.get(key), abs=1e-6)
