"""rsaft's AlignProp on the shared problem: one run, one JSON."""

from __future__ import annotations

import torch

import rsaft
from benchmarks.vs_trl import problem
from rsaft.rdrl import AlignProp, ImageScore, WeightedSum, plain_step
from rsaft.types import Batch


def main() -> None:
    args = problem.arguments(__doc__)
    torch.set_num_threads(1)
    lora = rsaft.LoRA(rank=problem.RANK, alpha=problem.ALPHA)
    backbone = rsaft.load_backbone(str(args.pipeline), lora=lora, dtype="fp32", seed=args.seed)
    score = ImageScore(backbone, {"train": problem.reward()}, WeightedSum({"train": 1.0}))
    algorithm = AlignProp(
        truncation="gaussian" if args.last is None else args.steps - args.last,
        eta=problem.ETA,
        sampling=rsaft.Sampling(num_steps=args.steps, guidance=problem.GUIDANCE),
    )
    params = backbone.parameters()
    optimizer = torch.optim.AdamW(params, lr=problem.LR, betas=problem.BETAS, weight_decay=problem.WEIGHT_DECAY)
    ids = tuple(range(args.batch))

    def update(i: int) -> float:
        batch = Batch(tuple(problem.prompts(args.seed, i, args.batch)), ids, step=i, seed=args.seed)
        output = plain_step([algorithm.rollout(backbone, batch)], score, params)
        torch.nn.utils.clip_grad_norm_(params, problem.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.losses[0].rewards.mean())

    problem.save(args, "rsaft", problem.measured(args, update))


if __name__ == "__main__":
    main()
