"""image-reward 1.5's own model, 446,665,953 random weights; run in the environment `image_reward` of run.sh.

The package's `__init__` imports training code and OpenAI's `clip`, which its metadata does not ask for; the two modules
of the model are imported without it. Nothing in them is changed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import problem
import shim  # noqa: F401 (before torchvision)
import torch

WORDS = 30522  # of bert-base-uncased; BLIP adds two
MED_CONFIG = {  # the published med_config.json
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": WORDS + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def bare_package(name: str, folder: Path) -> None:
    """Stands for a package whose `__init__` is not run."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def save_vocabulary(folder: Path) -> None:
    """As many words as BERT has, the prompts' among them. The model asks for "bert-base-uncased": a folder here."""
    known = sorted({word.strip(",") for prompt in problem.PROMPTS for word in prompt.split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *known]
    folder.mkdir(parents=True, exist_ok=True)
    words += [f"unused{i}" for i in range(WORDS - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def main(folder: Path) -> None:
    from importlib.metadata import version

    root = Path(importlib.util.find_spec("ImageReward").origin).parent
    bare_package("ImageReward", root)
    bare_package("ImageReward.models", root / "models")
    from ImageReward.ImageReward import ImageReward

    save_vocabulary(folder / "bert-base-uncased")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    os.chdir(folder)
    model = ImageReward("med_config.json", device="cpu").eval()
    print("parameters", sum(p.numel() for p in model.parameters()))
    state = problem.fill(model.state_dict())
    model.load_state_dict(state)
    torch.save(state, "ImageReward.pt")
    del state
    values: dict[str, torch.Tensor] = {}
    for name, size in (("square", problem.SQUARE), ("photo", problem.PHOTO)):
        found, gradients = [], []
        for i, (image, prompt) in enumerate(zip(problem.pictures(size), problem.PROMPTS, strict=True)):
            image.save(f"{name}-{i}.png")
            found.append(model.score(prompt, f"{name}-{i}.png"))  # the public way, without a gradient
            if name == "square":
                gradients.append(gradient(model, prompt, model.preprocess(image)))
        values[f"score_{name}"] = torch.tensor(found)
        if gradients:
            values["gradient"] = torch.stack(gradients)
    versions = {n: version(n) for n in ("image-reward", "torch", "transformers", "timm", "fairscale")}
    problem.save(Path("."), "image_reward", "theirs", values, versions)


def gradient(model, prompt: str, pixels: torch.Tensor) -> torch.Tensor:
    """To the image in [0, 1], of the lines of `score` that follow the preprocessing."""
    pixels = pixels.unsqueeze(0).requires_grad_()
    text = model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    seen = model.blip.visual_encoder(pixels)
    hidden = model.blip.text_encoder(
        text.input_ids,
        attention_mask=text.attention_mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long),
        return_dict=True,
    ).last_hidden_state
    score = (model.mlp(hidden[:, 0].float()) - model.mean) / model.std
    return torch.autograd.grad(score.sum(), pixels)[0][0] / torch.tensor(problem.STD).view(3, 1, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(problem.arguments(__doc__).folder.resolve())
