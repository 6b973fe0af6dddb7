"""The testbed's reward models: small networks over an image and its caption, learned from pairwise preferences."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ARCHITECTURES = ("cnn", "vit", "mixer")
MAX_WORDS = 16


class LearnedReward(nn.Module):
    """A reward (images in [0, 1], captions) -> (b,), differentiable to the images; costs about 1 ms an image.

    Captions are read as their set of known words. `center` and `spread` bring the scores to mean 0 and deviation 1 over
    the base model's samples, so a reward of 1 is one base sigma.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, architecture: str, words: Sequence[str]) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"testbed reward: architecture {architecture!r} is unknown; allowed: {', '.join(ARCHITECTURES)}."
            )
        self.architecture, self.words = architecture, tuple(words)
        self.index = {word: i + 1 for i, word in enumerate(self.words)}
        self.text = nn.EmbeddingBag(len(self.words) + 1, 64, mode="sum", padding_idx=0)
        self.body = {"cnn": GatedCNN, "vit": ViT, "mixer": Mixer}[architecture]()
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Standardised score of each image for its caption; higher is better."""
        ids = self.tokens(prompts).to(images.device)
        raw = self.body(images.float() * 2 - 1, self.text(ids))
        return (raw - self.center) / self.spread

    def tokens(self, prompts: Sequence[str]) -> Int[Tensor, "b w"]:
        """Indices of each caption's known words, padded with 0."""
        rows = [[self.index.get(w, 0) for w in prompt.lower().split()][:MAX_WORDS] for prompt in prompts]
        return torch.tensor([row + [0] * (MAX_WORDS - len(row)) for row in rows], dtype=torch.long)


class GatedCNN(nn.Module):
    """Three convolutions, each channel scaled and shifted by the caption, then two linear layers; 300 k weights."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.gates = nn.ModuleList(nn.Linear(64, 2 * width) for width in widths[1:])
        self.head = nn.Sequential(nn.Linear(96 * 16 + 64, 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, 1))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # strided convolutions are twice as fast so on a CPU
        for conv, gate in zip(self.convs, self.gates, strict=True):
            scale, shift = gate(text)[..., None, None].chunk(2, dim=1)
            x = F.silu(conv(x) * (1 + scale) + shift)
        pooled = F.avg_pool2d(x, 2).flatten(1)
        return self.head(torch.cat([pooled, text], dim=1)).squeeze(1)


class ViT(nn.Module):
    """A vision transformer over 64 patches and one caption token, 64 wide, 3 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 65, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Dropout(0.2), nn.Linear(64, 1))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = torch.cat([text[:, None], self.patches(x).flatten(2).mT], dim=1)
        return self.head(self.layers(tokens + self.places)[:, 0]).squeeze(1)


class Mixer(nn.Module):
    """An MLP-mixer over 64 patches beside a soft colour histogram; the caption gates both. No convolution overlaps."""

    bins: Tensor

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.across = nn.ModuleList(_mlp(64, 64) for _ in range(depth))
        self.within = nn.ModuleList(_mlp(width, 2 * width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(64, 2 * width) for _ in range(depth))
        self.register_buffer("bins", torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3))
        self.head = nn.Sequential(
            nn.Linear(width + len(self.bins) + 64, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 1)
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        for across, within, gate in zip(self.across, self.within, self.gates, strict=True):
            scale, shift = gate(text)[:, None].chunk(2, dim=2)
            tokens = tokens + across(tokens.mT).mT
            tokens = tokens * (1 + scale) + shift
            tokens = tokens + within(tokens)
        return self.head(torch.cat([tokens.mean(dim=1), self._histogram(x), text], dim=1)).squeeze(1)

    def _histogram(self, x: Tensor) -> Tensor:
        """Share of the picture near each of 27 colours, (b, 27)."""
        pixels = F.avg_pool2d(x, 2).flatten(2).mT
        nearness = -2.0 * (pixels[:, :, None] - self.bins).square().sum(dim=-1)
        return 4 * torch.softmax(nearness, dim=-1).mean(dim=1)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def caption_words(prompts: Sequence[str]) -> tuple[str, ...]:
    """Every word of `prompts`, sorted: what a reward model can read."""
    return tuple(sorted({word for prompt in prompts for word in prompt.lower().split()}))


def save_reward(reward: LearnedReward, path: Path) -> None:
    """Write weights in fp16 and, as metadata, what is needed to build the network again."""
    weights = {name: value.detach().half().contiguous() for name, value in reward.body.state_dict().items()}
    weights = {f"body.{name}": value for name, value in weights.items()}
    weights["text.weight"] = reward.text.weight.detach().half()
    # The standardisation stays in full precision: it is two numbers, and rounding them would shift every score.
    weights |= {"center": reward.center.float(), "spread": reward.spread.float()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, {"architecture": reward.architecture, "words": json.dumps(reward.words)})


def load_reward(path: Path) -> LearnedReward:
    """The reward saved at `path`: frozen, in eval mode, computing in fp32."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    reward = LearnedReward(metadata["architecture"], json.loads(metadata["words"]))
    reward.load_state_dict(weights)
    return reward.eval().requires_grad_(False)
