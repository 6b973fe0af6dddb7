"""The sections of a run file that have no code beside them; those of components are the dataclasses beside theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rsaft.config.messages import did_you_mean, shown
from rsaft.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
Family = Literal["sd", "sdxl", "sd3", "sd35", "flux", "schnell"]

TESTBED, TINY = "testbed:", "tiny:"  # beginnings of names that are no paths
WORLDS = ("fashion", "shapes")
PIPELINES: dict[Family, str] = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "schnell": "FluxPipeline",
}
"""What diffusers calls the pipelines of each family."""
FAMILIES = tuple(PIPELINES)


@dataclass(frozen=True)
class Model:
    """What is trained."""

    # testbed:fashion, testbed:shapes, a folder with model_index.json, a hub id, or tiny:FAMILY (random, for --tiny)
    path: str
    # The family that `path` is expected to be of; --tiny takes a tiny model of it, without looking at `path`.
    family: Family | None = None
    lora: Any = None  # adapters to train; null trains the whole denoiser
    dtype: Precision = "fp32"  # the network's arithmetic; trained values are fp32
    revision: str | None = None  # of a hub id: branch, tag or commit
    variant: str | None = None  # of the weight files, as in diffusers: fp16, ...
    gradient_checkpointing: bool = False  # recompute the denoiser's blocks in the backward pass
    resolution: int | tuple[int, int] | None = None  # height and width in pixels; null takes the checkpoint's own
    negative_prompt: str | None = None  # of guidance's unconditional branch; null: the checkpoint's own way
    max_sequence_length: int | None = None  # tokens that T5 reads (sd3: 256 by default, flux: 512)
    prompt_cache: str | None = None  # folder where encoded prompts are kept between runs
    drop_text_encoders: bool = False  # once the run's prompts are in the prompt cache, free the encoders' memory
    vae_dtype: Precision | None = None  # the decoder's arithmetic; null is fp32 (fp64 for an fp64 model)
    vae_slicing: bool = False  # decode image by image
    vae_tiling: bool = False  # decode tile by tile; changes the image at the seams
    vae_checkpointing: bool = False  # recompute the decoder's blocks in the backward pass
    compile: bool = False  # torch.compile the denoiser

    def __post_init__(self) -> None:
        _check_name(self.path, "path", TESTBED, WORLDS)
        _check_name(self.path, "path", TINY, FAMILIES)


@dataclass(frozen=True)
class Prompts:
    """What is drawn."""

    train: str  # testbed:fashion, testbed:shapes, or a .txt, .jsonl, .csv or .tsv file
    eval: str | None = None  # the same kinds; null takes the first training prompts

    def __post_init__(self) -> None:
        _check_name(self.train, "train", TESTBED, WORLDS)
        _check_name(self.eval or "", "eval", TESTBED, WORLDS)


@dataclass(frozen=True)
class TestbedReward:
    """A reward of a testbed's world; ships with rsaft, Apache-2.0 (the photographs: MIT)."""

    __test__ = False  # for pytest: not a test

    world: Literal["fashion", "shapes"]  # the world
    name: str = "reward"  # reward: the one to train on; gold, or one of the held-out ones: to measure with


@dataclass(frozen=True)
class Plain:
    """The step without flattening; it has no settings."""


@dataclass(frozen=True)
class KL:
    """A KL term to the base model (rsaft/rdrl/kl.py)."""

    weight: float  # of the mean squared difference of the two models' predictions, above 0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"kl.weight multiplies a loss, so weight > 0; got {self.weight}; or leave kl out.")


@dataclass(frozen=True)
class Custom:
    """Code of the user's own: a class is called with `args`, a function only if `args` is given."""

    type: str  # package.module:Name, importable from the working directory
    args: Mapping[str, Any] | None = None  # keyword arguments

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", self.type):
            raise ConfigError(f"type: code of your own is named as package.module:Name; got {shown(self.type)}.")


def _check_name(path: str, key: str, prefix: str, names: Sequence[str]) -> None:
    """Refuse PREFIX:NAME where there is no such name."""
    name = path.removeprefix(prefix)
    if path.startswith(prefix) and name not in names:
        allowed = ", ".join(f"{prefix}{n}" for n in names)
        what = "world" if prefix == TESTBED else "tiny model"
        raise ConfigError(f"{key}: there is no {what} {shown(name)}; allowed are {allowed}{did_you_mean(name, names)}")
