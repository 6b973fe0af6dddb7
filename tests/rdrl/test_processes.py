"""Several processes give one process's run: same prompts, same noise, same update; also when they share the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rsaft.config import build_trainer, load_config
from rsaft.flatten import worst_case_eps
from rsaft.flatten.weight import global_norm, rounding_cosine
from rsaft.rdrl.checkpoint import list_checkpoints
from rsaft.testbed.tiny import TINY_FAMILIES
from tests.helpers import tiny_folder, tiny_pipeline
from tests.rdrl.fork_server import REPOSITORY, ForkServer
from tests.rdrl.process_worker import RESUMED, backbone, cut_short, flattening_inputs, train, trainer

CASES = ["sd-full-rsaft", "sd-lora-plain", "sd3-full-plain", "sd3-lora-rsaft"]
CASES += ["sd3-full-every", "sd3-sharded-every", "sd-sharded-rsaft"]
REFUSED = ["sd-full-odd", "sd-sharded-share", "sd-ddp-plain", "sd-fsdp-plain"]

WAYS = ("full", "lora", "sharded")
GRID = [f"{name}-{what}-rsaft" for name in ("sd", "sdxl", "sd3", "sd35", "flux") for what in WAYS]
GRID += [f"{name}-{what}-{kind}" for name in ("sd", "sd3", "flux") for what in WAYS for kind in ("lv", "k3", "micro")]
GRID += [
    "sd-full-share",
    "sd3-lora-plain",
    *(f"sd-{what}-{kind}" for what in ("full", "sharded") for kind in ("plain", "every", "cached")),
]
pytestmark = pytest.mark.timeout(600)  # the processes may have to share one core with others


@dataclass(frozen=True)
class Runs:
    """Where one process and several have trained the same cases."""

    one: Path
    several: Path
    models: dict[str, str]  # family -> folder


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("tests.rdrl.process_worker") as server:
        yield server


def run_both(server: ForkServer, folder: Path, cases: Sequence[str], *, world: int, **also: Sequence[str]) -> Runs:
    """Train the cases here, and meanwhile by `world` processes, which are forked from one that imports torch once."""
    families = {case.partition("-")[0] for case in cases}
    models = {name: str(tiny_folder(folder / name, name)) for name in TINY_FAMILIES if name in families}
    runs = Runs(folder / "one", folder / "several", models)
    runs.one.mkdir()
    runs.several.mkdir()
    together: dict[str, Any] = {"models": models, "out": str(runs.several), "cases": cases, "world": world, **also}
    started = [server.start("train", **together, rank=rank) for rank in range(world)]
    train(models, str(runs.one), list(dict.fromkeys(map(alone, cases))))
    assert [server.wait(pid) for pid in started] == [0] * world
    return runs


@pytest.fixture(scope="module")
def pair(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("pair")
    return run_both(server, folder, CASES, world=2, refused=REFUSED, resumed=["sd3-sharded-every"])


@pytest.fixture(scope="module")
def four(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_both(server, tmp_path_factory.mktemp("four"), GRID, world=4)


def alone(case: str) -> str:
    """The case that one process trains to compare: alone it has nothing to shard."""
    return case.replace("sharded", "full")


def assert_same_weights(one: Path, several: Path) -> None:
    """Every tensor of the last checkpoint: weights, moments, moving average, a kept epsilon, the export."""
    first, second = tensors_of(one), tensors_of(several)
    assert first.keys() == second.keys()
    for key in first:
        assert float((first[key] - second[key]).abs().max()) <= 1e-6, key


def tensors_of(run: Path) -> dict[str, Tensor]:
    last = list_checkpoints(run / "checkpoints")[-1]
    files = {path.relative_to(last).as_posix(): load_file(path) for path in last.rglob("*.safetensors")}
    return {f"{name}: {key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def assert_same_records(one: Path, several: Path) -> None:
    """Every value of metrics.jsonl, also the gradient's norm, which AdamW hardly sees."""
    first, second = (records_of(folder) for folder in (one, several))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # The gauge divides by the deviation of a few alike images, and so enlarges what the last bits make.
            tolerance = 1e-5 * value if key == "grad_norm" else 1e-4 if key.startswith("gauge/") else 1e-6
            assert b[key] == (pytest.approx(value, rel=0, abs=tolerance) if isinstance(value, float) else value), key


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sentences(runs: Runs, case: str) -> set[str]:
    return {(runs.several / f"{case}-{rank}.txt").read_text() for rank in (0, 1)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one(pair, case):
    assert_same_weights(pair.one / alone(case), pair.several / case)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_the_records_of_one(pair, case):
    assert_same_records(pair.one / alone(case), pair.several / case)


@pytest.mark.parametrize("case", ["sd-full-rsaft", "sd3-lora-rsaft"])
def test_the_compared_runs_move_their_weights_by_a_hundred_times_the_tolerance(pair, case):
    family, what, _ = case.split("-")
    before = backbone(pair.models[family], what).parameters()
    after = tensors_of(pair.one / case)
    assert (
        max(float((after[f"weights.safetensors: {i}"] - p.detach()).abs().max()) for i, p in enumerate(before)) > 1e-4
    )


@pytest.mark.parametrize("case", ["sd3-sharded-every", "sd-sharded-rsaft"])
def test_each_of_two_processes_holds_half_of_what_is_sharded(pair, case):
    held = [float((pair.several / f"{case}-{rank}.share").read_text()) for rank in (0, 1)]
    assert sum(held) == pytest.approx(1.0, abs=1e-12)
    assert held == pytest.approx([0.5, 0.5], abs=0.02)
    assert float((pair.several / f"{alone(case)}-1.share").read_text()) == 1.0


def test_a_sharded_run_goes_on_bit_for_bit_after_a_stop(pair):
    whole, again = (pair.several / name for name in ("sd3-sharded-every", f"sd3-sharded-every-{RESUMED}"))
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    first, second = tensors_of(whole), tensors_of(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_one_process_goes_on_with_a_run_that_two_began_sharded(pair):
    run = pair.one / f"sd3-sharded-every-{RESUMED}"
    cut_short(pair.several / "sd3-sharded-every", run)
    trainer(pair.models, run).fit(resume=True)
    assert_same_weights(pair.one / "sd3-full-every", run)
    assert_same_records(pair.one / "sd3-full-every", run)


def test_the_model_card_of_a_sharded_run_names_the_class_that_diffusers_loads(pair):
    card = (pair.several / "sd3-sharded-every" / "README.md").read_text(encoding="utf-8")
    assert "pipe.transformer = SD3Transformer2DModel.from_pretrained(" in card


def test_flattening_in_parts_is_flattening_of_the_whole(server, tmp_path):
    started = [server.start("flatten_in_parts", out=str(tmp_path), rank=rank, world=2) for rank in (0, 1)]
    assert [server.wait(pid) for pid in started] == [0, 0]
    params, gradients = flattening_inputs()
    eps = worst_case_eps(gradients, 0.1)
    expected = {f"moved {i}": p + e for i, (p, e) in enumerate(zip(params, eps, strict=True))}
    expected |= {"norm": global_norm(gradients), "cosine": torch.tensor(rounding_cosine(params, eps, torch.bfloat16))}
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert all(torch.equal(found[f"restored {i}"], p) for i, p in enumerate(params))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


def test_every_process_refuses_a_batch_that_does_not_split_in_one_sentence(pair):
    assert sentences(pair, "sd-full-odd") == {
        "train.batch_size: 3 samples must split evenly over 2 processes and then into micro-batches of 1; choose a "
        "multiple of 2."
    }


def test_every_process_refuses_what_a_sharded_network_cannot_do_in_one_sentence(pair):
    assert sentences(pair, "sd-sharded-share") == {
        "train.shard: processes evaluate equal parts, and 7 samples do not split over 2; set train.eval_samples to a "
        "multiple of 2, or set train.shard to false."
    }


@pytest.mark.parametrize(("what", "found"), [("ddp", "DistributedDataParallel"), ("fsdp", "DTensor parameters")])
def test_a_network_that_is_wrapped_already_is_refused_by_name(pair, what, found):
    (sentence,) = sentences(pair, f"sd-{what}-plain")
    assert sentence.startswith(f"processes: found {found};")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", GRID)
def test_four_processes_give_the_run_of_one_in_every_family(four, case):
    assert_same_weights(four.one / alone(case), four.several / case)
    assert_same_records(four.one / alone(case), four.several / case)


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
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    pipe = tiny_pipeline("sdxl")
    pipe.load_lora_weights(tmp_path / "two" / "checkpoints" / "step-000002" / "adapter")
    assert pipe.get_list_adapters()["unet"]
