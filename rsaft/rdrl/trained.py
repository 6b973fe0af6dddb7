"""A run's trained weights, put back into a backbone."""

from __future__ import annotations

from pathlib import Path

from rsaft.errors import CheckpointError
from rsaft.rdrl.checkpoint import load_latest
from rsaft.rdrl.optimization import load_weights
from rsaft.types import Backbone


def load_trained(backbone: Backbone, run_dir: Path) -> int:
    """Put the newest checkpoint's weights (its moving average, if it has one) into a backbone of the same settings.

    Returns:
        The number of updates that the checkpoint holds.

    Raises:
        CheckpointError: if there is no good checkpoint, or it is of another model.
    """
    found = load_latest(run_dir / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir}: there is no checkpoint yet; train it, or name another run.")
    load_weights(backbone.parameters(), found.tensors.get("ema", found.tensors["weights"]))
    return found.step
