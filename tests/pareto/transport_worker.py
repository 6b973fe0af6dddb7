"""Gradients of ParetoTransport through every trainer, by one process or as one of two that share prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rsaft import distributed
from rsaft.flatten import RSAFT
from rsaft.pareto import FrontierStore, ParetoTransport
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ImageScore, ReFL, plain_step
from rsaft.rdrl.update_record import update_record
from rsaft.sampling import Sampling
from rsaft.types import Algorithm, Batch, Images, Step
from tests.rdrl.process_worker import meet
from tests.rdrl.toy import Toy

SAMPLING = Sampling(num_steps=4, guidance=1.5)
ALGORITHMS: dict[str, Algorithm] = {
    "draft": DRaFT(k=2, sampling=SAMPLING),
    "draft-lv": DRaFT(k=1, lv=2, sampling=SAMPLING),
    "refl": ReFL(last=2, sampling=SAMPLING),
    "alignprop": AlignProp(sampling=SAMPLING, gradient_checkpointing=False),
    "drtune": DRTune(k=2, early_stop=2, sampling=SAMPLING),
}
STEPS: dict[str, Step] = {"plain": plain_step, "rsaft": RSAFT(0.3, 0.1)}
PROMPTS = ("a cat",) * 3 + ("a dog",) * 3 + ("a hat",) * 2  # two processes cut the second group in half
NAMES = ("left", "right")


def left(images: Images, prompts: Sequence[str]) -> Tensor:
    return images[..., :3].mean(dim=(1, 2, 3))


def right(images: Images, prompts: Sequence[str]) -> Tensor:
    """Not a number for hats: a rank of its own is masked whole where it has nothing else."""
    hats = torch.tensor([prompt == "a hat" for prompt in prompts])
    return torch.where(hats, torch.nan, images[..., 3:].square().mean(dim=(1, 2, 3)))


def objectives() -> dict[str, ParetoTransport]:
    front = torch.rand(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.4
    store = FrontierStore(("a cat", "a dog", "a hat"), NAMES, front)
    return {"offline": ParetoTransport(frontiers=store), "online": ParetoTransport("online", store)}


CASES = [f"{a}/{s}/{o}" for a in ALGORITHMS for s in STEPS for o in ("offline", "online")]


def update(out: str, cases: Sequence[str], rank: int = 0, world: int = 1) -> None:
    """Write each case's gradient, the mean over processes, and its logs."""
    meet(out, rank, world)
    found: dict[str, Tensor] = {}
    for case in cases:
        algorithm, step, objective = case.split("/")
        toy, per = Toy("flow"), len(PROMPTS) // world
        ids = range(rank * per, (rank + 1) * per)
        batch = Batch(tuple(PROMPTS[i] for i in ids), tuple(ids), step=0, seed=0)
        score = ImageScore(toy, {"left": left, "right": right}, objectives()[objective])
        output = STEPS[step]([ALGORITHMS[algorithm].rollout(toy, batch)], score, toy.parameters())
        gradient = torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None])
        distributed.sum_([gradient])
        record, share = update_record(output, NAMES, step=1, device=toy.device)
        found[case] = gradient / world
        logs = [share, record["pareto/source"], record["pareto/lowered"], record["loss"]]
        found[f"{case} logs"] = torch.tensor(logs, dtype=torch.float64)
    save_file(found, Path(out) / f"{rank}.safetensors")
