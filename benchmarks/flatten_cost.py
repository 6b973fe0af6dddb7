"""What each mode of RSA-FT costs against a plain DRaFT-1 step, in one process, and what it is worth.

    python -m benchmarks.flatten_cost [--repeats 3] [--study benchmarks/results/rsa_ft_fashion.json]

Two models: the fashion testbed at T = 50, and a UNet of Stable Diffusion 1.5's shape with reduced width. Modes take
turns, update by update, so that a busy machine slows all of them alike; the figures are medians. Peak memory is the
process's own high-water mark above its level before the update (allocated GPU memory on a GPU). The outcome column is
gold at matched train reward on the frozen testbed, from the finished study.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from rsaft import testbed
from rsaft.backbones import load_backbone
from rsaft.flatten import RSAFT
from rsaft.metrics.matched import at_matched_reward, paired_bootstrap
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum, plain_step
from rsaft.sampling import Sampling
from rsaft.types import Backbone, Batch, Reward, Step

MODES: dict[str, Step] = {
    "plain": plain_step,
    "input": RSAFT(1.0, 0.0, mode="input"),
    "weight": RSAFT(0.0, 0.01, mode="weight"),
    "both": RSAFT(1.0, 0.01, mode="both"),
    "weight, cached": RSAFT(0.0, 0.01, mode="weight", reuse="cached"),
    "weight, last 3": RSAFT(0.0, 0.01, mode="weight", reuse=3),
    "weight, share 1/4": RSAFT(0.0, 0.01, mode="weight", eps_share=1 / 4),
    "weight, share 1/16": RSAFT(0.0, 0.01, mode="weight", eps_share=1 / 16),
    "weight, every 4": RSAFT(0.0, 0.01, mode="weight", eps_every=4),
}
STUDY = {  # name of the same scheme in testbed_study.py
    "plain": "plain",
    "input": "input-1",
    "weight": "weight-0.01",
    "both": "both-1-0.01",
    "weight, cached": "cached-0.01",
    "weight, last 3": "last3-0.01",
    "weight, share 1/4": "share4-0.01",
    "weight, share 1/16": "share16-0.01",
    "weight, every 4": "every4-0.01",
}


@dataclass(frozen=True)
class Problem:
    """A model with its reward and batch."""

    title: str
    backbone: Backbone
    reward: Reward
    prompts: Sequence[str]
    batch_size: int
    num_steps: int


def fashion(num_steps: int, batch_size: int) -> Problem:
    bed = testbed.load("fashion")
    title = f"fashion testbed, T = {num_steps}, batch {batch_size}, full fine-tuning"
    return Problem(title, bed.backbone, bed.reward, bed.prompts_train, batch_size, num_steps)


def narrow_sd15(num_steps: int, batch_size: int) -> Problem:
    """Stable Diffusion 1.5's blocks at a twentieth of its width, on 16x16 latents (128x128 images)."""
    tiny = testbed.load("fashion").backbone.pipe
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        cross_attention_dim=tiny.text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
    )
    pipe = StableDiffusionPipeline(
        vae, tiny.text_encoder, tiny.tokenizer, unet, tiny.scheduler, None, None, requires_safety_checker=False
    )
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        backbone = load_backbone(folder)
    critic = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 7, 4, 3),
        torch.nn.SiLU(),
        torch.nn.Conv2d(32, 64, 5, 4, 2),
        torch.nn.SiLU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(1024, 1),
    )
    critic.requires_grad_(False).to(backbone.device)
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    title = f"SD1.5-shaped UNet, {millions:.1f} M parameters, 128 px, T = {num_steps}, batch {batch_size}"
    return Problem(title, backbone, lambda x, p: critic(x)[:, 0], ["a photo"], batch_size, num_steps)


def peak_memory(device: torch.device) -> tuple[Callable[[], None], Callable[[], float]]:
    """(reset, MiB above the level at the reset)."""
    if device.type == "cuda":
        base = [0]

        def reset() -> None:
            torch.cuda.reset_peak_memory_stats(device)
            base[0] = torch.cuda.memory_allocated(device)

        return reset, lambda: (torch.cuda.max_memory_allocated(device) - base[0]) / 2**20
    level = [0.0]

    def read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    def restart() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM
        level[0] = read("VmRSS")

    return restart, lambda: read("VmHWM") - level[0]


