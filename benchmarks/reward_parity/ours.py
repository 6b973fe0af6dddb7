"""rsaft's side: the same weights, through the public classes. Runs in rsaft's own environment.

python -m benchmarks.reward_parity.ours FOLDER [CASE ...]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import rsaft
from benchmarks.reward_parity import problem
from rsaft.rewards import MPS, AestheticScore, CLIPScore, HPSv2, ImageReward, VLMReward
from rsaft.types import Reward

Make = Callable[[Path, bool], Reward]


def aesthetic(folder: Path, exact: bool) -> Reward:
    base = folder / "hub" / "openai" / "clip-vit-large-patch14"
    return AestheticScore(folder / "aesthetic.pth", clip=base, device="cpu", exact=exact)


def hpsv3(folder: Path, exact: bool) -> Reward:
    here = folder / "hpsv3"
    template = json.loads((here / "facts.json").read_text())["template"]
    options = {"base": here / "base", "template": template, "device": "cpu", "exact": exact}
    return VLMReward(here, "reward_token", dtype="fp32", **options)


# `exact`: whole 1/255 between the passes of the resize, as PIL; HPSv2 resizes tensors and has no such option.
CASES: dict[str, Make] = {
    "open_clip": lambda folder, exact: CLIPScore(
        folder / "clip.pt", tokenizer=folder / "vocabulary", device="cpu", exact=exact
    ),
    "hpsv2": lambda folder, exact: HPSv2(folder / "clip.pt", tokenizer=folder / "vocabulary", device="cpu"),
    "image_reward": lambda folder, exact: ImageReward(
        folder / "ImageReward.pt", tokenizer=folder / "bert-base-uncased", device="cpu", exact=exact
    ),
    "imscore_mps": lambda folder, exact: MPS(
        folder / "mps.pt", tokenizer=folder / "vocabulary", threshold=0.01, device="cpu", exact=exact
    ),
    "imscore_aesthetic": aesthetic,
    "hpsv3": hpsv3,
}


def score(case: str, folder: Path) -> None:
    """Scores of squares with their gradients, and of photos, where the resize matters."""
    make = CASES[case]
    reward = make(folder, False)
    side = (448, 448) if case == "hpsv3" else problem.SQUARE  # neither is resized
    squares = problem.as_tensor(problem.pictures(side)).requires_grad_()
    photos = problem.as_tensor(problem.pictures(problem.PHOTO))
    values = {"score_square": reward(squares, problem.PROMPTS)}
    (values["gradient"],) = torch.autograd.grad(values["score_square"].sum(), squares)
    with torch.no_grad():
        values["score_photo"] = reward(photos, problem.PROMPTS)
        del reward
        values["score_photo_exact"] = make(folder, True)(photos, problem.PROMPTS)
    versions = {"rsaft": rsaft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    problem.save(folder, case, "ours", values, versions)


def main() -> None:
    torch.set_num_threads(1)
    given = problem.arguments(__doc__)
    for case in given.cases or CASES:
        if (given.folder / f"{case}.theirs.npz").is_file():
            score(case, given.folder)


if __name__ == "__main__":
    main()
