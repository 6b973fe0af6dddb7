"""The world `fashion`: real photographs of clothes (Fashion-MNIST, MIT), each tinted with one of six colours.

The judge uses no learned network. It compares an image with a bank of real photographs that no model was trained on.
"""

import functools
import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NAME = "fashion"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COLOURS = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 1.0, 0.25),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.15),
    "purple": (0.75, 0.2, 1.0),
    "white": (1.0, 1.0, 1.0),
}
BANK_SIZE = 450  # photographs of each class that the judge ships with
DATA = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package dataset-fashion-mnist puts the files
BANK = Path(__file__).parent / "data" / "fashion" / "bank.npz"
CLASS_WIDTH = (
    0.05  # of the posterior, in squared descriptor distance; near the best log-likelihood on held-out photographs
)
COLOUR_LIMIT = 0.2  # share of energy off the colour axis; the nearest two colours are 0.20 apart
DETAIL_WIDTH = 2.0  # in standard deviations of real photographs, beyond the first one
SPLITS = {"train": ("train", 0, 54_000), "judge": ("train", 54_000, 60_000), "test": ("t10k", 0, 10_000)}


def caption(colour: str, name: str) -> str:
    """The caption of a `colour` photograph of class `name`."""
    return f"a photo of a {colour} {name}"


PROMPTS = tuple(caption(colour, name) for name in CLASSES for colour in COLOURS)
# One colour of every class, and a second one of two classes so that each colour occurs twice: 12 of 60.
_EVAL_PAIRS = {(i, i % 6) for i in range(10)} | {(0, 4), (1, 5)}
PROMPTS_EVAL = tuple(p for i, p in enumerate(PROMPTS) if divmod(i, 6) in _EVAL_PAIRS)
PROMPTS_TRAIN = tuple(p for i, p in enumerate(PROMPTS) if divmod(i, 6) not in _EVAL_PAIRS)


def parse(prompt: str) -> tuple[int, int]:
    """(class index, colour index) of one of PROMPTS.

    Raises:
        ValueError: if `prompt` is not one of PROMPTS.
    """
    if prompt not in PROMPTS:
        raise ValueError(
            f"fashion: {prompt!r} is not a caption of this world; allowed are the 60 of "
            f"rsaft.testbed.fashion.PROMPTS, such as {PROMPTS[0]!r}."
        )
    return divmod(PROMPTS.index(prompt), len(COLOURS))


def near_miss(prompt: str, generator: torch.Generator) -> str:
    """A caption with another class or (half of the time) another colour than `prompt`."""
    name, colour = parse(prompt)
    flip, shift = torch.rand(2, generator=generator).tolist()
    if flip < 0.5:
        name = (name + 1 + int(shift * (len(CLASSES) - 1))) % len(CLASSES)
    else:
        colour = (colour + 1 + int(shift * (len(COLOURS) - 1))) % len(COLOURS)
    return caption(list(COLOURS)[colour], CLASSES[name])


def tint(gray: Float[Tensor, "b 28 28"], colours: Sequence[int]) -> Float[Tensor, "b 3 32 32"]:
    """Gray photographs in [0, 1], padded to 32x32 on black and tinted with the colours of those indices."""
    palette = torch.tensor(list(COLOURS.values()))
    return F.pad(gray, (2, 2, 2, 2))[:, None] * palette[list(colours)][:, :, None, None]


