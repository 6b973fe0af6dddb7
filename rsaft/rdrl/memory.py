"""Peak memory of a training run, estimated from shapes: nothing of its size is allocated.

    peak = weights + max over time of what the loop has alive at that time

The weights are counted: denoiser, text encoders, VAE, rewards. The rest is rehearsed (`rehearsal.py`): the run's own
algorithm, step and optimizer do a few updates, an evaluation and a save on tensors without data, and every storage
that they make is counted while it lives (`allocations.py`). The three functions that take real work, a denoiser call,
a decode and a reward, run once on fake tensors to learn their price, forward and backward; in the rehearsal each call
pays it. So gradient checkpointing, guidance, half precision, RSA-FT's copies and gradient accumulation need no formula.

Three things are scaled instead. A denoiser call on more than 4 samples: its price is affine in their number.
Micro-batches beyond the third: each adds to an update what the third added. Trainable values are rehearsed in 16 equal
parts, because their number costs time and no memory.

Not counted: workspaces of convolution and attention kernels, the allocator's gaps, the CUDA context, the encoding of
prompts, and with several processes one copy of the gradients while they are averaged. Leave a tenth of the device free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.metrics.sharpness import rewards_around
from rsaft.rdrl.allocations import gradients_dropped
from rsaft.rdrl.optimization import Optimization
from rsaft.rdrl.rehearsal import Rehearsal
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import sample
from rsaft.types import Algorithm, Batch, Loss, Reward, Rollout, Sample, Step

UPDATES = 2  # rehearsed; an algorithm that draws how far it backpropagates draws anew for each


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by moment and part, at that moment's peak.

    The moments are "update", "evaluation" and, where a whole network is trained, "export": each save of a checkpoint
    loads what it wrote, and compares. An adapter's export is small.
    """

    moments: Mapping[str, Mapping[str, int]]
    not_traced: tuple[str, ...]  # rewards that do not run on fake tensors, and are not counted

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of each moment."""
        return {moment: sum(parts.values()) for moment, parts in self.moments.items()}

    @property
    def peak(self) -> int:
        """Bytes of the largest moment."""
        return max(self.totals.values())


@dataclass(frozen=True)
class Planned:
    """What a run is made of besides its model, as the Trainer takes it."""

    algorithm: Algorithm
    rewards: Mapping[str, Reward]
    held_out: Mapping[str, Reward]
    step: Step
    prompts: Sequence[str]
    config: TrainConfig


def estimate_memory(backbone: DiffusersBackbone, run: Planned, *, world: int = 1) -> MemoryEstimate:
    """What the run would need at its peak, in bytes of tensors on one process.

    Encodes a few prompts for real; the rest has no data. Takes seconds to a minute of one CPU core, whatever the size.

    Args:
        backbone: the model, loaded; it is left as it was.
        run: what is to be done with it.
        world: number of processes that share the batch.
    """
    per = run.config.batch_size // world
    micro = run.config.micro_batch or per
    number = per // micro
    rehearsal = Rehearsal(backbone, run.prompts)
    reloaded = 0 if backbone.lora is not None or (run.config.shard and world > 1) else _module_bytes([backbone.network])
    with torch.compiler.set_stance("force_eager"), gradients_dropped(backbone.parameters()):
        moments = _moments(rehearsal, run, micro, min(number, 3), reloaded)
        if number > 3:
            moments = _extrapolated(_moments(rehearsal, run, micro, 2, reloaded), moments, number)
    still = weights(backbone) | {"rewards: weights": sum(p.outside for p in rehearsal.reward_prices.values())}
    return MemoryEstimate({m: still | parts for m, parts in moments.items()}, tuple(sorted(rehearsal.not_traced)))


def weights(backbone: DiffusersBackbone) -> dict[str, int]:
    """Bytes of the pipeline's parameters and buffers as they are loaded, trainable ones included."""
    encoders = [getattr(backbone.pipe, name) for name in backbone.family.text_encoders]
    return {
        "denoiser: weights": _module_bytes([backbone.network]),
        "text encoders: weights": _module_bytes(encoders),
        "VAE: weights": _module_bytes([backbone.pipe.vae]),
    }


