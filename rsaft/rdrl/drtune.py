"""DRTune (Wu et al., 2024, "Deep reward supervisions for tuning text-to-image diffusion models").

Gradient reaches early steps because the network's input is detached: what is left is linear in the network's outputs.
In the coordinates of `Schedule.ysu` (x = scale y; u is eps, for flow models the velocity), for K training steps S that
are equally spaced in the executed steps 0..t, where t is one of the last m of T steps:

    (1)  u_i = u_theta(sg(x_i), t_i) for i in S,   sg(u_theta(x_i, t_i)) otherwise
    (2)  y_{i+1} = y_i + (s_{i+1} - s_i) u_i
    (3)  x_0_hat = y_t - s_t u_t,   L = -r(c, decode(x_0_hat))

Without early stop, (3) is the last step of (2) and the reward sees the final latents. So with g = dL / dx_0_hat

    (4)  dL / dtheta = sum_{i in S} c_i < g, du_i / dtheta >,   c_i = s_{i+1} - s_i, or -s_t for i = t

K vector-Jacobian products that do not depend on each other: the backend "vjp" computes one after the other, with the
activations of one, and adds them up in one set of gradients. The backend "graph" keeps all K network calls. They agree
to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsaft.errors import ConfigError
from rsaft.randomness import integer
from rsaft.sampling import Sampling, State, checkpointed, initial_noise, ode
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Batch, Denoiser, Latents, Sample


@dataclass(frozen=True)
class DRTune:
    """Settings of DRTune.

    Cost for each sample of a batch that stops at step t, after n = t + 1 denoiser calls: n - K of them without
    gradient, and 1 decode and 1 reward with gradient. backend "vjp": the K training steps without gradient, and again
    with gradient in the backward pass, one at a time. "graph": the K training steps with gradient at once (again in the
    backward pass with gradient checkpointing).

    Memory of "vjp": the activations of K = 1. From K = 2 on the sum of the products so far is alive beside them: one
    set of trainable gradients, whatever K is. For an adapter that is nothing; for a whole network it shows where its
    calls, and not decoder and optimizer, make the peak (docs/decisions.md has figures).
    """

    k: int = 5  # training steps K
    early_stop: int | None = None  # m: stop at one of the last m steps; null: 0.4 of the steps; 0: do not stop early
    backend: Literal["vjp", "graph"] = "vjp"  # "vjp": memory of one call, K more calls; "graph": of K calls
    sampling: Sampling = field(default_factory=Sampling)
    gradient_checkpointing: bool = False  # of backend "graph": recompute each denoiser call in the backward pass

    def __post_init__(self) -> None:
        steps = self.sampling.num_steps
        if not 1 <= self.k <= steps:
            raise ConfigError(
                f"algorithm.k: DRTune trains k of {steps} sampling steps, so 1 <= k <= {steps}; got {self.k}."
            )
        if self.early_stop is not None and not 0 <= self.early_stop <= steps - self.k + 1:
            raise ConfigError(
                f"algorithm.early_stop: a trajectory that stops at one of the last early_stop of {steps} steps still "
                f"makes k = {self.k} steps, so 0 <= early_stop <= {steps - self.k + 1}; got {self.early_stop}."
            )
        if self.backend == "vjp" and self.gradient_checkpointing:
            raise ConfigError(
                "algorithm.gradient_checkpointing: backend 'vjp' recomputes every denoiser call as it is; set it to "
                "false, or take backend 'graph', or model.gradient_checkpointing for the blocks inside a call."
            )

    @property
    def last(self) -> int:
        """m: a trajectory stops at one of so many last steps; 0: it does not stop early."""
        steps = self.sampling.num_steps
        return min(round(0.4 * steps), steps - self.k + 1) if self.early_stop is None else self.early_stop

    def rollout(self, backbone: Backbone, batch: Batch) -> DRTuneRollout:
        """Draw stop and training steps (the same for all samples of an update) and x_T; encode the prompts."""
        keys = {"seed": batch.seed, "step": batch.step}
        steps = self.sampling.num_steps
        n = steps if self.last == 0 else steps + 1 - integer(1, self.last + 1, purpose="drtune-stop", **keys)
        stride = n // self.k
        first = integer(0, n - (self.k - 1) * stride, purpose="drtune-first", **keys)
        x_T = initial_noise(backbone, purpose="rollout", sample_ids=batch.sample_ids, **keys)
        return DRTuneRollout(self, backbone, batch, n, range(first, first + self.k * stride, stride), x_T)


class DRTuneRollout:
    """A trajectory of DRTune with training steps `train`: nothing is drawn after it is made."""

    def __init__(
        self, settings: DRTune, backbone: Backbone, batch: Batch, num_steps: int, train: range, x_T: Latents
    ) -> None:
        self.batch = batch
        self.num_steps = num_steps  # n = t + 1: the trajectory ends with the prediction from its stop step
        self.train = train
        self._settings = settings
        self._backbone = backbone
        self._x_T = x_T
        self._schedule: Schedule = backbone.schedule(settings.sampling.num_steps)
        self._denoise: Denoiser = backbone.denoiser(
            batch.prompts,
            guidance=settings.sampling.guidance,
            detach_unconditional=settings.sampling.detach_unconditional,
        )
        if self._schedule.scale(0) == 0:
            raise ConfigError(
                "algorithm: DRTune divides by alpha, which is 0 at this model's first step (zero terminal SNR); use "
                "draft, refl or alignprop, or another spacing of the scheduler's timesteps."
            )
        points = [*range(num_steps), settings.sampling.num_steps]
        self._scale = [self._schedule.scale(i) for i in points]
        self._s = [self._schedule.sigmas[i] / self._schedule.scale(i) for i in points]
        if settings.last:
            self._scale[-1], self._s[-1] = 1.0, 0.0  # (3) is a step of (2) to s = 0, where x = y = x_0

    @torch.no_grad()
    def prefix(self, start: State | None = None, stop: int | None = None) -> State:
        """The state before the first training step (before step `stop`, if that is earlier)."""
        state = State(self._x_T, 0) if start is None else start
        end = self.train[0] if stop is None else min(stop, self.train[0])
        return State(ode(self._denoise, self._schedule, state.x, start=state.i, stop=end), end)

    def tail(self, prefix: State) -> Sample:
        """x_0_hat with the gradient of (4): of the training steps, whatever is sampled between them."""
        x = self.prefix(prefix).x  # finishes a prefix that was stopped early
        if self._settings.backend == "vjp":
            x_0 = _IndependentProducts.apply(self, x, *self._backbone.parameters())
        else:
            x_0, _ = self.sweep(x)
        return Sample(x_0, self.batch.prompts, torch.arange(len(x_0), device=x_0.device))

    def sweep(self, x: Latents) -> tuple[Latents, list[Latents]]:
        """(1) to (3) from the first training step on: x_0_hat, and the network's inputs at the training steps."""
        y, inputs = x / self._scale[self.train[0]], []
        for i in range(self.train[0], self.num_steps):
            x_i = (self._scale[i] * y).detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in self.train):
                u = self.u(x_i, i)
            y = y + (self._s[i + 1] - self._s[i]) * u
            if i in self.train:
                inputs.append(x_i)
        return self._scale[-1] * y, inputs

    def u(self, x: Latents, i: int) -> Latents:
        """u_theta(x, t_i) for a detached x."""
        denoise = checkpointed(self._denoise) if self._settings.gradient_checkpointing else self._denoise
        return self._schedule.ysu(denoise(x, self._schedule.timesteps[i]), x, i)[2]

    def c(self, i: int) -> float:
        """c_i of (4): d x_0_hat / d u_i."""
        return self._scale[-1] * (self._s[i + 1] - self._s[i])

    def select(self, rows: Sequence[int]) -> DRTuneRollout:
        index = torch.as_tensor(list(rows), device=self._x_T.device)
        return DRTuneRollout(
            self._settings, self._backbone, self.batch.select(rows), self.num_steps, self.train, self._x_T[index]
        )


