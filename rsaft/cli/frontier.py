"""The arguments of `rsaft frontier`. Imports nothing that is slow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rsaft.cli.arguments import Settings, Tiny, config_from, say


def frontier(
    settings: Settings,
    out: Annotated[
        Path, typer.Option(help="Folder of the frontiers, for objective.frontiers; the same command goes on there.")
    ],
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Images of each prompt; 50, with --tiny 4. A larger one adds to those."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time, on each process.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    tiny: Tiny = False,
) -> None:
    """Sample and score each training prompt's images of the untrained model, and keep the frontiers of the rewards.

    For example: rsaft frontier configs/sd35/pareto.yaml --out runs/frontiers/sd35-pareto
    """
    _, config = config_from(settings, tiny=tiny)
    from rsaft.cli.frontier_run import SAMPLES, TINY_SAMPLES, planned, run_frontier

    samples = n or (TINY_SAMPLES if tiny else SAMPLES)
    code = run_frontier(planned(config, out, n=samples, batch=batch, seed=seed, tiny=tiny), say)
    if code:
        sys.exit(code)
