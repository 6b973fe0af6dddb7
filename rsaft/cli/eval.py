"""The arguments of `rsaft eval`. Imports nothing that is slow."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from rsaft.errors import ConfigError

DTYPES = ("fp32", "bf16", "fp16", "fp64")


class ManyRewards(TyperCommand):
    """`--rewards a b c` is what `--rewards a --rewards b --rewards c` is: typer's options take one value each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, "--rewards"))


def spread(arguments: list[str], option: str) -> list[str]:
    """The arguments with `option` before each of the values that follow it, up to the next option."""
    result: list[str] = []
    taking = False
    for argument in arguments:
        if argument == option:
            taking = True
        elif taking and not argument.startswith("-"):
            result += [option, argument]
        else:
            taking = False
            result.append(argument)
    return result


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A run or one of its checkpoints, exported weights, a model as in model.path, or a folder of images.",
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A .txt, .jsonl, .csv or .tsv file, or testbed:fashion; the run's own by default."
        ),
    ] = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="hpsv2 and its like, my_pkg.mod:fn, testbed:fashion[:gold], or a YAML file with a section rewards; "
            "the run's own and held-out ones by default.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|none",
            help="What to pair with, at the same prompts and noises; by default the model that was tuned.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the scores; the same command goes on there. runs/eval/NAME-PROMPTS by default."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Of the checkpoint; the newest by default.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image of each prompt; the others count on.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the run's, or 50.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Guidance weight; the run's, or 7.5.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; the run's, or fp32.")] = None,
    save_images: Annotated[bool, typer.Option("--save-images", help="Keep the images, in OUT/images.")] = False,
) -> None:
    """Score a tuned model beside its base, or a folder of images.

    For example: rsaft eval runs/draft-1 --prompts PartiPrompts.tsv --rewards hpsv2 pickscore my_pkg.mod:fn
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("eval: it runs in one process; start it without torchrun, on a part of the prompts each.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: found '{dtype}', allowed are {', '.join(DTYPES)}.")
    from rsaft.cli.eval_run import Request, run_eval

    request = Request(
        source=source,
        prompts=prompts,
        rewards=tuple(rewards or ()),
        base=base,
        out=out,
        step=step,
        n=n,
        seed=seed,
        steps=steps,
        guidance=guidance,
        batch=batch,
        dtype=dtype,  # type: ignore[arg-type]
        save_images=save_images,
    )
    code = run_eval(request, lambda text: print(text, flush=True))
    if code:
        sys.exit(code)
