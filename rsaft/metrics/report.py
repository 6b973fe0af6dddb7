"""One self-contained HTML page that compares runs: tables, curves, samples, settings. No network, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rsaft.errors import ConfigError
from rsaft.files import write_atomic
from rsaft.metrics.figures import NUM_SLOTS, Line, chart, reward_plane
from rsaft.metrics.gauge_panel import gauge_panel
from rsaft.metrics.matched import at_matched_reward, common_levels, first_crossing, mean_interval
from rsaft.metrics.pages import templates
from rsaft.metrics.records import (
    GOLD,
    Run,
    all_keys,
    by_prompt,
    curve,
    differing,
    number,
    read_run,
    scores,
    side_by_side,
    train_reward,
    truth,
)
from rsaft.metrics.sample_tiles import sample_table

RESAMPLES = 2_000  # of each interval in the page


def write_report(runs: Sequence[Path], out: Path, *, title: str) -> Path:
    """Write one HTML file about one or several run directories, and return its path.

    Holds start, best and end of every reward; gold at matched train reward; curves with 95 % intervals over prompts;
    samples of the same prompts at start, middle and end, the runs side by side; what differs in the settings; counts
    of what was not finite; the environment. Runs that have just begun or were cut off give what they have. The same
    files give the same page, byte for byte.

    Args:
        runs: run directories; the first is what the others are compared with.
        out: the file, replaced whole.
        title: heading of the page.

    Raises:
        ConfigError: if there is no run.
        RunDirectoryError: if a directory is no run directory, a file in it is damaged, or `out` cannot be written.

    Cost: about a second for two runs; no model is needed.
    """
    if not runs:
        raise ConfigError("report: name at least one run directory.")
    found = [read_run(Path(run)) for run in runs]
    names = _names(found)
    truth_name = "gold" if any(GOLD in run.keys(GOLD) for run in found) else "mean held-out reward"
    pages = templates()
    pages.filters.update(number=shown, signed=signed)
    page = pages.get_template("report.html").render(
        title=title,
        runs=[{"name": name, "slot": i % NUM_SLOTS, "extent": _extent(found[i])} for i, name in enumerate(names)],
        truth_name=truth_name,
        quantities=[_quantity(found, key) for key in all_keys(found, ("reward/", "held_out/"))],
        matched=matched_table(found),
        plane=reward_plane(found, range(len(found)), [truth(run) for run in found], truth_name),
        charts=_charts(found),
        gauge=gauge_panel(found),
        parts=_part_charts(found),
        samples=sample_table(found),
        differing=differing([run.config for run in found]),
        nonfinite=[_nonfinite(run) for run in found],
        environment=side_by_side([run.environment for run in found]),
        settings=side_by_side([run.config for run in found]),
    )
    write_atomic(Path(out), page.encode("utf-8"))
    return Path(out)


def shown(value: float | None) -> str:
    """A number for a table: three decimals, fewer where it is large, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-5 <= abs(value) < 1e4:
        return f"{value:.2e}".replace("-", "−")
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None) -> str:
    """As `shown`, with a plus sign where it is one."""
    return f"+{shown(value)}" if value is not None and value > 0 else shown(value)


