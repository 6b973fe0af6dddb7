"""The command line. torch and the rest are imported when a command needs them: `rsaft train --help` is immediate."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsaft.cli.arguments import (
    Settings,
    Tiny,
    check_run,
    config_from,
    rank,
    refuse_filled,
    run_directory,
    say,
    split_settings,
)
from rsaft.cli.complaints import complain
from rsaft.cli.eval import ManyRewards, evaluate
from rsaft.cli.frontier import frontier
from rsaft.cli.reading import compare, gauge, report
from rsaft.errors import ConfigError, RsaftError, RunDirectoryError

if TYPE_CHECKING:
    from rsaft.rdrl.run_result import RunResult

app = typer.Typer(
    name="rsaft",
    help="Fine-tune text-to-image models with rewards, without letting the reward be hacked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: a usage error stays one line, and help comes a third sooner
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to put the runs and the report.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of each run; the full demo by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads in all; all by default.")] = None,
    world: Annotated[str, typer.Option(help="fashion or shapes.")] = "fashion",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the demo's earlier runs in OUT first.")] = False,
) -> None:
    """Watch a reward being hacked, plain and with RSA-FT, on a CPU."""
    from rsaft.testbed import demo as demonstration

    demonstration.main(out=out, steps=steps, threads=threads, world=world, fresh=fresh)


@app.command()
def train(
    settings: Settings,
    run: Annotated[
        # --run-dir because torchrun takes --run for an abbreviation of an option of its own
        Path | None, typer.Option("--run", "--run-dir", help="Run directory; the first free runs/NAME-N by default.")
    ] = None,
    tiny: Tiny = False,
) -> None:
    """Train a model.

    For example: rsaft train configs/sd15/draft_lv.yaml configs/overlays/rsa_ft.yaml train.lr=1e-4 --run DIR
    """
    files, config = config_from(settings, tiny=tiny)
    from rsaft.config import build_trainer

    folder = run_directory(run, f"{files[0].stem}-tiny" if tiny else files[0].stem)
    say(f"run {folder}")
    _finish(build_trainer(config, folder).fit())


@app.command()
def check(settings: Settings, tiny: Tiny = False) -> None:
    """Try a run without training: load all of it, take one sample's gradients, and estimate the peak memory.

    For example: rsaft check configs/sdxl/draft_lv.yaml configs/overlays/rsa_ft.yaml
    """
    files, config = config_from(settings, tiny=tiny)
    say(f"config   {', '.join(map(str, files))}: valid")
    from rsaft.cli.check import check_run

    check_run(config, say)


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """Go on with a run from its newest good checkpoint."""
    config = _config_of(run)
    from rsaft.config import build_trainer

    _finish(build_trainer(config, run).fit(resume=True))


@app.command()
def sample(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a model as in model.path.")],
    prompts: Annotated[str, typer.Option(help="A .txt, .jsonl, .csv or .tsv file, or testbed:fashion.")],
    out: Annotated[Path, typer.Option(help="Where to put the images; an empty or new folder.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the run's, or 50.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Guidance weight; the run's, or 7.5.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    step: Annotated[int | None, typer.Option(min=0, help="Of a run's checkpoint; the newest by default.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The run's checkpoint that the gauge would keep.")] = False,
) -> None:
    """Write images of a run's checkpoint, or of a model."""
    refuse_filled(out, "out", "choose another folder")
    from rsaft.cli.samples import write_samples

    run = Path(source) if (Path(source) / "config.yaml").is_file() else None
    config = _config_of(run) if run is not None else None
    count = write_samples(
        config,
        run,
        model=source,
        prompts=prompts,
        out=out,
        n=n,
        seed=seed,
        step=_chosen(run, step, best),
        steps=steps,
        guidance=guidance,
        batch=batch,
    )
    say(f"{count} images in {out}, their prompts in {out / 'metadata.jsonl'}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    format: Annotated[str, typer.Option(help="diffusers, peft, merged or comfyui.")] = "diffusers",
    out: Annotated[
        Path | None, typer.Option(help="An empty or new folder; RUN/export/FORMAT-step-N by default.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Of the checkpoint; the newest by default.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint that the gauge would keep.")] = False,
) -> None:
    """Write a run's trained weights for diffusers, peft or ComfyUI, and prove that they load back."""
    config = _config_of(run)
    from rsaft.cli.export import export_run

    done, weights = export_run(config, run, format=format, out=out, step=_chosen(run, step, best))
    say(f"export {done.folder} ({weights})")
    say(f"largest difference from the trained model, reloaded: {done.difference:.3g}")
    say(f"load it: {done.load}")