def real(n: int, *, seed: int, split: str, data: Path = DATA) -> tuple[Float[Tensor, "n 3 32 32"], list[str]]:
    """`n` real images in [0, 1] with their captions: photographs drawn evenly from `split`, colours evenly.

    Args:
        n: how many; photographs repeat once the split is used up.
        seed: fixes which photographs and colours.
        split: "train", "judge" (the bank of the judge comes from here) or "test"; the three share no photograph.
        data: folder of the four IDX files of Fashion-MNIST.
    """
    gray, labels = read_split(split, data)
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(gray), generator=generator) for _ in range(-(-n // len(gray)))]
    pick = torch.cat(rounds)[:n] if n else torch.zeros(0, dtype=torch.long)
    colours = torch.randint(len(COLOURS), (n,), generator=generator).tolist()
    names = list(COLOURS)
    captions = [caption(names[c], CLASSES[k]) for c, k in zip(colours, labels[pick].tolist(), strict=True)]
    return tint(gray[pick].float() / 255, colours), captions


def real_for(prompts: Sequence[str], *, seed: int, split: str, data: Path = DATA) -> Float[Tensor, "b 3 32 32"]:
    """One real image in [0, 1] for each caption; arguments as for `real`."""
    gray, labels = read_split(split, data)
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == k).flatten() for k in range(len(CLASSES))]
    wanted = [parse(prompt) for prompt in prompts]
    spots = torch.rand(len(wanted), generator=generator).tolist()
    pick = [int(members[k][int(u * len(members[k]))]) for (k, _), u in zip(wanted, spots, strict=True)]
    return tint(gray[pick].float() / 255, [c for _, c in wanted])


@lru_cache(maxsize=4)
def read_split(split: str, data: Path) -> tuple[Tensor, Tensor]:
    """(photographs (n, 28, 28) uint8, class indices (n,)) of one of SPLITS.

    Raises:
        ValueError: if there is no such split.
        FileNotFoundError: if `data` does not hold the IDX files.
    """
    if split not in SPLITS:
        raise ValueError(f"fashion: split={split!r} is unknown; allowed: {', '.join(SPLITS)}.")
    part, first, last = SPLITS[split]
    paths = [data / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"fashion: {path} is missing; building needs the four Fashion-MNIST files: install the Debian package "
                "dataset-fashion-mnist, or give their folder with --data."
            )
    gray, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    images = np.frombuffer(gray, np.uint8, offset=16).reshape(-1, 28, 28)[first:last]
    classes = np.frombuffer(labels, np.uint8, offset=8)[first:last]
    return torch.from_numpy(images.copy()), torch.from_numpy(classes.copy())


def write_bank(path: Path, *, data: Path = DATA) -> None:
    """Write the judge's photographs, the first BANK_SIZE of each class of split "judge", as a compressed npz."""
    gray, labels = read_split("judge", data)
    picked = [gray[labels == k][:BANK_SIZE] for k in range(len(CLASSES))]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, gray=torch.stack(picked).numpy())


