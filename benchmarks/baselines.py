"""Gated KL and base-model annealing on the testbed: with KL, the usual means against reward hacking.

python -m benchmarks.testbed_study --methods kl-0.1 gated-0.1          # trained
python -m benchmarks.testbed_study --methods plain annealed-1          # plain's weights, sampled another way
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from rsaft import testbed
from rsaft.metrics.evaluate import Evaluation, evaluate
from rsaft.rdrl.annealed import Annealed
from rsaft.rdrl.kl import OverRated
from rsaft.rdrl.optimization import load_weights
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling, sample
from rsaft.types import Reward

AUXILIARY = ("mixer", "vit")
"""Held-out rewards that the gate asks; the third, and gold, stay held out from it."""


def over_rated(bed: testbed.Testbed, sampling: Sampling, *, num_samples: int = 160) -> OverRated:
    """The gate, with scores of base samples of the training prompts as its references."""
    prompts = [bed.prompts_train[i % len(bed.prompts_train)] for i in range(num_samples)]
    images = sample(bed.backbone, prompts, sampling, seed=7_000_003, batch_size=40)
    with torch.no_grad():
        scores = {name: reward(images, prompts).tolist() for name, reward in gated_rewards(bed).items()}
    return OverRated("train", scores)


def gated_rewards(bed: testbed.Testbed) -> dict[str, Reward]:
    """The reward that is trained on, and those that the gate asks."""
    return {"train": bed.reward} | {name: bed.held_out[name] for name in AUXILIARY}


def annealed_evaluations(
    bed: testbed.Testbed, power: float, weights: Path, config: TrainConfig, sampling: Sampling
) -> list[tuple[int, Evaluation]]:
    """What a finished run's weights score when sampled between the base model and them, by update.

    Args:
        bed: the world, loaded with `keep_base=True`.
        power: of `Annealed`.
        weights: folder of `step-XXXXXX.safetensors`, as `--keep-weights` leaves them.
        config: the run's settings; of them the evaluation's.
        sampling: the run's steps and guidance.

    Raises:
        SystemExit: if the folder holds no weights.
    """
    files = sorted(weights.glob("step-*.safetensors"))
    if not files:
        raise SystemExit(f"{weights}: there are no weights to sample; run plain with --keep-weights first.")
    found = []
    for step, file in [(0, None), *((int(f.stem.removeprefix("step-")), f) for f in files)]:
        if file is not None:
            load_weights(bed.backbone.parameters(), load_file(file))
        result = evaluate(
            Annealed(bed.backbone, power),
            bed.prompts_eval,
            sampling,
            seed=config.eval_seed,
            num_samples=config.eval_samples,
            batch_size=config.eval_batch,
            rewards={"train": bed.reward},
            held_out={**bed.held_out, "gold": bed.gold},
            measures={"gold": bed.gold.parts},
            sharpness_rho=config.sharpness_rho,
        )
        found.append((step, result))
    return found
