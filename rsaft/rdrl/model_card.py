"""README.md of a run: what was trained, how it scores, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rsaft.backbones.export import loading_line
from rsaft.backbones.pipeline import DiffusersBackbone


def write_model_card(
    run: Path, backbone: DiffusersBackbone, *, evaluations: Sequence[Mapping[str, float]], step: int, best: int
) -> Path:
    """Write the card beside the checkpoints.

    Args:
        run: the run directory.
        backbone: what was trained.
        evaluations: means of each evaluation, with its "step".
        step: updates done.
        best: step of the evaluation whose weights to keep.
    """
    pipeline, source = backbone.family.pipeline, backbone.source
    classes = pipeline if backbone.lora is not None else f"{pipeline}, {type(backbone.network).__name__}"
    lines = [
        f"# {run.name}",
        "",
        f"`{source}` fine-tuned with rewards by rsaft for {step} updates. The evaluation to keep: step {best}.",
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
        "A reward that rises while held-out rewards fall is being hacked: look at `report.html` first. "
        + ("" if best in (0, step) else f"`rsaft export RUN --best` takes step {best} instead of the last one."),
        "",
        "```python",
        f"from diffusers import {classes}",
        f'pipe = {pipeline}.from_pretrained("{source}")',
        loading_line(backbone, Path(f"checkpoints/step-{step:06d}/adapter")),
        "```",
        "",
        "`rsaft export RUN` writes the weights for peft, for ComfyUI, or merged into a pipeline.",
        "`config.yaml` holds the settings, `env.json` the versions, `metrics.jsonl` the curves.",
        "",
    ]
    path = run / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
