"""The differences between both sides, into benchmarks/results/reward_parity.{json,md}.

python -m benchmarks.reward_parity.table FOLDER
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
CASES = {
    "open_clip": "open_clip, `CLIPScore`",
    "hpsv2": "hpsv2's own open_clip, `HPSv2`",
    "image_reward": "image-reward, `ImageReward`",
    "imscore_mps": "imscore, `MPS`",
    "imscore_aesthetic": "imscore, `AestheticScore`",
    "hpsv3": "hpsv3's own class, `VLMReward`",
}


def difference(folder: Path, case: str) -> dict[str, Any] | None:
    """What a case's two files say; None if one is missing."""
    paths = {side: folder / f"{case}.{side}.npz" for side in ("theirs", "ours")}
    if not all(path.is_file() for path in paths.values()):
        return None
    theirs, ours = (np.load(paths[side]) for side in ("theirs", "ours"))
    g, h = theirs["gradient"].ravel().astype(np.float64), ours["gradient"].ravel().astype(np.float64)
    row: dict[str, Any] = {
        "versions": {side: json.loads(str(file["versions"])) for side, file in (("theirs", theirs), ("ours", ours))},
        "scores": theirs["score_square"].tolist(),
        "square": gap(theirs["score_square"], ours["score_square"]),
        "gradient": float(np.linalg.norm(g - h) / np.linalg.norm(g)),
        "gradient_cosine": float(g @ h / np.linalg.norm(g) / np.linalg.norm(h)),
    }
    if "score_photo" in theirs.files:
        row["photo"] = gap(theirs["score_photo"], ours["score_photo"])
        row["photo_exact"] = gap(theirs["score_photo"], ours["score_photo_exact"])
    return row


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def lines_of(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| original, ours | scores, smallest and largest | 224 x 224: scores | 224 x 224: gradient, relative "
        "| 384 x 512: scores | with `exact` |",
        "|---|---|---|---|---|---|",
    ]
    for case, row in rows.items():
        photo = [f"{row[key]:.1e}" if key in row else "-" for key in ("photo", "photo_exact")]
        lines.append(
            f"| {CASES[case]} | {min(row['scores']):.4f}, {max(row['scores']):.4f} | {row['square']:.1e} "
            f"| {row['gradient']:.1e} | {photo[0]} | {photo[1]} |"
        )
    return lines


def main() -> None:
    folder = Path(sys.argv[1])
    rows = {case: row for case in CASES if (row := difference(folder, case)) is not None}
    said_in = folder / "attempts.json"
    said = json.loads(said_in.read_text()) if said_in.is_file() else {}
    where = f"{datetime.date.today().isoformat()}, {platform.machine()}, one thread of {os.cpu_count()} CPU cores"
    lines = ["# Rewards beside the original packages", ""]
    lines += [f"{where}. benchmarks/reward_parity/run.sh; the write-up is in benchmarks/reward_parity/README.md."]
    lines += ["Largest difference over three pictures with their prompts, on the same random weights, in fp32.", ""]
    lines += [*lines_of(rows), "", "## What ran", ""]
    for case, row in rows.items():
        text = "; ".join(
            f"{side}: {', '.join(f'{n} {v}' for n, v in row['versions'][side].items())}" for side in row["versions"]
        )
        lines.append(f"- {CASES[case]}: {text}")
    if said:
        lines += [
            "",
            "## What the originals say when used as their pages say",
            "",
            "| attempt | last line |",
            "|---|---|",
        ]
        lines += [f"| {name} | `{text}` |" for name, text in said.items()]
    (RESULTS / "reward_parity.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "reward_parity.json").write_text(json.dumps({"where": where, "cases": rows, "attempts": said}) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
