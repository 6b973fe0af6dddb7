"""Evaluation of a model on fixed prompts and noises: train rewards, held-out rewards, measures and S1 of each image.

Every score is kept for each sample, so that differences between two models can be taken pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rsaft.metrics.sharpness import rewards_around
from rsaft.sampling import Sampling, sample
from rsaft.types import Backbone, Images, Objective, Reward

Measure = Callable[[Images, Sequence[str]], Mapping[str, Tensor]]
"""(images, prompts) -> named scores (b,): the parts of a judgement, such as a testbed's `gold.parts`."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of n images, of which row i belongs to sample id `sample_ids[i]`.

    Keys: "reward/NAME", "held_out/NAME", "measure/NAME/PART", "sharpness/NAME", "slope/NAME" (L2 norm of the reward's
    gradient at the image), and, of several rewards under one objective, "pull/NAME" (that norm times the objective's
    slope in this reward: which one drives the step). All on the CPU; NaN where a score, or the image itself, was not
    finite.
    """

    scores: dict[str, Float[Tensor, " n"]]
    images: Float[Tensor, "n 3 h w"]
    prompts: tuple[str, ...]
    sample_ids: tuple[int, ...]

    def means(self) -> dict[str, float]:
        """Mean of each score over its finite values; "nonfinite/KEY" counts the others, where there are any.

        A score without a finite value has a count but no mean.
        """
        result = {}
        for key, values in self.scores.items():
            finite = values[torch.isfinite(values)]
            if len(finite):
                result[key] = float(finite.double().mean())
            if len(finite) < len(values):
                result[f"nonfinite/{key}"] = float(len(values) - len(finite))
        return result


def evaluate(
    backbone: Backbone,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    seed: int,
    num_samples: int,
    batch_size: int,
    rewards: Mapping[str, Reward],
    held_out: Mapping[str, Reward] | None = None,
    measures: Mapping[str, Measure] | None = None,
    sharpness_rho: float | None = None,
    objective: Objective | None = None,
    rows: slice | None = None,
) -> Evaluation:
    """Sample images without gradient and score them; with the same seed and weights, the same images.

    Args:
        backbone: the model.
        prompts: cycled to `num_samples`; sample i has prompt i modulo their number, and noise of its own.
        sampling: steps and guidance.
        seed: key of the noise, in a stream that no training step uses.
        num_samples: n, over all ranks.
        batch_size: images at a time.
        rewards: the rewards trained on.
        held_out: rewards that are only looked at.
        measures: named parts of a judgement.
        sharpness_rho: radius of S1, computed for each of `rewards`; None leaves it and the slopes out.
        objective: what the rewards are trained through; with it, S1 and two rewards or more, each one's pull is given.
        rows: this rank's part of the n samples; all of them by default. `joined` puts the parts together.

    Raises:
        ValueError: if there is no prompt or no sample, or a reward does not return one score an image.

    Cost: n sampled trajectories and decodes; one forward of each reward and measure, and with S1 one more forward and
    one backward of each train reward.
    """
    if not prompts:
        raise ValueError("evaluate: the prompt list is empty; give at least one prompt.")
    if num_samples < 1:
        raise ValueError(f"evaluate: num_samples counts images, so num_samples >= 1; got {num_samples}.")
    ids = list(range(num_samples))[rows or slice(None)]
    texts = [prompts[i % len(prompts)] for i in ids]
    if ids:
        images = sample(backbone, texts, sampling, seed=seed, sample_ids=ids, batch_size=batch_size)
    else:
        images = torch.zeros(0, 3, 1, 1)
    columns: dict[str, Tensor] = {}
    for first in range(0, len(ids), batch_size):
        part = slice(first, first + batch_size)
        usable = images[part].isfinite().flatten(1).all(dim=1)
        chosen = usable.nonzero().flatten() + first
        if not len(chosen):
            continue
        judged = [texts[i] for i in chosen.tolist()]
        moved = images[chosen].to(backbone.device)
        for key, values in _scores(moved, judged, rewards, held_out or {}, measures or {}, sharpness_rho):
            column = columns.setdefault(key, torch.full((len(ids),), torch.nan, dtype=torch.float64))
            found = values.detach().to("cpu", torch.float64)
            column[chosen] = torch.where(found.isfinite(), found, torch.nan)
    if objective is not None and sharpness_rho is not None and len(rewards) > 1 and columns:
        columns |= _pulls(columns, objective, tuple(rewards), texts)
    return Evaluation(columns, images, tuple(texts), tuple(ids))


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation from the parts of several ranks, in the order of sample ids.

    Raises:
        ValueError: if there is no part.
    """
    parts = [part for part in parts if part.sample_ids] or list(parts[:1])
    if not parts:
        raise ValueError("joined: give at least one part of an evaluation.")
    ids = [i for part in parts for i in part.sample_ids]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    prompts = [prompt for part in parts for prompt in part.prompts]
    keys = dict.fromkeys(key for part in parts for key in part.scores)

    def column(part: Evaluation, key: str) -> Tensor:
        return part.scores.get(key, torch.full((len(part.sample_ids),), torch.nan, dtype=torch.float64))

    return Evaluation(
        {key: torch.cat([column(part, key) for part in parts])[order] for key in keys},
        torch.cat([part.images for part in parts])[order],
        tuple(prompts[i] for i in order),
        tuple(ids[i] for i in order),
    )


