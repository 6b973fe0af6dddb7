"""The demo: watch a reward being hacked, and what RSA-FT changes, on two CPU cores in a few minutes.

DRaFT-1 fine-tunes the testbed's diffusion model on its learned reward twice from the same seed: plain, and with weight
flattening. Two processes with one thread each; the parent shows their progress and compares them when they are done.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from rsaft.errors import ConfigError, RsaftError
from rsaft.files import write_atomic
from rsaft.flatten import RSAFT
from rsaft.metrics import at_matched_reward, common_levels, write_report
from rsaft.metrics.records import GOLD, Run, curve, read_records, read_run, train_reward
from rsaft.metrics.report import shown
from rsaft.rdrl import DRaFT, WeightedSum, plain_step
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.run_directory import write_json_atomic
from rsaft.rdrl.run_result import RunResult
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from rsaft.testbed.processes import Job, run_side_by_side

if TYPE_CHECKING:
    from rsaft.testbed import Testbed

STEPS = 120  # updates of each run
SAMPLING = Sampling(num_steps=10, guidance=1.0)
TRAIN = TrainConfig(
    steps=STEPS,
    seed=0,
    batch_size=16,
    eval_every=20,
    eval_samples=96,
    eval_batch=32,
    sharpness_rho=0.1,
    save_every=20,
    keep=1,
)
LR = {"fashion": 1e-4, "shapes": 2e-5}  # the hacking of each world fits into STEPS updates (docs/testbed.md)
STEP_RULES = {"plain": None, "rsaft": RSAFT(rho=0.0, rho_w=0.01, mode="weight", eps_share=1 / 16)}

HEADER = "# A run of the rsaft demo.\n"  # first line of a run's config.yaml: what `fresh` may delete


def main(
    out: Path = Path("runs/demo"),
    *,
    steps: int | None = None,
    world: str = "fashion",
    fresh: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run the demo, write `out`/report.html and `out`/summary.json, print a table, and return the summary.

    Runs that are done are not done again, and runs that were stopped go on where they were.

    Args:
        out: folder of the demo; the runs lie in `out`/plain and `out`/rsaft.
        steps: updates of each run; STEPS by default.
        world: a testbed, see `rsaft.testbed.load`.
        fresh: delete the demo's own runs in `out` first.
        threads: CPU threads in all. Each run takes one; with 1, one run follows the other.

    Raises:
        ConfigError: if `out` holds runs with other settings, or something else.
        RsaftError: if a run failed.
        SystemExit: 130 after Ctrl-C and 143 after SIGTERM; the runs were saved.

    Cost: two trainings; peak memory about 1.5 GB.
    """
    out = Path(out)
    count = STEPS if steps is None else steps
    if world not in LR:
        raise ConfigError(f"demo: there is no world {world!r}; allowed: {', '.join(LR)}.")
    if count < 1:
        raise ConfigError(f"demo: steps counts updates, so steps >= 1; got {count}.")
    if threads is not None and threads < 1:
        raise ConfigError(f"demo: threads >= 1; got {threads}.")
    todo = [name for name in STEP_RULES if prepare(out / name, settings(name, world, count), fresh=fresh)]
    jobs = {name: Job(child_command(out, name, world, count), out / name) for name in todo}
    console = Console(stderr=True, highlight=False)
    console.print(f"rsaft demo: {world}, {count} updates; plain and RSA-FT from the same seed")
    for group in [{name: job} for name, job in jobs.items()] if threads == 1 else [jobs]:
        run_side_by_side(group, total=count, console=console)
    runs = [read_run(out / name) for name in STEP_RULES]
    summary = summarize(runs, {name: settings(name, world, count) for name in STEP_RULES})
    report = write_report([run.path for run in runs], out / "report.html", title=f"rsaft demo: {world}")
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_atomic(out / "summary.json", text.encode("utf-8"))
    Console(highlight=False).print(results_table(summary))
    print(f"report: {report}")
    return summary


