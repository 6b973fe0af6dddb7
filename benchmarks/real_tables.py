"""Markdown tables of `real_shapes`."""

from __future__ import annotations

from datetime import date
from typing import Any

_SIZES = ("parameters", "lora", "decoder")
_FLOPS = ("forward", "network", "decode", "reward", "step plain", "step RSA-FT")
_GPU_NOTE = (
    "Peak memory is all that is allocated, weights included. MFU is the counted FLOPs over the time and the dense bf16",
    "peak; what gradient checkpointing (recompute) does twice is not counted.",
)
_CPU_NOTE = (
    "The same blocks with fewer channels, an eighth of the resolution, four sampling steps. Seconds are those of one",
    "thread's own work, and rough, as the ratios are; memory and FLOP/s are not measured.",
)


def report(results: dict[str, Any]) -> str:
    """The page: what was counted at true size, and what was measured on this device."""
    settings, models = results["settings"], results["models"]
    on_gpu = settings["device"] == "cuda"
    size = "at true size" if on_gpu else "at reduced width (no GPU here: these times say nothing of the real models)"
    lines = [
        f"# DRaFT-1 and RSA-FT on the real architectures ({date.today()}, {results['hardware']})",
        "",
        f"Random weights, {results['versions']}. LoRA of rank {results['rank']} on the attention.",
        "Prompts are encoded beforehand: text encoders are counted nowhere.",
        "",
        "## Counted at true size",
        "",
        "Millions of parameters, and TFLOP for one image: a multiply and an add are two, elementwise work is not",
        "counted. F is a guided network evaluation without gradient, N one with its backward pass, D the decode and R",
        "the reward (a CLIP ViT-L/14) with theirs. plain = (T - 1) F + N + D + R; RSA-FT = 2 plain (the whole",
        "trajectory twice).",
        "",
        "| model | px | T | network M | LoRA M | decoder M | F | N | D | R | plain | RSA-FT |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_counted_line(name, entry) for name, entry in models.items()),
        "",
        f"## Measured {size}",
        "",
        f"Network in {settings['dtype']}, decoder in {settings['vae']}, reward, LoRA, latents and images in fp32;",
        f"{'compiled' if settings['compile'] else 'not compiled'}; steps timed after one to warm up: "
        f"{settings['repeats']} (median); no optimizer step.",
        *(_GPU_NOTE if on_gpu else _CPU_NOTE),
        *(["", "No MFU: the peak of this device is not known here."] if on_gpu and not results["peak_flops"] else []),
        "",
        "| model | network M | px | T | batch | recompute | step | s | x plain | peak GiB | TFLOP/s | MFU | date |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_measured_line(name, entry, row) for name, entry in models.items() for row in entry["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _counted_line(name: str, entry: dict[str, Any]) -> str:
    counted = entry["counted"]
    sizes = " | ".join(f"{counted[key] / 1e6:.1f}" for key in _SIZES)
    flops = " | ".join(f"{counted[key] / 1e12:.4g}" for key in _FLOPS)
    return f"| {name} | {entry['resolution']} | {counted['num_steps']} | {sizes} | {flops} |"


def _measured_line(name: str, entry: dict[str, Any], row: dict[str, Any]) -> str:
    built, recompute = entry["built"], "yes" if row["recompute"] else "no"
    start = (
        f"| {name} | {built['parameters'] / 1e6:.1f} | {built['resolution']} | {built['num_steps']} | {row['batch']} | "
        f"{recompute} | {row['step']} |"
    )
    if row["seconds"] is None:
        return f"{start} does not fit | | | | | {entry['date']} |"
    seconds = f"{row['seconds']:.3g}" + ("" if row["finite"] else " (a reward was not finite)")
    plain = _seconds_of_plain(entry["rows"], row)
    ratio = "" if plain is None else f"{row['seconds'] / plain:.2f}"
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    speed = "" if row["tflops_per_second"] is None else f"{row['tflops_per_second']:.3g}"
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return f"{start} {seconds} | {ratio} | {peak} | {speed} | {mfu} | {entry['date']} |"


def _seconds_of_plain(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Of the plain step in the same setting; None if it was not measured there."""
    for other in rows:
        if other["step"] == "plain" and (other["batch"], other["recompute"]) == (row["batch"], row["recompute"]):
            return other["seconds"]
    return None
