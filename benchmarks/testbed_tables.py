"""Tables of a study: gold and the other scores at matched train reward and against updates, method against plain.

    python -m benchmarks.testbed_tables runs/study --world fashion
    python -m benchmarks.testbed_tables runs/study --world shapes --methods plain half-lr weight-0.01 --levels 0.5 1.0

Reads the finished cells of `benchmarks.testbed_study`; methods may have different seeds. Prints Markdown, and writes it
with all numbers (JSON) and a plot to --results. A difference is over the seeds that a method shares with plain, and
is given only if each of those runs, of both methods, reaches the level: else runs chosen by their reward are compared.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.testbed_study import TRAINERS, trainer_and_method
from rsaft.metrics.matched import at_matched_reward, common_levels
from rsaft.metrics.paired import Compared, compared

Cell = dict[str, Any]
Cells = dict[str, dict[int, Cell]]  # method -> seed -> cell

TRAIN, GOLD, S1 = "reward/train", "held_out/gold", "sharpness/train"

NOTES = """
Mean over runs; without a difference, +- its standard error over seeds. In brackets: the mean difference to the plain
runs of the same seeds, with its 95 % bootstrap interval over seeds (percentile below 10 seeds, where it is too narrow;
none below 3). n: seeds in the difference. "2 of 5": the runs that reach the level; their mean is of runs chosen by
their reward, so no difference is given. Evaluations are on the same prompts and noises in every run, so the spread over
images is no part of a difference. "Best of the run" is a maximum over evaluations, and so too high, in every method.

