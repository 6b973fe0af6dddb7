"""Images in [0, 1] to the patches that Qwen2-VL and Qwen2.5-VL read, in torch, with a gradient to the images.

The originals are numpy on uint8 images (transformers, `Qwen2VLImageProcessorPil`). Over six sizes from 28 x 300 to
1024 x 1024 ours differ by at most 0.0165 in normalised units, which is 1.1 / 255: PIL's rounding. With `exact`, at most
0.2 % of the values differ, by 1 / 255.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.rewards.frozen import wide
from rsaft.rewards.preprocess import bicubic, normalise, pil_values
from rsaft.types import Images

PATCH, MERGE, FRAMES = 14, 2, 2  # pixels a patch, patches a side that are merged into one token, frames a patch
FACTOR = PATCH * MERGE  # sides of an image are multiples of this


def qwen_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that an image is resized to (Qwen2-VL's "smart resize").

    Multiples of 28, near the image's own aspect ratio, with min_pixels <= height * width <= max_pixels where multiples
    of 28 allow it. min_pixels = max_pixels = 448 * 448 brings every square to 448 x 448.

    Raises:
        ConfigError: if a side is over 200 times the other, or the bounds are no bounds.
    """
    if not FACTOR * FACTOR <= min_pixels <= max_pixels:
        raise ConfigError(
            f"vlm: pixels of an image, got min_pixels {min_pixels} and max_pixels {max_pixels}; allowed are "
            f"{FACTOR * FACTOR} <= min_pixels <= max_pixels."
        )
    if max(height, width) > 200 * min(height, width):
        raise ConfigError(f"vlm: images are {height} x {width}; a side may be 200 times the other, crop them.")
    # Python's round, half to even, as the original.
    new_height, new_width = (round(side / FACTOR) * FACTOR for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(FACTOR, math.floor(s / shrink / FACTOR) * FACTOR) for s in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(s * grow / FACTOR) * FACTOR for s in (height, width))
    return new_height, new_width


def qwen_patches(images: Images, min_pixels: int, max_pixels: int, exact: bool = False) -> Float[Tensor, "b n d"]:
    """Normalised patches of each image, n = (height / 14) * (width / 14) after `qwen_size`, d = 3 * 2 * 14 * 14.

    Four patches that become one token follow one another. A picture is a film of two equal frames.

    Args:
        images: in [0, 1]; half precision is computed in fp32.
        min_pixels, max_pixels: bounds of the resized image, see `qwen_size`.
        exact: round to whole 1 / 255 between the passes of the resize, as PIL does; see `clip_preprocess`.
    """
    x = wide(images)
    height, width = qwen_size(x.shape[-2], x.shape[-1], min_pixels, max_pixels)
    x = pil_values(x, exact)
    if width != x.shape[-1]:
        x = pil_values(bicubic(x, (x.shape[-2], width)), exact)
    if height != x.shape[-2]:
        x = pil_values(bicubic(x, (height, width)), exact)
    return patchify(normalise(x))


def patchify(x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
    """Cut pixels, whose sides are multiples of 28, into patches (transformers, `Qwen2VLImageProcessor.patchify`)."""
    b, c, height, width = x.shape
    x = x.view(b, c, height // FACTOR, MERGE, PATCH, width // FACTOR, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # b, rows and columns of tokens, rows and columns within one, c, pixels
    x = x[..., None, :, :].expand(*x.shape[:-2], FRAMES, PATCH, PATCH)
    return x.reshape(b, (height // PATCH) * (width // PATCH), c * FRAMES * PATCH * PATCH)
