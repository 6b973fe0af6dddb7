"""Whether `torch.compile` made code with the right gradients: found out before a run, on one sample.

Wrong ones are silent. With torch 2.13 on a CPU the output of a tiny UNet (Stable Diffusion 1.5 or XL) is right, and the
gradient of every adapter of its middle block is 0. Of the cause one part is known: the generated C++ is wrong for the
backward pass of a layer norm that has weights, whose input is a transposed view, and whose output feeds four or more
linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsaft.backbones.pipeline import DiffusersBackbone
from rsaft.errors import ConfigError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # half precision: rounded elsewhere


def check_compiled(backbone: DiffusersBackbone) -> tuple[float, float]:
    """Compare the compiled network with itself as it was written: its output, and the gradient of all trained values.

    The trained values should not all be at their first ones: of a new adapter only B has a gradient, as in training.
    Cost: two denoiser calls forward and backward on one sample, and a compilation.

    Returns:
        Difference of the output and of the gradient, each over the norm of the uncompiled one.

    Raises:
        ConfigError: if one is above the tolerance of the network's precision.
    """
    found = _outcome(backbone)
    with torch.compiler.set_stance("force_eager"):
        expected = _outcome(backbone)
    output, gradient = (float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True))
    allowed = TOLERANCE[backbone.compute_dtype]
    if not max(output, gradient) <= allowed:  # also where one is not a number
        raise ConfigError(
            f"model.compile: the compiled network's output differs by {output:.1e}, its gradient by {gradient:.1e}; "
            f"{allowed:g} is allowed. This torch compiles it wrongly, so set model.compile to false."
        )
    return output, gradient


def _outcome(backbone: DiffusersBackbone) -> tuple[Tensor, Tensor]:
    """The denoiser's output on a fixed input, and the gradient of its mean square, as one vector."""
    noise = torch.randn((1, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    params = backbone.parameters()
    with torch.enable_grad():
        denoise = backbone.denoiser([""], guidance=1.0, detach_unconditional=False)
        output = denoise(noise.to(backbone.device, backbone.dtype), 500.0)
        gradients = torch.autograd.grad(output.square().mean(), params, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, params, strict=True)]
    return output.detach().flatten(), torch.cat([g.flatten() for g in flat])
