"""open_clip 3.3.0, and hpsv2 1.2.0 with the open_clip that it carries; run in the environment `clip` of run.sh.

Nothing of the packages is changed but one file: hpsv2's wheel lacks its vocabulary, which is copied from open_clip.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import problem
import shim  # noqa: F401 (before torchvision)
import torch

VERSIONS = ("open_clip_torch", "hpsv2", "torch", "torchvision")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in VERSIONS}


def save_vocabulary(folder: Path) -> None:
    """open_clip's words in the files that transformers' CLIPTokenizer reads."""
    import open_clip

    words = open_clip.SimpleTokenizer()
    folder.mkdir(exist_ok=True)
    vocabulary = dict(words.encoder)
    for theirs, ours in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        vocabulary[ours] = vocabulary.pop(theirs)
    merges = [" ".join(pair) for pair in words.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def scores(model, preprocess, tokenize, folder: Path, case: str) -> None:
    """Cosines as hpsv2's `score` computes them, one image at a time, and their gradients to the pixels."""
    model.eval()
    values: dict[str, torch.Tensor] = {}
    for name, size in (("square", problem.SQUARE), ("photo", problem.PHOTO)):
        found, gradients, kept = [], [], []
        for image, prompt in zip(problem.pictures(size), problem.PROMPTS, strict=True):
            pixels = preprocess(image).unsqueeze(0).requires_grad_()
            outputs = model(pixels, tokenize([prompt]))
            cosine = torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)
            gradients.append(torch.autograd.grad(cosine.sum(), pixels)[0] / torch.tensor(problem.STD).view(3, 1, 1))
            found.append(cosine)
            kept.append(pixels)
        values |= {f"score_{name}": torch.cat(found), f"pixels_{name}": torch.cat(kept)}
        if name == "square":
            values["gradient"] = torch.cat(gradients)
    problem.save(folder, case, "theirs", values, versions())


def run_open_clip(folder: Path) -> None:
    import open_clip

    model = open_clip.model.CLIP(**problem.CLIP, output_dict=True)
    model.load_state_dict(problem.fill(model.state_dict()))
    torch.save({"state_dict": model.state_dict()}, folder / "clip.pt")
    save_vocabulary(folder / "vocabulary")
    preprocess = open_clip.image_transform(224, is_train=False)
    scores(model, preprocess, open_clip.SimpleTokenizer(), folder, "open_clip")


def run_hpsv2(folder: Path) -> None:
    import hpsv2
    import open_clip

    name = "bpe_simple_vocab_16e6.txt.gz"
    lacking = Path(hpsv2.__file__).parent / "src" / "open_clip" / name
    if not lacking.is_file():
        shutil.copy(Path(open_clip.__file__).parent / name, lacking)
    from hpsv2.src.open_clip import SimpleTokenizer, image_transform
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import tokenize

    del SimpleTokenizer
    model = CLIP(**problem.CLIP, output_dict=True)
    model.load_state_dict(torch.load(folder / "clip.pt", weights_only=True)["state_dict"])
    # What its create_model_and_transforms makes with light_augmentation=True, as img_score.py asks.
    preprocess = image_transform(224, is_train=False, resize_longest_max=True)
    scores(model, preprocess, tokenize, folder, "hpsv2")


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = problem.arguments(__doc__)
    for case, run in (("open_clip", run_open_clip), ("hpsv2", run_hpsv2)):
        if case in (given.cases or [case]):
            run(given.folder)
