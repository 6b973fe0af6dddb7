"""`rsaft gauge` on runs and on folders of images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsaft.cli.gauge import gauge_folder, gauge_run
from rsaft.errors import ConfigError

PROMPTS = [f"prompt {i}" for i in range(12)]


def write_run(run: Path, train: list[float], held_out: list[float]) -> Path:
    """A run whose held-out reward has these gains; gold falls from the start, which nobody may see."""
    (run / "samples").mkdir(parents=True)
    spread = [((5 * i) % 12) / 6 - 1 for i in range(12)]
    for step, (r, h) in enumerate(zip(train, held_out, strict=True)):
        wobble = [0.01 * ((3 * i + step) % 5 - 2) if step else 0.0 for i in range(12)]
        scores = {
            "reward/proxy": [r + s + w for s, w in zip(spread, wobble, strict=True)],
            "held_out/vit": [h + s - w for s, w in zip(spread, wobble, strict=True)],
            "held_out/gold": [-r for _ in spread],
        }
        record = {"step": 10 * step, "prompts": PROMPTS, "sample_ids": list(range(12)), "scores": scores}
        (run / "samples" / f"step-{10 * step:06d}.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("")
    return run


def test_a_run_without_a_gauge_of_its_own_is_read_from_its_samples(tmp_path: Path):
    run = write_run(tmp_path / "run", [0, 1, 2, 3, 4], [0, 0.5, 1.0, 1.02, 1.04])
    *table, verdict = gauge_run(run, patience=2).splitlines()
    assert [int(line.split()[0]) for line in table[1:]] == [0, 10, 20, 30, 40]
    assert [line.endswith("yes") for line in table[1:]] == [False, False, False, False, True]
    assert "keep step 20" in verdict


def test_an_honest_run_is_kept_to_its_end(tmp_path: Path):
    run = write_run(tmp_path / "run", [0, 1, 2, 3, 4], [0, 0.5, 1.0, 1.5, 2.0])
    assert gauge_run(run).splitlines()[-1].endswith("keep step 40")


def test_a_run_without_samples_is_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no evaluation to read"):
        gauge_run(tmp_path)


def write_images(folder: Path, colour: tuple[int, int, int]) -> Path:
    folder.mkdir()
    lines = []
    for i in range(4):
        pixels = np.full((40, 40, 3), colour, dtype=np.uint8)
        pixels[:10, :10] += np.uint8(10 * i)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "prompt": f"p{i % 2}", "seed": i // 2}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_of_images_has_its_statistics_beside_the_bases(tmp_path: Path):
    grey, red = write_images(tmp_path / "base", (100, 100, 100)), write_images(tmp_path / "tuned", (200, 0, 0))
    alone = gauge_folder(red, None)
    assert float(re.search(r"saturation +([\d.]+)", alone)[1]) == pytest.approx(200 / 255, abs=0.01)
    beside = gauge_folder(red, grey)
    assert float(re.search(r"saturation +[\d.]+ +([\d.]+)", beside)[1]) == pytest.approx(0, abs=0.001)
    assert "over 4 pairs" in beside
    assert re.search(r"drift +0\.000  over 4 pairs", gauge_folder(grey, grey))
    assert "diversity" in alone
