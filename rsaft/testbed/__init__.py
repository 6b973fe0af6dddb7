"""Two small text-to-image worlds whose truth is known: `load("fashion")` and `load("shapes")`.

Each holds a base model (a diffusers StableDiffusionPipeline), a reward to train on, rewards held out from training, and
a gold judge computed from the world itself, so that reward hacking can be measured and not only suspected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsaft.errors import ConfigError

if TYPE_CHECKING:
    from rsaft.backbones import LoRA
    from rsaft.types import Backbone

__all__ = ["WORLDS", "Testbed", "load"]

WORLDS = ("fashion", "shapes")
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Testbed:
    """One world, ready for training: everything reads images in [0, 1], and every score is higher for better."""

    __test__ = False  # not a test class, whatever its name makes pytest think

    name: str
    backbone: Backbone
    reward: Callable[..., Any]  # the reward to train on, in base sigmas: 0 is the base model's mean
    held_out: dict[str, Callable[..., Any]]  # rewards never trained on, in base sigmas
    gold: Callable[..., Any]  # the judge, in [0, 1]; `gold.parts(images, prompts)` gives its factors by name
    prompts_train: tuple[str, ...]
    prompts_eval: tuple[str, ...]
    path: Path  # folder of the diffusers pipeline


def load(
    name: str,
    *,
    lora: LoRA | None = None,
    base: Path | None = None,
    rewards: Path | None = None,
    keep_base: bool = False,
) -> Testbed:
    """The world `name`, from the files of the package alone.

    Args:
        name: one of WORLDS.
        lora: adapter to train; None trains the whole UNet.
        base: folder of another pipeline of the same world (a replication set); the packaged one by default.
        rewards: folder of other reward models (`train.safetensors` and any number of held-out ones).
        keep_base: keep a copy of the UNet for terms to the base model.

    Raises:
        ConfigError: if there is no such world.
        FileNotFoundError: if a folder does not hold what it should.
    """
    if name not in WORLDS:
        raise ConfigError(f"testbed.load: there is no world {name!r}; allowed: {', '.join(WORLDS)}.")
    import importlib

    from rsaft.backbones import load_backbone
    from rsaft.testbed.rewards import load_reward

    world = importlib.import_module(f"rsaft.testbed.{name}")
    base, rewards = Path(base or DATA / name / "pipeline"), Path(rewards or DATA / name / "rewards")
    _require(base / "model_index.json")
    _require(rewards / "train.safetensors")
    backbone = load_backbone(str(base), lora=lora, dtype="fp32", keep_base=keep_base)
    learned: dict[str, Callable[..., Any]] = {
        path.stem: load_reward(path).to(backbone.device) for path in sorted(rewards.glob("*.safetensors"))
    }
    return Testbed(
        name=name,
        backbone=backbone,
        reward=learned.pop("train"),
        held_out=learned,
        gold=world.gold(),
        prompts_train=world.PROMPTS_TRAIN,
        prompts_eval=world.PROMPTS_EVAL,
        path=base,
    )


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"testbed.load: {path} is missing; build it with `python -m rsaft.testbed.build`, or give another folder."
        )
