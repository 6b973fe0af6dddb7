"""Charts as inline SVG, in colours that the page's style sheet decides, and sample tiles as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from rsaft.metrics.records import Run, train_reward

NUM_SLOTS = 8  # colours of the style sheet; runs beyond these take them again
MARKERS = "os^Dv<>p"
TILE = 256  # px; larger tiles are shrunk, and stored as JPEG
_INK, _RULE = "#b10000", "#b20000"  # stand for the page's own colours
_SLOTS = [f"#a{i}0000" for i in range(NUM_SLOTS)]


@dataclass(frozen=True)
class Line:
    """One curve of a chart, in the colour of its run."""

    slot: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # lower and upper edge of a band
    high: Sequence[float] | None = None
    is_background: bool = False
    notes: tuple[tuple[int, str], ...] = ()  # (point, what is written beside it)


def line_chart(name: str, lines: Sequence[Line], *, x_label: str, y_label: str, title: str) -> str:
    """An `<svg>` of the curves; gaps where a value is not finite, and an empty frame without any value.

    Args:
        name: letters, digits and dashes; prefix of the ids, so that charts can share a page.
        lines: in drawing order.
        x_label: of the axis.
        y_label: of the axis; empty where the caption says it.
        title: read aloud in place of the picture.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(5.0, 3.1))
        left, right = (0.16 if y_label else 0.13), (0.84 if any(line.notes for line in lines) else 0.98)
        axes = figure.add_axes((left, 0.15, right - left, 0.82))  # fixed: a fitted layout costs a second drawing
        for line in lines:
            _draw(axes, line)
        axes.set_xlabel(x_label, color=_INK)
        if y_label:
            axes.set_ylabel(y_label, color=_INK)
        axes.margins(x=0.04, y=0.08)
        axes.locator_params(nbins=5)  # a tick costs 4 ms, and a small chart needs few
        axes.grid(True, color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_RULE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, title)


def chart(name: str, lines: Sequence[Line], label: str, note: str) -> dict[str, Any]:
    """A captioned chart against updates, for a page's template."""
    svg = line_chart(name, lines, x_label="update", y_label="", title=f"{label} against update")
    return {"label": label, "note": note, "svg": Markup(svg)}  # our own drawing, its texts escaped


def reward_plane(
    runs: Sequence[Run], slots: Sequence[int], truths: Sequence[Sequence[float]], truth_name: str
) -> Markup | None:
    """Truth against train reward: the higher curve buys the same reward with less hacking. None without any point.

    Args:
        runs: one line each.
        slots: colour of each run; the last update stands beside a line that has a colour of its own.
        truths: of each run, a value for each evaluation.
        truth_name: what that is.
    """
    lines = []
    for run, slot, y in zip(runs, slots, truths, strict=True):
        x = train_reward(run)
        good = [i for i in range(len(x)) if math.isfinite(x[i]) and math.isfinite(y[i])]
        if good:
            end = (len(good) - 1, f"update {run.evals[good[-1]]['step']}")
            notes = (end,) if list(slots).count(slot) == 1 else ()
            lines.append(Line(slot, [x[i] for i in good], [y[i] for i in good], notes=notes))
    title = f"{truth_name} against train reward"
    svg = line_chart("plane", lines, x_label="train reward", y_label=truth_name, title=title)
    return Markup(svg) if lines else None


def tiles(path: Path) -> list[Image.Image]:
    """The pictures of a grid in reading order, found by its transparent gaps; the grid itself if it has none."""
    grid = Image.open(path).convert("RGBA")
    opaque = np.asarray(grid)[:, :, 3] > 0
    lines, columns = _spans(np.any(opaque, axis=1)), _spans(np.any(opaque, axis=0))
    boxes = [(x0, y0, x1, y1) for y0, y1 in lines for x0, x1 in columns]
    cut = [grid.crop(box).convert("RGB") for box in boxes if opaque[box[1] : box[3], box[0] : box[2]].any()]
    return cut or [grid.convert("RGB")]


def data_uri(image: Image.Image) -> str:
    """The picture as a `data:` address: small ones exactly (PNG), large ones shrunk to TILE px (JPEG)."""
    buffer = io.BytesIO()
    if max(image.size) > TILE:
        image = image.copy()
        image.thumbnail((TILE, TILE))
        image.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    else:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw(axes: matplotlib.axes.Axes, line: Line) -> None:
    color = _SLOTS[line.slot % NUM_SLOTS]
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    y = np.where(np.isfinite(y), y, np.nan)
    if line.is_background:
        axes.plot(x, y, color=color, linewidth=0.9, alpha=0.3)
        return
    if line.low is not None and line.high is not None:
        axes.fill_between(x, np.asarray(line.low, float), np.asarray(line.high, float), color=color, alpha=0.15, lw=0)
    axes.plot(x, y, color=color, linewidth=2, marker=MARKERS[line.slot % NUM_SLOTS], markersize=4.5)
    for point, text in line.notes:
        if math.isfinite(x[point]) and math.isfinite(y[point]):
            axes.annotate(text, (x[point], y[point]), (7, -3), textcoords="offset points", color=color, fontsize=9)


def _inline(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_RULE, "var(--rule)")
    for i, color in enumerate(_SLOTS):
        svg = svg.replace(color, f"var(--run-{i})")
    size = re.search(r'viewBox="[^"]*"', svg)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
    return f'{head}aria-label="{label}" {size.group(0) if size else ""}{svg[svg.index(">") :]}'


def _spans(filled: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], filled, [False]]).astype(int)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
