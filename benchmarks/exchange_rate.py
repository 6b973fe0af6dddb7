"""What one gain in train reward does to gold along each regularizer's gradient, at one point of a run.

    python -m benchmarks.exchange_rate --world fashion --methods input-1 linf-0.01 weight-0.01 --out runs/exchange
    python -m benchmarks.exchange_rate --world fashion --weights RUN/weights/step-000050.safetensors --methods input-1
    python -m benchmarks.exchange_rate --tables runs/exchange

A whole run mixes what a regularizer does to the gradient with where the run has gone. Here all start from the same
weights. The mean gradient of 20 updates of 16 samples is divided, tensor by tensor, by the root mean square of the
plain one (what Adam does value by value, which 20 updates are too few for), and the weights go along it until the train
reward of the evaluation's samples has risen by 0.1 base sigmas (between two lengths: linear). Method names are those of
`benchmarks.testbed_study`.

"cosine" is between the method's direction and the plain one. Plain is measured a second time on 20 other updates: that
cosine, and that difference in gold, is what chance does.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.testbed_study import SAMPLER, TRAINERS, method
from rsaft import testbed
from rsaft.files import write_atomic
from rsaft.flatten.weight import global_norm
from rsaft.metrics.evaluate import evaluate
from rsaft.metrics.matched import mean_interval
from rsaft.rdrl import ImageScore, WeightedSum
from rsaft.rdrl.batches import batches_of
from rsaft.rdrl.optimization import load_weights
from rsaft.types import Algorithm, Step

UPDATES, BATCH, SAMPLES, GAIN = 20, 16, 320, 0.1
AGAIN = "plain, other updates"


def gradient(bed: testbed.Testbed, algorithm: Algorithm, step: Step, *, first: int) -> list[Tensor]:
    """Mean gradient of updates `first` to `first` + 19, all at the present weights."""
    params, state = bed.backbone.parameters(), None
    score = ImageScore(bed.backbone, {"train": bed.reward}, WeightedSum({"train": 1.0}))
    mean = [torch.zeros_like(p) for p in params]
    for update in range(first, first + UPDATES):
        (batch,) = batches_of(update, prompts=bed.prompts_train, seed=0, batch_size=BATCH, parts=[range(BATCH)])
        state = step([algorithm.rollout(bed.backbone, batch)], score, params, state).state
        for p, m in zip(params, mean, strict=True):
            if p.grad is not None:
                m.add_(p.grad / UPDATES)
            p.grad = None
    return mean


def scores(bed: testbed.Testbed) -> dict[str, Tensor]:
    """Train reward, held-out rewards and gold of the evaluation's samples."""
    found = evaluate(
        bed.backbone,
        bed.prompts_eval,
        SAMPLER,
        seed=1_000_003,
        num_samples=SAMPLES,
        batch_size=32,
        rewards={"train": bed.reward},
        held_out={**bed.held_out, "gold": bed.gold},
    )
    return found.scores


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    return dot / float(global_norm(a) * global_norm(b))


def direction(mean: Sequence[Tensor], plain: Sequence[Tensor]) -> list[Tensor]:
    """Downhill, each tensor over the root mean square of plain's, all together of root mean square 1."""
    roots = [g.square().mean().sqrt().clamp_min(1e-12) for g in plain]
    scaled = [-m / r for m, r in zip(mean, roots, strict=True)]
    rms = global_norm(scaled) / math.sqrt(sum(d.numel() for d in scaled))
    return [d / rms for d in scaled]


@torch.no_grad()
def moved(bed: testbed.Testbed, way: Sequence[Tensor], length: float) -> dict[str, Tensor]:
    """The scores at theta + length way; the weights are put back."""
    params = bed.backbone.parameters()
    kept = [p.clone() for p in params]
    for p, d in zip(params, way, strict=True):
        p.add_(d, alpha=length)
    found = scores(bed)
    for p, k in zip(params, kept, strict=True):
        p.copy_(k)
    return found