def measure(problem: Problem, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds, ratio to plain, and peak MiB of each mode."""
    score = ImageScore(problem.backbone, {"r": problem.reward}, WeightedSum({"r": 1.0}))
    algorithm = DRaFT(k=1, sampling=Sampling(num_steps=problem.num_steps, guidance=1.0))
    params = problem.backbone.parameters()
    reset, peak = peak_memory(problem.backbone.device)
    states: dict[str, Any] = dict.fromkeys(MODES)
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    memory: dict[str, list[float]] = {name: [] for name in MODES}
    rounds = 1 + max(repeats, 4)  # one to warm up; at least four, so that "every 4" is averaged over its period
    for update in range(rounds):
        ids = tuple(range(problem.batch_size))
        prompts = tuple(problem.prompts[i % len(problem.prompts)] for i in ids)
        for name, step in MODES.items():
            for p in params:
                p.grad = None
            rollout = algorithm.rollout(problem.backbone, Batch(prompts, ids, step=update, seed=0))
            reset()
            begun = time.perf_counter()
            states[name] = step([rollout], score, params, states[name]).state
            if problem.backbone.device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - begun
            if update:
                seconds[name].append(elapsed)
                memory[name].append(peak())
    average = {n: statistics.fmean(v) if "every" in n else statistics.median(v) for n, v in seconds.items()}
    return {
        name: {
            "seconds": average[name],
            "ratio": average[name] / average["plain"],
            "peak_mib": statistics.median(memory[name]),
        }
        for name in MODES
    }


def outcomes(study: Path, level: float) -> dict[str, str]:
    """Gold at the train reward `level`, with the paired difference to plain, for each mode that the study holds."""
    if not study.exists():
        return {}
    cells = json.loads(study.read_text())

    def gold(cell: dict[str, Any]) -> float | None:
        e = cell["evaluations"]
        return at_matched_reward([x["reward/train"] for x in e], [x["held_out/gold"] for x in e], [level])[0]

    result = {}
    for mode, name in STUDY.items():
        values = {s: v for s, c in cells.get(name, {}).items() if (v := gold(c)) is not None}
        plain = {s: v for s, c in cells["plain"].items() if (v := gold(c)) is not None}
        seeds = sorted(values.keys() & plain.keys())
        if not seeds:
            continue
        a, b = torch.tensor([values[s] for s in seeds]), torch.tensor([plain[s] for s in seeds])
        mean, low, high = paired_bootstrap(a, b, seed=0)
        result[mode] = f"{float(a.mean()):.3f} ({mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(seeds)} seeds)"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--study", type=Path, default=Path("benchmarks/results/rsa_ft_fashion.json"))
    parser.add_argument("--level", type=float, default=1.0, help="train reward at which gold is compared")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    worth = outcomes(args.study, args.level)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, one thread"
    lines = [f"# Cost of RSA-FT against a plain DRaFT-1 step ({date.today()}, {hardware}, torch {torch.__version__})"]
    tables = {}
    for problem in (fashion(50, 16), narrow_sd15(50, 16)):
        tables[problem.title] = measure(problem, args.repeats)
        outcome = f"gold at train reward {args.level:g} (difference to plain)"
        lines += [
            "",
            f"## {problem.title}",
            "",
            f"| mode | s | x plain | peak MiB | {outcome} |",
            "|---|---|---|---|---|",
        ]
        for name, row in tables[problem.title].items():
            lines.append(
                f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['peak_mib']:.0f} | "
                f"{worth.get(name, 'not measured') if problem.title.startswith('fashion') else ''} |"
            )
    print("\n".join(lines))
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "flatten_cost.md").write_text("\n".join(lines) + "\n")
    (args.results / "flatten_cost.json").write_text(json.dumps({"hardware": hardware, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()
