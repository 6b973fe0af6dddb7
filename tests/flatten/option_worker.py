"""One update with each option whose result could depend on the split, by one process or as one of several."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rsaft import distributed
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum
from rsaft.sampling import Sampling
from tests.helpers import PROMPTS, batch_of, toy_reward
from tests.rdrl.process_worker import meet
from tests.rdrl.toy import Toy

STEPS = {
    "weights": RSAFT(0.3, 0.1, sharpness_tau=0.02),
    "weights-input": RSAFT(0.3, mode="input", sharpness_tau=0.02),
    "smoothing": RSAFT(0.3, 0.1, smoothing="gaussian", draws=2),
    "latent": RSAFT(0.3, 0.1, space="latent", delta_steps=3),
}


def update(out: str, rank: int = 0, world: int = 1) -> None:
    """Write the gradient of each step, the mean over processes that share four samples, and what it logs."""
    meet(out, rank, world)
    found = {name: tensor for key, step in STEPS.items() for name, tensor in _update(key, step, rank, world).items()}
    save_file(found, Path(out) / f"{rank}.safetensors")


def _update(key: str, step: RSAFT, rank: int, world: int) -> dict[str, Tensor]:
    toy, per = Toy("flow"), len(PROMPTS) // world
    score = ImageScore(toy, {"toy": toy_reward}, WeightedSum({"toy": 1.0}))
    batch = batch_of(PROMPTS[rank * per : (rank + 1) * per], first_id=rank * per)
    rollout = DRaFT(sampling=Sampling(num_steps=3, guidance=1.0)).rollout(toy, batch)
    output = step([rollout], score, toy.parameters())
    gradient = torch.cat([p.grad.flatten() for p in toy.parameters() if p.grad is not None])
    distributed.sum_([gradient])
    weights = [value for name, value in output.logs.items() if "weight" in name]
    return {key: gradient / world, f"{key}: weights": torch.tensor(weights, dtype=torch.float64)}
