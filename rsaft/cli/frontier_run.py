"""`rsaft frontier`: samples and scores images of each training prompt, batch by batch, and saves their frontiers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsaft import distributed
from rsaft.backbones.load import default_device
from rsaft.cli.eval_store import read_settings
from rsaft.cli.frontier_records import (
    PICTURE,
    SETTINGS,
    Key,
    keys_of,
    records_of,
    refuse_changes,
    refuse_others,
    rewards_of,
    write_settings,
)
from rsaft.config import RunConfig
from rsaft.config.assemble import component, load_model, load_prompts, load_rewards, prepare_prompts
from rsaft.config.frontiers import base_origin, origin
from rsaft.errors import ConfigError
from rsaft.files import write_atomic
from rsaft.metrics.scoring import now, score_images
from rsaft.pareto import FrontierStore
from rsaft.randomness import key_of
from rsaft.rdrl.progress import ProgressLine
from rsaft.rdrl.run_directory import JsonLines, locked
from rsaft.rdrl.signals import StopRequest, agreed
from rsaft.sampling import Sampling, sample

if TYPE_CHECKING:
    from rsaft.backbones.pipeline import DiffusersBackbone

SAMPLES = 50  # of each prompt; PG-OT's analyses have so many
TINY_SAMPLES, TINY_PROMPTS = 4, 4


@dataclass(frozen=True)
class Plan:
    """What is to be sampled and scored, before anything is loaded."""

    config: RunConfig
    prompts: tuple[str, ...]  # each once
    sampling: Sampling
    settings: Mapping[str, Any]  # what decides the scores, but for the model's weights
    out: Path
    n: int
    batch: int
    seed: int


def planned(config: RunConfig, out: Path, *, n: int, batch: int, seed: int, tiny: bool) -> Plan:
    """What the arguments amount to; nothing is loaded but prompts and an algorithm of the user's own.

    Raises:
        ConfigError: if something that the config names does not exist.
    """
    sampling = component(config.algorithm, "config.algorithm").sampling
    prompts = tuple(dict.fromkeys(load_prompts(config.prompts.train, "train")))
    prompts = prompts[:TINY_PROMPTS] if tiny else prompts
    digest = hashlib.sha256(repr(prompts).encode()).hexdigest()
    settings = {"seed": seed, "prompts": f"{len(prompts)}, sha256 {digest}", **origin(config, sampling)}
    return Plan(config, prompts, sampling, settings, out, n, batch, seed)


def run_frontier(plan: Plan, say: Callable[[str], None]) -> int:
    """Score what is not scored yet, and write frontiers and pictures. All processes of torchrun call it.

    Returns:
        The exit code: 0, or that of a process which a signal ended.

    Raises:
        ConfigError: if something that the config names does not fit, `out` holds frontiers with other settings, or a
            prompt has no sample with finite scores.
        RunDirectoryError: if a file of `out` is damaged, or cannot be written.
    """
    refuse_others(plan.out)
    refuse_changes(plan.out, plan.settings)
    distributed.join(default_device())
    main = distributed.rank() == 0
    with locked(plan.out) if main else nullcontext():
        missing = distributed.gathered(_missing(plan))[0]  # all by what the first process read
        code = _score(plan, missing, say) if missing else 0
        distributed.barrier()
        if code:
            total = plan.n * len(plan.prompts)
            scored = total - len(_missing(plan))
            say(f"stopped: {scored} of {total} images are scored; the same command goes on with the others.")
        elif main:
            _finish(plan, say)
        distributed.barrier()
    return code


def _missing(plan: Plan) -> list[Key]:
    """The samples that are not scored: each prompt's first, then each one's second, so that `-n` may be lowered."""
    done = {key for record in records_of(plan.out) for key in keys_of(record)}
    keys = [(row, number) for number in range(plan.n) for row in range(len(plan.prompts))]
    return [key for key in keys if key not in done]


def _score(plan: Plan, missing: Sequence[Key], say: Callable[[str], None]) -> int:
    """Score them, each process every world-th batch; 0, or the exit code after a signal."""
    world, rank, total = distributed.world_size(), distributed.rank(), plan.n * len(plan.prompts)
    if len(missing) < total:
        say(f"{total - len(missing)} of {total} images were scored already")
    rewards = load_rewards(plan.config.rewards, "config.rewards")
    backbone = load_model(plan.config.model, seed=plan.config.train.seed)
    settings = {**plan.settings, **base_origin(backbone)}
    refuse_changes(plan.out, settings)
    prepare_prompts(backbone, plan.config.model, plan.prompts)
    if rank == 0:
        write_settings(plan.out, settings)
    distributed.barrier()
    batches = [missing[first : first + plan.batch] for first in range(0, len(missing), plan.batch)]
    done = total - len(missing)
    records = JsonLines(plan.out / f"scores-{rank}.jsonl", sys.maxsize)
    try:
        with (
            StopRequest() as stop,
            ProgressLine(done=done, total=total, visible=rank == 0, label="frontier", unit="images") as progress,
        ):
            for first in range(0, len(batches), world):  # a round: at most one batch of each process
                means: dict[str, float] = {}
                if first + rank < len(batches):
                    record = _batch(plan, batches[first + rank], backbone, rewards)
                    records.write({"step": first + rank, **record})
                    records.sync()
                    means = {f"reward/{name}": _mean(values) for name, values in record["scores"].items()}
                done += sum(len(keys) for keys in batches[first : first + world])
                progress.show(done, means)
                signal = agreed(stop.signal)
                if signal is not None:
                    return 128 + signal
    finally:
        records.close()
    return 0


def _batch(plan: Plan, keys: Sequence[Key], backbone: DiffusersBackbone, rewards: Mapping[str, Any]) -> dict[str, Any]:
    """Images of the untrained model, noise keyed by (seed, prompt row, number) alone; and their scores."""
    prompts = [plan.prompts[row] for row, _ in keys]
    noises = [key_of(plan.seed, "frontier", row, number) for row, number in keys]
    begun = now(backbone.device)
    with backbone.base() if backbone.lora is not None else nullcontext():
        images = sample(backbone, prompts, plan.sampling, seed=plan.seed, sample_ids=noises, batch_size=len(keys))
    seconds = now(backbone.device) - begun
    found = score_images(images, prompts, rewards, device=backbone.device)
    return {
        "samples": keys,
        "scores": {name: values.tolist() for name, values in found.scores.items()},
        "seconds": {"sampling": seconds, **{f"reward/{name}": value for name, value in found.seconds.items()}},
    }


def _finish(plan: Plan, say: Callable[[str], None]) -> None:
    """Write frontiers and pictures, and print what they hold."""
    from rsaft.pareto.figures import frontier_picture
    from rsaft.pareto.summary import markdown, summarize

    names = tuple(plan.config.rewards)
    rewards = rewards_of(records_of(plan.out), names, prompts=len(plan.prompts), samples=plan.n)
    for name, column in zip(names, rewards.unbind(dim=2), strict=True):
        broken = int((~column.isfinite()).sum())
        if broken:
            say(f"reward '{name}': {broken} of {column.numel()} scores are not finite; these samples are left out")
    good = rewards.isfinite().all(dim=2).any(dim=1).tolist()
    empty = [prompt for prompt, any_left in zip(plan.prompts, good, strict=True) if not any_left]
    if empty:
        raise ConfigError(
            f"frontier: {len(empty)} prompts have no sample with finite scores, the first is '{empty[0]:.60}'; raise "
            "-n, or mend the reward or take the prompts out and begin in another folder."
        )
    made_with = {key: value for key, value in read_settings(plan.out / SETTINGS).items() if key != "format_version"}
    store = FrontierStore(plan.prompts, names, rewards, {**made_with, "samples": plan.n})
    store.save(plan.out)
    write_atomic(plan.out / PICTURE, frontier_picture(store))
    say(markdown(summarize(store)))
    say(f"wrote {plan.out}, for objective.frontiers, and {plan.out / PICTURE}")


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if value == value]
    return sum(finite) / len(finite) if finite else float("nan")
