"""From a sample to a loss: decode, reward, mask what is not finite; and the plain step that backpropagates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsaft import distributed
from rsaft.errors import ConfigError
from rsaft.types import (
    Backbone,
    GroupObjective,
    Images,
    Loss,
    Objective,
    Others,
    Reward,
    Rollout,
    Sample,
    Score,
    StepOutput,
)


@dataclass(frozen=True)
class ImageScore:
    """Rewards of decoded images, turned into a Loss by an objective.

    Cost: one VAE decode (`view`), one call of each reward. A sample with a non-finite reward is masked: the rewards
    are computed again without it, so that nothing of it enters the gradient.
    """

    backbone: Backbone
    rewards: Mapping[str, Reward]
    objective: Objective
    # From the rewards, which samples' penalty counts: (b, m) rewards and their names to (b,) factors. None: all.
    gate: Callable[[Tensor, tuple[str, ...]], Tensor] | None = None

    def view(self, sample: Sample) -> Images:
        """The images, with their graph: what is perturbed and rewarded."""
        return self.backbone.decode(sample.latents)

    def __call__(self, view: Images, sample: Sample) -> Loss:
        rewards = self._matrix(view, sample.prompts)
        valid = torch.isfinite(rewards).all(dim=1)
        detached = torch.where(torch.isfinite(rewards), rewards, torch.nan).detach()
        if bool(valid.all()):
            losses, direction, logs = self._judged(rewards, sample.prompts)
            return Loss(losses.mean() + self._penalty(sample, detached, valid), direction, detached, valid, logs)
        rows = valid.nonzero().flatten()
        value = view[:0].sum()  # 0 with a graph, also where the images themselves are not finite
        direction = value.to(rewards.dtype).expand(len(valid))
        prompts = [sample.prompts[i] for i in rows.tolist()]
        losses, part, logs = self._judged(self._matrix(view[rows], prompts) if len(rows) else detached[:0], prompts)
        if len(rows):
            value = losses.sum() / len(valid) + self._penalty(sample, detached, valid)
            direction = direction.index_put((rows,), part)
        return Loss(value, direction, detached, valid, logs)

    def _judged(
        self, rewards: Float[Tensor, "n m"], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], dict[str, float]]:
        """Losses, directions and logs. Called once a pass, on every process: for a GroupObjective it gathers."""
        names = tuple(self.rewards)
        if isinstance(self.objective, GroupObjective):
            return self.objective.judge(rewards, names, prompts, others(rewards, prompts))
        return *self.objective(rewards, names, prompts), {}

    def _penalty(self, sample: Sample, rewards: Float[Tensor, "n m"], valid: Bool[Tensor, " n"]) -> Tensor | float:
        """The sample's own term of the loss, gated, and masked like its rewards."""
        if sample.penalty is None:
            return 0.0
        penalty = sample.penalty if self.gate is None else self.gate(rewards, tuple(self.rewards)) * sample.penalty
        return torch.where(valid, penalty, 0.0).sum() / len(valid)

    def _matrix(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "b m"]:
        # Half precision loses a perturbation of norm 1e-2 (specs: cosine 0.1 to 0.6), so rewards run outside autocast.
        with torch.autocast(images.device.type, enabled=False):
            columns = [checked(reward(images, prompts), name, images) for name, reward in self.rewards.items()]
        matrix = torch.stack(columns, dim=1)
        if images.requires_grad and torch.is_grad_enabled():
            constant = [k for k, column in enumerate(columns) if not column.requires_grad]
            if constant:
                self._refuse_constant(matrix, constant, prompts)
        return matrix

    def _refuse_constant(self, matrix: Float[Tensor, "b m"], constant: list[int], prompts: Sequence[str]) -> None:
        """An error if the objective uses a reward that has no gradient: its part of the update would be missing."""
        names = tuple(self.rewards)
        rewards = matrix.detach().requires_grad_()
        _, direction = self.objective(rewards, names, prompts)
        (slopes,) = torch.autograd.grad(direction.nan_to_num().sum(), rewards, materialize_grads=True)
        used = [names[k] for k in constant if bool((slopes[:, k] != 0).any())]
        if used:
            raise ConfigError(
                f"reward '{used[0]}' is not differentiable: its score has no gradient, and the algorithm "
                "backpropagates through it; keep it free of no_grad, detach, numpy and PIL, or list it under held_out."
            )


def others(rewards: Float[Tensor, "n m"], prompts: Sequence[str]) -> Others | None:
    """The rewards of the other processes' samples; None with one process. A collective: all processes call it."""
    if distributed.world_size() == 1:
        return None
    parts = distributed.gathered((rewards.detach().cpu(), tuple(prompts)))
    del parts[distributed.rank()]
    return Others(torch.cat([r for r, _ in parts]).to(rewards), tuple(p for _, names in parts for p in names))


def checked(scores: Any, name: str, images: Images) -> Float[Tensor, " b"]:
    """A reward's scores as fp32 (fp64 stays), if they are one floating-point number an image, where the images are.

    Raises:
        ConfigError: if they are not; it names the reward.
    """
    if not isinstance(scores, Tensor):
        raise ConfigError(
            f"reward '{name}' returned {type(scores).__name__} for {len(images)} images; it must return a tensor."
        )
    if tuple(scores.shape) != (len(images),):
        raise ConfigError(
            f"reward '{name}' returned shape {tuple(scores.shape)} for {len(images)} images; it must return one score "
            f"an image, shape ({len(images)},)."
        )
    if not scores.is_floating_point():
        raise ConfigError(f"reward '{name}' returned {scores.dtype} scores; they must be floating-point numbers.")
    if scores.device != images.device:
        raise ConfigError(
            f"reward '{name}' returned scores on {scores.device} for images on {images.device}; return them there."
        )
    return scores if scores.dtype == torch.float64 else scores.float()


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
