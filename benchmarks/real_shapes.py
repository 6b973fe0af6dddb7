"""What a step of plain DRaFT-1 and of RSA-FT costs on the real architectures, with random weights.

    python -m benchmarks.real_shapes [--models SD1.5 SDXL] [--batches 1 4] [--recompute auto|off|on] [--compile]

Parameters and FLOPs are counted at true size on the meta device, where nothing is computed. On a GPU the models are
then built at true size in bf16 and measured: step time, peak memory, model FLOP utilisation (MFU). Without a GPU the
same code measures versions of reduced width, and the table says so. A step of batch b costs, beside elementwise work,

    plain  = b ((T - 1) F + N + D + R)        RSA-FT = 2 plain  (mode "both", reuse "resample")

where F is one guided evaluation of the network without gradient, and N, D, R are one with its backward pass, the decode
with its backward pass, the reward with its backward pass. Results are written after each model; models that an earlier
run measured on the same hardware with the same settings are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.real_models import RANK, SHAPES, Shape, build_backbone, build_network, build_reward, reduced
from benchmarks.real_tables import report
from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, ImageScore, WeightedSum, plain_step
from rsaft.sampling import Sampling, State
from rsaft.types import Batch, Rollout, Step, StepOutput

STEPS: dict[str, Step] = {"plain": plain_step, "RSA-FT": RSAFT(1e-2, 1e-2, mode="both", network_dtype="bf16")}
PASSES = {"plain": 1, "RSA-FT": 2}  # delta and epsilon come from one backward pass, the update from another
NOT_FITTING: dict[str, Any] = dict.fromkeys(("seconds", "peak_gib", "finite", "tflops_per_second", "mfu"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Dense bf16 FLOP/s by the start of the device's name (NVIDIA's data sheets).
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
}


@dataclass(frozen=True)
class Work:
    """Sizes of a model, and the FLOPs of one image's parts of a step: a multiply and an add are two."""

    parameters: int  # of the network, without the adapter
    lora: int
    decoder: int
    forward: float  # F: the guided network without gradient
    network: float  # N: with its backward pass
    decode: float  # D: the same
    reward: float  # R: the same
    num_steps: int

    def step(self, name: str) -> float:
        """FLOPs for one image; what gradient checkpointing computes twice is not work of the model."""
        return PASSES[name] * ((self.num_steps - 1) * self.forward + self.network + self.decode + self.reward)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a whole GPU, None if it is not known."""
    if "MIG" in device_name or "NVL" in device_name:  # a part of a GPU, and a board with a lower clock
        return None
    return next((peak for start, peak in PEAKS.items() if device_name.startswith(start)), None)


def count(shape: Shape) -> Work:
    """Parameters and FLOPs, from one pass over each part on the meta device."""
    backbone = build_backbone(shape, device="meta", dtype=torch.float32)
    reward = build_reward(shape, device="meta")
    rollout = _rollout(backbone, shape, batch_size=1, update=0)
    with FlopCounterMode(display=False) as network:
        x_0 = rollout.tail(State(torch.empty(1, *backbone.latent_shape, device="meta"), shape.num_steps - 1)).latents
        forward = network.get_total_flops()
        x_0.sum().backward()
    with FlopCounterMode(display=False) as decode:
        images = backbone.decode(x_0.detach().requires_grad_())
        images.sum().backward()
    with FlopCounterMode(display=False) as judge:
        reward(images.detach().requires_grad_(), [""]).sum().backward()
    lora = sum(p.numel() for p in backbone.parameters())
    return Work(
        parameters=sum(p.numel() for p in backbone.network.parameters()) - lora,
        lora=lora,
        decoder=sum(p.numel() for p in backbone.pipe.vae.decoder.parameters()),
        forward=forward,
        network=network.get_total_flops(),
        decode=decode.get_total_flops(),
        reward=judge.get_total_flops(),
        num_steps=shape.num_steps,
    )


def _rollout(backbone: DiffusersBackbone, shape: Shape, *, batch_size: int, update: int) -> Rollout:
    ids = tuple(range(batch_size))
    sampling = Sampling(num_steps=shape.num_steps, guidance=shape.guidance)
    return DRaFT(k=1, sampling=sampling).rollout(backbone, Batch(("",) * batch_size, ids, step=update, seed=0))


@dataclass(frozen=True)
class Settings:
    """How models are measured."""

    device: str
    dtype: str  # of the network; a CPU emulates bf16, five times slower here than fp32
    batches: tuple[int, ...]
    recompute: str  # gradient checkpointing of network and decoder: off, on, or auto, where it does not fit without
    vae: str
    compile: bool
    repeats: int


def measure(shape: Shape, work: Work, settings: Settings, steps: Mapping[str, Step] = STEPS) -> list[dict[str, Any]]:
    """One row for each step, batch size and recomputation that was tried, those that do not fit included."""
    cases = [(batch, name) for batch in settings.batches for name in steps]
    rows: list[dict[str, Any]] = []
    if settings.recompute != "on":
        rows += _measure_built(shape, work, settings, steps, cases, recompute=False)
        cases = [(row["batch"], row["step"]) for row in rows if row["seconds"] is None]
    if settings.recompute != "off" and cases:
        rows += _measure_built(shape, work, settings, steps, cases, recompute=True)
    return rows


def _measure_built(
    shape: Shape,
    work: Work,
    settings: Settings,
    steps: Mapping[str, Step],
    cases: Sequence[tuple[int, str]],
    *,
    recompute: bool,
) -> list[dict[str, Any]]:
    """Rows of one build of the model; all of them say that it does not fit if it cannot even be built."""
    labels = [{"batch": batch, "recompute": recompute, "step": name} for batch, name in cases]
    _release()
    try:
        backbone = build_backbone(
            shape,
            device=settings.device,
            dtype=DTYPES[settings.dtype],
            vae_dtype=DTYPES[settings.vae],
            checkpointing=recompute,
            compile=settings.compile,
        )
        reward = build_reward(shape, device=settings.device)
    except torch.OutOfMemoryError:
        return [label | NOT_FITTING for label in labels]
    score = ImageScore(backbone, {"vit": reward}, WeightedSum({"vit": 1.0}))
    rows = []
    for label, (batch, name) in zip(labels, cases, strict=True):
        found = _measure_step(backbone, score, shape, steps[name], batch, settings)
        if found is None:
            rows.append(label | NOT_FITTING)
        else:
            rows.append(label | found | _speed(batch * work.step(name), found["seconds"], settings.device))
        _release()
    return rows


def _speed(flops: float, seconds: float, device: str) -> dict[str, float | None]:
    """FLOP/s, and its share of the peak; none of a CPU, where the model is not the one whose FLOPs were counted."""
    if device != "cuda":
        return {"tflops_per_second": None, "mfu": None}
    peak = peak_flops(torch.cuda.get_device_name())
    return {"tflops_per_second": flops / seconds / 1e12, "mfu": None if peak is None else flops / seconds / peak}


def _measure_step(
    backbone: DiffusersBackbone, score: ImageScore, shape: Shape, step: Step, batch: int, settings: Settings
) -> dict[str, Any] | None:
    """Median time and highest memory of a step after one to warm up; None if it does not fit."""
    params = backbone.parameters()
    seconds: list[float] = []
    peaks: list[float] = []
    finite: list[bool] = []
    try:
        for update in range(1 + settings.repeats):
            for p in params:
                p.grad = None
            rollout = _rollout(backbone, shape, batch_size=batch, update=update)
            output, elapsed, peak = _timed(partial(step, [rollout], score, params), settings.device)
            seconds.append(elapsed)
            peaks.append(peak)
            finite += [bool(loss.valid.all()) for loss in output.losses]
    except torch.OutOfMemoryError:
        return None
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_gib": max(peaks[1:]) if settings.device == "cuda" else None,
        "finite": all(finite),
    }


def _timed(run: Callable[[], StepOutput], device: str) -> tuple[StepOutput, float, float]:
    """Result, seconds (on a CPU of this process, whatever else it does), highest GiB allocated (on a CPU 0)."""
    if device != "cuda":
        begun = time.process_time()
        output = run()
        return output, time.process_time() - begun, 0.0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start.record()
    output = run()
    end.record()
    torch.cuda.synchronize()
    return output, start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() / 2**30


def _release() -> None:
    """Give freed memory back, so that what did not fit leaves the next one all of it."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def hardware(device: str) -> str:
    """The device's name, and a GPU's memory."""
    if device != "cuda":
        return f"{platform.machine()} CPU, one thread"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"


