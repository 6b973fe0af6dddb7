"""What a run writes while it goes: settings, records, sample grids, and a user's trackers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsaft.errors import MissingExtraError, RunDirectoryError
from rsaft.files import write_atomic
from rsaft.metrics.evaluate import Evaluation, image_grid
from rsaft.rdrl.run_directory import JsonLines, environment, write_json_atomic


class RunFiles:
    """The files of one run directory. metrics.jsonl holds nothing but what the seed decides; times go elsewhere."""

    def __init__(self, run: Path, done: int | None, description: str | None, *, resume: bool) -> None:
        """Open the files of a run.

        Args:
            run: the run directory.
            done: updates that the restored checkpoint holds; None if there is none. Later records are dropped.
            description: text of config.yaml.
            resume: False refuses a directory that holds a run already.
        """
        if not resume and (run / "metrics.jsonl").exists():
            raise RunDirectoryError(f"{run}: it holds a run already; resume that run, or choose another directory.")
        self._run = run
        (run / "samples").mkdir(exist_ok=True)
        if description is not None:
            write_atomic(run / "config.yaml", description.encode("utf-8"))
        write_json_atomic(run / "env.json", environment())
        kept = -1 if done is None else done
        self.metrics = JsonLines(run / "metrics.jsonl", kept)
        self.timing = JsonLines(run / "timing.jsonl", kept)

    def evaluation(self, done: int, evaluation: Evaluation, means: Mapping[str, float], *, grid: int) -> None:
        """Log the means; write each sample's scores and the grid of the first images."""
        self.metrics.write({"kind": "eval", **means})
        name = f"step-{done:06d}"
        scores = {key: values.tolist() for key, values in evaluation.scores.items()}
        write_json_atomic(
            self._run / "samples" / f"{name}.json",
            {"step": done, "prompts": evaluation.prompts, "sample_ids": evaluation.sample_ids, "scores": scores},
        )
        picture = io.BytesIO()
        image_grid(evaluation.images[:grid]).save(picture, "PNG")
        write_atomic(self._run / "samples" / f"{name}.png", picture.getvalue())

    def rewind(self, done: int) -> None:
        """Drop the records after `done` updates, as if the run were resumed there."""
        self.close()
        self.metrics = JsonLines(self._run / "metrics.jsonl", done)
        self.timing = JsonLines(self._run / "timing.jsonl", done)

    def sync(self) -> None:
        self.metrics.sync()
        self.timing.sync()

    def close(self) -> None:
        self.metrics.close()
        self.timing.close()


class Trackers:
    """TensorBoard, wandb and others through accelerate; nothing if none is named."""

    def __init__(self, names: Sequence[str], run: Path) -> None:
        self._accelerator: Any = None
        if not names:
            return
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        missing = sorted(set(names) - {str(t) for t in get_available_trackers()})
        if missing:
            raise MissingExtraError(f'train.trackers: {missing} are not installed: pip install "rsaft[track]".')
        self._accelerator = Accelerator(log_with=list(names), project_dir=str(run))
        self._accelerator.init_trackers(run.name)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        if self._accelerator is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()
