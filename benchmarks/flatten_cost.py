"""What each mode of RSA-FT costs against a plain step of each trainer, in one process, and what it is worth.

    python -m benchmarks.flatten_cost
    python -m benchmarks.flatten_cost --problems narrow --trainers drtune --modes weight "weight, share 1/16"

Two models: the fashion testbed at T = 50, and a UNet of Stable Diffusion 1.5's shape with reduced width at T = 20.
Modes take turns, update by update, so that a busy machine slows all of them alike; the figures are means over the
updates after the first, which draw the same truncation in every mode. A mode whose epsilon serves n updates makes each
update twice, with a new epsilon and with that one kept: it costs (new + (n - 1) kept) / n. Seconds are CPU seconds of
the one thread (wall seconds on a GPU). Peak memory is the process's own high-water mark above its level before the
update (allocated GPU memory on a GPU). The outcome column is gold at matched train reward on the frozen testbed, from
the finished study. The results are written after each problem and trainer; those of earlier calls stay.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.controls import CoarseFirstPass, FriendlySAM, LookSAM
from benchmarks.cost_problems import PROBLEMS, Problem
from benchmarks.testbed_tables import GOLD, at_reward
from rsaft.flatten import RSAFT
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ImageScore, ReFL, WeightedSum, plain_step
from rsaft.sampling import Sampling
from rsaft.types import Algorithm, Batch, Step

# Authors' settings; without gradient checkpointing, which would be the same in all modes.
TRAINERS: dict[str, Callable[[Sampling], Algorithm]] = {
    "draft": lambda sampling: DRaFT(k=1, sampling=sampling),
    "refl": lambda sampling: ReFL(sampling=sampling),
    "alignprop": lambda sampling: AlignProp(sampling=sampling, gradient_checkpointing=False),
    "drtune": lambda sampling: DRTune(sampling=sampling),
}


@dataclass(frozen=True)
class Mode:
    """A step, and what `benchmarks.testbed_study` calls it."""

    step: Step
    study: str
    every: int = 1  # updates that one epsilon serves


def modes(rho: float, rho_w: float) -> dict[str, Mode]:
    """All modes at the given radii; cost does not depend on them, the outcome does."""

    def weight(study: str, **options: Any) -> Mode:
        step = RSAFT(0.0, rho_w, mode="weight", **options)
        return Mode(step, f"{study}-{rho_w:g}", step.eps_every)

    return {
        "plain": Mode(plain_step, "plain"),
        "input": Mode(RSAFT(rho, 0.0, mode="input"), f"input-{rho:g}"),
        "weight": weight("weight"),
        "both": Mode(RSAFT(rho, rho_w, mode="both"), f"both-{rho:g}-{rho_w:g}"),
        "weight, cached": weight("cached", reuse="cached"),
        "weight, last 3": weight("last3", reuse=3),
        "weight, share 1/4": weight("share4", eps_share=1 / 4),
        "weight, share 1/16": weight("share16", eps_share=1 / 16),
        "weight, every 4": weight("every4", eps_every=4),
        "weight, every 16": weight("every16", eps_every=16),
        "weight, share 1/16, every 4": weight("share16every4", eps_share=1 / 16, eps_every=4),
        "weight, LookSAM every 4": Mode(LookSAM(rho_w, every=4), f"looksam4-{rho_w:g}", every=4),
        "weight, F-SAM": Mode(FriendlySAM(rho_w), f"fsam-{rho_w:g}"),
        "weight, first pass of 3 steps": Mode(CoarseFirstPass(rho_w, 3), f"coarse3-{rho_w:g}"),
    }


def peak_memory(device: torch.device) -> tuple[Callable[[], None], Callable[[], float]]:
    """(reset, MiB above the level at the reset)."""
    if device.type == "cuda":
        base = [0]

        def reset() -> None:
            torch.cuda.reset_peak_memory_stats(device)
            base[0] = torch.cuda.memory_allocated(device)

        return reset, lambda: (torch.cuda.max_memory_allocated(device) - base[0]) / 2**20
    level = [0.0]

    def read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    def restart() -> None:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier updates freed, which would hide this one's peak
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM
        level[0] = read("VmRSS")

    return restart, lambda: read("VmHWM") - level[0]


def measure(
    problem: Problem, algorithm: Algorithm, chosen: Mapping[str, Mode], repeats: int
) -> dict[str, dict[str, float]]:
    """Means of each mode; they take turns, update by update."""
    states: dict[str, Any] = dict.fromkeys(chosen)
    seen: dict[str, list[Update]] = {name: [] for name in chosen}
    for update in range(1 + repeats):  # one to warm up
        for name, mode in chosen.items():
            if mode.every == 1:
                found, states[name] = one_update(problem, algorithm, mode.step, update, states[name])
            else:
                new, state = one_update(problem, algorithm, mode.step, update, None)
                kept, _ = one_update(problem, algorithm, mode.step, update, state)
                found = of_a_period(new, kept, mode.every)
            print(
                f"{problem.title}: update {update} of {repeats}, {name}: {found.seconds:.2f} s",
                file=sys.stderr,
                flush=True,
            )
            if update:
                seen[name].append(found)
    seconds = {name: statistics.fmean(u.seconds for u in found) for name, found in seen.items()}
    return {
        name: {
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds["plain"],
            "calls": statistics.fmean(u.calls for u in found),
            "peak_mib": statistics.median(u.peak_mib for u in found),
        }
        for name, found in seen.items()
    }


@dataclass(frozen=True)
class Update:
    """What one update took."""

    seconds: float
    calls: float  # of the network, for one sample
    peak_mib: float


def of_a_period(new: Update, kept: Update, every: int) -> Update:
    """The mean over the updates that one epsilon serves, of which the first makes it; memory is the larger one."""
    seconds, calls = ((a + (every - 1) * b) / every for a, b in [(new.seconds, kept.seconds), (new.calls, kept.calls)])
    return Update(seconds, calls, max(new.peak_mib, kept.peak_mib))


def one_update(problem: Problem, algorithm: Algorithm, step: Step, update: int, state: Any) -> tuple[Update, Any]:
    """One update without the optimizer, and the step's state."""
    for p in problem.backbone.parameters():
        p.grad = None
    ids = tuple(range(problem.batch_size))
    prompts = tuple(problem.prompts[i % len(problem.prompts)] for i in ids)
    score = ImageScore(problem.backbone, {"r": problem.reward}, WeightedSum({"r": 1.0}))
    rollout = algorithm.rollout(problem.backbone, Batch(prompts, ids, step=update, seed=0))
    on_gpu = problem.backbone.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    rows: list[int] = []
    hook = problem.backbone.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    reset, peak = peak_memory(problem.backbone.device)
    reset()
    begun = clock()
    state = step([rollout], score, problem.backbone.parameters(), state).state
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - begun
    hook.remove()
    return Update(seconds, sum(rows) / problem.batch_size, peak()), state


