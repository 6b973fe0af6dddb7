"""The hacking gauge of a run: the first process reads it and tells the others; its memory is the run directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from rsaft import distributed
from rsaft.files import write_atomic
from rsaft.metrics.evaluate import Evaluation
from rsaft.metrics.gauge import Gauge, HackingGauge, Reading

THUMBNAILS = "base_thumbnails.safetensors"  # beside the samples: the untuned model's images, small
_log = logging.getLogger(__name__)


class RunGauge:
    """Reads every evaluation of a run. Without settings it reads nothing.

    Attributes:
        last: the newest reading; None before the first, and without settings.
    """

    def __init__(self, settings: Gauge | None, run: Path, on_reading: Callable[[Reading], None] | None) -> None:
        self.settings = settings
        self.last: Reading | None = None
        self._gauge = HackingGauge(settings)
        self._run = run
        self._on_reading = on_reading

    @property
    def best(self) -> int | None:
        """Step of the evaluation whose weights to keep; None without a verdict."""
        return None if self.last is None else self.last.keep_step

    @property
    def stops(self) -> bool:
        """Whether the run is to end here."""
        return self.last is not None and self.last.alarm and self.last.stop

    def look(
        self, step: int, evaluation: Evaluation, weight_distance: float | None, device: torch.device
    ) -> Evaluation:
        """Read an evaluation, which all processes hold; give it back with the scores of its images."""
        if self.settings is None:
            return evaluation
        found: tuple[dict[str, Tensor], Reading] | None = None
        if distributed.rank() == 0:
            evaluation = self._gauge.measured(evaluation, device=device)
            if step == 0 and self._gauge.base_thumbnails is not None:
                data = safetensors.torch.save({"thumbnails": self._gauge.base_thumbnails.contiguous()})
                write_atomic(self._run / "samples" / THUMBNAILS, data)
            found = evaluation.scores, self._gauge.look(step, evaluation, weight_distance=weight_distance)
        first = distributed.gathered(found)[0]
        assert first is not None  # the first process has looked
        scores, reading = first
        if reading.alarm and not (self.last is not None and self.last.alarm) and distributed.rank() == 0:
            _log.warning("update %d: %s", step, reading.sentence)
        self.last = reading
        if self._on_reading is not None:
            self._on_reading(reading)
        return replace(evaluation, scores=scores)

    def restore(self, steps: Sequence[int]) -> None:
        """Remember what the run directory holds of the evaluations after these updates."""
        self._gauge = HackingGauge(self.settings)
        if self.settings is None:
            return
        reading = None
        if distributed.rank() == 0:
            folder = self._run / "samples"
            files = [folder / f"step-{step:06d}.json" for step in steps]
            there = [file for file in files if file.is_file()]
            small = folder / THUMBNAILS
            base = safetensors.torch.load_file(small)["thumbnails"] if small.is_file() else None
            self._gauge.restore([json.loads(file.read_text()) for file in there], base)
            reading = self._gauge.reading() if there else None
        self.last = distributed.gathered(reading)[0]