def at_gain(bed: testbed.Testbed, way: Sequence[Tensor], start: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Each sample's change of each score where the mean train reward has risen by GAIN; empty if it does not rise.

    Up to four lengths are tried, each aimed by the one before; between the two around GAIN it is linear.
    """
    length = 1e-4  # root mean square of the weights' change: two updates of Adam at learning rate 5e-5
    below = {k: torch.zeros_like(x) for k, x in start.items()}
    low = 0.0
    for _ in range(4):
        change = {k: x - start[k] for k, x in moved(bed, way, length).items()}
        gain = float(change["reward/train"].mean())
        if gain >= GAIN:
            share = (GAIN - low) / (gain - low)
            return {k: (below[k] + share * (change[k] - below[k])).tolist() for k in start}
        if gain > low:
            below, low = change, gain
        length *= min(1.05 * GAIN / gain, 4.0) if gain > 0 else 0.25
    return {}


def measure(world: str, trained_by: str, names: Sequence[str], weights: Path | None, out: Path) -> None:
    """Write one JSON for each method that has none yet; plain comes first, as all are compared with it."""
    bed, algorithm = testbed.load(world), TRAINERS[trained_by]
    if weights is not None:
        load_weights(bed.backbone.parameters(), load_file(weights))
    folder = out / f"{world}.{trained_by}.{'base' if weights is None else weights.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    start = scores(bed)
    plain = gradient(bed, algorithm, method("plain")[0], first=0)
    for name in ("plain", AGAIN, *names):
        file = folder / f"{name}.json"
        if file.exists():
            continue
        step, first = (method("plain")[0], UPDATES) if name == AGAIN else (method(name)[0], 0)
        mean = plain if name == "plain" else gradient(bed, algorithm, step, first=first)
        way = direction(mean, plain)
        found = {
            "method": name,
            "cosine": cosine(way, direction(plain, plain)),
            "changes": at_gain(bed, way, start),
        }
        write_atomic(file, json.dumps(found).encode())
        print(f"{folder.name} {name}: cosine {found['cosine']:.3f}", flush=True)


def interval(values: Tensor) -> str:
    """Mean with its 95 % bootstrap interval over samples."""
    mean, low, high = mean_interval(values, seed=0)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def table(folder: Path) -> list[str]:
    """Rows in the order of gold's difference to plain; rewards are the change along the way."""
    found = {d["method"]: d for d in (json.loads(f.read_text()) for f in sorted(folder.glob("*.json")))}
    plain = {k: torch.tensor(x, dtype=torch.float64) for k, x in found["plain"]["changes"].items()}
    others = [k for k in plain if k.startswith("held_out/") and not k.endswith("gold")]
    names = [k.removeprefix("held_out/") for k in others]
    rows = [
        f"| method | cosine | gold | gold, difference to plain | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    for name, cell in found.items():
        head = f"| {name} | {cell['cosine']:.3f} |"
        if not cell["changes"]:
            rows.append(f"{head} the train reward does not rise |" + " |" * (1 + len(names)))
            continue
        changes = {k: torch.tensor(x, dtype=torch.float64) for k, x in cell["changes"].items()}
        gold = changes["held_out/gold"]
        difference = "" if name == "plain" else interval(gold - plain["held_out/gold"])
        held = " | ".join(f"{float(changes[k].mean()):+.3f}" for k in others)
        rows.append(f"{head} {float(gold.mean()):+.4f} | {difference} | {held} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="fashion")
    parser.add_argument("--trainer", default="draft", choices=sorted(TRAINERS))
    parser.add_argument("--weights", type=Path, help="weights of a run; the base model's by default")
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/exchange"))
    parser.add_argument("--tables", type=Path, metavar="OUT", help="print the tables of what is finished there")
    args = parser.parse_args()
    if args.tables is not None:
        for folder in sorted(f for f in args.tables.iterdir() if f.is_dir()):
            print(f"\n### {folder.name}\n\n" + "\n".join(table(folder)))
        return
    torch.set_num_threads(1)
    measure(args.world, args.trainer, args.methods, args.weights, args.out)


if __name__ == "__main__":
    main()
