"""Images of (prompt, seed) pairs, and their scores under any rewards, with the time that each reward takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.sampling import Sampling, initial_noise, ode
from rsaft.types import Backbone, Images, Reward

Picture = Float[Tensor, "3 _ _"]  # of any size; several need not be of one


@dataclass(frozen=True)
class Item:
    """One image to be scored. Two models' images with the same prompt_id and seed are a pair."""

    prompt_id: int
    prompt: str
    seed: int  # with the prompt_id it fixes the noise
    file: Path | None = None  # of an image that is there already


@dataclass(frozen=True)
class Scored:
    """Scores of n images on the CPU, NaN where a score or the image itself is not finite, and what they took."""

    scores: dict[str, Float[Tensor, " n"]]
    seconds: dict[str, float]  # of each reward


@torch.no_grad()
def sampled(backbone: Backbone, items: Sequence[Item], sampling: Sampling) -> Images:
    """Images of the items, without gradient, on the CPU; the noise of each depends on (seed, prompt_id) alone.

    Image for image what `rsaft.sampling.sample` makes of the same seed and sample ids in batches of the same size.

    Raises:
        ValueError: if there is no item.
    """
    if not items:
        raise ValueError("sampled: give at least one item.")
    schedule = backbone.schedule(sampling.num_steps)
    denoise = backbone.denoiser(
        [item.prompt for item in items],
        guidance=sampling.guidance,
        detach_unconditional=sampling.detach_unconditional,
    )
    noises = [
        initial_noise(backbone, seed=item.seed, purpose="sample", step=0, sample_ids=[item.prompt_id]) for item in items
    ]
    return backbone.decode(ode(denoise, schedule, torch.cat(noises), start=0, stop=schedule.num_steps)).cpu()


def score_images(
    images: Sequence[Picture | None] | Images,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    device: torch.device,
) -> Scored:
    """Scores of images that may differ in size; those of one size are scored together.

    Args:
        images: in [0, 1]; None where there is none, which scores NaN.
        prompts: one an image.
        rewards: by name.
        device: where the rewards expect the images.

    Raises:
        ConfigError: if a reward does not return one score an image.
    """
    scores = {name: torch.full((len(prompts),), torch.nan, dtype=torch.float64) for name in rewards}
    seconds = dict.fromkeys(rewards, 0.0)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        if image is not None and bool(image.isfinite().all()):
            by_size.setdefault(tuple(image.shape), []).append(i)
    for rows in by_size.values():
        batch = torch.stack([image for i in rows if (image := images[i]) is not None]).to(device)
        texts = [prompts[i] for i in rows]
        for name, reward in rewards.items():
            begun = now(device)
            values = _one_score_an_image(name, reward, batch, texts)
            seconds[name] += now(device) - begun
            scores[name][rows] = values.detach().to("cpu", torch.float64)
    for values in scores.values():
        values[~values.isfinite()] = torch.nan
    return Scored(scores, seconds)


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _one_score_an_image(name: str, reward: Reward, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
    with torch.autocast(images.device.type, enabled=False):
        values = reward(images, prompts)
    if not isinstance(values, Tensor) or tuple(values.shape) != (len(prompts),):
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(
            f"reward '{name}': it returned {found} for {len(prompts)} images; it must return one score an image, a "
            f"tensor of shape ({len(prompts)},)."
        )
    return values
