"""Several processes give one process's run: same prompts, same noise, same update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rsaft.config import build_trainer, load_config
from rsaft.testbed.tiny import TINY_FAMILIES
from tests.helpers import tiny_folder, tiny_pipeline
from tests.rdrl.fork_server import REPOSITORY, ForkServer
from tests.rdrl.process_worker import KINDS, backbone, train

CASES = [f"{name}-{what}-{kind}" for name in ("sd", "sd3") for what in ("full", "lora") for kind in ("plain", "rsaft")]
CASES += ["flux-full-rsaft", "sd-full-share", "sd-full-every"]
TRAINABLE = [kind for kind in KINDS if kind != "odd"]
GRID = [f"{name}-{what}-{kind}" for name in TINY_FAMILIES for what in ("full", "lora") for kind in TRAINABLE]


@dataclass(frozen=True)
class Runs:
    """Where one process and several have trained the same cases."""

    one: Path
    several: Path
    models: dict[str, str]  # family -> folder


def run_both(folder: Path, cases: Sequence[str], *, world: int, refused: Sequence[str] = ()) -> Runs:
    """Train the cases here, and meanwhile by `world` processes, which are forked from one that imports torch once."""
    families = {case.partition("-")[0] for case in cases}
    models = {name: str(tiny_folder(folder / name, name)) for name in TINY_FAMILIES if name in families}
    runs = Runs(folder / "one", folder / "several", models)
    runs.one.mkdir()
    runs.several.mkdir()
    together = {"models": models, "out": str(runs.several), "cases": cases, "refused": refused, "world": world}
    with ForkServer("tests.rdrl.process_worker") as server:
        started = [server.start("train", **together, rank=rank) for rank in range(world)]
        train(models, str(runs.one), cases)
        assert [server.wait(pid) for pid in started] == [0] * world
    return runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_both(tmp_path_factory.mktemp("pair"), CASES, world=2, refused=["sd-full-odd"])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_both(tmp_path_factory.mktemp("four"), GRID, world=4)


def assert_same_weights(runs: Runs, case: str) -> None:
    one, several = (load_file(folder / f"{case}.safetensors") for folder in (runs.one, runs.several))
    assert one.keys() == several.keys()
    for key in one:
        torch.testing.assert_close(several[key], one[key], rtol=0, atol=1e-6)


def assert_same_records(one: Path, several: Path) -> None:
    """Every value of metrics.jsonl, also the gradient's norm, which AdamW hardly sees."""
    first, second = (records_of(folder) for folder in (one, several))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            tolerance = 1e-5 * value if key == "grad_norm" else 1e-6
            assert b[key] == (pytest.approx(value, rel=0, abs=tolerance) if isinstance(value, float) else value), key


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one(pair, case):
    assert_same_weights(pair, case)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_the_records_of_one(pair, case):
    assert_same_records(pair.one / case, pair.several / case)


@pytest.mark.parametrize("case", ["sd-full-plain", "sd3-lora-rsaft"])
def test_the_compared_runs_move_their_weights_by_a_hundred_times_the_tolerance(pair, case):
    family, what, _ = case.split("-")
    before = backbone(pair.models[family], what).parameters()
    after = load_file(pair.one / f"{case}.safetensors")
    assert max(float((after[str(i)] - p.detach()).abs().max()) for i, p in enumerate(before)) > 1e-4


def test_every_process_refuses_a_batch_that_does_not_split_in_one_sentence(pair):
    sentences = {(pair.several / f"sd-full-odd-{rank}.txt").read_text() for rank in (0, 1)}
    assert sentences == {
        "train.batch_size: 3 samples must split evenly over 2 processes and then into micro-batches of 1; choose a "
        "multiple of 2."
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID)
def test_four_processes_give_the_run_of_one_in_every_family(four, case):
    assert_same_weights(four, case)
    assert_same_records(four.one / case, four.several / case)


@pytest.mark.slow
def test_torchrun_trains_an_adapter_of_sdxl_from_a_config_as_one_process_does(tmp_path: Path):
    settings = {
        "model": {"path": str(tiny_folder(tmp_path / "sdxl", "sdxl")), "lora": {"rank": 2, "alpha": 4.0}},
        "prompts": {"train": str(tmp_path / "prompts.txt")},
        "algorithm": {"type": "draft", "sampling": {"num_steps": 3, "guidance": 2.0}},
        "rewards": {"toy": {"type": "tests.helpers:toy_reward"}},
        "objective": {"type": "weighted_sum", "weights": {"toy": 1.0}},
        "step": {"type": "rsaft", "rho": 0.1, "rho_w": 0.05},
        "train": {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_samples": 4, "save_every": 2, "lr": 1e-4},
    }
    (tmp_path / "prompts.txt").write_text("a cat\ntwo red dogs\nrain\n", encoding="utf-8")
    config = tmp_path / "sdxl.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "rsaft.cli", "train", str(config), "--run-dir", str(tmp_path / "two")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    build_trainer(load_config([config]), tmp_path / "one").fit()
    assert_same_records(tmp_path / "one", tmp_path / "two")
    pipe = tiny_pipeline("sdxl")
    pipe.load_lora_weights(tmp_path / "two" / "checkpoints" / "step-000002" / "adapter")
    assert pipe.get_list_adapters()["unet"]
