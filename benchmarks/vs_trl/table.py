"""The tables of finished runs, into benchmarks/results/vs_trl.{json,md}: python -m benchmarks.vs_trl.table FOLDER"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
SIDES = ("trl", "rsaft")
WINDOW = 10  # updates whose mean reward is one point of a curve


def read(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Finished pairs of runs: name -> side -> what the side wrote."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        name, side = path.stem.rsplit(".", 1)
        found.setdefault(name, {})[side] = json.loads(path.read_text())
    return {name: pair for name, pair in found.items() if set(pair) == set(SIDES)}


def windows(rewards: Sequence[float]) -> list[float]:
    """Mean reward of each WINDOW updates."""
    return [statistics.mean(rewards[i : i + WINDOW]) for i in range(0, len(rewards) - WINDOW + 1, WINDOW)]


def cost_lines(pairs: dict[str, dict[str, Any]]) -> list[str]:
    """Step time and peak memory of each truncation, and their ratios."""
    lines = [
        "| steps with gradient | TRL CPU s | rsaft CPU s | ratio | TRL MiB | rsaft MiB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, timed, sized in [(f"{k} of 20", f"time-{k}", f"memory-{k}") for k in (1, 2, 5, 10)] + [
        ("random, each library's own", "learn-random-0", "memory-random")
    ]:
        if timed not in pairs or sized not in pairs:
            continue
        # Means: with a random truncation the updates differ.
        seconds = [statistics.mean(pairs[timed][side]["seconds"]) for side in SIDES]
        peaks = [pairs[sized][side]["peak_mib"] for side in SIDES]
        lines.append(
            f"| {label} | {seconds[0]:.3f} | {seconds[1]:.3f} | {seconds[1] / seconds[0]:.2f} "
            f"| {peaks[0]:.1f} | {peaks[1]:.1f} | {peaks[1] / peaks[0]:.2f} |"
        )
    return lines


def curve_lines(pairs: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """Mean reward of the training batches by window, and the difference over seeds with its standard error."""
    runs = [pair for name, pair in pairs.items() if name.startswith(f"learn-{kind}-")]
    if len(runs) < 2:
        return []
    curves = {side: [windows(run[side]["rewards"]) for run in runs] for side in SIDES}
    count = len(curves["trl"][0])
    heads = [f"{WINDOW * i + 1} to {WINDOW * (i + 1)}" for i in range(count)]
    lines = ["| updates | " + " | ".join(heads) + " |", "|---" * (count + 1) + "|"]
    for side in SIDES:
        means = [statistics.mean(values) for values in zip(*curves[side], strict=True)]
        lines.append(f"| {side} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    cells = []
    for i in range(count):
        gaps = [ours[i] - theirs[i] for ours, theirs in zip(curves["rsaft"], curves["trl"], strict=True)]
        cells.append(f"{statistics.mean(gaps):+.3f} +- {statistics.stdev(gaps) / len(gaps) ** 0.5:.3f}")
    return [*lines, "| rsaft - TRL | " + " | ".join(cells) + " |"]


def main() -> None:
    folder = Path(sys.argv[1])
    pairs = read(folder)
    where = f"{datetime.date.today().isoformat()}, {platform.machine()}, one thread of {os.cpu_count()} CPU cores"
    lines = ["# rsaft's AlignProp beside TRL 0.23.1's", "", f"{where}. benchmarks/vs_trl/run.sh; the write-up is in"]
    lines += ["benchmarks/vs_trl/README.md. Ratios are rsaft over TRL.", "", "## Cost of one update", ""]
    lines += cost_lines(pairs)
    for kind, text in (("2", "the last 2 of 20 steps with gradient"), ("random", "each library's random truncation")):
        lines += ["", f"## Mean reward of the training batches, {text}, 5 seeds", "", *curve_lines(pairs, kind)]
    (RESULTS / "vs_trl.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "vs_trl.json").write_text(json.dumps({"where": where, "runs": pairs}) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
