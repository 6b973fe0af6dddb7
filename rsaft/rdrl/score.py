"""From a sample to a loss: decode, reward, mask what is not finite; and the plain step that backpropagates it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsaft.types import Backbone, Images, Loss, Objective, Reward, Rollout, Sample, Score, StepOutput


@dataclass(frozen=True)
class ImageScore:
    """Rewards of decoded images, turned into a Loss by an objective.

    Cost: one VAE decode (`view`), one call of each reward. A sample with a non-finite reward is masked: the rewards
    are computed again without it, so that nothing of it enters the gradient.
    """

    backbone: Backbone
    rewards: Mapping[str, Reward]
    objective: Objective

    def view(self, sample: Sample) -> Images:
        """The images, with their graph: what is perturbed and rewarded."""
        return self.backbone.decode(sample.latents)

    def __call__(self, view: Images, sample: Sample) -> Loss:
        rewards = self._matrix(view, sample.prompts)
        valid = torch.isfinite(rewards).all(dim=1)
        detached = torch.where(torch.isfinite(rewards), rewards, torch.nan).detach()
        if bool(valid.all()):
            losses, direction = self.objective(rewards, tuple(self.rewards), sample.prompts)
            return Loss(losses.mean() + _penalty(sample, valid), direction, detached, valid)
        rows = valid.nonzero().flatten()
        value = view[:0].sum()  # 0 with a graph, also where the images themselves are not finite
        direction = value.to(rewards.dtype).expand(len(valid))
        if len(rows):
            prompts = [sample.prompts[i] for i in rows.tolist()]
            losses, part = self.objective(self._matrix(view[rows], prompts), tuple(self.rewards), prompts)
            value = losses.sum() / len(valid) + _penalty(sample, valid)
            direction = direction.index_put((rows,), part)
        return Loss(value, direction, detached, valid)

    def _matrix(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "b m"]:
        # Half precision loses a perturbation of norm 1e-2 (specs: cosine 0.1 to 0.6), so rewards run outside autocast.
        with torch.autocast(images.device.type, enabled=False):
            columns = [_checked(reward(images, prompts), name, len(prompts)) for name, reward in self.rewards.items()]
        return torch.stack(columns, dim=1)


def _checked(scores: Tensor, name: str, num_samples: int) -> Float[Tensor, " b"]:
    if tuple(scores.shape) != (num_samples,):
        raise ValueError(
            f"reward '{name}' returned shape {tuple(scores.shape)} for {num_samples} images; it must return one score "
            f"an image, shape ({num_samples},)."
        )
    return scores if scores.dtype == torch.float64 else scores.float()


def _penalty(sample: Sample, valid: Bool[Tensor, " n"]) -> Tensor | float:
    """The sample's own term of the loss, masked like its rewards."""
    return 0.0 if sample.penalty is None else torch.where(valid, sample.penalty, 0.0).sum() / len(valid)


def detached(loss: Loss) -> Loss:
    """The loss without its graph."""
    return replace(loss, value=loss.value.detach(), direction=loss.direction.detach())


def plain_step(rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: Any = None) -> StepOutput:
    """Backpropagate each micro-batch's loss; gradients of the mean over micro-batches are added to `.grad`.

    Cost for each rollout: its prefix, its tail forward and backward, one view, one score.
    """
    losses = []
    for rollout in rollouts:
        sample = rollout.tail(rollout.prefix())
        loss = score(score.view(sample), sample)
        (loss.value / len(rollouts)).backward()
        losses.append(detached(loss))
    return StepOutput(tuple(losses))
