"""What the commands make of their arguments. Imports nothing that is slow."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsaft.errors import ConfigError

if TYPE_CHECKING:
    from rsaft.config import RunConfig

Settings = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG.yaml [KEY=VALUE]", help="A run file, any overlays on it, and any single settings."),
]

Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny",
        help="A tiny random model of the config's family, a toy reward and 3 updates: seconds on a CPU. Shows that "
        "everything runs, and nothing else.",
    ),
]


def split_settings(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The YAML files and the overrides among the arguments; what holds a `=` and is no file is an override.

    Raises:
        ConfigError: if there is no file.
    """
    overrides = [a for a in arguments if "=" in a and not Path(a).is_file()]
    files = [Path(a) for a in arguments if a not in overrides]
    if not files:
        raise ConfigError("a run file is needed: rsaft train CONFIG.yaml [overlay.yaml...] [key=value...].")
    return files, overrides


def config_from(settings: list[str], *, tiny: bool) -> tuple[list[Path], RunConfig]:
    """The files among the arguments of `train`, and the settings that all of them amount to."""
    files, overrides = split_settings(settings)
    from rsaft.config import load_config

    config = load_config(files, overrides)
    if tiny:
        from rsaft.config.tiny import tiny as tiny_run

        config = tiny_run(config)
        # The model is saved and loaded at once, and cuts prompts after 12 tokens: nothing of that is news.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
    return files, config


def run_directory(chosen: Path | None, name: str) -> Path:
    """The run directory that was chosen, if nothing is in it; else the first free runs/NAME-N.

    Raises:
        ConfigError: if the chosen one is not empty, or if several processes would have to agree on a free one.
    """
    if chosen is not None:
        refuse_filled(chosen, "run", f"continue it with 'rsaft resume {chosen}', or choose another")
        return chosen
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("run: several processes cannot agree on a free run directory; name one with --run-dir DIR.")
    from rsaft.rdrl.run_directory import free_run_dir

    return free_run_dir(name)


def refuse_filled(folder: Path, option: str, way_out: str) -> None:
    """Refuse a folder with something in it. Only the first process looks: it may be ahead of the others, and writing.

    Raises:
        ConfigError: if there is something in it, if it or what it lies in is a file, or if it cannot be written.
    """
    if rank() > 0:
        return
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{option}: '{nearest}' is a file, and a folder is needed; choose another.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: '{nearest}' cannot be written; choose another folder.")
    if nearest == folder and any(folder.iterdir()):
        raise ConfigError(f"{option}: '{folder}' is not empty; {way_out}.")


def rank() -> int:
    """This process's number as torchrun gives it; 0 outside."""
    return int(os.environ.get("RANK", "0"))


def check_run(run: Path) -> None:
    """Raises ConfigError if there is no run directory with settings."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run '{run}': there is no run (no config.yaml) there; name a run directory.")


def say(text: str) -> None:
    """Print it, on the first process only."""
    if rank() == 0:
        print(text, flush=True)
