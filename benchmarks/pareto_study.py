"""PG-OT and its baselines on the frozen testbed, four train rewards, equal numbers of updates: one JSON a cell.

    python -m benchmarks.pareto_study --world fashion --judges B/rewards --methods pg-ot sum-1111 separate --seeds 0 1
    python -m benchmarks.pareto_study --world fashion --tables

Trained on: `train` and `cnn2`, the strong ones by measured accuracy (docs/testbed.md), and `mixer` and `vit`, the weak.
Held out: the four rewards of set B (`python -m rsaft.testbed.build fashion --set B`), which share neither images nor
labels with these, and gold. DRaFT-1 with the testbed's settings; the 16 samples of an update are four of each of four
prompts. Frontiers: 50 samples a training prompt of the untuned model, made once for each world. Finished cells are
skipped; several processes may share one --out.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.testbed_study import SAMPLER, SETTINGS, TRAINERS, train_config
from rsaft import testbed
from rsaft.errors import RunDirectoryError
from rsaft.files import write_atomic
from rsaft.metrics import joint_collapse_rate, joint_domination_rate, win_rate
from rsaft.metrics.matched import mean_interval
from rsaft.pareto import (
    DecisionAgent,
    FrontierStore,
    ParetoTransport,
    SeparateConstraints,
    StatsJudge,
    WeightedSumBound,
)
from rsaft.rdrl import WeightedSum
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.run_directory import locked
from rsaft.sampling import sample
from rsaft.testbed.rewards import load_reward
from rsaft.types import Objective

STRONG, WEAK = ("train", "cnn2"), ("mixer", "vit")
NAMES = (*STRONG, *WEAK)
CANDIDATES, GROUP = 50, 4
WEIGHTS = {"1111": (1, 1, 1, 1), "2323": (2, 3, 2, 3), "2233": (2, 2, 3, 3), "4411": (4, 4, 1, 1)}
"""The paper's ratios, of strong, strong, weak, weak."""
INTERVAL = 50  # updates between the agent's checks: two evaluations


def frontiers(bed: testbed.Testbed, rewards: dict[str, Any], folder: Path) -> FrontierStore:
    """The world's store; sampled from the untuned model where it is not there."""
    if (folder / "frontier.json").exists():
        return FrontierStore.load(folder)
    prompts = list(bed.prompts_train)
    texts = [prompt for prompt in prompts for _ in range(CANDIDATES)]
    images = sample(bed.backbone, texts, SAMPLER, seed=2_000_003, batch_size=40)
    with torch.no_grad():
        columns = [reward(images, texts).double() for reward in rewards.values()]
    pool = torch.stack(columns, dim=1).view(len(prompts), CANDIDATES, len(rewards))
    store = FrontierStore(tuple(prompts), tuple(rewards), pool, {"world": bed.name, "candidates": CANDIDATES})
    store.save(folder)
    return store


def method(name: str, store: FrontierStore) -> tuple[Objective, DecisionAgent | None]:
    """The objective of a method, and the agent if it has one.

    Names: pg-ot (offline, then what its agent decides), no-online (it never leaves the weak rewards' stage), offline,
    online, online-raw (without normalisation), offline-raw, no-ot and separate (the same), masked, hinge,
    reg-NUMBER, sum-RATIO, single-REWARD, bound-RATIO (each prompt's own), global-RATIO (one for all).
    """
    kind, _, rest = name.partition("-")
    agent = DecisionAgent(StatsJudge(), weak=WEAK, interval=INTERVAL, n_stable=3)
    weights = dict(zip(NAMES, WEIGHTS.get(rest, ()), strict=False))
    found: dict[str, Any] = {
        "pg-ot": ParetoTransport(frontiers=store),
        "no-online": ParetoTransport(frontiers=store),
        "offline": ParetoTransport(frontiers=store),
        "offline-raw": ParetoTransport(frontiers=store, normalize="none"),
        "online": ParetoTransport("online", store),
        "online-raw": ParetoTransport("online", store, normalize="none"),
        "masked": ParetoTransport(frontiers=store, cost="dominance_masked"),
        "hinge": ParetoTransport(frontiers=store, cost="hinge"),
        "separate": SeparateConstraints(store),
    }
    if name in found:
        followed = {"pg-ot": agent, "no-online": replace(agent, n_stable=10**6)}
        return found[name], followed.get(name)
    if kind == "reg":
        return ParetoTransport(frontiers=store, reg=float(rest)), None
    if kind == "single" and rest in NAMES:
        return WeightedSum({rest: 1.0}), None
    if kind == "sum" and weights:
        return WeightedSum({k: w / sum(weights.values()) for k, w in weights.items()}), None
    if kind in ("bound", "global") and weights:
        return WeightedSumBound(weights, store, bound="prompt" if kind == "bound" else "mean"), None
    raise SystemExit(f"there is no method '{name}'; {method.__doc__}")


