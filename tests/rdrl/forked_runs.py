"""Training runs in processes of their own, forked from one that has loaded the model; for the tests that end them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

import rsaft
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, WeightedSum, loop
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from tests.helpers import PROMPTS, toy_reward
from tests.rdrl.disk_faults import at_disk_calls, killed_at

STEPS = 8
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=2,
    micro_batch=1,
    lr=1e-3,
    lr_schedule="cosine",
    ema=0.9,
    eval_every=4,
    eval_samples=2,
    save_every=2,
)


@functools.cache
def backbone(folder: str) -> Any:
    return rsaft.load_backbone(folder, lora=rsaft.LoRA(rank=2, alpha=4.0, targets=("to_q",)))


def trainer(folder: str, run: str) -> Trainer:
    """A run whose every kind of state counts: AdamW, schedule, EMA, a perturbation kept over updates."""
    return Trainer(
        backbone(folder),
        algorithm=DRaFT(k=1, sampling=Sampling(num_steps=2, guidance=1.0)),
        rewards={"toy": toy_reward},
        objective=WeightedSum({"toy": 1.0}),
        step=RSAFT(0.1, 0.01, eps_every=2),
        prompts=PROMPTS,
        config=CONFIG,
        run_dir=run,
    )


def prepare(folder: str) -> None:
    """Load the model and what training imports, so that a fork starts at once."""
    torch.use_deterministic_algorithms(True)
    trainer(folder, os.devnull)


def train(folder: str, run: str, die_in_save: int | None = None) -> None:
    """The one command, at first and after every kill; exits as `rsaft train` does.

    Args:
        folder: the model.
        run: the run directory.
        die_in_save: be killed in this call that the saves make to change the disk, counted from the start.
    """
    if die_in_save is not None:
        save = loop.save_checkpoint
        left = [die_in_save]

        def deadly(*args: Any, **kwargs: Any) -> Path:
            with at_disk_calls(killed_at(left[0]), deletions=True) as calls:
                path = save(*args, **kwargs)
            left[0] -= calls.count
            return path

        loop.save_checkpoint = deadly
    result = trainer(folder, run).fit(resume=True)
    raise SystemExit(0 if result.signal is None else 128 + result.signal)


def outcome(run: Path) -> dict[str, bytes]:
    """What must not depend on kills: the records, and every file of the last checkpoint."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in last.rglob("*") if path.is_file()}
    return files | {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}