class _IndependentProducts(torch.autograd.Function):
    """x_0_hat as one node of the graph whose backward pass is (4); the parameters are its inputs.

    So `torch.autograd.grad` over images and parameters passes through it once, as through any operation.
    """

    @staticmethod
    def forward(ctx: Any, rollout: DRTuneRollout, x: Latents, *params: Tensor) -> Latents:
        x_0, inputs = rollout.sweep(x)
        ctx.rollout, ctx.params = rollout, params
        # The parameters are saved for autograd's check alone: a change before the backward pass is an error.
        ctx.save_for_backward(*inputs, *params)
        return x_0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rollout, params = ctx.rollout, ctx.params
        with _set_aside(params):
            for i, x in zip(rollout.train, ctx.saved_tensors, strict=False):  # the inputs come first
                with torch.enable_grad():
                    u = rollout.u(x, i)
                # Into `.grad`, where autograd adds each parameter's gradient in place as it arrives: one set of them.
                torch.autograd.backward(u, rollout.c(i) * g, inputs=params)
            return None, None, *[p.grad for p in params]


@contextmanager
def _set_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters have no `.grad` and no hooks; afterwards those that they had, also on an exception.

    A hook is to see a parameter's whole gradient, once: when it leaves the node. (fp16 networks unscale in one.)
    """
    grads = [p.grad for p in params]
    # torch has no public way to pass over hooks; these two attributes hold them.
    hooks = [(p, name, getattr(p, name)) for p in params for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    hooks = [(p, name, value) for p, name, value in hooks if value]
    try:
        for p, name, _ in hooks:
            setattr(p, name, {})
        for p in params:
            p.grad = None
        yield
    finally:
        for p, name, value in hooks:
            setattr(p, name, value)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
