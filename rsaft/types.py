"""The shapes that rsaft's parts exchange, and the Protocols that they meet. Knows nobody.

Dimension letters: b samples, m rewards, c h w channels and size of images, hz wz size of latents, s sampling steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "b 3 h w"]
Latents = Float[Tensor, "b c hz wz"]

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_t (b, c, h, w), network timestep) -> prediction (b, c, h, w), guidance included."""


@dataclass(frozen=True)
class Batch:
    """The prompts of one micro-batch with the keys of their randomness.

    A sample's noise depends on (seed, step, sample id) alone, so it is the same on every rank and in every
    micro-batch that the sample could have fallen into.
    """

    prompts: tuple[str, ...]
    sample_ids: tuple[int, ...]  # position in the global batch of this update
    step: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.sample_ids):
            raise ValueError(
                f"a Batch has one sample id for each prompt; got {len(self.prompts)} prompts "
                f"and {len(self.sample_ids)} ids."
            )

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of the given rows; each keeps its own randomness."""
        return Batch(
            tuple(self.prompts[i] for i in rows), tuple(self.sample_ids[i] for i in rows), self.step, self.seed
        )


@dataclass(frozen=True)
class Sample:
    """Final latents with their graph, and which prompt each belongs to (DRaFT-LV gives (1 + lv) b of them)."""

    latents: Float[Tensor, "n c hz wz"]
    prompts: tuple[str, ...]  # n prompts, one a latent
    index: Int[Tensor, " n"]  # row of the batch that each latent belongs to
    # A term added to each latent's loss, not to its reward (ReFL's pretraining loss); None: no term.
    penalty: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Loss:
    """What a score says of a batch.

    `value` is minimised: the objective's loss plus the sample's penalty, as a mean over all n samples, where a masked
    one counts as 0. `direction` is the quantity whose gradient gives RSA-FT's perturbations: the reward side without
    hinge or offset, larger is better.
    """

    value: Float[Tensor, ""]
    direction: Float[Tensor, " n"]
    rewards: Float[Tensor, "n m"]  # detached; NaN where a reward was not finite
    valid: Bool[Tensor, " n"]  # False: the sample was masked
    logs: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Any callable of this form is a reward. Larger is better; samples do not interact."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]: ...


@runtime_checkable
class StepReward(Protocol):
    """A reward of noisy latents at a noise level."""

    def __call__(self, x_t: Latents, t: float, prompts: Sequence[str]) -> Float[Tensor, " b"]: ...


@runtime_checkable
class Objective(Protocol):
    """From the reward matrix to a loss and a direction for each sample."""

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]: ...


@dataclass(frozen=True)
class Others:
    """What the other processes sampled in the same pass: rewards without a graph, and their prompts."""

    rewards: Float[Tensor, "n m"]
    prompts: tuple[str, ...]


@runtime_checkable
class GroupObjective(Objective, Protocol):
    """An objective that compares the samples of one prompt, on all processes."""

    @property
    def by_prompt(self) -> Literal[True]: ...

    def judge(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str], others: Others | None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], dict[str, float]]:
        """Loss and direction of each sample, as an Objective, and what to log; the same keys on every process."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A text-to-image model, frozen but for its trainable parameters. What the samplers and trainers need of it."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of latents between steps: float32 (float64 for a float64 model), whatever the network's."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable tensors, always in the same order."""
        ...

    def schedule(self, num_steps: int) -> Any:
        """The `rsaft.schedules.Schedule` of a trajectory of `num_steps` steps."""
        ...

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        """Encode the prompts once, and return the guided network as a function of (x_t, timestep)."""
        ...

    def decode(self, latents: Latents) -> Images:
        """fp32 images in [0, 1], differentiable; the clamp is straight-through."""
        ...


@runtime_checkable
class BackboneWithBase(Backbone, Protocol):
    """A Backbone that can still be the model it was before training."""

    def base(self) -> AbstractContextManager[None]:
        """Inside, denoisers, those made before too, are the base model's; the trained weights stay as they are."""
        ...


@runtime_checkable
class Rollout(Protocol):
    """One batch's trajectory: a no-gradient `prefix()` and a pure `tail(prefix)`.

    The law: all noise and all random indices are fixed when the rollout is made; a tail draws nothing, and called
    twice with the same weights it returns the same tensors bit for bit.
    """

    @property
    def batch(self) -> Batch: ...

    @property
    def num_steps(self) -> int:
        """Sampling steps of the whole trajectory; `stop` of `prefix` counts in them."""
        ...

    def prefix(self, start: Any = None, stop: int | None = None) -> Any:
        """The state before the first step with gradient (or before step `stop`, if that is earlier).

        Goes on from `start`, a state that an earlier call returned, if one is given.
        """
        ...

    def tail(self, prefix: Any) -> Sample: ...

    def select(self, rows: Sequence[int]) -> Rollout:
        """The same rollout for some rows of the batch."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """Makes a rollout for a batch; a frozen dataclass of settings."""

    @property
    def sampling(self) -> Any:
        """The `rsaft.sampling.Sampling` of its trajectories, which evaluations use too."""
        ...

    def rollout(self, backbone: Backbone, batch: Batch) -> Rollout: ...


@runtime_checkable
class Score(Protocol):
    """Turns a sample into the tensor that is perturbed and rewarded (`view`), and that tensor into a Loss."""

    def view(self, sample: Sample) -> Tensor: ...

    def __call__(self, view: Tensor, sample: Sample) -> Loss: ...


@dataclass(frozen=True)
class StepOutput:
    """What a step did: gradients are in `.grad`, weights are unchanged."""

    losses: tuple[Loss, ...]  # one a micro-batch, detached
    logs: dict[str, float] = field(default_factory=dict)
    state: Any = None  # what the step wants back at the next update (RSAFT with eps_every); tensors and ints


@runtime_checkable
class Step(Protocol):
    """Fills `.grad` of the parameters from the micro-batches of one update and leaves the weights unchanged."""

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: Any = None
    ) -> StepOutput: ...
