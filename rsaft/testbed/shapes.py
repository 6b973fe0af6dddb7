"""The shapes world: pictures of one coloured shape, and a judge that knows how they are drawn.

A picture is a size, a colour, a shape and a position, drawn with small jitters on a grey ground in a fixed light. The
judge is analysis by synthesis: it draws every admissible version of the caption and measures how far the picture is
from the nearest. Nothing in it is learned, so no pattern can fool it: a high score *is* a right picture.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NAME = "shapes"
SPLITS = ("train", "judge", "test")
PIXELS = 32

SIZES = {"small": 4.5, "medium": 6.0, "large": 8.0}  # radius in pixels
COLOURS = {
    "red": (0.74, 0.08, 0.08),
    "green": (0.08, 0.62, 0.12),
    "blue": (0.08, 0.18, 0.74),
    "yellow": (0.74, 0.70, 0.08),
    "purple": (0.62, 0.08, 0.70),
    "white": (0.74, 0.74, 0.74),
}
SHAPES = ("circle", "triangle", "cross")
POSITIONS = {  # centre in pixels: across, down
    "top left": (9.5, 9.5),
    "top right": (22.5, 9.5),
    "bottom left": (9.5, 22.5),
    "bottom right": (22.5, 22.5),
}
ATTRIBUTES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES, "position": tuple(POSITIONS)}

# How far an admissible picture may stray from the centre values above.
SHIFT = 2.5  # pixels, each way
GROWTH = 0.06  # of the radius
TINT = 0.08  # of each colour channel
GROUND = (0.04, 0.20)  # grey level behind the shape
LIGHT = 0.16  # added to every picture: red from left to right, blue from top to bottom

STEPS_SHIFT, STEPS_GROWTH = 11, 3  # placements the judge tries along each jitter
EDGES = 1.0  # weight of the gradient's residual beside the pixels' own: what makes blur and wrong outlines cost
STRICTNESS = 2.5  # gold is zero from a residual of 1 / STRICTNESS of the shape's contrast energy
FITS = 3  # rounds of fitting ground and colour in turn; they hardly overlap, so it settles at once


def _caption(size: str, colour: str, shape: str, position: str) -> str:
    return f"a {size} {colour} {shape} at the {position}"


_VALUES = tuple(product(SIZES, COLOURS, SHAPES, POSITIONS))
_INDEX = {_caption(*values): i for i, values in enumerate(_VALUES)}
PROMPTS: tuple[str, ...] = tuple(_INDEX)


def _held_out(caption: str) -> bool:
    # A Latin-square rule: every value of every attribute falls on both sides, and no random state is involved.
    ranks = [list(values).index(v) for values, v in zip(ATTRIBUTES.values(), _VALUES[_INDEX[caption]], strict=True)]
    return sum(w * rank for w, rank in zip((1, 1, 2, 3), ranks, strict=True)) % 5 == 0


PROMPTS_EVAL: tuple[str, ...] = tuple(p for p in PROMPTS if _held_out(p))
PROMPTS_TRAIN: tuple[str, ...] = tuple(p for p in PROMPTS if not _held_out(p))


def _indices(prompts: Sequence[str]) -> Tensor:
    unknown = next((p for p in prompts if p not in _INDEX), None)
    if unknown is not None:
        raise ValueError(f"prompts: the shapes world has {len(PROMPTS)} captions like {PROMPTS[0]!r}; got {unknown!r}.")
    return torch.tensor([_INDEX[p] for p in prompts], dtype=torch.long)


def _generator(seed: int, split: str) -> torch.Generator:
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}; got {split!r}.")
    if not 0 <= seed < 2**30:
        raise ValueError(f"seed must be in [0, 2**30), so that splits never share a random stream; got {seed}.")
    return torch.Generator().manual_seed(len(SPLITS) * seed + SPLITS.index(split))


def real(n: int, *, seed: int, split: str) -> tuple[Float[Tensor, "n 3 32 32"], list[str]]:
    """Real pictures and their captions, drawn evenly from all 216.

    Args:
        n: how many.
        seed: same seed and split, same pictures.
        split: "train", "judge" or "test": random streams that never meet.

    Returns:
        Pictures in [0, 1] and one caption for each.
    """
    generator = _generator(seed, split)
    index = torch.randint(len(PROMPTS), (n,), generator=generator)
    prompts = [PROMPTS[i] for i in index.tolist()]
    return _draw(prompts, generator), prompts


def real_for(prompts: Sequence[str], *, seed: int, split: str) -> Float[Tensor, "n 3 32 32"]:
    """Real pictures in [0, 1], one for each caption; arguments as in `real`."""
    return _draw(prompts, _generator(seed, split))


def near_miss(prompt: str, generator: torch.Generator) -> str:
    """A caption that differs from `prompt` in exactly one attribute, attribute and value drawn evenly."""
    values = list(_VALUES[int(_indices([prompt]))])
    which = int(torch.randint(len(values), (), generator=generator))
    others = [v for v in tuple(ATTRIBUTES.values())[which] if v != values[which]]
    values[which] = others[int(torch.randint(len(others), (), generator=generator))]
    size, colour, shape, position = values
    return _caption(size, colour, shape, position)


def _draw(prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    _indices(prompts)
    jitter = 2 * torch.rand(len(prompts), 7, generator=generator) - 1
    images = torch.empty(len(prompts), 3, PIXELS, PIXELS)
    for i, (prompt, j) in enumerate(zip(prompts, jitter, strict=True)):
        size, colour, shape, position = _VALUES[_INDEX[prompt]]
        centre = torch.tensor(POSITIONS[position]) + SHIFT * j[:2]
        mask = _coverage(shape, SIZES[size] * (1 + GROWTH * j[2:3]), centre[None])
        ground = (GROUND[0] + GROUND[1]) / 2 + (GROUND[1] - GROUND[0]) / 2 * j[6]
        tint = (torch.tensor(COLOURS[colour]) + TINT * j[3:6]).clamp(0, 1)
        images[i] = ground + mask * (tint[:, None, None] - ground)
    return images + _light()


def _light() -> Tensor:
    """The fixed light (3, 32, 32) over every picture: each place has a look of its own.

    Meant to help a base learn position. What did that was v-prediction (docs/testbed.md); the light's own share was not
    measured.
    """
    ramp = LIGHT * torch.linspace(0, 1, PIXELS)
    return torch.stack([ramp.expand(PIXELS, -1), torch.zeros(PIXELS, PIXELS), ramp[:, None].expand(-1, PIXELS)])


def _coverage(shape: str, radius: Tensor, centre: Tensor) -> Tensor:
    """Share of each pixel that the shape covers (p, 32, 32), for radii (p,) and centres (p, 2) in pixels."""
    grid = torch.arange(PIXELS, dtype=centre.dtype) + 0.5
    x = grid.view(1, 1, -1) - centre[:, 0].view(-1, 1, 1)
    y = grid.view(1, -1, 1) - centre[:, 1].view(-1, 1, 1)
    r = radius.view(-1, 1, 1)
    if shape == "circle":
        outside = (x**2 + y**2).sqrt() - r
    elif shape == "triangle":  # point up, as wide as 2.2 r and as high as 2 r
        slope = 2 / 1.1
        sides = (slope * x.abs() - y - r) / (1 + slope**2) ** 0.5
        outside = torch.maximum(sides, (y - r).expand_as(sides))
    else:  # two bars, 2.2 r by 0.7 r
        wide, high = x.abs(), y.abs()
        flat = torch.maximum(wide - 1.1 * r, high - 0.35 * r)
        outside = torch.minimum(flat, torch.maximum(wide - 0.35 * r, high - 1.1 * r))
    return (0.5 - outside).clamp(0, 1)  # a signed distance in pixels is coverage to first order


def _metric(x: Tensor) -> Tensor:
    """K x for pictures (..., 32, 32), where <x, K x> = |x|^2 + EDGES |grad x|^2."""
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    lap_across = F.pad(across, (1, 0)) - F.pad(across, (0, 1))
    lap_down = F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1))
    return x + EDGES * (lap_across + lap_down)


def _placements(shape: str, size: str, position: str) -> Tensor:
    """Coverage masks (p, 1024) over the whole admissible range of position and radius."""
    shift = torch.linspace(-SHIFT, SHIFT, STEPS_SHIFT)
    growth = torch.linspace(1 - GROWTH, 1 + GROWTH, STEPS_GROWTH)
    jitter = torch.cartesian_prod(shift, shift, growth)
    centre = torch.tensor(POSITIONS[position]) + jitter[:, :2]
    return _coverage(shape, SIZES[size] * jitter[:, 2], centre).flatten(1)


@dataclass(frozen=True)
class _Drawings:
    """The inner products, under the metric K, of one (size, shape, position)'s masks m with each other and the ground.

    With g = 1 - m, a drawing is ground * g + colour * m.
    """

    k_masks: Tensor  # (p, 1024)
    k_ones: Tensor  # (1024,)
    mm: Tensor  # (p,)
    mg: Tensor
    gg: Tensor

    @classmethod
    def of(cls, shape: str, size: str, position: str) -> "_Drawings":
        masks = _placements(shape, size, position)
        k_masks = _metric(masks.view(-1, PIXELS, PIXELS)).flatten(1)
        k_ones = _metric(torch.ones(PIXELS, PIXELS)).flatten()
        mm, m1 = (masks * k_masks).sum(1), masks @ k_ones
        return cls(k_masks, k_ones, mm, m1 - mm, k_ones.sum() - 2 * m1 + mm)


def _residual(x: Tensor, drawings: _Drawings, colours: Sequence[str]) -> Tensor:
    """Least residual (b, colours) over placements, ground and tint, in units of the drawn shape's contrast energy.

    `x` is (b, 3, 1024). At each placement ground and tint are fitted in turn, each inside its admissible range.
    """
    xm = x @ drawings.k_masks.T  # (b, 3, p)
    xg = (x @ drawings.k_ones).unsqueeze(-1) - xm
    xx = (x * _metric(x.view(-1, 3, PIXELS, PIXELS)).flatten(2)).sum((1, 2)).unsqueeze(1)
    mm, mg, gg = drawings.mm, drawings.mg, drawings.gg
    best = []
    for name in colours:
        centre = torch.tensor(COLOURS[name]).view(3, 1)
        low, high = (centre - TINT).clamp(0, 1), (centre + TINT).clamp(0, 1)
        tint = centre.expand_as(xm)
        for _ in range(FITS):
            ground = ((xg - tint * mg).sum(1, keepdim=True) / (3 * gg)).clamp(*GROUND)
            tint = torch.minimum(torch.maximum((xm - ground * mg) / mm, low), high)
        cross = (ground * xg + tint * xm).sum(1)
        drawn = (ground**2 * gg + 2 * ground * tint * mg + tint**2 * mm).sum(1)
        contrast = ((tint - ground) ** 2).sum(1) * mm
        best.append(((xx - 2 * cross + drawn) / contrast).amin(1))
    return torch.stack(best, 1)


@dataclass(frozen=True)
class Gold:
    """The judge: 1 - STRICTNESS * residual / contrast energy of the caption's nearest drawing, clipped to [0, 1].

    A Reward, though not a differentiable one. Holds 36 banks of 363 masks (53 MB); 240 pictures cost about 0.1 s on one
    core, `parts` about 1.3 s. Computed in float32 without gradients; pictures are clamped to [0, 1] first.
    """

    drawings: dict[tuple[str, str, str], _Drawings]  # by size, shape, position

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        """How near each picture is to its caption's nearest drawing, in [0, 1]."""
        x, index = _checked(images, prompts)
        residual = torch.empty(len(x))
        groups: dict[tuple[str, str, str, str], list[int]] = {}
        for i, caption in enumerate(index.tolist()):
            groups.setdefault(_VALUES[caption], []).append(i)
        for (size, colour, shape, position), rows in groups.items():
            residual[rows] = _residual(x[rows], self.drawings[size, shape, position], [colour])[:, 0]
        return _score(residual).to(images)

    @torch.no_grad()
    def parts(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> dict[str, Float[Tensor, "b"]]:
        """What the picture gets right: the best score among captions that share only some attributes with its own.

        Returns:
            "size", "colour", "shape", "position": that attribute as in the caption, all others free; "picture": all
            free, so whether it is a clean picture of anything. Each in [0, 1], and
            gold <= every attribute's part <= picture, so an attribute is wrong where its part is below "picture".
        """
        x, index = _checked(images, prompts)
        shape = [len(values) for values in ATTRIBUTES.values()]
        table = torch.empty(len(x), *shape)
        for (i, size), (j, form), (k, position) in product(enumerate(SIZES), enumerate(SHAPES), enumerate(POSITIONS)):
            table[:, i, :, j, k] = _score(_residual(x, self.drawings[size, form, position], tuple(COLOURS)))
        parts = {"picture": table.flatten(1).amax(1)}
        ranks = torch.unravel_index(index, shape)
        for d, (name, rank) in enumerate(zip(ATTRIBUTES, ranks, strict=True)):
            held = table.movedim(d + 1, 1)[torch.arange(len(x)), rank]
            parts[name] = held.flatten(1).amax(1)
        return {name: part.to(images) for name, part in parts.items()}


def _score(residual: Tensor) -> Tensor:
    return (1 - STRICTNESS * residual).clamp(0, 1)


def _checked(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    if images.shape[1:] != (3, PIXELS, PIXELS) or len(images) != len(prompts):
        found = f"{tuple(images.shape)} and {len(prompts)} prompts"
        raise ValueError(f"gold judges images (b, 3, {PIXELS}, {PIXELS}) with one prompt each; got {found}.")
    x = images.detach().to("cpu", torch.float32).clamp(0, 1)
    if not x.isfinite().all():
        raise ValueError("gold judges finite images; got a NaN: drop such images first and count them.")
    return (x - _light()).flatten(2), _indices(prompts)


@functools.cache
def gold() -> Gold:
    """The judge of this world; building it draws 13,068 masks, about 0.3 s, once a process."""
    return Gold(
        {
            (size, shape, position): _Drawings.of(shape, size, position)
            for size, shape, position in product(SIZES, SHAPES, POSITIONS)
        }
    )
