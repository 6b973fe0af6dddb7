"""imscore 0.0.11's MPS and LAION aesthetic score on tensors; run in the environment `clip` of run.sh.

Its constructors load a base model by hub id; here that is a folder of the same name, with a small random CLIP.
"""

from __future__ import annotations

import os
from pathlib import Path

import problem
import shim  # noqa: F401 (before torchvision)
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

LAION, OPENAI = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"


def save_clip(folder: str, projection: int, activation: str, vocabulary: Path) -> None:
    """Two layers of 128 values a tower, 64 a head; the tokenizer of open_clip's words."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower["projection_dim"] = projection
    config = CLIPConfig(
        vision_config={**tower, "image_size": 224, "patch_size": 14, "hidden_act": activation},
        text_config={**tower, "hidden_act": activation, "eos_token_id": 49407, "bos_token_id": 49406},
        projection_dim=projection,
    )
    model = CLIPModel(config)
    model.load_state_dict(problem.fill(model.state_dict()))
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    CLIPTokenizer.from_pretrained(str(vocabulary), model_max_length=77).save_pretrained(folder)


def run(case: str, model, folder: Path) -> None:
    from importlib.metadata import version

    model.eval()
    values: dict[str, torch.Tensor] = {}
    for name, size in (("square", problem.SQUARE), ("photo", problem.PHOTO)):
        images = problem.as_tensor(problem.pictures(size)).requires_grad_()
        # One at a time: MPS divides by the largest similarity of the batch.
        score = torch.cat([model.score(images[i : i + 1], [p]).view(1) for i, p in enumerate(problem.PROMPTS)])
        values[f"score_{name}"] = score
        if name == "square":
            values["gradient"] = torch.autograd.grad(score.sum(), images)[0]
    versions = {name: version(name) for name in ("imscore", "torch", "torchvision", "transformers")}
    problem.save(folder, case, "theirs", values, versions)


def run_mps(folder: Path) -> None:
    from imscore.mps.model import MPS

    save_clip(LAION, 1024, "gelu", folder / "vocabulary")
    model = MPS()
    model.load_state_dict(problem.fill(model.state_dict()))
    torch.save(model.state_dict(), folder / "mps.pt")
    run("imscore_mps", model, folder)


def run_aesthetic(folder: Path) -> None:
    from imscore.aesthetic.model import LAIONAestheticScorer

    save_clip(OPENAI, 768, "quick_gelu", folder / "vocabulary")
    model = LAIONAestheticScorer()
    head = problem.fill(model.mlp.state_dict())
    model.mlp.load_state_dict(head)
    torch.save(head, folder / "aesthetic.pth")
    run("imscore_aesthetic", model, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = problem.arguments(__doc__)
    place = given.folder.resolve()
    (place / "hub").mkdir(exist_ok=True)
    os.chdir(place / "hub")
    for name, start in (("imscore_mps", run_mps), ("imscore_aesthetic", run_aesthetic)):
        if name in (given.cases or [name]):
            start(place)