@app.command()
def show(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG.yaml [KEY=VALUE]", help="As for train.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run files instead.")] = False,
) -> None:
    """Print the settings that files and overrides amount to.

    Nothing of the user's own is imported.
    """
    import json

    import yaml

    from rsaft.config import json_schema, load_config, to_dict

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    files, overrides = split_settings(settings or [])
    print(
        yaml.safe_dump(to_dict(load_config(files, overrides)), sort_keys=False, allow_unicode=True, width=120), end=""
    )


@app.command("list")
def list_types(
    what: Annotated[str | None, typer.Argument(help="rewards, trainers, steps, objectives or commands.")] = None,
) -> None:
    """List what a run file can name, and the commands."""
    from rsaft.config import TYPES
    from rsaft.config.messages import did_you_mean

    kinds = {"rewards": "reward", "trainers": "algorithm", "steps": "step", "objectives": "objective"}
    choices = [*kinds, "commands"]
    if what is not None and what not in choices:
        raise ConfigError(f"list: there are no '{what}'; allowed are {', '.join(choices)}{did_you_mean(what, choices)}")
    for name in choices if what is None else [what]:
        print(f"{name}:")
        entries = _commands() if name == "commands" else TYPES[kinds[name]]
        if name == "rewards":
            entries = {entry: _summary(where) for entry, where in entries.items()}
        for entry, text in entries.items():
            print(f"  {entry:<14}{text}")
        if name != "commands":
            print(f"  {'MODULE:NAME':<14}your own, importable from the working directory, with args: {{...}}")
        if name == "rewards":
            print("All but remote have a gradient, which ReFL, DRaFT, AlignProp and DRTune need.")


def _summary(where: str) -> str:
    """The first line of what is said of "module:Name"."""
    import importlib
    import inspect

    module, _, name = where.partition(":")
    return (inspect.getdoc(getattr(importlib.import_module(module), name)) or where).splitlines()[0]


app.command("eval", cls=ManyRewards)(evaluate)
for command in (report, compare, gauge, frontier):
    app.command()(command)


def main() -> None:
    """Run the command line; an error that a user can cause is one sentence, and an exit code.

    2: a setting, a file or a folder is wrong, or the disk is full. 1: a run failed on the way.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no word on optional packages that rsaft does without
    logging.basicConfig(format="%(message)s", level=logging.WARNING if rank() == 0 else logging.ERROR)
    try:
        sys.path.append(os.getcwd())  # so that `my_rewards:Sharpness` is found where rsaft is started
        app()
    except (ConfigError, RunDirectoryError, OSError) as error:
        complain(error)
        sys.exit(2)
    except RsaftError as error:
        complain(error)
        sys.exit(1)


def _finish(result: RunResult) -> None:
    """Say where the results are; end as a process that a signal stopped, if one did."""
    if result.signal is not None:
        say(f"stopped at step {result.step}; go on with: rsaft resume {result.run_dir}")
        sys.exit(128 + result.signal)
    if result.reading is not None and result.reading.alarm:
        say(result.reading.sentence)
    from rsaft.rdrl.run_result import evaluation_share

    share = evaluation_share(result.run_dir) or 0.0
    say(
        f"evaluations and the gauge: {share:.0%} of the time"
        + ("; a larger train.eval_every or fewer train.eval_samples cost less" if share > 0.1 else "")
    )
    say(f"done: {result.step} steps, best at {result.best_step}; {result.run_dir / 'report.html'}")


def _config_of(run: Path) -> Any:
    from rsaft.config import load_config

    check_run(run)
    return load_config([run / "config.yaml"], [])


def _chosen(run: Path | None, step: int | None, best: bool) -> int | None:
    """The step of the checkpoint that `--step` or `--best` names; None for the newest."""
    if not best and (step is None or run is not None):
        return step
    if run is None or step is not None:
        raise ConfigError("best: --best and --step each name one of a run's checkpoints; give a run, and one of them.")
    from rsaft.rdrl.trained import best_step_of

    return best_step_of(run)


def _commands() -> dict[str, str]:
    """Each command with the first line of its help."""
    commands = {}
    for command in app.registered_commands:
        if command.callback is not None:
            name = command.name or command.callback.__name__
            commands[name] = (command.callback.__doc__ or "").strip().partition("\n")[0]
    return commands
