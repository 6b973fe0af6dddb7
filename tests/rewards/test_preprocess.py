"""Preprocessing equals what PIL and the original packages do, and carries a gradient."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from rsaft.errors import ConfigError
from rsaft.rewards.preprocess import MEAN, STD, centre_crop, clip_preprocess, hpsv2_preprocess

SIZES = [(512, 512), (768, 512), (333, 517), (517, 333), (160, 200), (225, 224), (224, 224)]
LEVELS = 255 * torch.tensor(STD).view(3, 1, 1)  # from normalised units to whole levels of a uint8


def smooth(height: int, width: int) -> Tensor:
    """Waves with a little noise, uint8 (3, h, w)."""
    source = torch.Generator().manual_seed(0)
    y, x = torch.linspace(0, 7, height)[:, None], torch.linspace(0, 5, width)
    waves = torch.stack([torch.sin(y + x + c) for c in range(3)])
    noise = torch.randn(3, height, width, generator=source)
    return ((0.5 + 0.35 * waves + 0.05 * noise).clamp(0, 1) * 255).round().byte()


def noise(height: int, width: int) -> Tensor:
    """Uniform noise, uint8 (3, h, w)."""
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def by_transformers(image: Tensor) -> Tensor:
    """transformers' own processor on a PIL image."""
    return torch.from_numpy(np.asarray(CLIPImageProcessorPil()(pil(image))["pixel_values"][0]))


def by_torchvision_rules(image: Tensor) -> Tensor:
    """open_clip's and ImageReward's pipeline, written with PIL: resize, torchvision's crop, normalise."""
    height, width = image.shape[1:]
    short = min(height, width)
    resized = pil(image).resize((int(224 * width / short), int(224 * height / short)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    cropped = resized.crop((left, top, left + 224, top + 224))
    values = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1) / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("make", [smooth, noise])
def test_clip_pixels_differ_from_pils_by_its_rounding_alone(make, size):
    image = make(*size)
    difference = ((clip_preprocess(image[None] / 255)[0] - by_transformers(image)) * LEVELS).abs()
    assert difference.max() < 1.1
    assert difference.mean() < 0.3


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("make", [smooth, noise])
def test_exact_clip_pixels_are_pils_but_for_ties(make, size):
    image = make(*size)
    difference = ((clip_preprocess(image[None] / 255, exact=True)[0] - by_transformers(image)) * LEVELS).abs()
    assert difference.max() < 1.001  # one level, where PIL's fixed-point sum falls on the other side of a tie
    assert (difference > 0.001).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(512, 512), (333, 517), (517, 333)], ids=str)
@pytest.mark.parametrize("make", [smooth, noise])
def test_the_crop_of_torchvision_is_that_of_open_clip_and_image_reward(make, size):
    image = make(*size)
    ours = clip_preprocess(image[None] / 255, rounding="torchvision", exact=True)[0]
    difference = ((ours - by_torchvision_rules(image)) * LEVELS).abs()
    assert difference.max() < 1.001
    assert (difference > 0.001).float().mean() < 1e-3


def test_the_two_crops_lie_one_pixel_apart_where_the_margin_is_odd():
    columns = torch.arange(347.0).expand(1, 3, 224, 347)
    assert centre_crop(columns, 224, "hf")[0, 0, 0, 0] == 61
    assert centre_crop(columns, 224, "torchvision")[0, 0, 0, 0] == 62


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (1024, 640)], ids=str)
def test_hpsv2_pixels_are_those_of_its_package_exactly(size, antialias):
    image = noise(*size) / 255
    scale = 224 / max(size)
    new = [round(side * scale) for side in size]
    # torchvision's resize of a tensor is this call, and its pad takes the smaller half left and above
    resized = F.interpolate(image[None], new, mode="bicubic", align_corners=False, antialias=antialias)[0]
    top, left = (224 - new[0]) // 2, (224 - new[1]) // 2
    expected = torch.zeros(3, 224, 224)
    expected[:, top : top + new[0], left : left + new[1]] = image if scale == 1 else resized
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(hpsv2_preprocess(image[None], antialias)[0], expected)


def test_antialiasing_moves_hpsv2_pixels_by_whole_levels():
    image = smooth(512, 512)[None] / 255
    difference = ((hpsv2_preprocess(image) - hpsv2_preprocess(image, antialias=False)) * LEVELS).abs()
    assert 5 < difference.max() < 60


PIPELINES = {
    "clip": clip_preprocess,
    "exact": lambda x: clip_preprocess(x, exact=True),
    "torchvision": lambda x: clip_preprocess(x, rounding="torchvision"),
    "hpsv2": hpsv2_preprocess,
    "hpsv2-old": lambda x: hpsv2_preprocess(x, antialias=False),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("size", [(300, 260), (100, 130), (224, 224)], ids=str)
def test_the_gradient_is_finite_and_reaches_each_image(name, size):
    images = torch.stack([smooth(*size), noise(*size)]).div(255).requires_grad_()
    weights = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    (g,) = torch.autograd.grad((PIPELINES[name](images) * weights).sum(), images)
    assert torch.isfinite(g).all()
    assert (g.flatten(1).norm(dim=1) > 1).all()


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_is_that_of_the_resize_without_cut_or_rounding(exact):
    images = (noise(96, 96)[None] / 255).double().requires_grad_()
    weights = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    (g,) = torch.autograd.grad((clip_preprocess(images, 32, exact=exact) * weights).sum(), images)
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    (expected,) = torch.autograd.grad((resized / std * weights).sum(), images)
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)


def test_a_white_image_stays_white_and_its_padding_is_black():
    pixels = hpsv2_preprocess(torch.ones(1, 3, 100, 50), size=32)[0] * torch.tensor(STD).view(3, 1, 1)
    pixels = pixels + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(pixels[:, :, 8:24], torch.ones(3, 32, 16), rtol=0, atol=1e-6)
    torch.testing.assert_close(pixels[:, :, :8], torch.zeros(3, 32, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_half_precision_is_computed_in_fp32_and_float64_stays(name):
    images = noise(64, 80)[None] / 255
    assert PIPELINES[name](images.bfloat16()).dtype == torch.float32
    assert PIPELINES[name](images.double()).dtype == torch.float64


def test_any_batch_gives_each_image_its_own_pixels():
    images = torch.stack([smooth(90, 120), noise(90, 120)]) / 255
    for pipeline in PIPELINES.values():
        torch.testing.assert_close(pipeline(images)[1:], pipeline(images[1:]), rtol=0, atol=0)


def test_a_perturbation_out_of_range_is_not_cut_off_before_the_resize():
    # RSA-FT adds delta to saturated pixels too: half of a block at 1.4 and half at 0.6 is 1
    columns = torch.tensor([0.6, 1.4]).repeat(64).expand(1, 3, 128, 128)
    pixels = clip_preprocess(columns, 32)[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (pixels[:, 8:24, 8:24] > 0.95).all()


def test_an_unknown_crop_is_refused():
    with pytest.raises(ConfigError, match="rounding is 'hf' or 'torchvision'; got 'floor'"):
        inspect.unwrap(clip_preprocess)(torch.zeros(1, 3, 8, 8), rounding="floor")  # as outside of tests
