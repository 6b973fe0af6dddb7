"""The memory estimate of `rsaft check` beside what updates take.

    python -m benchmarks.memory_estimate [--cases 0 9 13]

For each tiny family and way of training, a process of its own makes two updates and measures them. On a CPU twice:

- allocated: the peak of what torch's CPU allocator handed out, from the profiler's memory events;
- RSS: growth of the process's peak resident memory (VmHWM, set back first), from after the model is loaded and a small
  update has loaded every library. glibc maps blocks over 64 KiB by themselves here (MALLOC_MMAP_THRESHOLD_), so that
  what is freed leaves the process; with glibc's own settings much of it stays, and RSS says less about the run.

On a GPU once: the growth of `torch.cuda.max_memory_allocated`; that path has not been run yet. All are increments over
the loaded model, and so is the estimate beside them: on tiny models the interpreter and its libraries (about 500 MiB)
would hide everything. Results are written after each case, to benchmarks/results/memory_estimate.{json,md}; a case that
an earlier run measured on the same hardware is kept, unless --cases names it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One way of training one tiny model."""

    family: str
    lora: bool = True
    flattened: bool = False  # RSA-FT instead of the plain step
    checkpointing: bool = False  # of the network's and the decoder's blocks
    dtype: str = "fp32"
    micro_batches: int = 1
    micro: int = 4  # samples in one
    resolution: int = 64  # pixels; the tiny SD3's position embedding ends at 32

    @property
    def text(self) -> str:
        """For the table."""
        parts = ["LoRA" if self.lora else "full", "RSA-FT" if self.flattened else "plain"]
        parts += ["checkpointing"] if self.checkpointing else []
        return ", ".join([*parts, self.dtype, f"{self.micro_batches} x {self.micro} at {self.resolution} px"])


CASES = [
    Case("sd"),
    Case("sd", flattened=True),
    Case("sd", checkpointing=True),
    Case("sd", micro_batches=3, micro=2, flattened=True),
    Case("sd", lora=False),
    Case("sd", lora=False, flattened=True, micro_batches=2, micro=2),
    Case("sd", dtype="bf16"),
    Case("sdxl"),
    Case("sdxl", flattened=True, checkpointing=True),
    Case("sd3", micro=32, resolution=32),
    Case("sd3", micro=32, resolution=32, flattened=True),
    Case("sd35", micro=32, resolution=32),
    Case("sd35", micro=32, resolution=32, checkpointing=True),
    Case("flux", micro=8),
    Case("flux", micro=8, flattened=True),
]


def measure(case: Case) -> dict[str, float | None]:
    """The case's numbers, in MiB; in the process that calls it, which should do nothing else."""
    import torch

    from rsaft.backbones import LoRA
    from rsaft.config import Model
    from rsaft.config.assemble import load_model
    from rsaft.flatten import RSAFT
    from rsaft.rdrl import DRaFT, plain_step
    from rsaft.rdrl.memory import Planned, estimate_memory, weights
    from rsaft.rdrl.train_config import TrainConfig
    from rsaft.sampling import Sampling
    from rsaft.testbed.toy import toy_reward

    torch.set_num_threads(1)
    plan = Planned(
        algorithm=DRaFT(k=1, lv=2, sampling=Sampling(num_steps=2, guidance=3.0)),
        rewards={"toy": toy_reward},
        held_out={},
        step=RSAFT(rho=0.01, rho_w=0.01) if case.flattened else plain_step,
        prompts=["a cat"],
        config=TrainConfig(batch_size=case.micro_batches * case.micro, micro_batch=case.micro, eval_batch=1),
    )

    def load(resolution: int) -> Any:
        return load_model(
            Model(
                f"tiny:{case.family}",
                lora=LoRA(rank=2) if case.lora else None,
                dtype=case.dtype,  # type: ignore[arg-type]
                gradient_checkpointing=case.checkpointing,
                vae_checkpointing=case.checkpointing,
                resolution=resolution,
            ),
            seed=0,
        )

    small, backbone = load(16), load(case.resolution)
    _updates(small, plan)
    rss: float | None = None
    if backbone.device.type == "cuda":
        allocated = _allocated_on_gpu(lambda: _updates(backbone, plan))
    else:
        rss = _rss_of(lambda: _updates(backbone, plan)) / MIB
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _updates(backbone, plan)
        allocated = _allocated(profile)
    estimate = estimate_memory(backbone, plan).totals["update"] - sum(weights(backbone).values())
    return {"estimated": estimate / MIB, "allocated": allocated / MIB, "rss": rss}


