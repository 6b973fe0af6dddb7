"""The commands that read finished runs and train nothing: report, compare, gauge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsaft.cli.arguments import check_run, say
from rsaft.errors import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories to show side by side.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; RUN/report.html by default.")] = None,
) -> None:
    """Write an HTML report of runs, side by side."""
    for run in runs:
        check_run(run)
    if out is not None and out.is_dir():
        raise ConfigError(f"out: '{out}' is a folder, and a file is needed, as in {out / 'report.html'}.")
    from rsaft.metrics.report import write_report

    target = out if out is not None else runs[0] / "report.html"
    write_report(runs, target, title=", ".join(run.resolve().name for run in runs))
    say(f"report {target}")


def gauge(
    source: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run directory, or a folder of images.")],
    base: Annotated[Path | None, typer.Option(help="The untuned model's images, for a folder of images.")] = None,
    share: Annotated[float | None, typer.Option(help="Of the stop rule; the run's own by default.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Of the stop rule; the run's own by default.")] = None,
) -> None:
    """Read the hacking gauge: of a run, when it began to be hacked and what to keep; of images, their statistics."""
    from rsaft.cli.gauge import gauge_folder, gauge_run

    is_run = (source / "metrics.jsonl").is_file()
    if is_run and base is not None:
        raise ConfigError("gauge: --base is for a folder of images; a run's first evaluation is of its base.")
    if is_run:
        say(gauge_run(source, share=share, patience=patience))
    else:
        say(gauge_folder(source, base))


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished run directories; the first one's group comes first."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html|FOLDER",
            help="Also write the page and, beside it, every number as JSON; nothing by default.",
        ),
    ] = None,
) -> None:
    """Compare runs over seeds, at the same update and at the same train reward.

    Runs that differ only in train.seed are one group; each group is compared with the first, seed by seed.
    """
    from rsaft.cli.compare import compare_runs

    text, written = compare_runs(runs, out)
    say(text.rstrip())
    for path in written:
        say(f"wrote {path}")
