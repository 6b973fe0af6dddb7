"""Sample images of runs side by side, for a page: the same prompts and noises at the start, the middle and the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsaft.metrics.figures import data_uri, tiles
from rsaft.metrics.records import GOLD, Run, number

MAX_PROMPTS = 16  # rows of the table


def sample_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Tiles by prompt (rows), time (column groups) and run (columns); no rows without pictures."""
    picked = [_start_middle_end(sorted(run.grids)) for run in runs]
    times = [name for i, name in enumerate(("start", "middle", "end")) if any(len(steps) > i for steps in picked)]
    columns: list[dict[str, Any]] = []
    for i, _ in enumerate(times):
        for run, steps in zip(runs, picked, strict=True):
            step = steps[i] if i < len(steps) else None
            columns.append({"step": step, "cells": _cells(run, step)})
    texts = [[cell["prompt"] for cell in column["cells"] if cell["prompt"]] for column in columns]
    longest: list[str] = max(texts, key=len, default=[])
    height = min(MAX_PROMPTS, max((len(column["cells"]) for column in columns), default=0))
    rows = [
        {
            "prompt": longest[k] if k < len(longest) else "",
            "cells": [column["cells"][k] if k < len(column["cells"]) else None for column in columns],
        }
        for k in range(height)
    ]
    return {"times": times, "columns": columns, "rows": rows}


def _start_middle_end(steps: Sequence[int]) -> list[int]:
    if len(steps) < 3:
        return list(steps)
    middle = min(steps[1:-1], key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    return [steps[0], middle, steps[-1]]


def _cells(run: Run, step: int | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    sample = run.samples.get(step, {})
    prompts, gold = sample.get("prompts", []), sample.get("scores", {}).get(GOLD, [])
    return [
        {
            "uri": data_uri(tile),
            "is_pixel_art": max(tile.size) <= 64,
            "prompt": prompts[k] if k < len(prompts) else "",
            "gold": number(gold[k]) if k < len(gold) else None,
        }
        for k, tile in enumerate(tiles(run.grids[step])[:MAX_PROMPTS])
    ]
