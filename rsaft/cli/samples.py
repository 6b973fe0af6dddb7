"""Images of a run's checkpoint, or of a model: numbered files, with the prompts in `metadata.jsonl` only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.config import Custom, Model, RunConfig
from rsaft.config.assemble import load_model, load_prompts
from rsaft.rdrl.trained import load_trained
from rsaft.sampling import Sampling
from rsaft.sampling import sample as sample_images


def write_samples(
    config: RunConfig | None,
    run: Path | None,
    *,
    model: str,
    prompts: str,
    out: Path,
    n: int,
    seed: int,
    step: int | None,
    steps: int | None,
    guidance: float | None,
    batch: int,
) -> int:
    """Write `n` images of each prompt to `out`.

    Args:
        config, run: a run directory and its settings; None for a model as it is.
        model: its path, if there is no run.
        prompts: a file, or a world's evaluation prompts.
        out: a folder, made if it is missing.
        n: images of each prompt.
        seed: of the noise.
        step: of the run's checkpoint; the newest by default.
        steps, guidance: of the sampler; None takes the run's.
        batch: images at a time.

    Returns:
        The number of images.

    Raises:
        ConfigError: if the model or the prompts do not exist.
        CheckpointError: if the run has no checkpoint.
    """
    texts = [prompt for prompt in load_prompts(prompts, "eval") for _ in range(n)]
    backbone = load_model(Model(model) if config is None else config.model, seed=0)
    if run is not None:
        load_trained(backbone, run, step)
    built_in = config is not None and not isinstance(config.algorithm, Custom)
    sampling = config.algorithm.sampling if config is not None and built_in else Sampling()
    if steps is not None:
        sampling = replace(sampling, num_steps=steps)
    if guidance is not None:
        sampling = replace(sampling, guidance=guidance)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            for i, image in enumerate(_images(backbone, part, sampling, seed=seed, first=first), start=first):
                image.save(out / f"{i:06d}.png")
                row = {"file_name": f"{i:06d}.png", "prompt": texts[i], "seed": seed, "sample_id": i}
                metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(texts)


def _images(
    backbone: DiffusersBackbone, prompts: Sequence[str], sampling: Sampling, *, seed: int, first: int
) -> list[Image.Image]:
    ids = list(range(first, first + len(prompts)))
    images = sample_images(backbone, prompts, sampling, seed=seed, sample_ids=ids, batch_size=len(prompts))
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(p) for p in pixels]
