"""What RSA-FT does on the frozen testbed: one JSON a cell (world, method, seed); finished cells are skipped.

    python -m benchmarks.testbed_study --world fashion --methods plain weight-0.1 --seeds 0 1 2 3 4 --out runs/study
    python -m benchmarks.testbed_tables runs/study                     # tables and plots of what is finished

Several processes may share one --out: a cell is claimed by its lock file. Every cell trains the whole UNet with the
settings of `SETTINGS`, and is evaluated on the same prompts and noises. It trains with DRaFT-1 unless the method names
another trainer of `TRAINERS`: `--methods refl:plain refl:weight-0.01 drtune:plain`. Beside each cell stay all evaluated
images and, with --keep-weights, the weights at every evaluation.

With `--lora 8` every cell trains an adapter of that rank (alpha the same) at the same learning rate, unless --lr gives
another. Its cells lie apart, so that nothing is compared across: `benchmarks.testbed_tables --world fashion-lora8`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import annealed_evaluations, gated_rewards, over_rated
from benchmarks.methods import method, number_of
from rsaft import testbed
from rsaft.backbones import LoRA
from rsaft.errors import RunDirectoryError
from rsaft.files import write_atomic
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ReFL, WeightedSum, WithKL
from rsaft.rdrl.checkpoint_folder import list_checkpoints
from rsaft.rdrl.kl import OverRated
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.run_directory import locked
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from rsaft.types import Algorithm, Step


@dataclass(frozen=True)
class Settings:
    """How a world was calibrated on the plain trainer (docs/testbed.md)."""

    lr: float
    steps: int
    batch_size: int = 16
    num_steps: int = 10
    eval_every: int = 25
    eval_samples: int = 160
    sharpness_rho: float = 0.1


SETTINGS = {"fashion": Settings(lr=5e-5, steps=200), "shapes": Settings(lr=1e-5, steps=200)}


SAMPLER = Sampling(num_steps=Settings.num_steps, guidance=1.0)  # of every trainer and of the evaluations
TRAINERS: dict[str, Algorithm] = {
    "draft": DRaFT(k=1, sampling=SAMPLER),
    # The authors stop at one of steps 30 to 39 of 40, so in the last quarter: here steps 8 and 9 of 0 to 9. Their noisy
    # sampler; evaluations are deterministic for every trainer.
    "refl": ReFL(last=2, eta=1.0, sampling=SAMPLER),
    # k from a normal of mean 42 and deviation 5 of 50 steps, here 8.4 and 1: two steps with gradient on average.
    "alignprop": AlignProp(truncation="gaussian", mean=0.84, std=0.1, eta=1.0, sampling=SAMPLER),
    # K = 5 and m = 20 of 50 steps (second-hand). m scales to 4; K would scale to 1, and is 2, so that an earlier step
    # is trained beside a later one.
    "drtune": DRTune(k=2, early_stop=4, sampling=SAMPLER),
}
"""Each trainer with its authors' settings, brought to 10 sampling steps. The learning rate was calibrated on draft, and
the loss is the reward itself for all: ReFL's hinge at 2 would bind on a reward in base sigmas."""


def trainer_and_method(name: str) -> tuple[str, str]:
    """("refl", "weight-0.01") of `refl:weight-0.01`; names without a trainer are DRaFT-1's.

    Raises:
        SystemExit: if there is no such trainer.
    """
    trained_by, colon, rest = name.partition(":")
    if not colon:
        return "draft", name
    if trained_by not in TRAINERS or trained_by == "draft":  # draft has one name, so that no cell is trained twice
        others = ", ".join(sorted(set(TRAINERS) - {"draft"}))
        raise SystemExit(f"'{name}': before a colon stands {others}; a name without one is trained with draft.")
    return trained_by, rest


def folder_of(world: str, lora: int | None) -> str:
    """Where in --out the cells of a world lie: those of whole networks, or of adapters of one rank."""
    return world if lora is None else f"{world}-lora{lora}"