def matched_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Truth of each run where its train reward first reaches each common level, and differences from the first run.

    A difference is (mean, low, high), a 95 % interval over prompts, for each run after the first; None without common
    samples. It says nothing of other training seeds.
    """
    levels = common_levels([train_reward(run) for run in runs])
    columns = [at_matched_reward(train_reward(run), truth(run), levels) for run in runs]
    rows = []
    for k, level in enumerate(levels):
        base = _scores_at(runs[0], level)
        differences = [_difference(base, _scores_at(run, level)) for run in runs[1:]]
        rows.append({"level": level, "values": [column[k] for column in columns], "differences": differences})
    return rows


def _scores_at(run: Run, level: float) -> dict[tuple[str, int], float]:
    """Gold of each sample at a train reward, between the two evaluations that enclose it."""
    masked = [t if math.isfinite(g) else math.nan for t, g in zip(train_reward(run), truth(run), strict=True)]
    crossing = first_crossing(masked, level)
    if crossing is None:
        return {}
    i, j, w = crossing
    before, after = (scores(run, int(run.evals[k]["step"]), GOLD) for k in (i, j))
    return {key: (1 - w) * before[key] + w * after[key] for key in before if key in after}


def _difference(
    base: dict[tuple[str, int], float], other: dict[tuple[str, int], float]
) -> tuple[float, float, float] | None:
    pairs = by_prompt({key: other[key] - base[key] for key in other if key in base})
    return mean_interval(torch.tensor(list(pairs.values())), seed=0, resamples=RESAMPLES) if pairs else None


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _label(key: str) -> str:
    kind, _, name = key.partition("/")
    if key == GOLD:
        return "gold"
    heads = {"reward": "train reward: ", "held_out": "held out: ", "sharpness": "S1 of ", "pull": "pull of "}
    return heads.get(kind, "") + name.replace("/", ": ")


def _extent(run: Run) -> str:
    steps = [int(record["step"]) for record in run.train] or [0]
    return f"{max(steps)} updates, {len(run.evals)} evaluations"


def _quantity(runs: Sequence[Run], key: str) -> dict[str, Any]:
    """Start, best and end of one reward for each run."""
    rows = []
    for run in runs:
        steps, values = curve(run.evals, key)
        points = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if not points:
            rows.append(dict.fromkeys(("start", "best", "step", "end", "change")))
            continue
        (best, at), start, end = max(points, key=lambda point: point[0]), points[0][0], points[-1][0]
        rows.append({"start": start, "best": best, "step": at, "end": end, "change": end - start})
    return {"label": _label(key), "rows": rows, "is_gold": key == GOLD}


def _charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A chart for each train reward, held-out reward, S1, and pull of several rewards, against step."""
    charts: list[dict[str, Any]] = []
    for key in all_keys(runs, ("reward/", "held_out/", "sharpness/", "pull/")):
        lines = []
        for slot, run in enumerate(runs):
            steps, values = curve(run.evals, key)
            if key.startswith("reward/"):
                lines.append(Line(slot, *curve(run.train, key), is_background=True))
            low, high = _bands(run, key) if key == GOLD else (None, None)
            lines.append(Line(slot, steps, values, low, high))
        caption = {
            "sharpness": "r(x) − r(x + δ), mean over images",
            "pull": "size of this reward's part of the gradient at the images",
        }
        note = "band: 95 % over prompts" if key == GOLD else caption.get(key.split("/")[0], "")
        charts.append(chart(f"chart-{len(charts)}", lines, _label(key), note))
    return charts


def _part_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    keys = all_keys(runs, ("measure/",))
    lines = [[Line(slot, *curve(run.evals, key)) for slot, run in enumerate(runs)] for key in keys]
    return [chart(f"part-{i}", line, _label(key), "") for i, (key, line) in enumerate(zip(keys, lines, strict=True))]


def _bands(run: Run, key: str) -> tuple[list[float], list[float]]:
    """The 95 % interval of each evaluation's mean over prompts; NaN without samples."""
    edges = []
    for record in run.evals:
        means = by_prompt(scores(run, int(record["step"]), key))
        values = torch.tensor(list(means.values()), dtype=torch.float64)
        edges.append(mean_interval(values, seed=0, resamples=RESAMPLES) if means else (math.nan,) * 3)
    return [low for _, low, _ in edges], [high for _, _, high in edges]


def _nonfinite(run: Run) -> dict[str, int]:
    """Samples masked and updates skipped in training, scores dropped in evaluation."""
    in_training = {
        f"nonfinite/{kind}": sum(int(number(record.get(f"nonfinite/{kind}", 0)) or 0) for record in run.train)
        for kind in ("reward", "grad")
    }
    dropped = sum(int(record[key]) for record in run.evals for key in record if key.startswith("nonfinite/"))
    return {
        "samples masked": in_training["nonfinite/reward"],
        "updates skipped": in_training["nonfinite/grad"],
        "evaluation scores dropped": dropped,
    }
