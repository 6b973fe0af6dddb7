"""Images in [0, 1] whose gradient survives saturation."""

from __future__ import annotations

import pytest
import torch

from rsaft.backbones import load_backbone
from rsaft.backbones.decode import to_images
from tests.helpers import relative_difference


def test_values_are_clamped_and_the_gradient_is_one_half_everywhere():
    decoded = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64).expand(1, 3, 1, 5).requires_grad_()
    images = to_images(decoded)
    assert images[0, 0, 0].tolist() == [0, 0, 0.5, 1, 1]
    (gradient,) = torch.autograd.grad(images.sum(), decoded)
    assert torch.equal(gradient, torch.full((1, 3, 1, 5), 0.5, dtype=torch.float64))


def test_gradient_through_the_decoder_is_that_of_unclamped_images(tiny_sd):
    backbone = load_backbone(tiny_sd, dtype="fp64")
    backbone.pipe.vae.decoder.conv_out.weight.data.mul_(5)  # contrast, so that many pixels saturate
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=source, dtype=torch.float64)
    latents.requires_grad_()
    weight = torch.randn(2, 3, 16, 16, generator=source, dtype=torch.float64)
    images = backbone.decode(latents)
    saturated = (images == 0) | (images == 1)
    assert saturated.float().mean() > 0.1
    vae = backbone.pipe.vae
    unclamped = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    for mask in (torch.ones_like(saturated), saturated):
        (ours,) = torch.autograd.grad((weight * mask * images).sum(), latents, retain_graph=True)
        (expected,) = torch.autograd.grad((weight * mask * unclamped).sum(), latents, retain_graph=True)
        assert expected.abs().max() > 0
        assert relative_difference(ours, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_images_are_float32_whatever_the_decoder(dtype):
    assert to_images(torch.zeros(1, 3, 2, 2, dtype=dtype)).dtype == torch.float32


def test_float64_stays_float64():
    assert to_images(torch.zeros(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
