"""One small update before a long run: whether rewards, gradients and weights do what training needs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsaft.errors import ConfigError, NonFiniteError, RsaftError
from rsaft.flatten.weight import global_norm
from rsaft.rdrl.score import ImageScore, checked
from rsaft.sampling import sample
from rsaft.types import Algorithm, Backbone, Batch, GroupObjective, Images, Objective, Reward, Step

LARGEST = 1e4  # of a score; rewards in use lie between -10 and 100


@dataclass(frozen=True)
class StepReport:
    """What the update saw."""

    rewards: dict[str, float]  # of one sample; trained ones first, then those that are only measured
    loss: float
    gradient_norm: float  # over all trainable values, finite; above 0, but for an objective that compares samples


def try_step(
    backbone: Backbone,
    *,
    algorithm: Algorithm,
    rewards: Mapping[str, Reward],
    held_out: Mapping[str, Reward],
    objective: Objective,
    step: Step,
    prompt: str,
    trained_on: Sequence[str],
) -> StepReport:
    """Gradients of one sample through the real algorithm, step, rewards and objective; no optimizer step.

    Args:
        backbone: the model; its weights and `.grad` are afterwards what they were.
        algorithm, rewards, held_out, objective, step: as for the Trainer.
        prompt: of the sample.
        trained_on: names of the rewards that must have a gradient.

    Raises:
        ConfigError: if an image, a reward or the gradient is not finite, a reward has the wrong shape or no gradient,
            or nothing trainable gets a gradient.
        RsaftError: if the step changed the weights.
    """
    seen: dict[str, float] = {}
    guarded = {n: _guarded(r, n, seen, differentiable=n in trained_on) for n, r in rewards.items()}
    params = backbone.parameters()
    before = _checksum(params)
    try:
        rollout = algorithm.rollout(backbone, Batch((prompt,), (0,), step=0, seed=0))
        output = step([rollout], ImageScore(backbone, guarded, objective), params, None)
        norm = float(global_norm([torch.zeros_like(p) if p.grad is None else p.grad for p in params]))
        images = sample(backbone, [prompt], algorithm.sampling, seed=0) if held_out else None
    except NonFiniteError as error:
        raise ConfigError(str(error)) from error
    finally:
        for p in params:
            p.grad = None
    if _checksum(params) != before:
        raise RsaftError(
            "check: the step changed the weights, and only the optimizer may; this is a fault of the step."
        )
    # One sample alone may have no target in a group objective.
    if not math.isfinite(norm) or (norm == 0 and not isinstance(objective, GroupObjective)):
        raise ConfigError(
            f"check: the gradient of the trainable values has norm {norm}, and training needs a finite one above 0; "
            "see that the rewards depend on the images, smoothly, and that the objective uses them."
        )
    if images is not None:
        with torch.no_grad():
            for name, reward in held_out.items():
                _guarded(reward, name, seen, differentiable=False)(images.to(backbone.device), [prompt])
    return StepReport(seen, float(output.losses[0].value), norm)


def _guarded(reward: Reward, name: str, seen: dict[str, float], *, differentiable: bool) -> Callable[..., Tensor]:
    """The reward, refused if it gives what training cannot use; its first score goes into `seen`."""

    def guarded(images: Images, prompts: Sequence[str]) -> Tensor:
        if not bool(images.isfinite().all()):
            raise ConfigError(
                f"check: the model's image of '{prompts[0]}' is not finite before any training; load the model in "
                "fp32, or look at its VAE."
            )
        scores = checked(reward(images, prompts), name, images)
        broken = scores.detach()[~scores.isfinite()]
        if len(broken):
            raise ConfigError(
                f"reward '{name}' gave {float(broken[0])} for an image of '{prompts[0]}'; training masks such samples, "
                "and here there is no other; look at that reward."
            )
        large = scores.detach()[scores.detach().abs() > LARGEST]
        if len(large):
            raise ConfigError(
                f"reward '{name}' gave {float(large[0]):g}, and scores up to {LARGEST:g} in size are expected: it "
                "would drown every other one; divide it (rsaft.rewards.shaping.Standardized)."
            )
        if differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise ConfigError(
                f"reward '{name}' is not differentiable: its score has no gradient, and the algorithm backpropagates "
                "through it; keep it free of no_grad, detach, numpy and PIL, or list it under held_out."
            )
        seen.setdefault(name, float(scores[0].detach()))
        return scores

    return guarded


def _checksum(params: Sequence[Tensor]) -> list[int]:
    """A number for each tensor, of its bytes; a copy to compare with would take as much memory as the tensor."""
    return [int(p.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)) for p in params]
