"""`rsaft gauge`: the hacking gauge on a finished run, or on a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.metrics.gauge import Gauge, HackingGauge, Reading
from rsaft.metrics.image_folder import load_picture, matched_ids, read_image_folder
from rsaft.metrics.image_statistics import diversity, drift, image_statistics, thumbnails
from rsaft.metrics.records import read_run
from rsaft.metrics.scoring import Item
from rsaft.metrics.stop_rule import StopRule

COLUMNS = ("gain", "believed", "gap", "jdr", "jcr", "sharpness", "diversity", "drift")


def gauge_run(run: Path, *, share: float | None = None, patience: int | None = None) -> str:
    """A line for each evaluation, and the verdict; also of runs that had no gauge.

    `share` and `patience` take the place of the run's own, or of the defaults where it has none.

    Raises:
        ConfigError: if the run has no evaluation whose samples' scores are there.
        RunDirectoryError: if it is no run directory, or a file in it is damaged.
    """
    found = read_run(run)
    samples, own = found.samples, (found.config.get("gauge") or {}).get("rule") or {}
    given = {"share": share, "patience": patience}
    rule = StopRule(**own | {key: value for key, value in given.items() if value is not None})
    if not samples:
        raise ConfigError(f"gauge: {run} holds no samples/step-XXXXXX.json, so no evaluation to read.")
    gauge = HackingGauge(Gauge(rule=rule))
    readings = []
    for _, record in sorted(samples.items()):
        gauge.restore([record], None)
        readings.append(gauge.reading())
    lines = [" ".join(["update", *(f"{name:>9}" for name in COLUMNS), "  alarm"])]
    lines += [_line(reading) for reading in readings]
    return "\n".join([*lines, readings[-1].sentence])


def gauge_folder(folder: Path, base: Path | None) -> str:
    """The statistics of a folder's images, beside those of another's (the untuned model's) if it is given.

    Images of the same prompt and seed are a pair; drift is over pairs.

    Raises:
        ConfigError: if a folder has no images with prompts.
    """
    items = list(read_image_folder(folder).items)
    mine, small = _measured(items)
    if base is None:
        lines = [f"{'':<24}{'images':>9}"]
        return "\n".join(lines + [f"{name:<24}{float(x.nanmean()):9.3f}" for name, x in mine.items()])
    others = matched_ids(read_image_folder(base).items, items)
    theirs, base_small = _measured(others)
    lines = [f"{'':<24}{'images':>9}{'base':>9}  shift in base deviations"]
    for name, x in mine.items():
        now, before, spread = float(x.nanmean()), float(theirs[name].nanmean()), float(_finite(theirs[name]).std())
        lines.append(f"{name:<24}{now:9.3f}{before:9.3f}  {(now - before) / spread if spread else float('nan'):+.2f}")
    rows = {(item.prompt_id, item.seed): i for i, item in enumerate(others)}
    pairs = [
        (i, rows[item.prompt_id, item.seed]) for i, item in enumerate(items) if (item.prompt_id, item.seed) in rows
    ]
    alike = [(small[i], base_small[j]) for i, j in pairs if small[i].shape == base_small[j].shape]
    if alike:
        a, b = (torch.stack(column) for column in zip(*alike, strict=True))
        lines.append(f"{'drift':<24}{float(drift(a, b).nanmean()):9.3f}  over {len(alike)} pairs")
    return "\n".join(lines)


def _line(reading: Reading) -> str:
    cells = [reading.values.get(f"gauge/{name}") for name in COLUMNS]
    shown = [f"{value:9.3f}" if value is not None else f"{'-':>9}" for value in cells]
    return " ".join([f"{reading.step:6d}", *shown, "  yes" if reading.alarm else ""]).rstrip()


def _measured(items: Sequence[Item]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Statistics of each image that can be read, with the diversity of its prompt; thumbnails (3, h, w)."""
    columns: dict[str, list[Tensor]] = {}
    small = []
    for item in items:
        picture = None if item.file is None else load_picture(item.file)
        if picture is None:
            raise ConfigError(f"gauge: {item.file} cannot be read as an image of 8 bits; take it out of the folder.")
        for name, value in image_statistics(picture[None]).items():
            columns.setdefault(name, []).append(value)
        small.append(thumbnails(picture[None])[0])
    found = {name: torch.cat(values) for name, values in columns.items()}
    if len({s.shape for s in small}) == 1:
        found["diversity"] = diversity(torch.stack(small).flatten(1), [item.prompt for item in items])
    return found, small


def _finite(x: Tensor) -> Tensor:
    return x[x.isfinite()]