def settings(name: str, world: str, steps: int) -> dict[str, Any]:
    """Everything that decides the result of a run."""
    rule = STEP_RULES[name]
    return {
        "world": world,
        "algorithm": {"type": "draft"} | asdict(DRaFT(k=1, sampling=SAMPLING)),
        "step": {"type": "plain"} if rule is None else {"type": "rsaft"} | asdict(rule),
        "train": asdict(train_config(world, steps)) | {"betas": list(TRAIN.betas), "trackers": list(TRAIN.trackers)},
    }


def train_config(world: str, steps: int) -> TrainConfig:
    """TRAIN with the world's learning rate."""
    return replace(TRAIN, lr=LR[world], steps=steps)


def train_one(testbed: Testbed, name: str, run_dir: Path, steps: int) -> RunResult:
    """Train one of STEP_RULES in this process, from its newest checkpoint if it has one."""
    trainer = Trainer(
        testbed.backbone,  # type: ignore[arg-type]  # the testbed's backbone is a DiffusersBackbone
        algorithm=DRaFT(k=1, sampling=SAMPLING),
        rewards={"proxy": testbed.reward},
        objective=WeightedSum({"proxy": 1.0}),
        step=STEP_RULES[name] or plain_step,
        prompts=testbed.prompts_train,
        eval_prompts=testbed.prompts_eval,
        held_out={"gold": testbed.gold, **testbed.held_out},
        measures={"gold": testbed.gold.parts},  # type: ignore[attr-defined]  # every gold judge has parts
        config=train_config(testbed.name, steps),
        run_dir=run_dir,
        description=_description(settings(name, testbed.name, steps)),
    )
    return trainer.fit(resume=True)


