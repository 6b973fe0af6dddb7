"""What images look like, whatever their reward: numbers that move when a model is tuned into a hack.

Washed-out or glaring colour, black images, one pattern on every image, noise, one image for all prompts. None of them
says that an image is bad: read each beside the same number of the base model on the same prompts and noise.

Images are in [0, 1] (clamped) with at least 2 x 2 pixels, and computed in fp32 on their device without a graph. An
image that is not finite gives NaN and touches no other; up to rounding, no value depends on the rest of the batch.
Luma is 0.299 R + 0.587 G + 0.114 B of the pixels as they are stored (Rec. 601). Flips and turns by 90 degrees change
no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rsaft.types import Images

HALF_STEP = 0.5 / 255  # half of an 8-bit step
ROUNDING = (1 / 255) ** 2 / 12  # variance of rounding to 8 bits
CONSTANT = 1e-12  # variance of the luma below which it is fp32's rounding: one 8-bit step in 4 megapixels is 4e-12
LOWEST_RING = 4  # fft_peak: waves longer than a quarter of the shorter side are composition, not pattern


def image_statistics(images: Images) -> dict[str, Float[Tensor, " b"]]:
    """All statistics of this module that need one image alone, by name, with their default settings.

    Raises:
        ValueError: if these are no images of at least 2 x 2 pixels.

    Cost: two Fourier transforms of the luma and a few passes over the pixels; no backward.
    """
    return {
        "saturation": saturation(images),
        "dark_share": dark_share(images),
        "clipped_share": clipped_share(images),
        "edge_density": edge_density(images),
        "high_frequency_energy": high_frequency_energy(images),
        "fft_peak": fft_peak(images),
        "colour_entropy": colour_entropy(images),
    }


def saturation(images: Images) -> Float[Tensor, " b"]:
    """Mean over pixels of max - min over channels: HSV's chroma, which, unlike HSV's S, is small in the dark.

    Returns:
        In [0, 1]: 0 for grey images, 1 for pure red.
    """
    x = _pixels(images)
    return _nan_if_not_finite((x.amax(1) - x.amin(1)).mean((1, 2)), images)


def dark_share(images: Images, threshold: float = 0.1) -> Float[Tensor, " b"]:
    """Share of pixels whose luma is below `threshold`, in [0, 1]."""
    return _nan_if_not_finite((_luma(_pixels(images)) < threshold).float().mean((1, 2)), images)


def clipped_share(images: Images) -> Float[Tensor, " b"]:
    """Share of channel values that are 0 or 1 when rounded to 8 bits, in [0, 1]: 1 for pure red, 0 for mid grey."""
    x = _pixels(images)
    return _nan_if_not_finite(((x <= HALF_STEP) | (x >= 1 - HALF_STEP)).float().mean((1, 2, 3)), images)


def edge_density(images: Images, threshold: float = 10.0) -> Float[Tensor, " b"]:
    """Share of places whose luma has a steep gradient.

    A place is a block of 2 x 2 pixels, (h - 1)(w - 1) of them. The squared gradient is the mean of the block's two
    squared differences along rows plus the same along columns, so stripes of single pixels count too.

    Args:
        images: in [0, 1].
        threshold: in luma per shorter side, so that a smooth image keeps its value when it is enlarged; 10 means from
            black to white within a tenth of the side, which is 0.31 a pixel at 32 x 32 and 0.02 at 512 x 512.

    Returns:
        In [0, 1].
    """
    luma = _luma(_pixels(images))
    along_rows = luma.diff(dim=2).square()
    along_columns = luma.diff(dim=1).square()
    squared = (along_rows[:, 1:] + along_rows[:, :-1] + along_columns[:, :, 1:] + along_columns[:, :, :-1]) / 2
    steep = squared.sqrt() * min(luma.shape[1:]) > threshold
    return _nan_if_not_finite(steep.float().mean((1, 2)), images)


def high_frequency_energy(images: Images) -> Float[Tensor, " b"]:
    """Share of the luma's spectral energy above half of Nyquist, that is above 0.25 cycles a pixel in any direction.

    The mean is removed and the image faded out towards its borders (a Hann window), for else the jump from one border
    to the opposite one counts as high frequency.

    Returns:
        In [0, 1]: 0 for a constant image, about 0.80 (1 - pi / 16) for white noise.
    """
    power = _power(_luma(_pixels(images)))
    high = (_radius(*power.shape[1:]) > 0.25).to(power.device)
    total = power.mean((1, 2))
    share = (power * high).mean((1, 2)) / total.clamp_min(CONSTANT)
    return _nan_if_not_finite(torch.where(total > CONSTANT, share, 0.0), images)


def fft_peak(images: Images) -> Float[Tensor, " b"]:
    """By how many powers of ten the strongest single frequency of the luma stands out: grids and repeated patterns.

    log10 of (its power + q) / (median power of its ring + q), at the frequency where that is largest. A ring holds the
    frequencies with the same rounded number of waves along the shorter side, from 4 waves on (fewer, if the image has
    none so high); all beyond Nyquist, in the corners of the spectrum, are one ring with it. q is the power of rounding
    to 8 bits. The image is faded out as for `high_frequency_energy`.

    Long straight edges are lines in the spectrum and stand out as well: compare with the base model's images.

    Returns:
        >= 0: 0 for a constant image, about 1.2 for white noise of 512 x 512, and log10(1 + a^2 h w / (9 q)) for a wave
        of amplitude a alone.
    """
    power = _power(_luma(_pixels(images)))
    side = min(power.shape[1:])
    ring = (_radius(*power.shape[1:]) * side).round().long().clamp_max(side // 2).flatten()
    by_ring = power.flatten(1)[:, ring.argsort().to(power.device)].split(ring.bincount().tolist(), dim=1)
    peaks = [
        torch.log10((powers.amax(1) + ROUNDING) / (powers.median(1).values + ROUNDING))
        for powers in by_ring[min(LOWEST_RING, side // 2) :]
    ]
    return _nan_if_not_finite(torch.stack(peaks).amax(0), images)


def colour_entropy(images: Images, bins: int = 8) -> Float[Tensor, " b"]:
    """Entropy in bits of an image's colours, counted in a cube of `bins` equal steps a channel.

    Returns:
        From 0 (one colour) to 3 log2(bins), or log2(h w) if that is less.

    Raises:
        ValueError: if there is no bin, or these are no images.
    """
    if bins < 1:
        raise ValueError(f"colour_entropy: bins are steps a channel, so bins >= 1; got {bins}.")
    level = (_pixels(images) * bins).long().clamp_max(bins - 1).flatten(2)  # (b, 3, pixels); 1.0 is in the last bin
    colour = (level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]
    first = torch.arange(len(colour), device=colour.device)[:, None] * bins**3
    counts = torch.bincount((colour + first).flatten(), minlength=len(colour) * bins**3).view(len(colour), bins**3)
    entropy = torch.special.entr(counts / colour.shape[1]).sum(1) / math.log(2)
    return _nan_if_not_finite(entropy, images)


def thumbnails(images: Images, size: int = 32) -> Float[Tensor, "b 3 h_small w_small"]:
    """The images averaged over areas to `size` x `size`, whatever their shape; a side no longer than that stays.

    Where `size` does not divide the side, neighbouring areas share a row or column of pixels.

    Raises:
        ValueError: if size is not positive, or these are no images.
    """
    if size < 1:
        raise ValueError(f"thumbnails: size counts pixels, so size >= 1; got {size}.")
    x = _pixels(images)
    small = F.adaptive_avg_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3])))
    return _nan_if_not_finite(small, images)


def drift(images: Images, base_images: Images) -> Float[Tensor, " b"]:
    """Root mean square difference between the thumbnails of image i and base image i, in [0, 1].

    Args:
        images: of the tuned model.
        base_images: of the base model, for the same prompts and noise, row by row.

    Raises:
        ValueError: if the shapes differ, or these are no images.
    """
    if images.shape != base_images.shape:
        raise ValueError(
            f"drift: one base image of the same size for each image; got shapes {tuple(images.shape)} and "
            f"{tuple(base_images.shape)}."
        )
    change = thumbnails(images) - thumbnails(base_images)
    return change.square().mean((1, 2, 3)).sqrt()


def diversity(features: Float[Tensor, "n d"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
    """Mean Euclidean distance from each sample to the other samples of its prompt.

    Args:
        features: of one sample a row, such as flattened thumbnails or a network's; any scale.
        prompts: one a sample; equal strings are one prompt, in any order.

    Returns:
        (n,), >= 0, fp32 without a graph: 0 where a prompt's samples are all alike. NaN where a sample is not finite,
        which then counts as absent, and where it is its prompt's only one.

    Raises:
        ValueError: if there is not one prompt a row.

    Cost: d operations for each pair of samples of one prompt.
    """
    if features.ndim != 2 or len(features) != len(prompts):
        raise ValueError(
            f"diversity: a matrix (samples, features) with one prompt a row; got shape {tuple(features.shape)} and "
            f"{len(prompts)} prompts."
        )
    x = features.detach().float()
    rows_of: dict[str, list[int]] = {}
    for row in x.isfinite().all(1).nonzero().flatten().tolist():
        rows_of.setdefault(prompts[row], []).append(row)
    result = x.new_full((len(x),), torch.nan)
    for rows in rows_of.values():
        if len(rows) > 1:
            # Through a matrix product, as torch does from 25 rows on, equal samples are not at distance 0.
            distances = torch.cdist(x[rows], x[rows], compute_mode="donot_use_mm_for_euclid_dist")
            result[rows] = distances.sum(1) / (len(rows) - 1)
    return result


def _pixels(images: Tensor) -> Tensor:
    """The images in fp32, clamped and without a graph; one that is not finite is black."""
    shaped = images.ndim == 4 and images.shape[1] == 3 and (min(images.shape[2:]) >= 2 or not len(images))
    if not shaped or not images.is_floating_point():
        raise ValueError(
            "image statistics: images are floating point in [0, 1], of shape (b, 3, h, w) with 2 x 2 pixels or more; "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    x = images.detach()
    return torch.where(_is_finite(x).view(-1, 1, 1, 1), x, 0.0).float().clamp(0, 1)


def _is_finite(images: Tensor) -> Tensor:
    return images.isfinite().flatten(1).all(dim=1)


def _nan_if_not_finite(values: Tensor, images: Tensor) -> Tensor:
    return torch.where(_is_finite(images).view(-1, *[1] * (values.ndim - 1)), values, torch.nan)


def _luma(x: Tensor) -> Tensor:
    return 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]


def _power(luma: Tensor) -> Tensor:
    """Power at each frequency (b, h, w), mean removed; for white noise it is the noise's variance everywhere."""
    if not len(luma):  # torch's transform on a CPU fails on an empty batch
        return luma
    height, width = luma.shape[1:]
    window = (_hann(height)[:, None] * _hann(width)).to(luma)
    mean = (luma * window).sum((1, 2), keepdim=True) / window.sum()
    return torch.fft.fft2((luma - mean) * window).abs().square() / window.square().sum()


def _hann(n: int) -> Tensor:
    """Periodic, moved by half a pixel: a wave fills three frequencies and no more, and flips change nothing."""
    return torch.sin(torch.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n).square()


def _radius(height: int, width: int) -> Tensor:
    """Cycles a pixel of each frequency of an image's transform, (h, w)."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in (height, width))
    down = torch.minimum(rows, height - rows) / height
    across = torch.minimum(columns, width - columns) / width
    return (down[:, None].square() + across.square()).sqrt()
