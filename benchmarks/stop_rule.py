"""The stop rule on finished runs of the testbed, against other ways to choose a checkpoint, judged by gold.

    python -m benchmarks.stop_rule runs/study [MORE...]     # any folders that benchmarks.testbed_study wrote

The rule was chosen on DRaFT-1's runs of both worlds, the fixed update and the KL threshold on its plain runs of
`fashion`; all are constants here, and the runs of other trainers are tests. Only what judges them sees gold. The KL
baseline needs `python -m benchmarks.kl_distance` on runs with kept weights, and is left out for others. Prints tables,
and writes them with every run's numbers to --results.

Truth: a run is hacked from the first look after its best gold at which gold is lower by more than two standard errors,
paired by sample. Regret: best gold minus gold at the look that was kept. An alarm at a run that is never hacked, or
before it is, is false.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.testbed_study import trainer_and_method
from rsaft.metrics.stop_rule import StopRule, first_alarm

CALIBRATION = "draft"  # the trainer whose runs the rule was chosen on
FIXED = 2  # look: update 50, the best fixed one on fashion's plain runs
KL = 0.12  # D (rsaft/rdrl/kl.py, Eq. 1) at that look, its mean over those runs
GOLD = "held_out/gold"


@dataclass(frozen=True)
class Looks:
    """One run: each score (t, n) of the same samples at t looks."""

    world: str
    trainer: str
    method: str
    seed: int
    steps: list[int]
    scores: dict[str, Tensor]
    prompts: list[str]
    kl: list[float] | None  # D at each look

    @property
    def held_out(self) -> dict[str, Tensor]:
        return {k: x for k, x in self.scores.items() if k.startswith("held_out/") and k != GOLD}

    @property
    def gold(self) -> Tensor:
        return self.scores[GOLD]


@dataclass(frozen=True)
class Truth:
    """What gold says of a run."""

    best: int
    hacked: int | None  # first look at which it is hacked
    gain: float  # of the best look over the base
    spread: float  # best minus worst


def read(study: Path) -> list[Looks]:
    """Runs of which every evaluation is there, in the order of their names."""
    found = []
    for folder in sorted(study.glob("*/runs/*.seed*")):
        cell = study / folder.parent.parent.name / f"{folder.name}.json"
        match = re.fullmatch(r"(.+)\.seed(\d+)", folder.name)
        if match is None or not cell.exists():
            continue
        trainer, method = trainer_and_method(match[1])
        records = [json.loads(f.read_text()) for f in sorted((folder / "samples").glob("step-*.json"))]
        if method.startswith("annealed") or len(records) != len(json.loads(cell.read_text())["evaluations"]):
            continue
        keys = [k for k in records[0]["scores"] if k.startswith(("reward/train", "held_out/"))]
        scores = {k: torch.tensor([r["scores"][k] for r in records], dtype=torch.float64) for k in keys}
        steps = [int(r["step"]) for r in records]
        kl = json.loads((folder / "kl.json").read_text()) if (folder / "kl.json").exists() else None
        distances = None if kl is None else [kl[str(step)] for step in steps]
        world, prompts = folder.parent.parent.name, records[0]["prompts"]
        found.append(Looks(world, trainer, method, int(match[2]), steps, scores, prompts, distances))
    return found


def truth(run: Looks) -> Truth:
    means = run.gold.mean(dim=1)
    best = int(means.argmax())
    hacked = None
    for t in range(best + 1, len(means)):
        fall = run.gold[best] - run.gold[t]
        if float(fall.mean()) > 2 * float(fall.std()) / math.sqrt(len(fall)):
            hacked = t
            break
    return Truth(best, hacked, float(means[best] - means[0]), float(means.max() - means.min()))


def rule_of_the_gauge(run: Looks) -> tuple[int, int | None]:
    """(look kept, look of the alarm) of a run that ends at its alarm."""
    alarm, verdict = first_alarm(run.scores["reward/train"], run.held_out, run.prompts, StopRule())
    return verdict.keep, alarm


def best_of(key: str) -> Callable[[Looks], int | None]:
    """The look with the best mean score; None where a run has no such reward."""
    return lambda run: int(run.scores[key].mean(dim=1).argmax()) if key in run.scores else None


def best_mean(run: Looks) -> int:
    """Mean over held-out rewards in base deviations, largest."""
    gains = [(x.mean(dim=1) - x[0].mean()) / x[0].std() for x in run.held_out.values()]
    return int(torch.stack(gains).mean(dim=0).argmax())


def below_kl(run: Looks) -> int | None:
    """The last look before D first exceeds its threshold."""
    if run.kl is None:
        return None
    return next((t - 1 for t, d in enumerate(run.kl) if d > KL), len(run.kl) - 1)


BASELINES: dict[str, Callable[[Looks], int | None]] = {
    "last checkpoint": lambda run: len(run.steps) - 1,
    "update 50": lambda run: FIXED,
    "best train reward": best_of("reward/train"),
    "best held-out cnn2": best_of("held_out/cnn2"),
    "best held-out vit": best_of("held_out/vit"),
    "best held-out mixer": best_of("held_out/mixer"),
    "best mean of held-out": best_mean,
    "KL below .12": below_kl,
    "the base model": lambda run: 0,
}


def regret(run: Looks, look: int | None) -> float:
    """Best gold minus gold there; NaN without a look."""
    if look is None:
        return math.nan
    means = run.gold.mean(dim=1)
    return float(means.max() - means[look])


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else math.nan


def groups(runs: Sequence[Looks]) -> dict[str, list[Looks]]:
    """Plain runs and others, by world and trainer; first the trainer that the rule was chosen on."""
    found: dict[str, list[Looks]] = defaultdict(list)
    for run in runs:
        what = "plain" if run.method == "plain" else "others"
        known = " (calibration)" if run.trainer == CALIBRATION else ""
        found[f"{run.trainer}, {run.world}, {what}{known}"].append(run)
    return dict(sorted(found.items(), key=lambda item: ("calibration" not in item[0], item[0])))


def regret_table(by_group: dict[str, list[Looks]]) -> list[str]:
    rows = [
        "| runs | n | gold: base, best, last | regret: gauge's rule | " + " | ".join(BASELINES) + " |",
        "|---|---|---|---|" + "---|" * len(BASELINES),
    ]
    for name, runs in by_group.items():
        means = torch.stack([run.gold.mean(dim=1)[[0, -1]] for run in runs])
        best = [float(run.gold.mean(dim=1).max()) for run in runs]
        gain, spread = (median([getattr(truth(run), what) for run in runs]) for what in ("gain", "spread"))
        own = median([regret(run, rule_of_the_gauge(run)[0]) for run in runs])
        share = f"{own / gain:.0%} of the gain" if gain > 0.01 else f"{own / spread:.0%} of the spread"
        cells = [_shown([regret(run, pick(run)) for run in runs]) for pick in BASELINES.values()]
        golds = f"{median(means[:, 0].tolist()):.3f}, {median(best):.3f}, {median(means[:, 1].tolist()):.3f}"
        rows.append(f"| {name} | {len(runs)} | {golds} | **{own:.3f}** ({share}) | " + " | ".join(cells) + " |")
    return rows


def _shown(regrets: Sequence[float]) -> str:
    known = [r for r in regrets if not math.isnan(r)]
    of = "" if len(known) == len(regrets) else f" ({len(known)} runs)"
    return f"{median(known):.3f}{of}" if known else "–"


def alarm_table(by_group: dict[str, list[Looks]]) -> list[str]:
    rows = [
        "| runs | n | hacked | alarm among them | looks from hacking to alarm, median | false alarms |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in by_group.items():
        found = [(truth(run).hacked, rule_of_the_gauge(run)[1]) for run in runs]
        hacked = [(since, alarm) for since, alarm in found if since is not None]
        raised = [(since, alarm) for since, alarm in hacked if alarm is not None]
        early = sum(alarm is not None and (since is None or alarm < since) for since, alarm in found)
        delay = median([alarm - since for since, alarm in raised])
        shown = "–" if math.isnan(delay) else f"{delay:+.0f}"
        rows.append(f"| {name} | {len(runs)} | {len(hacked)} | {len(raised)} | {shown} | {early} of {len(runs)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="--out folders of benchmarks.testbed_study")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    unique = {(r.world, r.trainer, r.method, r.seed): r for study in args.studies for r in read(study)}
    runs = list(unique.values())
    if not runs:
        raise SystemExit(f"{', '.join(map(str, args.studies))}: there is no finished run with its samples.")
    by_group = groups(runs)
    lines = ["# The stop rule, judged by gold", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += ["## Median regret", "", *regret_table(by_group), "", "## Alarms", "", *alarm_table(by_group), ""]
    print("\n".join(lines))
    cells = []
    for run in runs:
        keep, alarm = rule_of_the_gauge(run)
        cells.append(
            {"world": run.world, "trainer": run.trainer, "method": run.method, "seed": run.seed, "steps": run.steps}
            | {"gold": run.gold.mean(dim=1).tolist(), "keep": keep, "alarm": alarm, "truth": asdict(truth(run))}
            | {"baselines": {name: pick(run) for name, pick in BASELINES.items()}}
        )
    args.results.mkdir(parents=True, exist_ok=True)
    stem = args.results / "stop_rule"
    stem.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({"rule": asdict(StopRule()), "runs": cells}) + "\n")


if __name__ == "__main__":
    main()
