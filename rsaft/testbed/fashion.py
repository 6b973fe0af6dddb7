"""The world `fashion`: real photographs of clothes (Fashion-MNIST, MIT), each tinted with one of six colours.

The judge uses no learned network. It compares an image with a bank of real photographs that no model was trained on.
"""

import gzip
from collections.abc import Sequence
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


def gold(*, bank: Path) -> None:
    raise NotImplementedError
