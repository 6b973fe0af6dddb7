"""What both sides of the comparison share. Imported in both environments: of rsaft it takes the testbed's data alone.

The fashion testbed's pipeline, its train reward, its prompts, and how time and memory are measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsaft.testbed import DATA
from rsaft.testbed.fashion import PROMPTS_TRAIN
from rsaft.testbed.rewards import LearnedReward, load_reward

WORLD = DATA / "fashion"
RANK = ALPHA = 4  # TRL's own, on to_q, to_k, to_v, to_out.0
LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, (0.9, 0.999), 1e-4, 1.0  # TRL's defaults
ETA = 1.0
# TRL fails without guidance (its text embeddings are doubled all the same), and rescales guided predictions by default,
# which the paper does not. A guidance of 1 and a little costs what guidance costs, and changes and rescales nothing.
GUIDANCE = 1.000001


def arguments(description: str | None) -> argparse.Namespace:
    """What a side is asked to do."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="T: sampling steps")
    parser.add_argument("--last", type=int, help="K: steps with gradient; each library's random truncation if left out")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def prompts(seed: int, update: int, batch: int) -> list[str]:
    """The prompts of one update: the same on both sides."""
    return random.Random(f"{seed} {update}").choices(PROMPTS_TRAIN, k=batch)


def reward() -> LearnedReward:
    """The testbed's reward to train on: (images in [0, 1], prompts) -> (batch,)."""
    return load_reward(WORLD / "rewards" / "train.safetensors")


def measured(args: argparse.Namespace, update: Callable[[int], float]) -> dict[str, Any]:
    """Run the updates; mean reward of each batch, CPU seconds of each, and growth of the peak resident memory in MiB.

    CPU seconds of the one thread, because other work on the machine would be counted in the others.
    """
    rewards, seconds = [update(0)], []  # the first loads what is loaded once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = _status("VmRSS")
    for i in range(1, args.updates):
        begun = time.process_time()
        rewards.append(update(i))
        seconds.append(time.process_time() - begun)
    return {"rewards": rewards, "seconds": seconds, "peak_mib": (_status("VmHWM") - before) / 1024}


def save(args: argparse.Namespace, side: str, result: dict[str, Any]) -> None:
    """One JSON a run."""
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "pipeline")}
    args.out.write_text(json.dumps({"side": side, **settings, **result}) + "\n")


def _status(key: str) -> int:
    """KiB."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])