def prepare(run_dir: Path, wanted: Mapping[str, Any], *, fresh: bool) -> bool:
    """Make the run directory, and tell whether there is anything left to train.

    Raises:
        ConfigError: if the directory holds a run with other settings, or none of the demo's.
    """
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if run_dir.exists() and any(run_dir.iterdir()) and not text.startswith(HEADER):
        raise ConfigError(f"demo: {run_dir} holds something that is no run of the demo; choose another --out.")
    if fresh and run_dir.exists():
        shutil.rmtree(run_dir)
    elif text and text != _description(wanted):
        raise ConfigError(
            f"demo: {run_dir} holds a run with other settings; choose another --out, or replace it with --fresh."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(config, _description(wanted).encode("utf-8"))
    records = _lines(run_dir / "metrics.jsonl")
    saved = (run_dir / "checkpoints" / f"step-{wanted['train']['steps']:06d}").is_dir()
    return not (saved and any(r.get("kind") == "eval" and r["step"] == wanted["train"]["steps"] for r in records))


def child_command(out: Path, name: str, world: str, steps: int) -> list[str]:
    """The command that trains one run."""
    return [sys.executable, "-m", "rsaft.testbed.demo", "--only", name, "--out", str(out), "--world", world,
            "--steps", str(steps)]  # fmt: skip


def summarize(runs: Sequence[Run], settings_of: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What summary.json holds; None stands for a value that no evaluation gives."""
    rewards = [train_reward(run) for run in runs]
    levels = common_levels(rewards)
    results = {}
    for run, reward in zip(runs, rewards, strict=True):
        steps, gold = curve(run.evals, GOLD)
        matched = at_matched_reward(reward, gold, levels)
        times = [record["seconds"] for record in _lines(run.path / "timing.jsonl") if "seconds" in record]
        clock = run.path / "wall.json"
        results[run.name] = {
            "gold": _start_peak_end(steps, gold),
            "train_reward": _start_peak_end(steps, reward),
            "held_out": {
                key.removeprefix("held_out/"): _start_peak_end(*curve(run.evals, key))
                for key in run.keys("held_out/")
                if key != GOLD
            },
            "gauge": _kept(run, steps, gold),
            "gold_at_train_reward": {str(level): value for level, value in zip(levels, matched, strict=True)},
            "wall_seconds": json.loads(clock.read_text())["seconds"] if clock.is_file() else None,
            "seconds_per_update": round(statistics.median(times), 4) if times else None,
            "seed": settings_of[run.name]["train"]["seed"],
            "settings": settings_of[run.name],
        }
    return {"format": 1, "levels": levels, "runs": results}


def results_table(summary: Mapping[str, Any]) -> Table:
    """The summary as a person reads it."""
    levels = summary["levels"][-1:]
    table = Table(
        title="train reward, and gold: the truth that it stands for",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    table.add_column("\nrun", no_wrap=True)
    heads = ["reward\nend", "gold\nstart", "\nbest", "\nend", "gauge\nkeeps"]
    for head in [*heads, *(f"at reward\n{level:g}" for level in levels), "\nseconds"]:
        table.add_column(head, justify="right", no_wrap=True)
    for name, run in summary["runs"].items():
        gold = run["gold"]
        table.add_row(
            name,
            shown(run["train_reward"]["end"]),
            shown(gold["start"]),
            _at(gold["peak"], gold["peak_step"]),
            shown(gold["end"]),
            _at(run["gauge"]["gold"], run["gauge"]["keep_step"]),
            *(shown(run["gold_at_train_reward"][str(level)]) for level in levels),
            "–" if run["wall_seconds"] is None else f"{run['wall_seconds']:.0f}",
        )
    return table


def _at(value: float | None, step: int | None) -> str:
    return shown(value) if step is None else f"{shown(value)} @{step}"


def _start_peak_end(steps: Sequence[int], values: Sequence[float]) -> dict[str, float | int | None]:
    points = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not points:
        return dict.fromkeys(("start", "peak", "peak_step", "end"))
    peak, step = max(points, key=lambda point: point[0])
    return {"start": points[0][0], "peak": peak, "peak_step": step, "end": points[-1][0]}


def _kept(run: Run, steps: Sequence[int], gold: Sequence[float]) -> dict[str, float | int | None]:
    """What the hacking gauge says, without having seen gold: the update to keep, with gold there, and its alarm."""
    kept = [step for step in curve(run.evals, "gauge/keep_step")[1] if math.isfinite(step)]
    alarms = [step for step, alarm in zip(*curve(run.evals, "gauge/alarm"), strict=True) if alarm == 1]
    keep = int(kept[-1]) if kept else None
    return {
        "keep_step": keep,
        "gold": dict(zip(steps, gold, strict=True)).get(keep) if keep is not None else None,
        "alarm_step": alarms[0] if alarms else None,
    }


def _description(wanted: Mapping[str, Any]) -> str:
    return HEADER + yaml.safe_dump(dict(wanted), sort_keys=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_records(path) if path.is_file() else []


def _train_in_this_process(name: str, out: Path, world: str, steps: int) -> int:
    """Train one run and add the seconds to its wall.json; the exit code."""
    import torch

    from rsaft.testbed import load

    begun = time.monotonic()
    torch.set_num_threads(1)
    result = train_one(load(world), name, out / name, steps)
    clock = out / name / "wall.json"
    before = json.loads(clock.read_text())["seconds"] if clock.is_file() else 0.0
    write_json_atomic(clock, {"seconds": round(before + time.monotonic() - begun, 2)})
    return 0 if result.signal is None else 128 + result.signal


def _command_line(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rsaft.testbed.demo", description="Watch a reward being hacked, and RSA-FT hold against it."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--world", default="fashion", help="testbed world")
    parser.add_argument("--steps", type=int, help=f"updates of each run ({STEPS})")
    parser.add_argument("--threads", type=int, help="CPU threads in all; 1 trains one run after the other")
    parser.add_argument("--fresh", action="store_true", help="delete the demo's own runs first")
    parser.add_argument("--only", choices=list(STEP_RULES), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.only:
            return _train_in_this_process(given.only, given.out, given.world, given.steps or STEPS)
        main(given.out, steps=given.steps, world=given.world, fresh=given.fresh, threads=given.threads)
    except RsaftError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(_command_line())
