"""A run's trained weights as files for others: diffusers, peft, a merged pipeline, or ComfyUI."""

from __future__ import annotations

from pathlib import Path

from rsaft.backbones.export import Exported, check_format, export
from rsaft.cli.arguments import refuse_filled
from rsaft.config import RunConfig
from rsaft.config.assemble import load_model
from rsaft.rdrl.trained import put_trained, trained_checkpoint


def export_run(
    config: RunConfig, run: Path, *, format: str, out: Path | None, step: int | None
) -> tuple[Exported, str]:
    """Export a checkpoint of a run; what cannot be is refused before the model is loaded.

    Args:
        config: the run's settings.
        run: its directory.
        format: diffusers, peft, merged or comfyui.
        out: an empty or new folder; None takes RUN/export/FORMAT-step-XXXXXX.
        step: of the checkpoint; None takes the newest good one.

    Returns:
        Where it lies, with its verified difference, and a word on which weights it holds.

    Raises:
        ConfigError: if the format does not fit the run, there is no such step, or `out` is not empty.
        CheckpointError: if the checkpoint is missing, damaged or of another model.
        ExportError: if what was written does not load back as the trained model.
    """
    chosen = check_format(format, is_lora=config.model.lora is not None)
    checkpoint = trained_checkpoint(run, step)
    folder = out if out is not None else run / "export" / f"{chosen}-{checkpoint.path.name}"
    refuse_filled(folder, "out", "delete it, or choose another with --out")
    backbone = load_model(config.model, seed=0)
    put_trained(backbone, checkpoint)
    weights = f"step {checkpoint.step}" + (", moving average" if "ema" in checkpoint.tensors else "")
    return export(backbone, folder, chosen), weights
