"""The README's picture, from a finished demo: python -m benchmarks.demo_picture runs/demo docs/images/demo.png"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from rsaft.metrics.records import curve, read_run

TITLES = {"plain": "DRaFT-1, plain", "rsaft": "DRaFT-1 with RSA-FT"}
COLOURS = {"plain": "#c0392b", "rsaft": "#2471a3"}


def main(demo: Path, out: Path) -> None:
    runs = {name: read_run(demo / name) for name in TITLES}
    figure = Figure(figsize=(10, 8.2), layout="constrained", dpi=100)
    rows = [["train", "gold"], *([f"plain{k}", f"rsaft{k}"] for k in range(3))]
    axes = figure.subplot_mosaic(rows, height_ratios=[2.2, 1, 1, 1])
    for name, run in runs.items():
        for panel, key in (("train", "reward/proxy"), ("gold", "held_out/gold")):
            steps, values = curve(run.evals, key)
            axes[panel].plot(steps, values, color=COLOURS[name], label=TITLES[name], lw=2, marker="o", ms=3)
        steps = sorted(run.grids)
        for k, step in enumerate((steps[0], steps[len(steps) // 2], steps[-1])):
            axes[f"{name}{k}"].imshow(Image.open(run.grids[step]), interpolation="nearest")
            axes[f"{name}{k}"].set_title(f"{TITLES[name]}, update {step}", fontsize=9)
            axes[f"{name}{k}"].axis("off")
    axes["train"].set_title("what is trained: the learned reward", fontsize=10)
    axes["gold"].set_title("what is wanted: the gold judge", fontsize=10)
    axes["train"].legend(fontsize=8)
    for panel in ("train", "gold"):
        axes[panel].grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
