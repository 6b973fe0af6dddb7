"""Short training runs, one a case such as "sd3-lora-rsaft", by one process or as one of several that work together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import rsaft
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, WeightedSum, plain_step
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from tests.helpers import PROMPTS, toy_reward


@dataclass(frozen=True)
class Kind:
    """What a run does; the last part of a case's name."""

    step: Any
    algorithm: DRaFT
    config: TrainConfig


# AdamW divides a gradient by its own size, so where one is nothing but rounding (1e-8), a weight may move by any part
# of lr: with this one (the default is 2e-5) by 3e-7 in tiny Flux.
CONFIG = TrainConfig(steps=2, batch_size=4, eval_every=2, eval_samples=6, save_every=2, lr=1e-4, ema=0.9)
SAMPLING = Sampling(num_steps=3, guidance=2.0)
DRAFT, RSA_FT = DRaFT(sampling=SAMPLING), RSAFT(0.1, 0.05)
KINDS = {
    "plain": Kind(plain_step, DRAFT, CONFIG),
    "rsaft": Kind(RSA_FT, DRAFT, CONFIG),
    "share": Kind(replace(RSA_FT, eps_share=0.5), DRAFT, CONFIG),
    "every": Kind(RSAFT(0.0, 0.05, mode="weight", eps_every=2), DRAFT, replace(CONFIG, steps=3, save_every=3)),
    "cached": Kind(replace(RSA_FT, reuse="cached"), DRAFT, CONFIG),
    "micro": Kind(RSA_FT, DRAFT, replace(CONFIG, micro_batch=1)),
    "lv": Kind(RSA_FT, DRaFT(lv=2, sampling=SAMPLING), CONFIG),
    "k3": Kind(
        RSA_FT,
        DRaFT(k=3, sampling=replace(SAMPLING, detach_unconditional=True), gradient_checkpointing=True),
        CONFIG,
    ),
    "odd": Kind(plain_step, DRAFT, replace(CONFIG, batch_size=3)),
}


def train(
    models: Mapping[str, str],
    out: str,
    cases: Sequence[str],
    refused: Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train each case and write its weights and run directory into `out`; the first process writes.

    Args:
        models: family -> folder.
        out: a folder that is there.
        cases: "family-full-kind" or "family-lora-kind", of `KINDS`.
        refused: cases that are a ConfigError; each process writes its sentence.
        rank, world: this process's number, and how many are started with the same arguments.
    """
    meet(out, rank, world)
    for case in cases:
        run = trainer(models, Path(out), case)
        run.fit()
        if rank == 0:
            weights = {str(i): p.detach() for i, p in enumerate(run.backbone.parameters())}
            save_file(weights, Path(out) / f"{case}.safetensors")
    for case in refused:
        try:
            trainer(models, Path(out), case)
        except ConfigError as error:
            (Path(out) / f"{case}-{rank}.txt").write_text(str(error))


def meet(out: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if world > 1:  # by a file, which needs no free port; a process that is left alone gives up
        meeting, patience = f"file://{out}/meeting", timedelta(seconds=100)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)


def trainer(models: Mapping[str, str], out: Path, case: str) -> Trainer:
    family, what, kind = case.split("-")
    return Trainer(
        backbone(models[family], what),
        algorithm=KINDS[kind].algorithm,
        rewards={"toy": toy_reward},
        objective=WeightedSum({"toy": 1.0}),
        step=KINDS[kind].step,
        prompts=PROMPTS,
        config=KINDS[kind].config,
        run_dir=out / case,
    )


def backbone(folder: str, what: str) -> DiffusersBackbone:
    """The model of a folder, with a new adapter if `what` is lora."""
    return rsaft.load_backbone(folder, lora=rsaft.LoRA(rank=2, alpha=4.0) if what == "lora" else None, device="cpu")
