"""README.md of a run: what was trained, how it scores, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rsaft.backbones.export import LORA_FILE


def write_model_card(
    run: Path, *, source: str, evaluations: Sequence[Mapping[str, float]], step: int, best: int, is_lora: bool
) -> Path:
    """Write the card beside the checkpoints.

    Args:
        run: the run directory.
        source: path or hub id of the base model.
        evaluations: means of each evaluation, with its "step".
        step: updates done.
        best: step of the best held-out evaluation.
        is_lora: whether the checkpoint holds an adapter or a whole UNet.
    """
    folder = f"checkpoints/step-{step:06d}/adapter"
    load = (
        f'pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")'
        if is_lora
        else f'pipe.unet = UNet2DConditionModel.from_pretrained("{folder}", subfolder="unet")'
    )
    lines = [
        f"# {run.name}",
        "",
        f"`{source}` fine-tuned with rewards by rsaft for {step} updates. Best held-out evaluation: step {best}.",
        "",
        "| score | before | after |",
        "|---|---|---|",
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        names = [k for k in first if k.startswith(("reward/", "held_out/", "sharpness/")) and k in last]
        lines += [f"| {name} | {first[name]:.4f} | {last[name]:.4f} |" for name in names]
    lines += [
        "",
        "A reward that rises while held-out rewards fall is being hacked: look at `report.html` first.",
        "",
        "```python",
        "from diffusers import StableDiffusionPipeline, UNet2DConditionModel",
        f'pipe = StableDiffusionPipeline.from_pretrained("{source}")',
        load,
        "```",
        "",
        "`config.yaml` holds the settings, `env.json` the versions, `metrics.jsonl` the curves.",
        "",
    ]
    path = run / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
