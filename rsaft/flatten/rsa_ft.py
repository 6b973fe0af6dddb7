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
from rsaft.flatten.input import Norm, check_precision, check_radius, worst_case_delta
from rsaft.flatten.weight import global_norm, gradients_of, perturbed, rounding_cosine, worst_case_eps
from rsaft.types import Loss, Rollout, Sample, Score, StepOutput

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

    Passing the state that a call returns to the next call is needed for `eps_every` alone.
    """

    rho: float = 1e-2  # radius of delta per image, in units of [0, 1] pixels (Eq. 15)
    rho_w: float = 1e-2  # radius of epsilon, L2 over all trainable values (Eq. 17)
    mode: Mode = "both"
    # Steps that are sampled again at theta + eps: all of them (Eq. 19), those with gradient, or the last m.
    reuse: Literal["resample", "cached"] | int = "resample"
    norm: Norm = "l2"  # of delta
    # Where delta's gradient is taken: Algorithm 1's clean weights, or theta + eps (one more reward pass). A first pass
    # on a part of the batch, or none (eps_every), always takes it at theta + eps.
    delta_from: Literal["clean", "perturbed"] = "clean"
    eps_share: float = 1.0  # share of the batch in the first pass: every (1 / eps_share)-th sample
    eps_every: int = 1  # updates that one epsilon serves
    # One epsilon for the global batch (results do not depend on the number of processes), or one a micro-batch.
    eps_group: Literal["global", "micro_batch"] = "global"
    # The network's arithmetic. In half precision, how much of epsilon survives rounding is logged as eps_cosine.
    network_dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"

    def __post_init__(self) -> None:
        check_radius(self.rho, "rho")
        check_radius(self.rho_w, "rho_w")
        if isinstance(self.reuse, int) and self.reuse < 1:
            raise ConfigError(f"step.reuse counts the last steps sampled again, so reuse >= 1; got {self.reuse}.")
        if not 0 < self.eps_share <= 1:
            raise ConfigError(f"step.eps_share is a share of the batch, so 0 < eps_share <= 1; got {self.eps_share}.")
        if self.eps_every < 1:
            raise ConfigError(f"step.eps_every counts updates, so eps_every >= 1; got {self.eps_every}.")
        if self.eps_group == "micro_batch" and (self.eps_share < 1 or self.eps_every > 1):
            raise ConfigError(
                "step.eps_group: an epsilon for each micro-batch is computed from all of it at every update; "
                "set eps_share and eps_every to 1, or eps_group to global."
            )

    def __call__(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: KeptEps | None = None
    ) -> StepOutput:
        """Accumulate into `.grad` the gradient of the mean loss over `rollouts`, the micro-batches of one update."""
        if self.mode in ("none", "input"):
            losses, logs = zip(*[self._unperturbed(r, score, len(rollouts)) for r in rollouts], strict=True)
            return StepOutput(losses, _mean(logs))
        if self.eps_group == "micro_batch":
            outputs = [self._update([r], score, params, None, len(rollouts)) for r in rollouts]
            return StepOutput(tuple(o.losses[0] for o in outputs), _mean([o.logs for o in outputs]))
        return self._update(rollouts, score, params, state, len(rollouts))

    def _unperturbed(self, rollout: Rollout, score: Score, parts: int) -> tuple[Loss, dict[str, float]]:
        """Backward through the clean weights; mode "input" adds delta to the view (Eq. 16)."""
        sample = rollout.tail(rollout.prefix())
        view = score.view(sample)
        delta = self._delta_at(view, score, sample) if self.mode == "input" else None
        return _backward(view, delta, score, sample, parts)

    def _update(
        self, rollouts: Sequence[Rollout], score: Score, params: Sequence[Tensor], state: KeptEps | None, parts: int
    ) -> StepOutput:
        """The two passes of Algorithm 1 over micro-batches that share one epsilon."""
        shared = [self._shared_prefix(r) for r in rollouts]
        deltas: Sequence[Tensor | None] = [None] * len(rollouts)
        if state is not None and state.age < self.eps_every:
            state = replace(state, age=state.age + 1)
        else:
            gradients, deltas = self._first_pass(rollouts, shared, score, params)
            state = KeptEps(tuple(worst_case_eps(gradients, self.rho_w)), age=1)
        losses, logs = [], []
        with perturbed(params, state.eps):
            for rollout, start, delta in zip(rollouts, shared, deltas, strict=True):
                sample = rollout.tail(rollout.prefix(start=start))
                view = score.view(sample)
                if self.mode == "both" and delta is None:
                    delta = self._delta_at(view, score, sample)
                loss, log = _backward(view, delta, score, sample, parts)
                losses.append(loss)
                logs.append(log)
        logs_of_eps = {"rsaft/eps_norm": float(global_norm(state.eps))}
        if self.network_dtype in _HALF:
            logs_of_eps["rsaft/eps_cosine"] = rounding_cosine(params, state.eps, _HALF[self.network_dtype])
        return StepOutput(tuple(losses), _mean(logs) | logs_of_eps, state if self.eps_every > 1 else None)

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
        with_delta = self.mode == "both" and self.delta_from == "clean" and stride == 1 and self.eps_every == 1
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
                check_precision(view)
                deltas[-1] = worst_case_delta(gradients.pop(0), self.rho, self.norm)
            for t, g in zip(total, gradients, strict=True):
                t.add_(g)
        if self.eps_group == "global":
            distributed.sum_(total)
        return total, deltas

    def _delta_at(self, view: Tensor, score: Score, sample: Sample) -> Tensor:
        """delta of Eq. 15 at a view, by a reward pass of its own that stops at the view."""
        check_precision(view)
        leaf = view.detach().requires_grad_()
        (g,) = torch.autograd.grad(score(leaf, sample).direction.sum(), leaf)
        return worst_case_delta(g, self.rho, self.norm)


def _backward(
    view: Tensor, delta: Tensor | None, score: Score, sample: Sample, parts: int
) -> tuple[Loss, dict[str, float]]:
    """Backpropagate the loss at view + delta into `.grad`, divided by the number of micro-batches."""
    loss = score(view if delta is None else view + delta, sample)
    (loss.value / parts).backward()
    logs = {} if delta is None else _delta_logs(view.detach(), delta)
    return replace(loss, value=loss.value.detach(), direction=loss.direction.detach()), logs


def _delta_logs(view: Tensor, delta: Tensor) -> dict[str, float]:
    """Size of delta in 8-bit grey levels, and the cosine between delta and what addition left of it."""
    left = (view + delta) - view
    cosine = (left * delta).sum() / (left.norm() * delta.norm()).clamp_min(1e-24)
    return {
        "rsaft/delta_rms_255": float(delta.square().mean().sqrt() * 255),
        "rsaft/delta_cosine": float(cosine),
    }


def _mean(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: math.fsum(log[key] for log in logs) / len(logs) for key in (logs[0] if logs else {})}
