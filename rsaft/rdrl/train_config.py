"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsaft.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. Counts are updates, sizes are samples."""

    steps: int = 200  # updates
    seed: int = 0  # of prompts and all noise
    batch_size: int = 16  # samples of one update, over all processes
    group_size: int = 1  # samples of one prompt in an update; they differ in their noise alone
    micro_batch: int | None = None  # samples of one forward pass on one process; None: this process's whole share
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    # Names of diffusers.optimization.get_scheduler, stepped once an update.
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    shard: bool = False  # split weights, gradients, AdamW and EMA over the processes (FSDP2); without an adapter only
    ema: float | None = None  # decay of the weights' moving average, which is then evaluated and exported
    eval_every: int = 25  # updates between evaluations; the first is before any update
    eval_samples: int = 40
    eval_batch: int = 32
    eval_seed: int = 1_000_003  # of the evaluation's noise, the same for every run
    sharpness_rho: float | None = None  # radius of the sharpness S1 that evaluations report; None leaves it out
    grid: int = 16  # images in the saved sample grids
    save_every: int = 50
    keep: int = 2  # newest checkpoints that are kept
    max_nonfinite: int = 10  # updates in a row without a finite gradient that stop the run
    trackers: tuple[str, ...] = ()  # names that accelerate knows, such as tensorboard

    def __post_init__(self) -> None:
        counts = (
            "batch_size",
            "group_size",
            "eval_every",
            "eval_samples",
            "eval_batch",
            "save_every",
            "keep",
            "max_nonfinite",
            "grid",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} counts, so {name} >= 1; got {getattr(self, name)}.")
        for name in ("steps", "warmup_steps", "seed", "eval_seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} is not negative; got {getattr(self, name)}.")
        for name in ("lr", "micro_batch", "max_grad_norm", "sharpness_rho"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"train.{name} is larger than 0; got {getattr(self, name)}.")
        if self.batch_size % self.group_size:
            raise ConfigError(
                f"train.group_size: an update of {self.batch_size} samples has whole groups of one prompt, so "
                f"group_size divides it; got {self.group_size}."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas are decays, so 0 <= beta < 1; got {list(self.betas)}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train.ema is a decay, so 0 < ema < 1; got {self.ema}.")
