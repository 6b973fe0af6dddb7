"""What `rsaft eval` scores: a run or its checkpoint, exported weights on their base, or a model; not yet loaded."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsaft.cli.eval_weights import Kind, exported_digest, exported_kind, peft_base, put_exported
from rsaft.config import Custom, Model, RunConfig, load_config
from rsaft.config.sections import TESTBED, TINY, Precision
from rsaft.errors import CheckpointError, ConfigError
from rsaft.metrics.image_folder import IMAGE_SUFFIXES
from rsaft.rdrl.checkpoint import list_checkpoints, load_checkpoint
from rsaft.rdrl.checkpoint_folder import step_of
from rsaft.rdrl.manifest import verify
from rsaft.rdrl.trained import put_trained
from rsaft.sampling import Sampling

if TYPE_CHECKING:
    from rsaft.backbones.pipeline import DiffusersBackbone

_log = logging.getLogger(__name__)

WEIGHTS = ("weights.safetensors", "ema.safetensors")  # of a checkpoint: what decides its images


@dataclass(frozen=True)
class Target:
    """A model that can be evaluated, before it is loaded."""

    label: str
    step: int | None  # of a run's checkpoint
    model: Model  # what is loaded
    identity: dict[str, Any]  # what decides its images
    tune: Callable[[DiffusersBackbone], None] | None = None  # puts the trained weights in; None: there are none
    config: RunConfig | None = None  # of the run that it belongs to

    @property
    def sampling(self) -> Sampling | None:
        """The run's, if it belongs to one and its algorithm is built in."""
        built_in = self.config is not None and not isinstance(self.config.algorithm, Custom)
        return self.config.algorithm.sampling if self.config is not None and built_in else None


def is_image_folder(source: str) -> bool:
    """Whether it is a folder of images, and nothing else."""
    folder = Path(source)
    if not folder.is_dir() or _run_of(folder) or exported_kind(folder) or (folder / "model_index.json").is_file():
        return False
    return any(path.suffix.lower() in IMAGE_SUFFIXES or path.stem == "metadata" for path in folder.iterdir())


def find_target(source: str, *, base: str | None, step: int | None, dtype: Precision | None) -> Target:
    """The model that a name stands for; it is not loaded.

    Args:
        source: a run directory, one of its checkpoints, exported weights, a diffusers folder, or a name as in
            model.path.
        base: what exported weights belong to; by default the run that they lie in, or what peft's file says.
        step: of the checkpoint of a run; the newest good one by default.
        dtype: of the network; the run's own, or fp32.

    Raises:
        ConfigError: if there is nothing of the kind.
        CheckpointError: if a checkpoint is missing or damaged.
    """
    folder = Path(source)
    folder = folder.resolve() if folder.is_symlink() else folder  # checkpoints/best
    run = _run_of(folder)
    if run is not None:
        chosen = step_of(folder) if folder != run else step
        if folder != run and step not in (None, chosen):
            raise ConfigError(f"step: '{source}' is the checkpoint of step {chosen}, and --step says {step}; drop one.")
        return _of_run(run, chosen, dtype)
    if step is not None:
        raise ConfigError(f"step: only a run has checkpoints of several steps, and '{source}' is none; drop --step.")
    kind = exported_kind(folder)
    if kind is not None:
        return _of_export(folder, kind, base, dtype)
    known = source.startswith((TESTBED, TINY)) or (folder / "model_index.json").is_file()
    if folder.exists() and not known:
        raise ConfigError(
            f"model '{source}': it is neither a run (config.yaml), nor exported weights, nor a pipeline "
            "(model_index.json), nor a folder of images; name one of these, or a hub id."
        )
    model = Model(source, dtype=dtype or "fp32")
    label = re.sub(r"[^\w.+-]+", "-", folder.resolve().name if folder.exists() else source)
    return Target(label, None, model, _model_identity(model))


def _run_of(folder: Path) -> Path | None:
    """The run that a folder is, or is a checkpoint of."""
    if (folder / "config.yaml").is_file():
        return folder
    parent = folder.parent.parent
    is_checkpoint = step_of(folder) is not None and folder.parent.name == "checkpoints"
    return parent if is_checkpoint and (parent / "config.yaml").is_file() else None


def _of_run(run: Path, step: int | None, dtype: Precision | None) -> Target:
    config = load_config([run / "config.yaml"])
    model = config.model if dtype is None else replace(config.model, dtype=dtype)
    path, found, digests = _good_checkpoint(run, step)

    def tune(backbone: DiffusersBackbone) -> None:
        put_trained(backbone, load_checkpoint(path))

    identity = _model_identity(model) | {"step": found, "weights": digests}
    return Target(run.resolve().name, found, model, identity, tune, config)


def _good_checkpoint(run: Path, step: int | None) -> tuple[Path, int, dict[str, str]]:
    """The checkpoint of that step, or the newest good one: its folder, step, and its weights' sha256."""
    paths = {step_of(path): path for path in list_checkpoints(run / "checkpoints")}
    if paths and step is not None and step not in paths:
        kept = ", ".join(map(str, paths))
        raise ConfigError(f"step: {run} has no checkpoint of step {step}; kept are those of steps {kept}.")
    damaged: CheckpointError | None = None
    for path in reversed([path for number, path in paths.items() if step in (None, number)]):
        try:
            manifest = verify(path, step=step_of(path))
        except CheckpointError as error:
            _log.warning(str(error))
            damaged = error
        else:
            digests = {name: manifest.files[name].sha256 for name in WEIGHTS if name in manifest.files}
            return path, manifest.step, digests
    raise damaged or CheckpointError(f"{run}: there is no checkpoint yet; train it, or name another run.")


def _of_export(folder: Path, kind: Kind, base: str | None, dtype: Precision | None) -> Target:
    run = next((path for path in folder.resolve().parents[:3] if (path / "config.yaml").is_file()), None)
    config = None if run is None else load_config([run / "config.yaml"])
    path = base or (peft_base(folder) if kind == "peft" else None)
    if config is not None and base is None:
        model = replace(config.model, lora=None)
    elif path is not None:
        model = Model(path)
    else:
        raise ConfigError(f"model '{folder}': which model do these weights belong to? Name it with --base.")
    model = replace(model, dtype=dtype or model.dtype)
    named = re.search(r"step-(\d{6,})", str(folder.resolve()))
    identity = _model_identity(model) | {"weights": exported_digest(folder)}
    label = folder.resolve().name if run is None else f"{run.name}-{folder.resolve().name}"
    tune = partial(put_exported, folder=folder, kind=kind)
    return Target(label, int(named[1]) if named else None, model, identity, tune, config)


def _model_identity(model: Model) -> dict[str, Any]:
    """The section, and for a folder its files' names, sizes and times."""
    folder = Path(model.path)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {"model": asdict(model), "files": hashlib.sha256(repr(stats).encode()).hexdigest() if stats else None}
