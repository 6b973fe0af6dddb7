"""What RSA-FT does at a view, the tensor that is perturbed and rewarded: slopes, latents as a view, noise around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsaft.flatten.input import Delta, check_precision, repeated
from rsaft.randomness import normal
from rsaft.types import Batch, Loss, Sample, Score


def slope_of(score: Score, sample: Sample) -> Callable[[Tensor], Tensor]:
    """The gradient of each sample's direction as a function of the view; it stops there."""

    def slope(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        (g,) = torch.autograd.grad(score(leaf, sample).direction.sum(), leaf)
        return g

    return slope


@dataclass(frozen=True)
class LatentScore:
    """A Score whose view is the latents: decoding is a part of what it scores. Cost: a decode in each call."""

    score: Score  # of images

    def view(self, sample: Sample) -> Tensor:
        return sample.latents

    def __call__(self, view: Tensor, sample: Sample) -> Loss:
        moved = replace(sample, latents=view)
        return self.score(self.score.view(moved), moved)


def smoothed(view: Tensor, sample: Sample, batch: Batch, delta: Delta) -> tuple[Tensor, Tensor, Sample]:
    """The view `draws` times over, Gaussian noise for each copy, and the copies' sample.

    RSAFT takes the objective's loss of each copy, and their mean: E[L(r(x + sigma u))]. Where L is linear that is the
    loss of the smoothed reward, L(r~) with r~ = E[r(x + sigma u)]; for a hinge or a softmin it is another thing.

    Noise is keyed by (seed, update, sample id, pair), so a resumed run repeats it. The several latents of one sample
    (DRaFT-LV) share theirs.
    """
    check_precision(view)

    def noise(pair: int) -> Tensor:
        u = normal(
            tuple(view.shape[1:]),
            seed=batch.seed,
            purpose=f"smoothing-{pair}",
            step=batch.step,
            sample_ids=batch.sample_ids,
            device=view.device,
        )
        return u[sample.index]

    n = delta.draws
    copies = Sample(
        repeated(sample.latents, n),
        sample.prompts * n,
        sample.index.repeat(n),
        None if sample.penalty is None else sample.penalty.repeat(n),
    )
    return repeated(view, n), delta.gaussian(view, noise), copies