def run_cell(world: str, name: str, seed: int, judges: Path, out: Path) -> None:
    """Train one cell and write its JSON."""
    result = out / world / f"{name}.seed{seed}.json"
    if result.exists():
        return
    bed, s = testbed.load(world), SETTINGS[world]
    rewards = {"train": bed.reward, **{k: bed.held_out[k] for k in (*STRONG[1:], *WEAK)}}
    store = frontiers(bed, rewards, out / world / "frontiers")
    objective, agent = method(name, store)
    held_out = {f"B-{path.stem}": load_reward(path) for path in sorted(judges.glob("*.safetensors"))}
    run, begun = out / world / "runs" / f"{name}.seed{seed}", time.process_time()
    fitted = Trainer(
        bed.backbone,
        algorithm=TRAINERS["draft"],
        rewards=rewards,
        objective=objective,
        prompts=list(bed.prompts_train),
        eval_prompts=list(bed.prompts_eval),
        held_out={**held_out, "gold": bed.gold},
        measures={"gold": bed.gold.parts},
        config=replace(train_config(s, seed), group_size=GROUP, keep=1, sharpness_rho=None),
        run_dir=run,
        agent=agent,
    ).fit(resume=True)
    if fitted.signal is not None:
        raise SystemExit(128 + fitted.signal)
    cell = {"world": world, "method": name, "seed": seed, "evaluations": list(fitted.evaluations)}
    cell |= {"cpu_seconds": time.process_time() - begun, "joint": joint(run)}
    write_atomic(result, json.dumps(cell).encode())


def joint(run: Path) -> list[dict[str, float]]:
    """JDR, JCR and win rates of every evaluation against the first."""
    files = sorted((run / "samples").glob("step-*.json"))
    records = [json.loads(file.read_text()) for file in files]
    trained = [f"reward/{name}" for name in NAMES]
    judged = sorted(k for k in records[0]["scores"] if k.startswith("held_out/"))
    sets = {"strong": trained[:2], "trained": trained, "judged": judged}
    found = []
    for record in records:
        row: dict[str, float] = {"step": record["step"]}
        for label, keys in sets.items():
            now, base = (_matrix(r["scores"], keys) for r in (record, records[0]))
            row[f"jdr/{label}"] = float(joint_domination_rate(now, base))
            row[f"jcr/{label}"] = float(joint_collapse_rate(now, base))
        for key in (*trained, *judged):
            now, base = (_matrix(r["scores"], [key]) for r in (record, records[0]))
            row[f"win/{key}"] = float(win_rate(now, base))
        found.append(row)
    return found


def _matrix(scores: dict[str, list[float]], keys: list[str]) -> Tensor:
    return torch.tensor([scores[key] for key in keys], dtype=torch.float64).T


COLUMNS = ("jdr/strong", "jdr/trained", "jcr/trained", "jdr/judged", "jcr/judged", "held_out/gold")


def table(cells: list[dict[str, Any]], step: int) -> list[str]:
    """One row a method after `step` updates: the mean over seeds with its interval."""
    rows = [f"| method | seeds | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name in sorted({cell["method"] for cell in cells}):
        values: dict[str, list[float]] = {column: [] for column in COLUMNS}
        mine = [cell for cell in cells if cell["method"] == name]
        for cell in mine:
            at = {row["step"]: row for row in cell["joint"]}[step]
            at |= {row["step"]: row for row in cell["evaluations"]}[step]
            for column in COLUMNS:
                values[column].append(at[column])
        rows.append(f"| {name} | {len(mine)} | " + " | ".join(_shown(v) for v in values.values()) + " |")
    return rows


def _shown(values: list[float]) -> str:
    mean, low, high = mean_interval(torch.tensor(values, dtype=torch.float64), seed=0)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if len(values) > 1 else f"{mean:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="fashion", choices=sorted(SETTINGS))
    parser.add_argument("--judges", type=Path, help="folder of set B's rewards")
    parser.add_argument("--methods", nargs="+", default=["pg-ot", "sum-1111"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/pareto"))
    parser.add_argument("--tables", action="store_true", help="print the tables of what is finished")
    args = parser.parse_args()
    if args.tables:
        cells = [json.loads(f.read_text()) for f in sorted((args.out / args.world).glob("*.seed*.json"))]
        for step in (50, 100, 200):
            print(f"\nAfter {step} updates:\n\n" + "\n".join(table(cells, step)))
        return
    if args.judges is None:
        parser.error("--judges is needed: the folder of set B's rewards.")
    torch.set_num_threads(1)
    for seed in args.seeds:
        for name in args.methods:
            claim = args.out / args.world / "claims" / f"{name}.seed{seed}"
            claim.mkdir(parents=True, exist_ok=True)
            try:
                with locked(claim):
                    print(f"{args.world} {name} seed {seed}", flush=True)
                    run_cell(args.world, name, seed, args.judges, args.out)
            except RunDirectoryError:
                print(f"{args.world} {name} seed {seed}: another process has it", flush=True)


if __name__ == "__main__":
    main()
