"""Run by torchrun, or alone: trains a tiny model and writes its weights. Arguments: model folder, out folder, cases."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import rsaft
from rsaft import distributed
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, WeightedSum, plain_step
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from tests.helpers import PROMPTS, toy_reward

STEPS = {
    "plain": plain_step,
    "rsaft": RSAFT(0.1, 0.05),
    "share": RSAFT(0.1, 0.05, eps_share=0.25),
    "every": RSAFT(0.0, 0.05, mode="weight", eps_every=2),
}


def main(model: Path, out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        family, kind = case.split("-")
        lora = rsaft.LoRA(rank=2, alpha=4.0) if family == "lora" else None
        run = Trainer(
            rsaft.load_backbone(model, lora=lora, device="cpu"),
            algorithm=DRaFT(sampling=Sampling(num_steps=3, guidance=2.0)),
            rewards={"toy": toy_reward},
            objective=WeightedSum({"toy": 1.0}),
            step=STEPS[kind],
            prompts=PROMPTS,
            config=TrainConfig(steps=4, batch_size=4, eval_every=4, eval_samples=6, save_every=4, lr=1e-3, ema=0.9),
            run_dir=out / case,
        )
        run.fit()
        if distributed.rank() == 0:
            save_file(
                {str(i): p.detach() for i, p in enumerate(run.backbone.parameters())}, out / f"{case}.safetensors"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
