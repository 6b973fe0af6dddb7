"""Short training runs, one a case such as "sd3-lora-rsaft", by one process or as one of several that work together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rsaft
from rsaft import distributed
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT, perturbed, worst_case_eps
from rsaft.flatten.weight import global_norm, rounding_cosine
from rsaft.rdrl import DRaFT, WeightedSum, plain_step
from rsaft.rdrl.checkpoint import list_checkpoints
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
CONFIG = TrainConfig(steps=2, batch_size=8, eval_every=2, eval_samples=4, save_every=2, grid=1, lr=1e-4, ema=0.9)
SAMPLING = Sampling(num_steps=3, guidance=2.0)
DRAFT, RSA_FT = DRaFT(sampling=SAMPLING), RSAFT(0.1, 0.05)
KINDS = {
    "plain": Kind(plain_step, DRAFT, CONFIG),
    "rsaft": Kind(RSA_FT, DRAFT, CONFIG),
    "share": Kind(replace(RSA_FT, eps_share=0.25), DRAFT, replace(CONFIG, eval_samples=7)),
    "every": Kind(RSAFT(0.0, 0.05, mode="weight", eps_every=3), DRAFT, replace(CONFIG, steps=3)),
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
RESUMED = "again"  # ends the name of a run directory that was resumed


def train(
    models: Mapping[str, str],
    out: str,
    cases: Sequence[str],
    refused: Sequence[str] = (),
    resumed: Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train each case in a run directory of its name in `out`.

    Args:
        models: family -> folder.
        out: a folder that is there.
        cases: "family-full-kind", "family-sharded-kind" or "family-lora-kind", of `KINDS`.
        refused: cases that are a ConfigError; each process writes its sentence.
        resumed: of the cases, those that are done again from the last but one checkpoint, in another folder.
        rank, world: this process's number, and how many are started with the same arguments.
    """
    meet(out, rank, world)
    for case in cases:
        run = trainer(models, Path(out) / case)
        run.fit()
        (Path(out) / f"{case}-{rank}.share").write_text(str(share_held(run)))
    for case in resumed:
        if rank == 0:
            cut_short(Path(out) / case, Path(out) / f"{case}-{RESUMED}")
        distributed.barrier()
        trainer(models, Path(out) / f"{case}-{RESUMED}").fit(resume=True)
    for case in refused:
        try:
            trainer(models, Path(out) / case)
        except ConfigError as error:
            (Path(out) / f"{case}-{rank}.txt").write_text(str(error))


def cut_short(run: Path, copy: Path) -> None:
    """Copy a run directory without its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(list_checkpoints(copy / "checkpoints")[-1])


def share_held(run: Trainer) -> float:
    """The share of weights, moments and moving average that this process holds."""
    tensors = [t for group in run.optimization.tensors().values() for t in group.values() if t.dim()]
    return sum(distributed.local(t).numel() for t in tensors) / sum(t.numel() for t in tensors)


def flatten_in_parts(out: str, rank: int, world: int) -> None:
    """Write what the arithmetic of weight flattening gives for tensors in parts; each process must find the same."""
    meet(out, rank, world)
    mesh = init_device_mesh("cpu", (world,))

    def split(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]

    params, gradients = (split(tensors) for tensors in flattening_inputs())
    eps = worst_case_eps(gradients, 0.1)
    with perturbed(params, eps):
        moved = [p.full_tensor() for p in params]  # type: ignore[attr-defined]
    found = {f"moved {i}": t for i, t in enumerate(moved)}
    found |= {f"restored {i}": p.full_tensor() for i, p in enumerate(params)}  # type: ignore[attr-defined]
    found |= {"norm": global_norm(gradients), "cosine": torch.tensor(rounding_cosine(params, eps, torch.bfloat16))}
    save_file({name: t.contiguous() for name, t in found.items()}, Path(out) / f"{rank}.safetensors")


def flattening_inputs() -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients that do not split evenly: one process has no part of the second tensor."""
    source = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (1,), (5, 2, 2))
    weights, gradients = ([torch.randn(shape, generator=source) for shape in shapes] for _ in range(2))
    return weights, gradients


def meet(out: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if world > 1:  # by a file, which needs no free port; a process that is left alone gives up
        meeting, patience = f"file://{out}/meeting", timedelta(seconds=100)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)


def trainer(models: Mapping[str, str], run: Path) -> Trainer:
    """The run of the case that the folder is named after."""
    family, what, kind = run.name.split("-")[:3]
    return Trainer(
        backbone(models[family], what),
        algorithm=KINDS[kind].algorithm,
        rewards={"toy": toy_reward},
        objective=WeightedSum({"toy": 1.0}),
        step=KINDS[kind].step,
        prompts=PROMPTS,
        config=replace(KINDS[kind].config, shard=what == "sharded"),
        run_dir=run,
    )


def backbone(folder: str, what: str) -> DiffusersBackbone:
    """The model of a folder; with a new adapter (lora), or with a network that its user has wrapped (ddp, fsdp)."""
    made = rsaft.load_backbone(folder, lora=rsaft.LoRA(rank=2, alpha=4.0) if what == "lora" else None, device="cpu")
    if what == "ddp":
        made.network = DistributedDataParallel(made.network)
    if what == "fsdp":
        fully_shard(made.network)
    return made
