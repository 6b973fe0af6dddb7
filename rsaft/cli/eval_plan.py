"""What the arguments of `rsaft eval` amount to, before a model or a reward is loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rsaft.cli.eval_parts import Part, folder_parts, model_parts
from rsaft.cli.eval_rewards import rewards_named
from rsaft.cli.eval_source import Target, find_target, is_image_folder
from rsaft.config.assemble import load_prompts
from rsaft.config.sections import TESTBED, Precision
from rsaft.errors import ConfigError
from rsaft.metrics.image_folder import read_image_folder
from rsaft.metrics.scoring import Item
from rsaft.prompts import PromptFile, read_prompts
from rsaft.sampling import Sampling

_log = logging.getLogger(__name__)

NO_BASE = "none"


@dataclass(frozen=True)
class Request:
    """The command's arguments; None where the run, or a default, decides."""

    source: str
    prompts: str | None = None
    rewards: tuple[str, ...] = ()
    base: str | None = None
    out: Path | None = None
    step: int | None = None
    n: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    batch: int = 8
    dtype: Precision | None = None
    save_images: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be scored and where, before anything is loaded."""

    parts: tuple[Part, ...]  # the base's first
    rewards: Mapping[str, Any]  # settings by name
    prompts: Mapping[str, Any]  # of prompts.json, but for what a text encoder says
    categories: Mapping[int, str]  # by prompt_id
    lines: tuple[int, ...]  # of each prompt in its file; empty for a folder of images
    settings: Mapping[str, Any]
    out: Path
    batch: int
    save_images: bool

    def batches(self) -> list[tuple[Part, tuple[Item, ...]]]:
        """All batches, in their fixed order."""
        return [
            (part, part.items[first : first + self.batch])
            for part in self.parts
            for first in range(0, len(part.items), self.batch)
        ]


def planned(request: Request, say: Callable[[str], None]) -> Plan:
    """What the arguments amount to; nothing is loaded but prompts.

    Raises:
        ConfigError, CheckpointError: as `run_eval`.
    """
    images = is_image_folder(request.source)
    return _plan_of_images(request, say) if images else _plan_of_model(request)


def _plan_of_model(request: Request) -> Plan:
    own = request.base is None or request.base == NO_BASE
    tuned = find_target(request.source, base=None if own else request.base, step=request.step, dtype=request.dtype)
    base = _base_of(tuned, request)
    source, found = _prompts(request, tuned)
    items = [Item(i, prompt, request.seed + k) for i, prompt in enumerate(found.prompts) for k in range(request.n)]
    sampling = tuned.sampling or Sampling()
    if request.steps is not None:
        sampling = replace(sampling, num_steps=request.steps)
    if request.guidance is not None:
        sampling = replace(sampling, guidance=request.guidance)
    categories = {i: kind for i, kind in enumerate(found.categories) if kind is not None}
    name = tuned.label if tuned.step is None or str(tuned.step) in tuned.label else f"{tuned.label}-step-{tuned.step}"
    out = request.out or Path("runs/eval") / f"{name}-{Path(source.removeprefix(TESTBED)).stem}"
    return _plan(
        request,
        model_parts(tuned, base, items, sampling),
        rewards=_rewards(request, tuned),
        sampling=asdict(sampling),
        prompts={"source": source, "report": found.report(), "note": found.note},
        categories=categories,
        lines=found.lines,
        out=out,
    )


def _plan_of_images(request: Request, say: Callable[[str], None]) -> Plan:
    for option, value in (("prompts", request.prompts), ("step", request.step), ("dtype", request.dtype)):
        if value is not None:
            raise ConfigError(
                f"{option}: '{request.source}' is a folder of images, which has its own; drop --{option}."
            )
    if request.save_images or (request.steps, request.guidance) != (None, None) or request.n != 1:
        raise ConfigError(
            f"source: '{request.source}' is a folder of images: nothing is sampled; drop --steps, --guidance, -n and "
            "--save-images."
        )
    folders = [request.source] + ([] if request.base in (None, NO_BASE) else [str(request.base)])
    if not all(map(is_image_folder, folders)):
        raise ConfigError(f"base: a folder of images is paired with another one; '{request.base}' is none.")
    found = [read_image_folder(Path(folder)) for folder in folders]
    for folder, one in zip(folders, found, strict=True):
        say(f"images '{folder}': {len(one.items)}, prompts from {one.source}")
        if one.note:
            _log.warning(one.note)
    names = [Path(folder).resolve().name for folder in folders]
    return _plan(
        request,
        folder_parts(found[0], found[1] if len(found) > 1 else None, (names[0], names[-1])),
        rewards=_rewards(request, None),
        sampling=None,
        prompts={
            "source": found[0].source,
            "report": {"prompts": len({i.prompt_id for i in found[0].items})},
            "note": found[0].note,
        },
        categories=found[0].categories,
        lines=(),
        out=request.out or Path("runs/eval") / names[0],
    )


def _plan(
    request: Request,
    parts: Sequence[Part],
    *,
    rewards: Mapping[str, Any],
    sampling: Mapping[str, Any] | None,
    prompts: Mapping[str, Any],
    categories: Mapping[int, str],
    lines: tuple[int, ...],
    out: Path,
) -> Plan:
    keys = [[(item.prompt_id, item.prompt, item.seed) for item in part.items] for part in parts]
    settings = {
        "models": {part.role: part.identity for part in parts},
        "prompts": {"images": len(keys[-1]), "sha256": hashlib.sha256(repr(keys).encode()).hexdigest()},
        "sampling": sampling,
        "seed": request.seed,
        "batch": request.batch,
        "rewards": {name: {"type": type(entry).__name__} | asdict(entry) for name, entry in rewards.items()},
    }
    return Plan(tuple(parts), rewards, prompts, categories, lines, settings, out, request.batch, request.save_images)


def _base_of(tuned: Target, request: Request) -> Target | None:
    """What it is paired with: by default its own base; weights that were exported have no other."""
    if request.base == NO_BASE:
        return None
    if tuned.tune is not None and (request.base is None or tuned.model.path == request.base):
        return tuned
    if request.base is None:
        return None
    if is_image_folder(request.base):
        raise ConfigError(f"base: '{request.base}' is a folder of images, and a model is paired with a model.")
    return find_target(request.base, base=None, step=None, dtype=request.dtype)


def _prompts(request: Request, tuned: Target) -> tuple[str, PromptFile]:
    """Those of the file, or the run's evaluation prompts; and where they are from."""
    source, part = request.prompts, "eval"
    if source is None and tuned.config is not None:
        wanted = tuned.config.prompts
        source, part = (wanted.train, "train") if wanted.eval is None else (wanted.eval, "eval")
    if source is None:
        raise ConfigError(f"prompts: '{request.source}' has none of its own; name a file with --prompts.")
    if not source.startswith(TESTBED):
        return source, read_prompts(Path(source))
    prompts = load_prompts(source, part)
    return source, PromptFile(prompts, None, tuple(range(1, len(prompts) + 1)), (None,) * len(prompts))


def _rewards(request: Request, tuned: Target | None) -> dict[str, Any]:
    """Those named, or the run's own and its held-out ones."""
    if request.rewards:
        return rewards_named(request.rewards)
    if tuned is None or tuned.config is None:
        raise ConfigError("rewards: name at least one, as in --rewards hpsv2 pickscore my_pkg.mod:fn.")
    return {**tuned.config.rewards, **tuned.config.held_out}
