"""Tables of a study: gold against train reward and against steps, with paired bootstrap intervals over seeds.

    python -m benchmarks.testbed_tables runs/study --world fashion --levels 0.2 0.3 0.4 0.5 0.6

Prints Markdown, and writes it with the numbers (JSON) and a plot to --results.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from rsaft.metrics.matched import at_matched_reward, mean_interval, paired_bootstrap

Cell = dict[str, Any]


def load(out: Path, world: str) -> dict[str, dict[int, Cell]]:
    """Finished cells by method and seed."""
    cells: dict[str, dict[int, Cell]] = defaultdict(dict)
    for file in sorted((out / world).glob("*.json")):
        cell = json.loads(file.read_text())
        cells[cell["method"]][cell["seed"]] = cell
    return dict(cells)


def curve(cell: Cell, key: str) -> list[float]:
    return [e[key] for e in cell["evaluations"]]


def matched(cell: Cell, key: str, levels: list[float]) -> list[float | None]:
    return at_matched_reward(curve(cell, "reward/train"), curve(cell, key), levels)


def interval(values: list[float]) -> str:
    mean, low, high = mean_interval(torch.tensor(values), seed=0)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def matched_table(cells: dict[str, dict[int, Cell]], key: str, levels: list[float], best: str) -> list[str]:
    """One row a method: the score at each train reward, and its difference to plain over the seeds that both have."""
    rows = [
        f"| method | seeds | {best} | " + " | ".join(f"at {level:g}" for level in levels) + " |",
        "|---|---|---|" + "---|" * len(levels),
    ]
    for name, runs in cells.items():
        columns = [interval([max(curve(c, key)) for c in runs.values()])]
        for k, _ in enumerate(levels):
            mine = {s: matched(c, key, levels)[k] for s, c in runs.items()}
            values = {s: v for s, v in mine.items() if v is not None}
            if not values:
                columns.append("not reached")
                continue
            text = f"{sum(values.values()) / len(values):.3f}"
            theirs = {s: matched(c, key, levels)[k] for s, c in cells.get("plain", {}).items()}
            both = [s for s in values if theirs.get(s) is not None]
            if name != "plain" and both:
                a, b = torch.tensor([values[s] for s in both]), torch.tensor([theirs[s] for s in both])
                mean, low, high = paired_bootstrap(a, b, seed=0)
                text += f" ({mean:+.3f} [{low:+.3f}, {high:+.3f}], n={len(both)})"
            columns.append(text)
        rows.append(f"| {name} | {len(runs)} | " + " | ".join(columns) + " |")
    return rows


def steps_table(cells: dict[str, dict[int, Cell]], key: str) -> list[str]:
    """Mean and standard error over seeds at each evaluated step."""
    steps = sorted({e["step"] for runs in cells.values() for c in runs.values() for e in c["evaluations"]})
    rows = ["| method | " + " | ".join(map(str, steps)) + " |", "|---|" + "---|" * len(steps)]
    for name, runs in cells.items():
        columns = []
        for step in steps:
            values = torch.tensor([e[key] for c in runs.values() for e in c["evaluations"] if e["step"] == step])
            if not len(values):
                columns.append("")
                continue
            error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
            columns.append(f"{float(values.mean()):.3f} ± {error:.3f}")
        rows.append(f"| {name} | " + " | ".join(columns) + " |")
    return rows


def plot(cells: dict[str, dict[int, Cell]], path: Path) -> None:
    """Gold against train reward, one line a run, one colour a method."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, runs) in enumerate(cells.items()):
        for n, cell in enumerate(runs.values()):
            gold, train, steps = curve(cell, "held_out/gold"), curve(cell, "reward/train"), curve(cell, "step")
            style = {"color": f"C{k % 10}", "alpha": 0.8, "lw": 1.2, "label": name if n == 0 else None}
            left.plot(train, gold, marker=".", **style)
            right.plot(steps, gold, **style)
    left.set(xlabel="train reward (base sigmas)", ylabel="gold")
    right.set(xlabel="update", ylabel="gold")
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--world", default="fashion")
    parser.add_argument("--methods", nargs="*", help="these only, in this order")
    parser.add_argument("--levels", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="rsa_ft")
    args = parser.parse_args()
    cells = load(args.study, args.world)
    order = args.methods or sorted(cells, key=lambda name: (name != "plain", name))
    cells = {name: cells[name] for name in order if name in cells}
    held_out = sorted(k for k in next(iter(next(iter(cells.values())).values()))["evaluations"][0] if "held_out/" in k)
    lines = [
        f"# {args.world}: gold at matched train reward (paired difference to plain, 95 % bootstrap over seeds)",
        "",
    ]
    lines += matched_table(cells, "held_out/gold", args.levels, "best gold of the run")
    lines += ["", "## Gold against steps (mean ± standard error over seeds)", "", *steps_table(cells, "held_out/gold")]
    lines += ["", "## Train reward against steps", "", *steps_table(cells, "reward/train")]
    for key in [k for k in held_out if k != "held_out/gold"] + ["sharpness/train"]:
        lines += [
            "",
            f"## {key} at matched train reward",
            "",
            *matched_table(cells, key, args.levels, "best of the run"),
        ]
    lines += [
        "",
        "Median seconds of an update (CPU, one thread, machine shared): "
        + ", ".join(
            f"{name} {sorted(c['update_seconds_median'] for c in runs.values())[len(runs) // 2]:.2f}"
            for name, runs in cells.items()
        )
        + f". {platform.machine()}, torch {torch.__version__}.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    stem = args.results / f"{args.name}_{args.world}"
    args.results.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(cells, indent=None, separators=(",", ":")))
    plot(cells, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
