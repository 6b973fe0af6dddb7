"""RSA-FT, Algorithm 1: fine-tune on the reward of the worst image and the worst weights nearby (Eq. 19).

    max_theta E r( x_0(x_T, c; theta + eps) + delta, c ),
    delta = -rho g_x / ||g_x||,  eps = -rho_w g_theta / ||g_theta||

Both gradients are taken at the clean point, by one backward pass, and are constants afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rsaft import distributed
from rsaft.errors import ConfigError
from rsaft.flatten.input import Delta, Norm, Smoothing, check_precision, check_radius
from rsaft.flatten.selective import look, weigh_gradient, weights_of_batch
from rsaft.flatten.views import LatentScore, slope_of, smoothed
from rsaft.flatten.weight import global_norm, gradients_of, perturbed, rounding_cosine, worst_case_eps
from rsaft.types import Batch, Loss, Rollout, Sample, Score, StepOutput

Mode = Literal["none", "input", "weight", "both"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class KeptEps:
    """An epsilon that serves several updates: the tensors, and how many updates they have served."""

    eps: tuple[Tensor, ...]
    age: int


@dataclass(frozen=True)
class RSAFT:
    """A Step. Fills `.grad` with the gradient of Eq. 19 and leaves the weights as they were.

    Cost beside a plain step, in network calls of a trajectory of T steps (f forward, b backward, K with gradient):
    input: one reward forward and backward. weight, both: one more trajectory with its backward, decode and reward
    (`reuse="resample"`, 2x); only the K last steps (`"cached"`); or m steps (`reuse=m`). A first pass on a share of
    the batch (`eps_share`) costs that share of a plain step; an epsilon kept for n updates (`eps_every`) 1/n of one.
    Each of `delta_steps` beyond the first: one reward forward and backward. `smoothing`: no pass for delta, and the
    reward pass of the loss on `draws` times as many images. `sharpness_tau`: the K last steps, decode and reward once
    more without gradient, a reward forward and backward for delta, which serves the loss too where that needs one, and
    a reward forward.

    Passing the state that a call returns to the next call is needed for `eps_every` alone.
    """

    rho: float = 1e-2  # radius of delta per image, in units of [0, 1] pixels (Eq. 15), or of latents
    rho_w: float = 1e-2  # radius of epsilon, L2 over all trainable values (Eq. 17)
    mode: Mode = "both"
    # Steps that are sampled again at theta + eps: all of them (Eq. 19), those with gradient, or the last m.
    reuse: Literal["resample", "cached"] | int = "resample"
    norm: Norm = "l2"  # of delta
    # Where delta's gradient is taken: Algorithm 1's clean weights, or theta + eps (one more reward pass). A first pass
    # on a part of the batch, or none (eps_every), always takes it at theta + eps.
    delta_from: Literal["clean", "perturbed"] = "clean"
    eps_share: float = 1.0  # share of the batch in the first pass, 1 / n: every n-th sample
    eps_every: int = 1  # updates that one epsilon serves
    # One epsilon for the global batch (results do not depend on the number of processes), or one a micro-batch.
    eps_group: Literal["global", "micro_batch"] = "global"
    # The network's arithmetic. In half precision, how much of epsilon survives rounding is logged as eps_cosine.
    network_dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    # What delta is added to: decoded images, or latents before the decoder.
    space: Literal["image", "latent"] = "image"
    delta_steps: int = 1  # of projected gradient descent towards the worst case; one is Eq. 15
    # "gaussian": the mean over x + noise in place of the worst case, its size from rho; fresh noise at every update.
    smoothing: Smoothing | None = None
    draws: int = 4  # of noise for each image, in pairs u and -u
    project: bool = False  # keep x + delta in [0, 1]
    # Temperature, in the reward's units, of the weight exp(-S1 / tau) of each sample, where S1 = r(x) - r(x + delta)
    # is the sharpness at its image; weights have mean 1 over the global batch. null weighs all samples alike.
    sharpness_tau: float | None = None

    def __post_init__(self) -> None:
        self._delta  # noqa: B018  checks its settings
        check_radius(self.rho_w, "rho_w")
        if isinstance(self.reuse, int) and self.reuse < 1:
            raise ConfigError(f"step.reuse counts the last steps sampled again, so reuse >= 1; got {self.reuse}.")
        if not 0 < self.eps_share <= 1:
            raise ConfigError(f"step.eps_share is a share of the batch, so 0 < eps_share <= 1; got {self.eps_share}.")
        n = _nearest_n(self.eps_share)
        if not math.isclose(self.eps_share, 1 / n, rel_tol=1e-6):  # a rounded 1/3 is one
            raise ConfigError(
                f"step.eps_share: the first pass takes every n-th sample, so the share is 1 / n; got {self.eps_share}, "
                f"and the nearest is {1 / n:g} (1 / {n})."
            )
        if self.eps_every < 1:
            raise ConfigError(f"step.eps_every counts updates, so eps_every >= 1; got {self.eps_every}.")
        reason = self._why_not_together()
        if reason is not None:
            raise ConfigError(reason)

    def _why_not_together(self) -> str | None:
        """Which settings contradict each other; None if none do."""
        if self.eps_group == "micro_batch" and (self.eps_share < 1 or self.eps_every > 1):
            return (
                "step.eps_group: an epsilon for each micro-batch is computed from all of it at every update; "
                "set eps_share and eps_every to 1, or eps_group to global."
            )
        if self.smoothing is not None and self.mode in ("none", "weight"):
            return f"smoothing moves images, and mode {self.mode} moves none; set mode to input or both."
        if self.project and self.space == "latent":
            return "project keeps pixels in [0, 1], and latents have no such bounds; set project to false."
        if self.sharpness_tau is None:
            return None
        if not 0 < self.sharpness_tau < math.inf:
            return f"sharpness_tau is a temperature, so 0 < sharpness_tau; got {self.sharpness_tau}; null is off."
        if self.rho == 0:
            return "sharpness_tau weighs samples by their sharpness within rho, and rho is 0; set rho > 0."
        if self.eps_group == "micro_batch":
            return "sharpness_tau: weights have mean 1 over the global batch; set eps_group to global."
        return None

    @property
    def _delta(self) -> Delta:
        return Delta(self.rho, self.norm, self.delta_steps, self.smoothing, self.draws, self.project)

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: KeptEps | None = None
    ) -> StepOutput:
        """Accumulate into `.grad` the gradient of the mean loss over `rollouts`, the micro-batches of one update."""
        if self.space == "latent":
            score = LatentScore(score)
        if self.mode in ("none", "input"):
            nothing = [None] * len(rollouts)
            return StepOutput(*self._backward(rollouts, nothing, nothing, score, parts=len(rollouts)))
        if self.eps_group == "micro_batch":
            outputs = [self._update([r], score, params, None, len(rollouts)) for r in rollouts]
            return StepOutput(tuple(o.losses[0] for o in outputs), _mean([o.logs for o in outputs]))
        return self._update(rollouts, score, params, state, len(rollouts))

    def _update(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: KeptEps | None, parts: int
    ) -> StepOutput:
        """The two passes of Algorithm 1 over micro-batches that share one epsilon."""
        shared = [self._shared_prefix(r) for r in rollouts]
        deltas: list[Tensor | None] = [None] * len(rollouts)
        if state is not None and state.age < self.eps_every:
            state = replace(state, age=state.age + 1)
        else:
            gradients, deltas = self._first_pass(rollouts, shared, score, params)
            state = KeptEps(tuple(worst_case_eps(gradients, self.rho_w)), age=1)
        with perturbed(params, state.eps):
            losses, logs = self._backward(rollouts, shared, deltas, score, parts)
        logs["rsaft/eps_norm"] = float(global_norm(state.eps))
        if self.network_dtype in _HALF:
            logs["rsaft/eps_cosine"] = rounding_cosine(params, state.eps, _HALF[self.network_dtype])
        return StepOutput(losses, logs, state if self.eps_every > 1 else None)

    def _shared_prefix(self, rollout: Rollout) -> Any:
        """The part of the trajectory that both passes take from theta; None if they share nothing."""
        if self.reuse == "resample":
            return None
        if self.reuse == "cached":
            return rollout.prefix()
        return rollout.prefix(stop=max(rollout.num_steps - self.reuse, 0))

    def _first_pass(
        self, rollouts: Sequence[Rollout], shared: Sequence[Any], score: Score, params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """g_theta summed over the global batch, and each micro-batch's delta if it can be had from the same pass."""
        stride = round(1 / self.eps_share)
        searched = self.mode == "both" and self.smoothing is None and self.delta_from == "clean"
        with_delta = searched and stride == 1 and self.eps_every == 1
        total = [torch.zeros_like(p) for p in params]
        deltas: list[Tensor | None] = []
        for rollout, start in zip(rollouts, shared, strict=True):
            deltas.append(None)
            # By sample id, not by row: the same samples whatever the micro-batches and ranks.
            rows = [row for row, i in enumerate(rollout.batch.sample_ids) if i % stride == 0]
            if not rows:
                continue
            part = rollout if stride == 1 else rollout.select(rows)
            sample = part.tail(part.prefix(start=start if stride == 1 else None))
            view = score.view(sample)
            wanted = [view, *params] if with_delta else list(params)
            direction = score(view, sample).direction.sum()
            gradients = gradients_of(direction, wanted)
            if with_delta:
                deltas[-1] = self._worst_case(view, score, sample, first=gradients.pop(0))
            for t, g in zip(total, gradients, strict=True):
                t.add_(g)
        if self.eps_group == "global":
            distributed.sum_(total)
        return total, deltas

    def _backward(
        self,
        rollouts: Sequence[Rollout],
        shared: Sequence[Any],
        deltas: Sequence[Tensor | None],
        score: Score,
        parts: int,
    ) -> tuple[tuple[Loss, ...], dict[str, float]]:
        """Backpropagate each micro-batch's loss, at the weights as they are now, into `.grad`; divided by `parts`."""
        weights: Sequence[Tensor | None] = [None] * len(rollouts)
        logs_of_weights: dict[str, float] = {}
        if self.sharpness_tau is not None:
            looks = [look(r, start, score, self._delta) for r, start in zip(rollouts, shared, strict=True)]
            shared = [found.start for found in looks]
            deltas = [found.delta if delta is None else delta for delta, found in zip(deltas, looks, strict=True)]
            weights, logs_of_weights = weights_of_batch([found.s1 for found in looks], self.sharpness_tau)
        losses, logs = [], []
        for rollout, start, delta, weight in zip(rollouts, shared, deltas, weights, strict=True):
            sample = rollout.tail(rollout.prefix(start=start))
            view = score.view(sample)
            if weight is not None:
                weigh_gradient(view, weight)
            view, delta, sample = self._perturbation(view, delta, score, sample, rollout.batch)
            loss = score(view if delta is None else view + delta, sample)
            (loss.value / parts).backward()
            losses.append(replace(loss, value=loss.value.detach(), direction=loss.direction.detach()))
            logs.append({} if delta is None else self._logs_of_delta(view.detach(), delta))
        return tuple(losses), _mean(logs) | logs_of_weights

    def _perturbation(
        self, view: Tensor, delta: Tensor | None, score: Score, sample: Sample, batch: Batch
    ) -> tuple[Tensor, Tensor | None, Sample]:
        """Where the loss is taken: a view, its delta (the given one, if there is one), and its sample."""
        if self.mode in ("none", "weight"):
            return view, None, sample
        if self.smoothing == "gaussian":
            return smoothed(view, sample, batch, self._delta)
        return view, self._worst_case(view, score, sample) if delta is None else delta, sample

    def _worst_case(self, view: Tensor, score: Score, sample: Sample, first: Tensor | None = None) -> Tensor:
        """delta at a view; `first` is the gradient there, if it is known."""
        check_precision(view)
        return self._delta.worst_case(view.detach(), slope_of(score, sample), first)

    def _logs_of_delta(self, view: Tensor, delta: Tensor) -> dict[str, float]:
        """Size of delta, for images in 8-bit grey levels, and the cosine between delta and what addition left of it."""
        left = (view + delta) - view
        cosine = (left * delta).sum() / (left.norm() * delta.norm()).clamp_min(1e-24)
        rms = delta.square().mean().sqrt()
        size = {"rsaft/delta_rms_255": float(rms * 255)} if self.space == "image" else {"rsaft/delta_rms": float(rms)}
        return size | {"rsaft/delta_cosine": float(cosine)}


def _nearest_n(share: float) -> int:
    """The n whose 1 / n is nearest to a share in (0, 1]."""
    below, above = math.floor(1 / share), math.ceil(1 / share)
    return below if 1 / below - share < share - 1 / above else above


def _mean(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: math.fsum(log[key] for log in logs) / len(logs) for key in (logs[0] if logs else {})}
