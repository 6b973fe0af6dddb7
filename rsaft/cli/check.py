"""`rsaft check`: everything that can go wrong early goes wrong here, before hours of training do."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rsaft.backbones.compiled import check_compiled
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.config import Custom, RunConfig
from rsaft.config.assemble import Components, components, load_model, with_kl
from rsaft.config.frontiers import check_base
from rsaft.config.objectives import ParetoTransport
from rsaft.config.tiny import few_steps
from rsaft.errors import ConfigError
from rsaft.rdrl.batches import micro_batch_ids, refuse_split_groups
from rsaft.rdrl.memory import MemoryEstimate, Planned, estimate_memory, weights
from rsaft.rdrl.objectives import WeightedSum
from rsaft.rdrl.preflight import StepReport, try_step
from rsaft.rdrl.rehearsal import PRICED_ROWS
from rsaft.types import GroupObjective

COMFORTABLE = 0.9  # share of a device that tensors may take; the rest is for what an estimate cannot see


def check_run(config: RunConfig, say: Callable[[str], None], *, memory: int | None = None) -> None:
    """Load everything that a run needs, take the gradients of one sample, and estimate the run's peak memory.

    Args:
        config: the run.
        say: prints a line.
        memory: bytes that the run may take; by default those of the device.

    Raises:
        ConfigError: if the run could not be trained.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_ids(config.train, world=world, rank=0)  # refuses what does not split evenly
    parts = components(config)
    if isinstance(parts.objective, GroupObjective):
        refuse_split_groups(config.train, world=world)
    say(f"files    {len(parts.prompts)} prompts, {len(parts.rewards)} rewards, {len(parts.held_out)} held out")
    backbone = load_model(config.model, seed=config.train.seed, keep_base=config.kl is not None)
    say(f"model    {model_line(backbone)}")
    check_base(parts.objective, backbone)
    loaded = sum(weights(backbone).values())
    if config.model.drop_text_encoders:  # as the run does it, but with no more prompts than are looked at here
        backbone.cache_prompts(parts.prompts[:PRICED_ROWS])
        backbone.drop_text_encoders()
        say(f"         weights are {_size(loaded)} until the text encoders are dropped")
    if config.model.compile:
        output, gradient = check_compiled(backbone)
        say(f"compiled differs by {output:.1e} in output, {gradient:.1e} in gradient")
    say(f"disk     {_disk_line(backbone, config)}")
    report = _one_step(backbone, config, parts, say)
    if isinstance(config.algorithm, Custom) or isinstance(config.step, Custom):
        say("memory   not estimated: code of your own for algorithm or step may not run without data")
    else:
        plan = Planned(parts.algorithm, parts.rewards, parts.held_out, parts.step, parts.prompts, config.train)
        size = device_memory(backbone.device) if memory is None else memory
        _memory(backbone, config, plan, world, size, say, loaded=loaded)
    if report is None:
        raise ConfigError("check: one sample does not fit the device's memory; see the estimate, and take less.")
    say("ready: rsaft train with the same arguments")


def _memory(
    backbone: DiffusersBackbone,
    config: RunConfig,
    plan: Planned,
    world: int,
    size: int,
    say: Callable[[str], None],
    *,
    loaded: int,
) -> None:
    """The estimate beside `size`, and if it does not fit, what each switch would save, the most first.

    `loaded` is what all weights take at the start, when the text encoders are there in any case.
    """
    estimate = estimate_memory(backbone, plan, world=world)
    whose = (
        "one process" if not config.train.shard else "a process that holds the whole network (train.shard splits it)"
    )
    say(f"memory   estimated for {whose}:")
    for line in table(estimate):
        say(line)
    peak = max(estimate.peak, loaded)
    found = f"{_size(peak)} of {_size(size)} on {backbone.device}"
    if peak <= COMFORTABLE * size:
        say(f"         fits: {found}")
        return
    say(f"         {'tight' if peak <= size else 'too much'}: {found}; leave a tenth free")
    savings = []
    for switch, changed, module in _switches(backbone, config, plan):
        with _recomputing(module):
            savings.append((estimate.peak - estimate_memory(backbone, changed, world=world).peak, switch))
    for saved, switch in sorted(savings, reverse=True):
        if saved > 0.01 * estimate.peak:
            say(f"         {switch:<40} saves {_size(saved)}")
    if backbone.lora is None:
        say("         model.lora={rank: 8}                     saves most of gradients, optimizer, EMA and step")


def model_line(backbone: DiffusersBackbone) -> str:
    """One line on the model and what of it is trained."""
    names = [name for name, _ in backbone.network.named_parameters()]
    total = sum(p.numel() for p in backbone.network.parameters())
    trainable = sum(p.numel() for p in backbone.parameters())
    what = f"{sum('lora_A' in name for name in names)} adapters" if backbone.lora else "the whole network"
    return (
        f"{backbone.family.pipeline}, {total:,} parameters; trained: {what}, {trainable:,} parameters; "
        f"latents {' x '.join(map(str, backbone.latent_shape))} on {backbone.device}"
    )


