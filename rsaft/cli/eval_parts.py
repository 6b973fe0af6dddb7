"""The parts of an evaluation: a base's images and a tuned model's, or those of one or two folders."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rsaft.backbones.load import default_device
from rsaft.backbones.text_limits import text_readers
from rsaft.cli.eval_source import Target
from rsaft.config.assemble import load_model
from rsaft.metrics.image_folder import ImageFolder, load_picture, matched_ids
from rsaft.metrics.scoring import Item, Picture, sampled
from rsaft.prompts import TextReader
from rsaft.sampling import Sampling

if TYPE_CHECKING:
    from rsaft.backbones.pipeline import DiffusersBackbone

Role = Literal["base", "tuned"]
BASE: Role = "base"


@dataclass(frozen=True)
class Opened:
    """A part whose model is loaded."""

    device: torch.device
    pictures: Callable[[Sequence[Item]], Any]  # (items) -> an image or None each
    readers: tuple[TextReader, ...] = ()


@dataclass(frozen=True)
class Part:
    """The images of one model or folder, before anything is loaded."""

    role: Role
    run: str
    step: int | None
    identity: dict[str, Any]  # what decides its images
    items: tuple[Item, ...]
    open: Callable[[], Opened]


def model_parts(tuned: Target, base: Target | None, items: Sequence[Item], sampling: Sampling) -> list[Part]:
    """The base's part, if there is one, and the tuned model's: the same items, so the same noises.

    A run's own base, and that of exported weights, is the model before they are put in; it is loaded once, and its part
    must be done before the other one is opened.

    Args:
        tuned: what is evaluated.
        base: another model to pair with, or the same target for its own base; None: no base.
        items: prompts and seeds.
        sampling: of both.
    """
    load = functools.cache(lambda: load_model(tuned.model, seed=0))
    parts = []
    if base is tuned:
        identity = {"model": tuned.identity["model"], "files": tuned.identity["files"]}
        parts.append(Part(BASE, "base", 0, identity, tuple(items), _opener(tuned, load, sampling)))
    elif base is not None:
        name = "base" if base.label == tuned.label else base.label
        parts.append(Part(BASE, name, base.step, base.identity, tuple(items), _opener(base, _tuned(base), sampling)))
    name = "tuned" if parts and parts[0].run == tuned.label else tuned.label
    opener = _opener(tuned, _tuned(tuned, load), sampling)
    return [*parts, Part("tuned", name, tuned.step, tuned.identity, tuple(items), opener)]


def folder_parts(tuned: ImageFolder, base: ImageFolder | None, names: tuple[str, str]) -> list[Part]:
    """The parts of one or two folders of images; two images of the same prompt and number or seed are a pair."""
    parts = []
    if base is not None:
        items = tuple(matched_ids(base.items, tuned.items))
        parts.append(_folder_part(BASE, names[1] if names[1] != names[0] else "base", items))
    return [*parts, _folder_part("tuned", names[0], tuned.items)]


def _opener(target: Target, load: Callable[[], DiffusersBackbone], sampling: Sampling) -> Callable[[], Opened]:
    def opened() -> Opened:
        backbone = load()
        return Opened(
            backbone.device,
            lambda items: sampled(backbone, items, sampling),
            tuple(text_readers(backbone.pipe, backbone.family, target.model.max_sequence_length)),
        )

    return opened


def _tuned(target: Target, load: Callable[[], DiffusersBackbone] | None = None) -> Callable[[], DiffusersBackbone]:
    """Loads a target with its trained weights."""

    def tuned() -> DiffusersBackbone:
        backbone = load() if load is not None else load_model(target.model, seed=0)
        if target.tune is not None:
            target.tune(backbone)
        return backbone

    return tuned


def _folder_part(role: Role, run: str, items: Sequence[Item]) -> Part:
    files = [item.file for item in items if item.file is not None]
    state = [(item.prompt, item.seed, f.name, f.stat().st_size) for item, f in zip(items, files, strict=True)]
    identity = {"images": hashlib.sha256(repr(state).encode()).hexdigest()}
    return Part(role, run, None, identity, tuple(items), lambda: Opened(default_device(), _read))


def _read(items: Sequence[Item]) -> list[Picture | None]:
    return [None if item.file is None else load_picture(Path(item.file)) for item in items]
