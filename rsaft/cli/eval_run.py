"""`rsaft eval`: scores a model's images, and its base's of the same prompts and noises, batch by batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from rsaft.cli.eval_parts import Opened, Part
from rsaft.cli.eval_plan import Plan, Request, planned
from rsaft.cli.eval_store import (
    PROMPTS,
    SUMMARY,
    TABLE,
    open_records,
    part_scores,
    records_of,
    refuse_others,
    throughput,
)
from rsaft.config.assemble import load_rewards
from rsaft.files import write_atomic
from rsaft.metrics.score_page import as_json, markdown
from rsaft.metrics.score_table import parquet, summary
from rsaft.metrics.scoring import Item, Picture, now, score_images
from rsaft.prompts import over_long
from rsaft.rdrl.progress import ProgressLine
from rsaft.rdrl.run_directory import JsonLines, environment, locked, write_json_atomic
from rsaft.rdrl.signals import StopRequest

_log = logging.getLogger(__name__)


def run_eval(request: Request, say: Callable[[str], None]) -> int:
    """Score what is not scored yet, and write the table and the summary.

    Returns:
        The exit code: 0, or that of a process which a signal ended.

    Raises:
        ConfigError: if something that the arguments name does not exist or does not fit, or `out` holds an evaluation
            with other settings.
        CheckpointError, RunDirectoryError: if a checkpoint or a file of `out` is damaged, or cannot be written.
    """
    plan = planned(request, say)
    refuse_others(plan.out)
    with locked(plan.out):
        records = open_records(plan.out, plan.settings)
        try:
            code = _score(plan, records, say)
        finally:
            records.close()
        if code:
            total = sum(len(part.items) for part in plan.parts)
            done = sum(record["images"] for record in records_of(plan.out).values())
            say(f"stopped: {done} of {total} images are scored; the same command goes on with the others.")
            return code
        say(_finish(plan))
    for name in (TABLE, SUMMARY):
        say(f"wrote {plan.out / name}")
    return 0


def _score(plan: Plan, records: JsonLines, say: Callable[[str], None]) -> int:
    """Score the batches that are missing; 0, or the exit code after a signal."""
    done = records_of(plan.out)
    batches = plan.batches()
    missing = [number for number in range(len(batches)) if number not in done]
    _write_prompts(plan, None)
    if not missing:
        return 0
    if done:
        say(f"{len(done)} of {len(batches)} batches were done already")
    rewards = load_rewards(plan.rewards, "rewards")
    counts = [len(items) for _, items in batches]
    seen = sum(counts[number] for number in done)
    current: Part | None = None
    opened: Opened | None = None
    with StopRequest() as stop, ProgressLine(done=seen, total=sum(counts), visible=True, label="eval") as progress:
        for number in missing:
            part, items = batches[number]
            if opened is None or part is not current:
                opened = None  # one model in memory at a time
                opened, current = part.open(), part
                _write_prompts(plan, opened)
            record = _batch(part, items, opened, rewards, plan)
            records.write({"step": number, **record})
            records.sync()
            seen += len(items)
            progress.show(seen, {f"reward/{name}": _mean(values) for name, values in record["scores"].items()})
            if stop.signal is not None:
                return stop.exit_code or 1
    return 0


def _batch(part: Part, items: Sequence[Item], opened: Opened, rewards: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    begun = now(opened.device)
    pictures = opened.pictures(items)
    seconds = now(opened.device) - begun
    found = score_images(pictures, [item.prompt for item in items], rewards, device=opened.device)
    if plan.save_images:
        for item, picture in zip(items, pictures, strict=True):
            _save(picture, plan.out / "images" / part.role / _name(item))
    return {
        "part": part.role,
        "images": len(items),
        "unreadable": [str(item.file) for item, one in zip(items, pictures, strict=True) if one is None],
        "scores": {name: values.tolist() for name, values in found.scores.items()},
        "seconds": {"images": seconds, **{f"reward/{name}": value for name, value in found.seconds.items()}},
    }


def _write_prompts(plan: Plan, opened: Opened | None) -> None:
    """prompts.json; what the text encoders do not read is known once a model is open, and kept from then on."""
    path = plan.out / PROMPTS
    prompts = {item.prompt_id: item.prompt for item in plan.parts[-1].items}
    lines = plan.lines or tuple(range(1, len(prompts) + 1))
    cut = json.loads(path.read_text(encoding="utf-8")).get("over_long", {}) if path.is_file() else {}
    if opened is not None:
        for reader in opened.readers:
            found = over_long(list(prompts.values()), lines, reader)
            key = f"{reader.name}, {reader.limit} tokens"
            if found is not None and key not in cut:
                cut[key] = asdict(found)
                what = f"longer than the {reader.limit} tokens that {reader.name} reads"
                _log.warning(f"prompts '{plan.prompts['source']}': {found.said(what)}, cut there.")
    rows = [
        {"prompt_id": i, "line": lines[row], "prompt": prompt, "category": plan.categories.get(i)}
        for row, (i, prompt) in enumerate(prompts.items())
    ]
    write_json_atomic(path, {**plan.prompts, "over_long": cut, "prompts": rows})


def _finish(plan: Plan) -> str:
    """Write the table and the summary; returns what is printed."""
    records, batches = records_of(plan.out), plan.batches()
    of_part = [[records[number] for number, (owner, _) in enumerate(batches) if owner is part] for part in plan.parts]
    parts = [part_scores(part, tuple(plan.rewards), found) for part, found in zip(plan.parts, of_part, strict=True)]
    found = summary(parts[-1], parts[0] if len(parts) > 1 else None, plan.categories)
    speeds = throughput(list(records.values()))
    unreadable = [name for record in records.values() for name in record["unreadable"]]
    write_atomic(plan.out / TABLE, parquet(parts))
    if plan.save_images:
        for part in plan.parts:
            _write_metadata(part, plan.out / "images" / part.role)
    written = json.loads((plan.out / PROMPTS).read_text(encoding="utf-8"))
    write_json_atomic(
        plan.out / SUMMARY,
        {
            "settings": plan.settings,
            "parts": [{"role": part.role, "run": part.run, "step": part.step} for part in plan.parts],
            **as_json(found),
            "prompt_file": {key: written[key] for key in ("source", "report", "note", "over_long")},
            "unreadable": unreadable,
            "throughput": speeds,
            "environment": environment(),
        },
    )
    word = "read" if plan.settings["sampling"] is None else "sampled"
    text = [markdown(found), _speeds(speeds, tuple(plan.rewards), word)]
    if unreadable:
        text.append(f"{len(unreadable)} images could not be read as images of 8 bits, the first: {unreadable[0]}")
    return "\n\n".join(text)


def _speeds(speeds: Mapping[str, float], names: Sequence[str], word: str) -> str:
    scored = [f"{name} {speeds[f'reward/{name}']:.3g}" for name in names if f"reward/{name}" in speeds]
    return f"Images a second: {word} {speeds.get('images', float('nan')):.3g}; scored by {', '.join(scored)}."


def _save(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path)


def _write_metadata(part: Part, folder: Path) -> None:
    rows = [{"file_name": _name(item), "prompt": item.prompt, "seed": item.seed} for item in part.items]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(folder / "metadata.jsonl", text.encode("utf-8"))


def _name(item: Item) -> str:
    return f"{item.prompt_id:06d}-{item.seed}.png"


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if value == value]
    return sum(finite) / len(finite) if finite else float("nan")