def table(estimate: MemoryEstimate) -> list[str]:
    """Each part of each moment, and the totals, in a unit that suits the largest."""
    unit, size = ("GiB", 2**30) if estimate.peak >= 2**30 else ("MiB", 2**20)
    moments = list(estimate.moments)
    names = list(dict.fromkeys(name for parts in estimate.moments.values() for name in parts))
    rows = [(name, [estimate.moments[m].get(name, 0) / size for m in moments]) for name in names]
    rows = [(name, row) for name, row in rows if max(row) >= 0.005]
    rows.append(("total", [estimate.totals[m] / size for m in moments]))
    lines = ["         " + f"{unit:<30}" + "".join(f"{m:>12}" for m in moments)]
    lines += ["         " + f"{name:<30}" + "".join(f"{value:>12.2f}" for value in row) for name, row in rows]
    lines += [
        f"         reward {name}: not counted, its code does not run without data" for name in estimate.not_traced
    ]
    return lines


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine (of its control group, if that is less)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(size, int(text)) if text.isdigit() else size


def _one_step(
    backbone: DiffusersBackbone, config: RunConfig, parts: Components, say: Callable[[str], None]
) -> StepReport | None:
    """Try it, and say what came out; None if memory did not suffice."""
    weights = _weights(config)
    try_it = functools.partial(
        try_step,
        backbone,
        algorithm=(
            parts.algorithm if isinstance(config.algorithm, Custom) else with_kl(few_steps(config.algorithm), config.kl)
        ),
        rewards=parts.rewards,
        step=parts.step,
        prompt=parts.prompts[0],
        trained_on=[name for name in parts.rewards if weights.get(name)],
    )
    try:
        report = try_it(held_out=parts.held_out, objective=parts.objective)
        if report.gradient_norm == 0:  # of a GroupObjective, for which the sample alone has no target
            say("step     the sample has no target under the objective, so a sum of the rewards is tried")
            report = replace(try_it(held_out={}, objective=WeightedSum(weights)), rewards=report.rewards)
    except torch.OutOfMemoryError:
        say("step     out of memory with one sample")
        return None
    rewards = ", ".join(f"{name} {value:.4g}" for name, value in report.rewards.items())
    say(f"step     one sample: {rewards}; loss {report.loss:.4g}, gradient norm {report.gradient_norm:.3g}")
    return report


def _weights(config: RunConfig) -> Mapping[str, float]:
    """The rewards that the objective uses, all of them where it is not known."""
    if isinstance(config.objective, Custom):
        return dict.fromkeys(config.rewards, 1.0)
    if isinstance(config.objective, ParetoTransport):
        return dict.fromkeys(config.objective.active or config.rewards, 1.0)
    return config.objective.weights


def _disk_line(backbone: DiffusersBackbone, config: RunConfig) -> str:
    """What checkpoints take: weights, two moments, EMA, export; one more than are kept, while it is written."""
    copies = 4 + (config.train.ema is not None)
    need = (config.train.keep + 1) * copies * sum(p.nbytes for p in backbone.parameters())
    free = shutil.disk_usage(Path()).free
    if need > free:
        raise ConfigError(
            f"check: checkpoints need about {_size(need)} on disk (train.keep = {config.train.keep}), and here "
            f"{_size(free)} are free; free some, or keep fewer."
        )
    return f"checkpoints take about {_size(need)}; {_size(free)} are free here"


def _switches(backbone: DiffusersBackbone, config: RunConfig, plan: Planned) -> Iterator[tuple[str, Planned, Any]]:
    """What can be switched to save memory: the setting, the plan with it, and a module that is to recompute with it."""
    train = plan.config
    if (train.micro_batch or train.batch_size) > 1:
        yield "train.micro_batch=1", replace(plan, config=replace(train, micro_batch=1)), None
    if train.eval_batch > 1:
        yield "train.eval_batch=1", replace(plan, config=replace(train, eval_batch=1)), None
    if train.ema is not None:
        yield "train.ema=null", replace(plan, config=replace(train, ema=None)), None
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", plan, backbone.network
    if not config.model.vae_checkpointing:
        yield "model.vae_checkpointing=true", plan, backbone.pipe.vae
    if not isinstance(config.algorithm, Custom) and vars(config.algorithm).get("gradient_checkpointing") is False:
        with suppress(ConfigError):  # DRTune recomputes by itself, and refuses to do it twice
            once_more = replace(config.algorithm, gradient_checkpointing=True)
            yield "algorithm.gradient_checkpointing=true", replace(plan, algorithm=with_kl(once_more, config.kl)), None


@contextmanager
def _recomputing(module: Any) -> Iterator[None]:
    """Inside, a diffusers model recomputes its blocks in the backward pass."""
    if module is None:
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