def image_grid(images: Images, columns: int = 8) -> Image.Image:
    """The images in reading order, `columns` a row, with transparent gaps: by them a reader finds the tiles again.

    Args:
        images: in [0, 1]; clamped, and black where not finite.
        columns: images a row, at least 1; fewer if there are fewer images.

    Raises:
        ValueError: if there is no image.
    """
    if not len(images) or columns < 1:
        raise ValueError(f"image_grid: give at least one image and one column; got {len(images)} and {columns}.")
    pixels = images.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    tiles = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    height, width = tiles.shape[1:3]
    gap = max(2, width // 32)
    columns = min(columns, len(tiles))
    lines = math.ceil(len(tiles) / columns)
    grid = Image.new("RGBA", (columns * (width + gap) - gap, lines * (height + gap) - gap))
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        grid.paste(Image.fromarray(tile), (column * (width + gap), row * (height + gap)))
    return grid


def _scores(
    images: Images,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    held_out: Mapping[str, Reward],
    measures: Mapping[str, Measure],
    sharpness_rho: float | None,
) -> Iterator[tuple[str, Float[Tensor, " b"]]]:
    near = {}
    for name, reward in rewards.items():
        key = f"reward/{name}"
        if sharpness_rho is None:
            yield key, _plain(reward, images, prompts, key)
        else:
            found = rewards_around(reward, images, prompts, sharpness_rho)
            yield key, _checked(found.centre, len(prompts), key)
            near[f"sharpness/{name}"] = found.centre - found.moved
            near[f"slope/{name}"] = found.slope
    for name, reward in held_out.items():
        key = f"held_out/{name}"
        yield key, _plain(reward, images, prompts, key)
    for name, measure in measures.items():
        with torch.no_grad():
            parts = measure(images, prompts)
        for part, values in parts.items():
            key = f"measure/{name}/{part}"
            yield key, _checked(values, len(prompts), key)
    yield from near.items()


def _pulls(
    columns: Mapping[str, Tensor], objective: Objective, names: tuple[str, ...], prompts: Sequence[str]
) -> dict[str, Float[Tensor, " n"]]:
    """|d direction / d r_k| |d r_k / d x| of each reward and image; NaN where a reward is not finite."""
    matrix = torch.stack([columns[f"reward/{name}"] for name in names], dim=1)
    finite = matrix.isfinite().all(dim=1).nonzero().flatten()
    slopes = torch.full_like(matrix, torch.nan)
    if len(finite):
        rewards = matrix[finite].requires_grad_()
        with torch.enable_grad():
            _, direction = objective(rewards, names, [prompts[i] for i in finite.tolist()])
            (slopes[finite],) = torch.autograd.grad(direction.sum(), rewards)
    return {f"pull/{name}": slopes[:, k].abs() * columns[f"slope/{name}"] for k, name in enumerate(names)}


@torch.no_grad()
def _plain(reward: Reward, images: Images, prompts: Sequence[str], key: str) -> Float[Tensor, " b"]:
    with torch.autocast(images.device.type, enabled=False):
        return _checked(reward(images, prompts), len(prompts), key)


def _checked(values: Tensor, num_samples: int, key: str) -> Float[Tensor, " b"]:
    if tuple(values.shape) != (num_samples,):
        raise ValueError(
            f"evaluate: '{key}' returned shape {tuple(values.shape)} for {num_samples} images; it must return one "
            f"score an image, shape ({num_samples},)."
        )
    return values