def run_cell(
    world: str,
    name: str,
    seed: int,
    out: Path,
    *,
    base: Path | None = None,
    rewards: Path | None = None,
    lr: float | None = None,
    lora: int | None = None,
    keep_weights: bool = False,
) -> None:
    """Train one cell and write its JSON."""
    folder = out / folder_of(world, lora)
    result = folder / f"{name}.seed{seed}.json"
    if result.exists():
        return
    trained_by, method_name = trainer_and_method(name)
    step, lr_factor = method(method_name)
    s = replace(SETTINGS[world], lr=(lr or SETTINGS[world].lr) * lr_factor)
    kl, gated, power = (number_of(method_name, kind) for kind in ("kl", "gated", "annealed"))
    to_base = any(number is not None for number in (kl, gated, power))
    adapter = None if lora is None else LoRA(rank=lora, alpha=lora)
    bed = testbed.load(world, lora=adapter, base=base, rewards=rewards, keep_base=to_base)
    run = folder / "runs" / f"{name}.seed{seed}"
    cell: dict[str, Any] = {"world": world, "method": name, "seed": seed, "lr": s.lr, "lora": lora}
    begun, cpu = time.monotonic(), time.process_time()
    algorithm = replace(TRAINERS[trained_by], sampling=replace(SAMPLER, num_steps=s.num_steps))
    if power is not None:
        plain = folder / "runs" / f"{name.replace(method_name, 'plain')}.seed{seed}" / "weights"
        cell |= annealed_scores(bed, power, plain, s, seed)
    else:
        weight = kl if gated is None else gated
        gate = None if gated is None else over_rated(bed, algorithm.sampling)
        algorithm = algorithm if weight is None else WithKL(algorithm, weight)
        fitted = trainer(bed, algorithm, step, s, seed, run, gate).fit(resume=True)
        if fitted.signal is not None:  # stopped: the checkpoint stays, and the same command goes on from it
            raise SystemExit(128 + fitted.signal)
        records = map(json.loads, (run / "timing.jsonl").read_text().splitlines())
        timing = [record["seconds"] for record in records if "seconds" in record]
        cell |= {"evaluations": list(fitted.evaluations), "gold_standard_error": gold_errors(run)}
        cell["update_seconds_median"] = sorted(timing)[len(timing) // 2]
    cell |= {"wall_seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - cpu}
    if keep_weights and power is None:
        move_weights(run, s.eval_every)
    write_atomic(result, json.dumps(cell, indent=1).encode())
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # with the optimizer, three times the weights


def move_weights(run: Path, every: int) -> None:
    """Move the weights at every evaluation out of the run's checkpoints, to `weights/step-XXXXXX.safetensors`."""
    (run / "weights").mkdir(exist_ok=True)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) % every == 0:  # others are from stops
            (checkpoint / "weights.safetensors").rename(run / "weights" / f"{checkpoint.name}.safetensors")


def annealed_scores(bed: testbed.Testbed, power: float, weights: Path, s: Settings, seed: int) -> dict[str, Any]:
    """The evaluations of `annealed-POWER`, and gold's standard errors, as a trained cell has them."""
    sampling = replace(SAMPLER, num_steps=s.num_steps)
    found = annealed_evaluations(bed, power, weights, train_config(s, seed), sampling)
    gold = {str(step): e.scores["held_out/gold"] for step, e in found}
    return {
        "evaluations": [{"step": step} | e.means() for step, e in found],
        "gold_standard_error": {step: float(g.std() / math.sqrt(len(g))) for step, g in gold.items()},
    }


def train_config(s: Settings, seed: int) -> TrainConfig:
    """The loop's settings of one cell. Every evaluated image is kept, and the weights at each evaluation."""
    return TrainConfig(
        steps=s.steps,
        seed=seed,
        batch_size=s.batch_size,
        lr=s.lr,
        eval_every=s.eval_every,
        eval_samples=s.eval_samples,
        sharpness_rho=s.sharpness_rho,
        grid=s.eval_samples,
        save_every=s.eval_every,
        keep=1 + s.steps // s.eval_every,
    )


def trainer(
    bed: testbed.Testbed, algorithm: Algorithm, step: Step, s: Settings, seed: int, run: Path, gate: OverRated | None
) -> Trainer:
    """The trainer of one cell."""
    return Trainer(
        bed.backbone,
        algorithm=algorithm,
        rewards={"train": bed.reward} if gate is None else gated_rewards(bed),
        objective=WeightedSum({"train": 1.0}),
        step=step,
        prompts=list(bed.prompts_train),
        eval_prompts=list(bed.prompts_eval),
        held_out={**bed.held_out, "gold": bed.gold},
        measures={"gold": bed.gold.parts},
        config=train_config(s, seed),
        run_dir=run,
        gate=gate,
    )


def gold_errors(run: Path) -> dict[str, float]:
    """Standard error of gold's mean over samples, by step."""
    errors = {}
    for file in sorted((run / "samples").glob("step-*.json")):
        record = json.loads(file.read_text())
        gold = torch.tensor(record["scores"]["held_out/gold"], dtype=torch.float64)
        errors[str(record["step"])] = float(gold.std() / len(gold) ** 0.5)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="fashion", choices=sorted(SETTINGS))
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--lr", type=float, help="another learning rate than the calibrated one")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank")
    parser.add_argument("--base", type=Path, help="folder of another base model (a replication set)")
    parser.add_argument("--rewards", type=Path, help="folder of other reward models")
    parser.add_argument("--keep-weights", action="store_true", help="7 MB an evaluation, as annealed-POWER needs them")
    args = parser.parse_args()
    if args.lora is None and any("product-" in name for name in args.methods):
        parser.error("--methods: product-RHO_W measures LoRA's factors; give their rank with --lora.")
    torch.set_num_threads(1)
    for seed in args.seeds:  # seeds outermost: every method has its first seeds early
        for name in args.methods:
            claim = args.out / folder_of(args.world, args.lora) / "claims" / f"{name}.seed{seed}"
            claim.mkdir(parents=True, exist_ok=True)
            try:
                with locked(claim):
                    print(f"{args.world} {name} seed {seed}", flush=True)
                    run_cell(
                        args.world,
                        name,
                        seed,
                        args.out,
                        base=args.base,
                        rewards=args.rewards,
                        lr=args.lr,
                        lora=args.lora,
                        keep_weights=args.keep_weights,
                    )
            except RunDirectoryError:
                print(f"{args.world} {name} seed {seed}: another process has it", flush=True)


if __name__ == "__main__":
    main()
