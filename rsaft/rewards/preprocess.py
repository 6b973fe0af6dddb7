"""Images in [0, 1] to the pixels that CLIP and BLIP read: resize, crop or pad, normalise; in torch, with a gradient.

The originals resize uint8 images with PIL (PickScore, CLIP, ImageReward), or a tensor (HPSv2). Both are followed here
to the rounding; docs/rewards.md has the differences.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.types import Images

CropRounding = Literal["hf", "torchvision"]

# OpenAI's mean and standard deviation of the channels, which every CLIP and BLIP here was trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(
    images: Images, size: int = 224, rounding: CropRounding = "hf", exact: bool = False
) -> Float[Tensor, "b 3 s s"]:
    """What PIL-based CLIP and BLIP pipelines make of images: shorter side to `size`, bicubic, centre crop, normalise.

    PIL resizes in two passes, width and then height, and cuts each pass's result off to [0, 255]. So does this; the
    gradient goes through the cut as if it were not there. Values differ from PIL's by its rounding, at most 1.1 / 255.
    Values outside [0, 1], as flattening makes them, are averaged as they are and cut off after the pass.

    Args:
        images: in [0, 1]; half precision is computed in fp32.
        size: side of the square that the network reads, in pixels.
        rounding: where an odd crop lies: "hf" is `CLIPImageProcessor`'s (h - size) // 2, "torchvision" that of
            open_clip and ImageReward, round((h - size) / 2). They differ by one pixel for some sizes.
        exact: round to whole 1 / 255 as PIL does, before, between and after the passes. For numbers that are compared
            with published ones; the gradient is that of the unrounded values.

    Returns:
        Normalised pixels, in the dtype of `images`, fp32 at least.

    Raises:
        ConfigError: if `rounding` is another word.
    """
    if rounding not in ("hf", "torchvision"):
        raise ConfigError(f"clip_preprocess: rounding is 'hf' or 'torchvision'; got {rounding!r}.")
    x = _wide(images)
    height, width = x.shape[-2:]
    short = min(height, width)
    # The longer side is cut off to a whole number by PIL's callers, not rounded.
    new_height, new_width = (int(size * side / short) for side in (height, width))
    if exact:
        x = pil_values(x, exact)
    if new_width != width:
        x = pil_values(bicubic(x, (height, new_width)), exact)
    if new_height != height:
        x = pil_values(bicubic(x, (new_height, new_width)), exact)
    return normalise(centre_crop(x, size, rounding))


def hpsv2_preprocess(images: Images, antialias: bool = True, size: int = 224) -> Float[Tensor, "b 3 s s"]:
    """What hpsv2 1.2.0 makes of images: longer side to `size`, bicubic, zeros around, normalise (its `transform.py`).

    hpsv2 resizes a tensor, so nothing is cut off or rounded, and the border is black rather than mean-coloured.

    Args:
        images: in [0, 1]; half precision is computed in fp32.
        antialias: average over the pixels that a new one covers. torchvision does so for tensors since 0.17; scores
            computed with older ones need False, which moves pixels by tens of levels even in smooth images.
        size: side of the square that the network reads, in pixels.

    Returns:
        Normalised pixels, in the dtype of `images`, fp32 at least.
    """
    x = _wide(images)
    height, width = x.shape[-2:]
    scale = size / max(height, width)
    if scale != 1.0:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        x = bicubic(x, (height, width), antialias=antialias)
    top, left = (size - height) // 2, (size - width) // 2
    x = F.pad(x, (left, size - width - left, top, size - height - top))
    return normalise(x)


def centre_crop(x: Float[Tensor, "b c h w"], size: int, rounding: CropRounding) -> Float[Tensor, "b c s s"]:
    """The middle `size` x `size` pixels of an image whose sides are at least that."""
    height, width = x.shape[-2:]
    if rounding == "hf":
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top, left = round((height - size) / 2), round((width - size) / 2)
    return x[..., top : top + size, left : left + size]


def normalise(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """(x - mean) / std for each channel, with OpenAI's values."""
    mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def _wide(images: Tensor) -> Tensor:
    return images if images.dtype == torch.float64 else images.float()


def bicubic(x: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """Resized to (height, width) as PIL's bicubic filter does, without its rounding; values may leave [0, 1]."""
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=antialias)


def pil_values(x: Tensor, exact: bool) -> Tensor:
    """Values that an image of PIL can hold, with the gradient of `x` itself (straight-through)."""
    held = x.detach().clamp(0, 1)
    if exact:
        held = (held * 255).round() / 255
    return held + (x - x.detach())
