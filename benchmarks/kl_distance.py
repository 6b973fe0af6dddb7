"""How far finished runs have moved from their base, at every evaluation: the KL baseline of the stop rule.

    python -m benchmarks.kl_distance runs/study          # runs of benchmarks.testbed_study with --keep-weights

Writes `kl.json` into each run: D of `rsaft.rdrl.kl`, Eq. 1, on samples of the evaluation's prompts, by update.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.testbed_study import SAMPLER
from rsaft import testbed
from rsaft.files import write_atomic
from rsaft.randomness import normal
from rsaft.rdrl.optimization import load_weights
from rsaft.sampling import initial_noise, ode

SAMPLES = 48


@torch.no_grad()
def distance(bed: testbed.Testbed) -> float:
    """D, the mean over all noise levels of the sampler and over 48 samples of the model as it is now."""
    backbone, ids = bed.backbone, list(range(SAMPLES))
    prompts = [bed.prompts_eval[i % len(bed.prompts_eval)] for i in ids]
    schedule = backbone.schedule(SAMPLER.num_steps)
    denoise = backbone.denoiser(prompts, guidance=SAMPLER.guidance, detach_unconditional=False)
    noise = initial_noise(backbone, seed=5, purpose="kl", step=0, sample_ids=ids)
    x_0 = ode(denoise, schedule, noise, start=0, stop=schedule.num_steps)
    total = 0.0
    for i in range(schedule.num_steps):
        eps = normal(backbone.latent_shape, seed=5, purpose="kl-noise", step=i, sample_ids=ids, device=backbone.device)
        x_t, t = schedule.add_noise(x_0, eps, i), schedule.timesteps[i]
        with backbone.base():
            base = denoise(x_t, t)
        total += float((denoise(x_t, t) - base).square().mean())
    return total / schedule.num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="--out of the study")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in sorted(args.study.glob("*/runs/*/weights")):
        target = folder.parent / "kl.json"
        if target.exists():
            continue
        bed = testbed.load(folder.parent.parent.parent.name, keep_base=True)
        found = {"0": 0.0}
        for file in sorted(folder.glob("step-*.safetensors")):
            load_weights(bed.backbone.parameters(), load_file(file))
            found[str(int(file.stem.removeprefix("step-")))] = distance(bed)
        write_atomic(target, json.dumps(found).encode())
        print(folder.parent.name, found, flush=True)


if __name__ == "__main__":
    main()
