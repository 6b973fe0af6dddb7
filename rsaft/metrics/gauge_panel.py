"""The hacking gauge's part of a report: curves of what matters most, one table of the rest, the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rsaft.metrics.figures import Line, chart
from rsaft.metrics.records import Run, all_keys, curve

CURVES = {
    "gap": ("gain that held-out rewards do not believe", "in standard deviations of the base's scores"),
    "jcr": ("JCR", "share of samples that every held-out reward finds worse than the base's"),
    "diversity": ("diversity", "distance between the images of a prompt; the base is 1"),
}
ROWS = {
    "gain": "gain of the train reward, base deviations",
    "jdr": "JDR, share better than the base by every held-out reward",
    "drift": "drift from the base's images, root mean square",
    "weight_distance": "weights moved, share of the base's norm",
    "sharpness": "S1 of the train reward; the base is 1",
    "sharpness_trend": "trend of S1, per 100 updates",
    "slope": "size of the train reward's gradient; the base is 1",
}


def gauge_panel(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Charts, rows and verdicts for the page's template; None without readings."""
    keys = all_keys(runs, ("gauge/",))
    if not keys:
        return None
    charts = []
    for name, (label, note) in CURVES.items():
        if f"gauge/{name}" in keys:
            lines = [Line(slot, *curve(run.evals, f"gauge/{name}")) for slot, run in enumerate(runs)]
            charts.append(chart(f"gauge-{name.replace('_', '-')}", lines, label, note))
    images = {key.removeprefix("gauge/"): _image_label(key) for key in keys if key.startswith("gauge/image/")}
    rows = [
        {"label": label, "values": [_last(run, f"gauge/{name}") for run in runs]}
        for name, label in (ROWS | images).items()
        if f"gauge/{name}" in keys
    ]
    return {"charts": charts, "rows": rows, "verdicts": [verdict(run) for run in runs]}


def verdict(run: Run) -> str | None:
    """What the stop rule says of a run; None without held-out rewards."""
    steps, keep = curve(run.evals, "gauge/keep_step")
    if not keep or not math.isfinite(keep[-1]):
        return None
    alarms = [step for step, alarm in zip(*curve(run.evals, "gauge/alarm"), strict=True) if alarm == 1]
    text = f"keep the weights of update {keep[-1]:.0f}"
    return f"{text}; alarm at update {alarms[0]}" if alarms else f"{text}; no alarm up to update {steps[-1]}"


def _image_label(key: str) -> str:
    return f"{key.removeprefix('gauge/image/').replace('_', ' ')} of the images, shift in base deviations"


def _last(run: Run, key: str) -> float | None:
    values = [value for value in curve(run.evals, key)[1] if math.isfinite(value)]
    return values[-1] if values else None