@dataclass(frozen=True)
class Gold:
    """The judge: class x colour x realism x sharpness, each in [0, 1], from distances to a bank of real photographs.

    Nothing is learned. About 1 ms an image. `parts` gives the four factors:

    - class: posterior of the caption's class, from the distance to the five nearest photographs of each class;
    - colour: 1 without energy off the caption's colour axis, falling linearly to 0 at COLOUR_LIMIT of all energy;
    - realism: 1 while the five nearest photographs of any class are as near as they are to a real photograph;
    - sharpness: 1 while the share of fine detail is typical of the caption's class; blur, averages and noise fall out.
    """

    bank: Float[Tensor, "n d"]  # descriptors of the photographs, class after class, equally many of each
    scale: tuple[float, float]  # what brings the two parts of a descriptor to the same spread
    distances: tuple[float, float]  # median and 90th percentile of the distance of real photographs to the others
    detail: Float[Tensor, "k 2"]  # mean and deviation of `detail` for each class

    def __call__(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Gold score of each image for its caption, in [0, 1]."""
        return torch.stack(list(self.parts(images, prompts).values())).prod(dim=0).to(images.device)

    @torch.no_grad()
    def parts(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> dict[str, Float[Tensor, " b"]]:
        """The four factors of the score, by name, each in [0, 1]; computed on the CPU.

        Raises:
            ValueError: if a prompt is not one of PROMPTS.
        """
        names, colours = (torch.tensor(column) for column in zip(*map(parse, prompts), strict=True))
        x = images.detach().float().cpu().clamp(0, 1)
        gray = x.amax(dim=1)  # undoes the tint: every colour's largest channel is 1
        near = _nearest(torch.cdist(_descriptor(gray, self.scale), self.bank), len(CLASSES))
        posterior = torch.softmax(-near.square() / CLASS_WIDTH, dim=1)
        median, high = self.distances
        strange = F.relu((near.amin(dim=1) - median) / (high - median) - 0.5)
        mean, deviation = self.detail[names].unbind(dim=1)
        atypical = F.relu(((_detail(gray) - mean) / deviation).abs() - 1) / DETAIL_WIDTH
        off = _off_axis(x, torch.tensor(list(COLOURS.values()))[colours])
        return {
            "class": posterior.gather(1, names[:, None]).squeeze(1),
            "colour": (1 - off / COLOUR_LIMIT).clamp(0, 1),
            "realism": torch.exp(-0.5 * strange.square()),
            "sharpness": torch.exp(-0.5 * atypical.square()),
        }


@functools.cache
def gold(*, bank: Path = BANK) -> Gold:
    """The judge over the photographs in `bank`; takes about two seconds, once a process, and reads no other file."""
    gray = torch.from_numpy(np.load(bank)["gray"]).float() / 255
    classes, each = gray.shape[:2]
    gray = F.pad(gray.flatten(0, 1), (2, 2, 2, 2))
    pixels, edges = _descriptor_parts(gray)
    scale = (0.5 / pixels.std(dim=0).norm().item(), 1.0 / edges.std(dim=0).norm().item())
    descriptors = _descriptor(gray, scale)
    some = torch.arange(0, len(descriptors), 5)  # every fifth photograph gives the two quantiles well enough
    between = torch.cdist(descriptors[some], descriptors)
    between[torch.arange(len(some)), some] = torch.inf  # a photograph is judged against the others
    nearest = _nearest(between, classes).amin(dim=1)
    detail = _detail(gray).view(classes, each)
    return Gold(
        bank=descriptors,
        scale=scale,
        distances=(nearest.median().item(), nearest.quantile(0.9).item()),
        detail=torch.stack([detail.mean(dim=1), detail.std(dim=1)], dim=1),
    )


def _nearest(distances: Tensor, classes: int, k: int = 5) -> Tensor:
    """(b, n) distances to the bank -> (b, classes) mean distance to the `k` nearest of each class."""
    return distances.unflatten(1, (classes, -1)).topk(k, largest=False).values.mean(dim=-1)


def _descriptor(gray: Tensor, scale: tuple[float, float]) -> Tensor:
    return torch.cat([part * s for part, s in zip(_descriptor_parts(gray), scale, strict=True)], dim=1)


def _descriptor_parts(gray: Tensor) -> tuple[Tensor, Tensor]:
    """Halved pixels (b, 256), and histograms of gradient orientation (b, 648): 8 directions in overlapping cells."""
    x = gray[:, None]
    dx, dy = F.pad(x[..., 2:] - x[..., :-2], (1, 1)), F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    centres = torch.arange(8).view(1, -1, 1, 1) * (math.pi / 4)
    share = F.relu(torch.cos(torch.atan2(dy, dx) - centres)) ** 4
    energy = (dx.square() + dy.square() + 1e-8).sqrt() * share
    cells = F.avg_pool2d(energy, 8, 4, padding=2)
    return F.avg_pool2d(x, 2).flatten(1), cells.sqrt().flatten(1)  # root: many faint edges count as few strong ones


def _detail(gray: Tensor) -> Tensor:
    """Log of the mean absolute Laplacian over the mean brightness, (b,)."""
    x = F.pad(gray, (1, 1, 1, 1))
    around = x[:, 1:-1, 2:] + x[:, 1:-1, :-2] + x[:, 2:, 1:-1] + x[:, :-2, 1:-1]
    return ((4 * gray - around).abs().mean(dim=(1, 2)) + 1e-4).log() - (gray.mean(dim=(1, 2)) + 1e-3).log()


def _off_axis(images: Tensor, axes: Tensor) -> Tensor:
    """Share of the images' energy that is off their colour axes; 1 for a black image."""
    along = torch.einsum("bchw,bc->bhw", images, F.normalize(axes, dim=1))
    return 1 - along.square().mean(dim=(1, 2)) / (images.square().sum(dim=1).mean(dim=(1, 2)) + 1e-6)