def outcomes(study: Path, level: float, trainer: str, chosen: Mapping[str, Mode]) -> dict[str, str]:
    """Gold where the train reward is `level`, for each mode that the finished study of a trainer holds."""
    if not study.exists():
        return {}
    stored = json.loads(study.read_text())["cells"]
    cells = {name: {int(seed): cell for seed, cell in runs.items()} for name, runs in stored.items()}  # keys are text
    prefix = "" if trainer == "draft" else f"{trainer}:"
    own = {name.removeprefix(prefix): runs for name, runs in cells.items() if name.startswith(prefix)}
    own = {name: runs for name, runs in own.items() if ":" not in name}
    if "plain" not in own:
        return {}
    found = at_reward(own, GOLD, level)
    return {name: found[mode.study].text for name, mode in chosen.items() if mode.study in found}


RECORD, ROW = {"title", "measured", "outcome", "modes"}, {"seconds", "ratio", "calls", "peak_mib", "outcome"}


def earlier(file: Path) -> dict[str, Any]:
    """The results of earlier calls; those that lack a figure of today's table are left out, with a printed sentence."""
    stored = json.loads(file.read_text()) if file.exists() else {}
    whole = {
        name: found
        for name, found in stored.items()
        if found.keys() >= RECORD and all(row.keys() >= ROW for row in found["modes"].values())
    }
    if left := sorted(stored.keys() - whole.keys()):
        print(f"{file}: {', '.join(left)} were measured by an older version and lack figures; they are left out.")
    return whole


def page(results: Mapping[str, Any]) -> str:
    """The Markdown of all problems measured so far."""
    lines = ["# Cost of RSA-FT against a plain step"]
    for found in results.values():
        lines += [
            "",
            f"## {found['title']}",
            "",
            f"{found['measured']}.",
            "",
            f"| mode | network calls a sample | s | x plain | peak MiB | {found['outcome']} |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in found["modes"].items():
            worth = row["outcome"] or ("not measured" if found["outcome"] else "")
            lines.append(
                f"| {name} | {row['calls']:.1f} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['peak_mib']:.0f} "
                f"| {worth} |"
            )
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--modes", nargs="+", metavar="MODE", help=f"plain and these: {'; '.join(modes(1, 1))}")
    parser.add_argument("--repeats", type=int, default=4, help="timed updates")
    parser.add_argument("--steps", type=int, help="sampling steps; by default 50 for fashion and 20 for narrow")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rho", type=float, default=1.0, help="radius of the input modes, for the outcome")
    parser.add_argument("--rho-w", type=float, default=0.01, help="radius of the weight modes, for the outcome")
    parser.add_argument("--study", type=Path, default=Path("benchmarks/results/rsa_ft_fashion.json"))
    parser.add_argument("--level", type=float, default=1.0, help="train reward at which gold is compared")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: counts timed updates, so at least 1; got {args.repeats}")
    if unknown := set(args.modes or ()) - set(modes(args.rho, args.rho_w)):
        parser.error(f"--modes: there is no {sorted(unknown)}; allowed are {list(modes(args.rho, args.rho_w))}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, one thread"
    every = modes(args.rho, args.rho_w)
    chosen = {name: mode for name, mode in every.items() if name == "plain" or name in (args.modes or every)}
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "flatten_cost.json"
    results = earlier(file)
    for name in args.problems:
        make, num_steps = PROBLEMS[name]
        problem = make(args.steps or num_steps, args.batch)
        for trainer in args.trainers:
            algorithm = TRAINERS[trainer](Sampling(num_steps=problem.num_steps, guidance=1.0))
            worth = outcomes(args.study, args.level, trainer, chosen) if name == "fashion" else {}
            rows = measure(problem, algorithm, chosen, args.repeats)
            results[f"{name}, {trainer}"] = {
                "title": f"{algorithm.__class__.__name__}: {problem.title}",
                "measured": f"{date.today()}, {hardware}, torch {torch.__version__}; {args.repeats} updates in turns",
                "outcome": f"gold at train reward {args.level:g} (difference to plain)" if worth else "",
                "modes": {mode: row | {"outcome": worth.get(mode)} for mode, row in rows.items()},
            }
            file.write_text(json.dumps(results, indent=1) + "\n")
            (args.results / "flatten_cost.md").write_text(page(results))
            print(page({name: results[f"{name}, {trainer}"]}), flush=True)


if __name__ == "__main__":
    main()