def write(results: dict[str, Any], folder: Path) -> None:
    """The JSON and Markdown files, each replaced whole: a killed run leaves the ones before."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in {"json": json.dumps(results, indent=1) + "\n", "md": report(results)}.items():
        unfinished = folder / f"real_shapes.{suffix}.partial"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / f"real_shapes.{suffix}")


def started(settings: Settings, folder: Path) -> dict[str, Any]:
    """Results without models, or with those of an earlier run that only measured other models."""
    gpu = settings.device == "cuda"
    fresh: dict[str, Any] = {
        "hardware": hardware(settings.device),
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        "rank": RANK,
        "peak_flops": peak_flops(torch.cuda.get_device_name()) if gpu else None,
        "settings": json.loads(json.dumps(asdict(settings))),
    }
    path = folder / "real_shapes.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(earlier.get(key) == value for key, value in fresh.items())
    return fresh | {"models": earlier["models"] if same else {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4] if gpu else [1])
    parser.add_argument("--recompute", choices=["auto", "off", "on"], default="auto", help="gradient checkpointing")
    parser.add_argument("--vae", choices=list(DTYPES), default="fp32", help="the decoder's dtype; fp32 as in rsaft")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--repeats", type=int, default=3 if gpu else 1)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = ("cuda", "bf16") if gpu else ("cpu", "fp32")
    settings = Settings(device, dtype, tuple(args.batches), args.recompute, args.vae, args.compile, args.repeats)
    results = started(settings, args.results)
    for name in args.models:
        begun = time.perf_counter()
        counted = count(SHAPES[name])
        shape = SHAPES[name] if gpu else reduced(SHAPES[name])
        built = sum(p.numel() for p in build_network(shape, device="meta", dtype=torch.float32).parameters())
        results["models"][name] = {
            "date": str(date.today()),
            "resolution": SHAPES[name].resolution,
            "counted": asdict(counted) | {f"step {step}": counted.step(step) for step in STEPS},
            "built": {"parameters": built, "resolution": shape.resolution, "num_steps": shape.num_steps},
            "rows": measure(shape, counted, settings),
        }
        write(results, args.results)
        print(f"{name}: done in {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
