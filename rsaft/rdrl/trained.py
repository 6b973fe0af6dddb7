"""A run's trained weights, put back into a backbone."""

from __future__ import annotations

from pathlib import Path

from rsaft.errors import CheckpointError, ConfigError
from rsaft.rdrl.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, load_latest
from rsaft.rdrl.checkpoint_folder import BEST, step_of
from rsaft.rdrl.optimization import load_weights
from rsaft.types import Backbone


def trained_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint:
    """A run's newest good checkpoint, or that of a step.

    Raises:
        ConfigError: if there is no checkpoint of that step.
        CheckpointError: if there is none at all, or it is damaged.
    """
    folder = run_dir / "checkpoints"
    if step is None:
        found = load_latest(folder)
        if found is None:
            raise CheckpointError(f"{run_dir}: there is no checkpoint yet; train it, or name another run.")
        return found
    paths = {step_of(path): path for path in list_checkpoints(folder)}
    if step not in paths:
        kept = ", ".join(map(str, paths)) or "none"
        raise ConfigError(f"step: {run_dir} has no checkpoint of step {step}; kept are those of steps {kept}.")
    return load_checkpoint(paths[step])


def best_step_of(run_dir: Path) -> int:
    """Step of the checkpoint that the gauge would keep, `checkpoints/best`.

    Raises:
        ConfigError: if there is none.
    """
    step = step_of((run_dir / "checkpoints" / BEST).resolve())
    if step is None or not (run_dir / "checkpoints" / BEST).exists():
        raise ConfigError(
            f"best: {run_dir} has no checkpoints/best, as where the gauge was off, nothing was held out, or the model "
            "as it was loaded is best; name a step instead."
        )
    return step


def put_trained(backbone: Backbone, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights (their moving average, if it has one) into a backbone of the same settings.

    Raises:
        CheckpointError: if it is of another model.
    """
    load_weights(backbone.parameters(), checkpoint.tensors.get("ema", checkpoint.tensors["weights"]))


def load_trained(backbone: Backbone, run_dir: Path, step: int | None = None) -> int:
    """Put a checkpoint's weights (their moving average, if it has one) into a backbone of the same settings.

    Args:
        backbone: as the run's config describes it.
        run_dir: of the run.
        step: of the checkpoint; the newest good one by default.

    Returns:
        The number of updates that the checkpoint holds.

    Raises:
        CheckpointError: if there is no good checkpoint, or it is of another model.
    """
    found = trained_checkpoint(run_dir, step)
    put_trained(backbone, found)
    return found.step
