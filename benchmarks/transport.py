"""What frontiers and transport plans cost: ours, a loop over POT, and POT's batch solver, on one and two threads.

    python -m benchmarks.transport
    python -m benchmarks.transport --threads 1 --rounds 3

The plans: 64 prompts, 24 samples and 50 frontier points each, 4 rewards, reg 0.05. All 50 candidates lie on a sphere,
so all are on the frontier. Each solver gets the loosest tolerance of its own with which its marginal error, |row sums -
a|_1 + |column sums - b|_1 of the worst prompt, is at most 1e-6; the error reached is in the table. POT's loop gets
numpy arrays, which is its fastest way. "Frontier and loss" is what training adds to an update: the frontier of the
candidates, the cost of the samples, the plan, sum(plan * cost), and its gradient with respect to the samples' rewards.

Solvers take turns in one process, round by round; the figures are medians over the rounds after the first. With one
thread they are seconds of CPU, so that a busy machine changes them little; with more, wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import ot
import ot.batch
import torch
from torch import Tensor

from rsaft.pareto import non_dominated, sinkhorn

PROMPTS, SAMPLES, POINTS, REWARDS, REG, ERROR = 64, 24, 50, 4, 0.05, 1e-6
TOLERANCES = (1e-6, 3e-7, 1e-7, 3e-8, 1e-8)  # of POT, which stops by other norms of the error
Solver = Callable[[], Tensor]


def on_sphere(generator: torch.Generator, *shape: int) -> Tensor:
    """Points that no other point of the sphere dominates."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).abs()
    return 2 * x / x.norm(dim=-1, keepdim=True)


def squared_distance(r: Tensor, frontier: Tensor) -> Tensor:
    return r.square().sum(2)[:, :, None] + frontier.square().sum(2)[:, None] - 2 * r @ frontier.mT


def pot_loop(cost: Tensor, tol: float) -> Tensor:
    a, b = np.full(SAMPLES, 1 / SAMPLES), np.full(POINTS, 1 / POINTS)
    plans = [
        ot.sinkhorn(a, b, c, REG * c.mean(), method="sinkhorn_log", numItermax=10_000, stopThr=tol)
        for c in cost.numpy()
    ]
    return torch.from_numpy(np.stack(plans))


def pot_batch(cost: Tensor, tol: float) -> Tensor:
    unit = cost / cost.mean((1, 2), keepdim=True)  # it takes one eps for all prompts
    return ot.batch.solve_batch(unit, REG, method="log_sinkhorn", max_iter=10_000, tol=tol, grad="detach").plan


def frontier_and_loss(candidates: Tensor, samples: Tensor) -> Tensor:
    """The gradient of the transport loss with respect to the samples' rewards."""
    r = samples.detach().requires_grad_()
    cost = squared_distance(r, candidates)
    plan = sinkhorn(cost, b=non_dominated(candidates), tol=ERROR)
    (plan * cost).sum().backward()
    assert r.grad is not None
    return r.grad


def marginal_error(plan: Tensor) -> float:
    rows = (plan.double().sum(2) - 1 / SAMPLES).abs().sum(1)
    return float((rows + (plan.double().sum(1) - 1 / POINTS).abs().sum(1)).max())


def loosest(solve: Callable[[Tensor, float], Tensor], cost: Tensor) -> float:
    """The first tolerance that reaches ERROR."""
    return next(tol for tol in TOLERANCES if marginal_error(solve(cost, tol)) <= ERROR)


def problems() -> tuple[dict[str, Solver], dict[str, Solver]]:
    """What is timed: solvers of one transport problem, and the rest."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(PROMPTS, SAMPLES, REWARDS, generator=generator, dtype=torch.float64)
    candidates = on_sphere(generator, PROMPTS, POINTS, REWARDS)
    mixed = torch.randn(PROMPTS, POINTS, REWARDS, generator=generator, dtype=torch.float64)
    cost = squared_distance(samples, candidates)
    loop_tol, batch_tol = loosest(pot_loop, cost), loosest(pot_batch, cost)
    plans: dict[str, Solver] = {
        "rsaft.pareto.sinkhorn": lambda: sinkhorn(cost, reg=REG, tol=ERROR),
        "rsaft.pareto.sinkhorn, float32": lambda: sinkhorn(cost.float(), reg=REG, tol=ERROR),
        f"loop over ot.sinkhorn(method='sinkhorn_log', stopThr={loop_tol:g})": lambda: pot_loop(cost, loop_tol),
        f"ot.batch.solve_batch(tol={batch_tol:g})": lambda: pot_batch(cost, batch_tol),
    }
    many = torch.rand(10_000, REWARDS, generator=generator, dtype=torch.float64)
    sphere = on_sphere(generator, 10_000, REWARDS)
    shell = sphere * (1 + 0.05 * torch.randn(10_000, 1, generator=generator, dtype=torch.float64))
    rest: dict[str, Solver] = {
        "frontier and loss, 50 of 50 on the frontier": lambda: frontier_and_loss(candidates, samples),
        "frontier and loss, independent rewards": lambda: frontier_and_loss(mixed, samples),
        "frontiers of 64 x 50 x 4": lambda: non_dominated(candidates),
    }
    rest |= {
        f"frontier of 10,000 x 4, {name} ({int(non_dominated(r).sum())} on it)": lambda r=r: non_dominated(r)
        for name, r in {"independent": many, "anti-correlated": shell, "all on a sphere": sphere}.items()
    }
    return plans, rest


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Median milliseconds of everything, in turns."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    plans, rest = problems()
    seconds: dict[str, list[float]] = {name: [] for name in plans | rest}
    for _ in range(rounds + 1):
        for name, solve in (plans | rest).items():
            begun = clock()
            solve()
            seconds[name].append(clock() - begun)
    median = {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}
    ours = median["rsaft.pareto.sinkhorn"]
    rows = {
        name: {"ms": median[name], "times_ours": median[name] / ours, "error": marginal_error(solve())}
        for name, solve in plans.items()
    }
    return {"plans": rows, "rest_ms": {name: median[name] for name in rest}}


def processor() -> str:
    """The CPU's name and number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def page(results: dict[str, Any]) -> str:
    """The Markdown of the results."""
    lines = ["# Cost of frontiers and transport plans"]
    for threads, found in results.items():
        clock = "CPU" if threads == "1" else "wall"
        lines += ["", f"## {threads} thread{'' if threads == '1' else 's'}", "", f"{found['measured']}.", ""]
        lines += [
            f"| 64 plans of 24 x 50, reg 0.05 | {clock} ms | x ours | marginal error |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {k} | {v['ms']:.1f} | {v['times_ours']:.2f} | {v['error']:.1e} |" for k, v in found["plans"].items()
        ]
        lines += ["", f"| work | {clock} ms |", "|---|---|"]
        lines += [f"| {name} | {ms:.1f} |" for name, ms in found["rest_ms"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*Sinkhorn did not converge.*")  # while a tolerance is sought
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "transport.json"
    results = json.loads(file.read_text()) if file.exists() else {}  # thread counts of earlier calls stay
    for threads in args.threads:
        load = os.getloadavg()[0]
        where = f"{date.today()}, {processor()}, torch {torch.__version__}, POT {ot.__version__}"
        found = measure(args.rounds, threads)
        results[str(threads)] = {
            "measured": f"{where}; medians of {args.rounds} rounds; load {load:.1f} before"
        } | found
        file.write_text(json.dumps(results, indent=1) + "\n")
        (args.results / "transport.md").write_text(page(results))
    print(page(results), flush=True)


if __name__ == "__main__":
    main()
