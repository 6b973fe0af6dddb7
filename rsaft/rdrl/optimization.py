"""The state that an update changes: weights, AdamW, learning-rate schedule, EMA. Saved and restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rsaft.errors import CheckpointError
from rsaft.flatten.weight import global_norm, kept
from rsaft.rdrl.sharding import part_of

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimization:
    """Weights with their optimizer, schedule and moving average.

    Attributes:
        params: the trainable tensors.
        ema: their exponential moving average, or None.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        lr_schedule: str,
        warmup_steps: int,
        steps: int,
        ema: float | None,
    ) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.params = list(params)
        self._adamw = torch.optim.AdamW(self.params, lr=lr, betas=betas, weight_decay=weight_decay)
        self._scheduler = get_scheduler(
            lr_schedule, self._adamw, num_warmup_steps=warmup_steps, num_training_steps=steps
        )
        self.ema = None if ema is None else EMAModel(self.params, decay=ema)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self._adamw.param_groups[0]["lr"])

    def gradients(self) -> list[Tensor]:
        """One gradient a parameter; a parameter that got none has zeros."""
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.params if p.grad is not None]

    def clear(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def update(self, *, max_grad_norm: float | None) -> float:
        """Clip and take one step of optimizer, schedule and EMA, unless the gradient is not finite.

        Returns:
            The gradient's norm before clipping; not finite means that nothing was changed.
        """
        gradients = self.gradients()
        norm = global_norm(gradients)
        if bool(torch.isfinite(norm)):
            if max_grad_norm is not None and float(norm) > max_grad_norm:
                for g in gradients:
                    g.mul_(max_grad_norm / norm)
            self._adamw.step()
            self._scheduler.step()
            if self.ema is not None:
                self.ema.step(self.params)
        self.clear()
        return float(norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are their moving average, if there is one."""
        if self.ema is None:
            yield
            return
        with kept(self.params):
            load_weights(self.params, _numbered(self.ema.shadow_params))
            yield

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, one group a file; keys are positions in `params`."""
        groups = {"weights": _numbered(self.params), "optimizer": {}}
        for i, p in enumerate(self.params):
            for name, value in self._adamw.state.get(p, {}).items():
                groups["optimizer"][f"{i}.{name}"] = value.detach()
        if self.ema is not None:
            groups["ema"] = _numbered(self.ema.shadow_params)
        return groups

    def state(self) -> dict[str, Any]:
        """The numbers that go with `tensors`."""
        return {
            "updates": self._scheduler.last_epoch,
            "ema_updates": 0 if self.ema is None else self.ema.optimization_step,
        }

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Raises: CheckpointError if the checkpoint is of another model or other settings."""
        load_weights(self.params, tensors["weights"])
        for i, p in enumerate(self.params):
            found = {name: tensors["optimizer"].get(f"{i}.{name}") for name in _MOMENTS}
            if all(value is not None for value in found.values()):
                self._adamw.state[p] = {
                    name: value.clone() if name == "step" else part_of(value, p)
                    for name, value in found.items()
                    if value is not None
                }
        self._scheduler.last_epoch = state["updates"]
        for group, base, factor in zip(
            self._adamw.param_groups, self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(state["updates"])
        if self.ema is not None:
            if "ema" not in tensors:
                raise CheckpointError("the checkpoint holds no EMA weights; resume with train.ema: null.")
            load_weights(self.ema.shadow_params, tensors["ema"])
            self.ema.optimization_step = state["ema_updates"]


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): t.detach() for i, t in enumerate(tensors)}


@torch.no_grad()
def load_weights(params: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into `params`.

    Raises:
        CheckpointError: if their number or shapes differ.
    """
    shapes = [tuple(p.shape) for p in params]
    found = [tuple(tensors[str(i)].shape) if str(i) in tensors else None for i in range(len(params))]
    if shapes != found or len(tensors) != len(params):
        raise CheckpointError(
            f"the checkpoint holds {len(tensors)} tensors and the model {len(params)} trainable ones, and their shapes "
            "must agree; resume with the model and lora settings that the run began with."
        )
    for i, p in enumerate(params):
        p.copy_(part_of(tensors[str(i)], p))
