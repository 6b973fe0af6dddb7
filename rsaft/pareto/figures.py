"""Pictures of frontiers: a few prompts' samples pair by pair of rewards, and the bounds of all prompts.

They show what PG-OT's Figures 3, 6 and 8 are about: with several rewards many samples are "optimal", and each prompt
has bounds of its own.
"""

from __future__ import annotations

import io
import itertools
import warnings

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rsaft.pareto.dominance import non_dominated
from rsaft.pareto.frontier import FrontierStore

COLUMNS = 3  # prompts that are shown, spread over the store
MOST_PAIRS = 10  # of rewards, the first ones
MOST_BOUNDS = 60  # prompts in the panel of bounds, spread over the store
TITLE = 34  # characters of a prompt

SAMPLE, FRONT, STAIR, LOW = "0.72", "#b3001b", "0.15", "#1f5aa6"


def frontier_figure(store: FrontierStore) -> Figure:
    """One panel for each shown prompt and each pair of rewards, and one below with the bounds of the prompts.

    A panel's scatters are all samples, and those on the frontier of all rewards; its line is the frontier of the pair.
    The last panel's scatters are the ideals and the nadirs.
    """
    pairs = list(itertools.combinations(range(len(store.names)), 2))[:MOST_PAIRS]
    shown = spread(len(store.prompts), COLUMNS)
    lines = len(pairs)
    height = 2.1 * lines + 2.9
    figure = Figure(figsize=(7.5, height))
    grid = figure.add_gridspec(  # fixed: a fitted layout costs as much as two drawings
        lines + 1, len(shown), height_ratios=[1.0] * lines + [1.25], wspace=0.3, hspace=0.32, left=0.08, right=0.985,
        top=1 - 0.3 / height, bottom=0.3 / height,
    )  # fmt: skip
    for line, pair in enumerate(pairs):
        for column, row in enumerate(shown):
            axes = figure.add_subplot(grid[line, column])
            draw_pair(axes, store, row, pair)
            if line == 0:
                axes.set_title(shortened(store.prompts[row]), fontsize=8, parse_math=False)
            if line == column == 0:
                axes.legend(fontsize=6, loc="lower left", framealpha=0.8, handlelength=1.2)
    draw_bounds(figure.add_subplot(grid[lines, :]), store)
    return figure


def frontier_picture(store: FrontierStore) -> bytes:
    """`frontier_figure` as PNG, for print."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a prompt in a script that the font lacks
        frontier_figure(store).savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def draw_pair(axes: Axes, store: FrontierStore, row: int, pair: tuple[int, int]) -> None:
    """One prompt's samples in two rewards."""
    values = store.rewards[row][store.mask[row]]
    x, y = (values[:, k] for k in pair)
    on_all, on_pair = non_dominated(values), non_dominated(values[:, list(pair)])
    order = x[on_pair].argsort()
    axes.scatter(x, y, s=9, color=SAMPLE, linewidths=0, label="all samples")
    axes.scatter(x[on_all], y[on_all], s=11, color=FRONT, linewidths=0, label="on the frontier of all rewards")
    # What lies below and to the left of the steps is dominated: each step reaches left from its point.
    axes.plot(
        x[on_pair][order], y[on_pair][order], drawstyle="steps-pre", color=STAIR, lw=1, label="frontier of these two"
    )
    _labelled(axes, store.names[pair[0]], store.names[pair[1]])


def draw_bounds(axes: Axes, store: FrontierStore) -> None:
    """Each prompt's ideal and nadir in each reward, as deviations within a prompt from the mean of all prompts."""
    rows = spread(len(store.prompts), MOST_BOUNDS)
    ideal, nadir = bounds(store)
    pool, mask = store.pool(store.prompts, store.names)
    middle = pool.sum(dim=(0, 1)) / mask.sum()
    scale = store.scales("prompt_pool", store.prompts[:1], store.names)[0]
    high, low = ((values - middle) / scale for values in (ideal[rows], nadir[rows]))
    places = torch.linspace(-0.36, 0.36, len(rows), dtype=torch.float64) if len(rows) > 1 else torch.zeros(1)
    x = torch.stack([k + places for k in range(len(store.names))], dim=1)
    order = high.argsort(dim=0)  # each reward's prompts by their ideal
    high, low = high.gather(0, order), low.gather(0, order)
    axes.vlines(x.flatten().numpy(), low.flatten().numpy(), high.flatten().numpy(), color=SAMPLE, lw=0.8)
    axes.scatter(x.flatten().numpy(), high.flatten().numpy(), s=10, marker="^", color=FRONT, lw=0, label="ideal")
    axes.scatter(x.flatten().numpy(), low.flatten().numpy(), s=10, marker="v", color=LOW, lw=0, label="nadir")
    axes.set_xticks(range(len(store.names)), store.names)
    axes.set_title(f"bounds of {len(rows)} prompts, by their ideal", fontsize=8)
    axes.legend(fontsize=6, loc="lower right", framealpha=0.8)
    _labelled(axes, "", "deviations within a prompt")


def bounds(store: FrontierStore) -> tuple[Float[Tensor, "p m"], Float[Tensor, "p m"]]:
    """The best and the worst value of each reward on each prompt's frontier: ideal and nadir."""
    front, mask = store.frontiers(store.prompts, store.names)
    known = mask[..., None]
    return (
        front.masked_fill(~known, -torch.inf).amax(dim=1),
        front.masked_fill(~known, torch.inf).amin(dim=1),
    )


def spread(n: int, most: int) -> list[int]:
    """At most `most` of 0..n-1, evenly spaced, ends included."""
    return list(range(n)) if n <= most else torch.linspace(0, n - 1, most).round().long().tolist()


def shortened(prompt: str) -> str:
    """One line of a prompt."""
    text = " ".join(prompt.split())
    return text if len(text) <= TITLE else text[: TITLE - 3] + "..."


def _labelled(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=7, labelpad=1, parse_math=False)
    axes.set_ylabel(y, fontsize=7, labelpad=1, parse_math=False)
    axes.tick_params(labelsize=6, length=2)
    axes.locator_params(axis="y", nbins=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