def _updates(backbone: Any, plan: Any) -> None:
    """Two updates as the loop makes them: AdamW's moments exist in the second."""
    from rsaft.rdrl import ImageScore, WeightedSum
    from rsaft.rdrl.memory import optimization_of
    from rsaft.types import Batch

    params = backbone.parameters()
    optimization = optimization_of(params, plan.config)
    score = ImageScore(backbone, plan.rewards, WeightedSum({"toy": 1.0}))
    size, micro = plan.config.batch_size, plan.config.micro_batch
    for update in range(2):
        rollouts = [
            plan.algorithm.rollout(backbone, Batch(("a cat",) * micro, tuple(range(i, i + micro)), update, 0))
            for i in range(0, size, micro)
        ]
        plan.step(rollouts, score, params, None)
        del rollouts
        optimization.update(max_grad_norm=1.0)


def _rss_of(work: Any) -> int:
    """Growth of the peak resident memory while `work` runs, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _allocated_on_gpu(work: Any) -> int:
    """Growth of the most that was allocated on the GPU while `work` runs, in bytes."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocated(profile: Any) -> int:
    """The largest sum of the profiler's allocations and frees, in time's order."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def markdown(rows: list[dict[str, Any]], where: str) -> str:
    """The table, and the line that says how far off the estimate was."""
    lines = [
        f"# Memory estimate beside measured peaks, tiny models, {len(rows)} of {len(CASES)} cases",
        "",
        f"{where}. MiB over the loaded model; see benchmarks/memory_estimate.py for what is measured.",
        "",
        "| model | training | estimated | allocated | estimate / allocated | RSS | estimate / RSS | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        e, a, r = row["estimated"], row["allocated"], row["rss"]
        resident = f"{r:.1f} | {e / r:.3f}" if r else " | "
        lines.append(
            f"| {row['family']} | {row['case']} | {e:.1f} | {a:.1f} | {e / a:.3f} | {resident} | {row['date']} |"
        )
    errors = {key: [abs(row["estimated"] / row[key] - 1) for row in rows if row[key]] for key in ("allocated", "rss")}
    names = {"allocated": "what was allocated", "rss": "RSS"}
    off = [f"{max(found):.1%} of {names[key]}" for key, found in errors.items() if found]
    return "\n".join([*lines, "", f"Largest error: {', '.join(off)}.", ""])


def hardware() -> str:
    """What it is measured on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help="Measure one case in this process, and print it as JSON.")
    parser.add_argument("--cases", type=int, nargs="+", help="Measure these, in this order; by default all missing.")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(CASES[arguments.case])))
        return
    where, file = hardware(), RESULTS / "memory_estimate.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    rows = {(row["family"], row["case"]): row for row in earlier.get("rows", []) if earlier["where"] == where}
    missing = [i for i, case in enumerate(CASES) if (case.family, case.text) not in rows]
    for i in missing if arguments.cases is None else arguments.cases:
        case = CASES[i]
        command = [sys.executable, "-m", "benchmarks.memory_estimate", "--case", str(i)]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
        row = {"family": case.family, "case": case.text, "date": datetime.date.today().isoformat()}
        rows[case.family, case.text] = row | json.loads(done.stdout.splitlines()[-1])
        found = [rows[key] for key in ((case.family, case.text) for case in CASES) if key in rows]
        file.write_text(json.dumps({"where": where, "rows": found}, indent=1) + "\n")
        (RESULTS / "memory_estimate.md").write_text(markdown(found, where))
        print(rows[case.family, case.text], flush=True)


if __name__ == "__main__":
    main()
