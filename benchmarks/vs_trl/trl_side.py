"""TRL 0.23.1's AlignPropTrainer on the shared problem: one run, one JSON. Runs in TRL's own environment.

Nothing of TRL is changed. Its trainer is asked for one `step` at a time, so that each can be timed.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

from benchmarks.vs_trl import problem


def loadable(folder: Path) -> Path:
    """The testbed's pipeline as transformers 4 reads it: other tokenizer files, prefixed keys of the text encoder."""
    if not (folder / "tokenizer" / "vocab.json").is_file():
        shutil.copytree(problem.WORLD / "pipeline", folder, dirs_exist_ok=True)
        model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
        (folder / "tokenizer" / "merges.txt").write_text(merges + "\n")
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
        weights = folder / "text_encoder" / "model.safetensors"
        renamed = {f"text_model.{key}": value for key, value in load_file(weights).items()}
        save_file(renamed, weights, metadata={"format": "pt"})
    return folder


def main() -> None:
    args = problem.arguments(__doc__)
    torch.set_num_threads(1)
    PartialState()  # TRL logs a warning before it has one, which accelerate refuses
    pipeline = DefaultDDPOStableDiffusionPipeline(str(loadable(args.pipeline)), use_lora=True)
    score, seen = problem.reward(), []

    def reward(images: torch.Tensor, prompts: tuple[str, ...], metadata: object) -> tuple[torch.Tensor, dict]:
        scores = score(images, prompts)
        seen.append(float(scores.detach().mean()))
        return scores, {}

    asked = itertools.chain.from_iterable(problem.prompts(args.seed, i, args.batch) for i in itertools.count())
    config = AlignPropConfig(
        seed=args.seed,
        sample_num_steps=args.steps,
        sample_eta=problem.ETA,
        sample_guidance_scale=problem.GUIDANCE,
        train_batch_size=args.batch,
        train_gradient_accumulation_steps=1,
        train_learning_rate=problem.LR,
        train_adam_weight_decay=problem.WEIGHT_DECAY,
        train_max_grad_norm=problem.MAX_GRAD_NORM,
        truncated_backprop_rand=args.last is None,
        truncated_backprop_timestep=args.steps - (args.last or 0),
        truncated_rand_backprop_minmax=(0, args.steps),
        mixed_precision="no",
        log_with=None,
    )
    trainer = AlignPropTrainer(config, reward, lambda: (next(asked), {}), pipeline)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)  # after the trainer has set it

    def update(i: int) -> float:
        trainer.step(0, i)
        return seen[-1]

    problem.save(args, "trl", problem.measured(args, update))


if __name__ == "__main__":
    sys.exit(main())