Methods: weight-RHO_W, input-RHO, both-RHO-RHO_W: RSA-FT. shareN: epsilon from one sample of N. everyN: kept for N
updates. lastM, cached: only the last M steps, or those with gradient, sampled again at theta + epsilon. product-RHO_W:
LoRA's factors moved until the layers' weights move by RHO_W. Controls: half-lr (half the learning rate), random-RHO_W
(a random direction of that norm).
"""


def load(out: Path, world: str, trainer: str = "draft") -> Cells:
    """Finished cells of a trainer by method and seed, plain first, then in the order of names and radii.

    Raises:
        SystemExit: if there is no plain cell, or cells were evaluated at different updates or learning rates.
    """
    cells: Cells = defaultdict(dict)
    for file in sorted((out / world).glob("*.json")):
        cell = json.loads(file.read_text())
        trained_by, name = trainer_and_method(cell["method"])
        if trained_by == trainer:
            cells[name][cell["seed"]] = cell
    if "plain" not in cells:
        raise SystemExit(
            f"{out / world}: there is no finished cell of plain ({trainer}) to compare with; run the study first."
        )
    for name, runs in cells.items():
        for what in ("lr", "steps"):
            found = {cell["lr"] if what == "lr" else tuple(column(cell, "step")) for cell in runs.values()}
            if len(found) > 1:
                raise SystemExit(f"{name}: its runs differ in {what}: {sorted(found)}; keep them in different folders.")
    return {name: dict(sorted(cells[name].items())) for name in sorted(cells, key=_order)}


def _order(name: str) -> tuple[bool, bool, str, list[float]]:
    kind, *numbers = re.split(r"-(?=\d)", name)
    return name != "plain", name != "half-lr", kind, [float(n) for n in numbers]


def column(cell: Cell, key: str) -> list[float]:
    """One score at each evaluation."""
    return [e[key] for e in cell["evaluations"]]


def at_reward(cells: Cells, key: str, level: float) -> dict[str, Compared]:
    """A score of each method where its runs first reach a train reward."""
    values = {
        name: {s: at_matched_reward(column(c, TRAIN), column(c, key), [level])[0] for s, c in runs.items()}
        for name, runs in cells.items()
    }
    return {name: compared(mine, None if name == "plain" else values["plain"]) for name, mine in values.items()}


def at_step(cells: Cells, key: str, step: int) -> dict[str, Compared]:
    """A score of each method after so many updates."""
    values = {
        name: {s: next((e[key] for e in c["evaluations"] if e["step"] == step), None) for s, c in runs.items()}
        for name, runs in cells.items()
    }
    return {name: compared(mine, None if name == "plain" else values["plain"]) for name, mine in values.items()}


def best_of_run(cells: Cells, key: str) -> dict[str, Compared]:
    """The largest value of each run, whenever it was."""
    values = {name: {s: max(column(c, key)) for s, c in runs.items()} for name, runs in cells.items()}
    return {name: compared(mine, None if name == "plain" else values["plain"]) for name, mine in values.items()}


def table(cells: Cells, columns: Mapping[str, Mapping[str, Compared]]) -> list[str]:
    """Markdown: one row a method, one column a place."""
    rows = [f"| method | runs | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name, runs in cells.items():
        rows.append(f"| {name} | {len(runs)} | " + " | ".join(c[name].text for c in columns.values()) + " |")
    return rows


def reached_table(cells: Cells, levels: Sequence[float]) -> list[str]:
    """Markdown: how many runs of each method reach each train reward."""
    found = {f"{level:g}": at_reward(cells, TRAIN, level) for level in levels}
    rows = [f"| method | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for name in cells:
        counts = [f"{len(c[name].values)} of {c[name].runs}" for c in found.values()]
        rows.append(f"| {name} | " + " | ".join(counts) + " |")
    return rows


def report(cells: Cells, world: str, levels: Sequence[float]) -> tuple[str, dict[str, Any]]:
    """The Markdown page, and every number in it."""
    first = next(iter(cells["plain"].values()))
    steps = [int(s) for s in column(first, "step")]
    others = sorted(k for k in first["evaluations"][0] if k.startswith("held_out/") and k != GOLD)
    matched = {key: {f"{x:g}": at_reward(cells, key, x) for x in levels} for key in [GOLD, *others, S1]}
    against = {key: {str(s): at_step(cells, key, s) for s in steps} for key in (GOLD, TRAIN, S1)}
    best = {"best of the run": best_of_run(cells, GOLD)}
    sections = [
        ("Gold at matched train reward", table(cells, best | matched[GOLD])),
        ("Runs that reach each train reward", reached_table(cells, levels)),
        ("Gold against updates", table(cells, against[GOLD])),
        ("Train reward against updates", table(cells, against[TRAIN])),
        *((f"{key} at matched train reward", table(cells, matched[key])) for key in others),
        ("S1 of the train reward (sharpness) at matched train reward", table(cells, matched[S1])),
        ("S1 of the train reward against updates", table(cells, against[S1])),
    ]
    counts = ", ".join(f"{name} {len(runs)}" for name, runs in cells.items())
    lines = [f"# {world}: {sum(map(len, cells.values()))} runs ({counts})", NOTES.rstrip()]
    for title, rows in sections:
        lines += ["", f"## {title}", "", *rows]
    numbers = {
        part: {
            key: {place: {name: asdict(c) for name, c in by.items()} for place, by in places.items()}
            for key, places in scores.items()
        }
        for part, scores in {"at_train_reward": matched, "at_update": against, "best": {GOLD: best}}.items()
    }
    return "\n".join(lines) + "\n", numbers


def plot(cells: Cells, levels: Sequence[float], path: Path) -> None:
    """Mean over seeds of gold against train reward and updates; differences to plain at matched train reward."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, (name, runs) in enumerate(cells.items()):
        style = {"color": "black" if name == "plain" else f"C{k % 10}", "ls": ("-", "--", ":", "-.")[k // 10 % 4]}
        gold, train = (
            torch.tensor([column(c, key) for c in runs.values()], dtype=torch.float64) for key in (GOLD, TRAIN)
        )
        steps = column(next(iter(runs.values())), "step")
        label = f"{name} ({len(runs)})"
        left.plot(train.mean(0), gold.mean(0), marker=".", label=label, **style)
        middle.plot(steps, gold.mean(0), marker=".", **style)
        if name != "plain":
            found = [(x, at_reward(cells, GOLD, x)[name].difference) for x in levels]
            for x, (mean, low, high) in [(x, d) for x, d in found if d is not None]:
                shifted = x + 0.012 * (levels[-1] - levels[0]) * (k - len(cells) / 2)
                right.errorbar(shifted, mean, [[mean - low], [high - mean]], fmt="o", ms=3, color=style["color"])
    left.set(xlabel="train reward (base sigmas)", ylabel="gold, mean over seeds")
    middle.set(xlabel="update", ylabel="gold, mean over seeds")
    right.set(xlabel="train reward", ylabel="gold: difference to plain, 95 % over seeds")
    right.axhline(0, color="black", lw=0.8)
    left.legend(fontsize=7, title="method (runs)", title_fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="--out of the study")
    parser.add_argument("--world", default="fashion", help="fashion, shapes, or with --lora of the study fashion-lora8")
    parser.add_argument("--trainer", default="draft", choices=list(TRAINERS), help="whose cells; one table each")
    parser.add_argument("--methods", nargs="+", help="these only, in this order; plain always comes first")
    parser.add_argument("--levels", nargs="+", type=float, help="train rewards; by default round ones of plain's range")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", help="of the files; rsa_ft, with the trainer's name unless it is draft")
    args = parser.parse_args()
    cells = load(args.study, args.world, args.trainer)
    missing = sorted(set(args.methods or ()) - set(cells))
    if missing:
        raise SystemExit(f"--methods: no finished cell of {', '.join(missing)}; finished are {', '.join(cells)}.")
    cells = {name: cells[name] for name in dict.fromkeys(["plain", *(args.methods or cells)])}
    levels = sorted(args.levels or common_levels([column(c, TRAIN) for c in cells["plain"].values()], count=7))
    text, numbers = report(cells, args.world, levels)
    print(text)
    args.results.mkdir(parents=True, exist_ok=True)
    name = args.name or ("rsa_ft" if args.trainer == "draft" else f"rsa_ft_{args.trainer}")
    stem = args.results / f"{name}_{args.world}"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({"levels": levels, **numbers, "cells": cells}) + "\n")
    plot(cells, levels, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