def _module_bytes(modules: Sequence[torch.nn.Module | None]) -> int:
    """Each storage once: tied weights share one."""
    tensors = [t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _extrapolated(
    two: Mapping[str, Mapping[str, int]], three: Mapping[str, Mapping[str, int]], number: int
) -> dict[str, dict[str, int]]:
    """The moments of `number` micro-batches from those of 2 and 3."""
    return {
        moment: {k: n + (number - 3) * max(n - two[moment].get(k, 0), 0) for k, n in parts.items()}
        for moment, parts in three.items()
    }


def _moments(rehearsal: Rehearsal, run: Planned, micro: int, number: int, reloaded: int) -> dict[str, dict[str, int]]:
    """The peaks of updates with `number` micro-batches of `micro` samples, of an evaluation, and of a save that loads
    a network of `reloaded` bytes to compare.
    """
    texts = rehearsal.texts(micro * number)
    updates = [
        [
            run.algorithm.rollout(
                rehearsal, Batch(texts[i : i + micro], tuple(range(i, i + micro)), update, run.config.seed)
            )
            for i in range(0, micro * number, micro)
        ]
        for update in range(UPDATES)
    ]
    with rehearsal.begin() as allocations:
        with allocations.part("EMA"):
            optimization = optimization_of(rehearsal.params, run.config)
        score = _Score(rehearsal, {name: rehearsal.reward(name, r) for name, r in run.rewards.items()})
        _update(rehearsal, optimization, updates, score, run.step)
        moments = {"update": allocations.peak.copy()}
        allocations.forget_peak()
        with allocations.part("evaluation: weights kept"), optimization.averaged():
            _evaluate(rehearsal, run)
        moments["evaluation"] = allocations.peak.copy()
        if reloaded:
            allocations.forget_peak()
            with allocations.part("export: weights kept"), optimization.averaged():
                with allocations.part("export: network reloaded"):
                    allocations.take(reloaded)
            moments["export"] = allocations.peak.copy()
    return {moment: {k: n for k, n in parts.items() if k != rehearsal.TRAINABLE} for moment, parts in moments.items()}


def _update(
    rehearsal: Rehearsal,
    optimization: Optimization,
    updates: Sequence[Sequence[Rollout]],
    score: _Score,
    step: Step,
) -> None:
    """Updates after the first one, which makes AdamW's moments."""
    allocations, state = rehearsal.allocations, None
    with allocations.part("optimizer"):
        optimization.update(max_grad_norm=None)
    for rollouts in updates:
        with allocations.part("step"):
            output = step(rollouts, score, rehearsal.params, state)
        state = output.state
        with allocations.part("optimizer"):
            optimization.update(max_grad_norm=None)
            if rehearsal.on_gpu:  # there AdamW works on all parameters at once, with temporaries of their size
                allocations.take(sum(p.nbytes for p in rehearsal.params))


def _evaluate(rehearsal: Rehearsal, run: Planned) -> None:
    number = min(run.config.eval_batch, run.config.eval_samples)
    texts = rehearsal.texts(number)
    images = sample(rehearsal, texts, run.algorithm.sampling, seed=0, batch_size=number)
    for name, reward in {**run.rewards, **run.held_out}.items():
        stand_in = rehearsal.reward(name, reward)
        if run.config.sharpness_rho is not None and name in run.rewards:
            rewards_around(stand_in, images, texts, run.config.sharpness_rho)
        with torch.no_grad():
            stand_in(images, texts)


def optimization_of(params: Sequence[torch.nn.Parameter], config: TrainConfig) -> Optimization:
    """The optimizer, schedule and moving average of a run, for these parameters."""
    return Optimization(
        params,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        lr_schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        ema=config.ema,
    )


@dataclass(frozen=True)
class _Score:
    """A Score; which objective a run has makes no difference to memory."""

    rehearsal: Rehearsal
    rewards: Mapping[str, Reward]

    def view(self, sample: Sample) -> Tensor:
        return self.rehearsal.decode(sample.latents)

    def __call__(self, view: Tensor, sample: Sample) -> Loss:
        rewards = torch.stack([reward(view, sample.prompts) for reward in self.rewards.values()], dim=1)
        return Loss(-rewards.mean(), rewards.sum(1), rewards.detach(), torch.isfinite(rewards).all(dim=1))
