"""Tiny real models, a smooth reward, and counters: what the tests share. Nothing here is a mock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from rsaft.backbones.decode import to_images
from rsaft.backbones.schedules import flow_schedule
from rsaft.randomness import generator
from rsaft.schedules import Schedule
from rsaft.testbed.tiny import Prediction, TinyFamily, tiny_pipeline
from rsaft.types import Batch, Denoiser, Images, Latents

PROMPTS = ("a cat", "two red dogs", "rain", "a very small house on a hill")


def tiny_sd_folder(path: Path, prediction_type: Prediction = "epsilon", *, seed: int = 0) -> Path:
    """Save a tiny Stable Diffusion in `path`, from where `rsaft.load_backbone` loads it; returns `path`.

    The session fixtures `tiny_sd` and `tiny_sd_v` are such folders, made once.
    """
    return tiny_folder(path, "sd", seed=seed, prediction_type=prediction_type)


def tiny_folder(path: Path, family: TinyFamily, *, seed: int = 0, prediction_type: Prediction = "epsilon") -> Path:
    """Save `tiny_pipeline` of a family in `path`; returns `path`."""
    tiny_pipeline(family, seed=seed, prediction_type=prediction_type).save_pretrained(path)
    return path


class TinyFlow:
    """A flow-matching Backbone: a two-block SD3 transformer on 4x4x4 latents, trained in full; 8x8 images.

    Text features are noise keyed by the prompt, and the decoder is one frozen transposed convolution.

    Args:
        dtype: of everything.
        shift: of the flow-matching grid (SD3 uses 3).
        seed: of the weights.
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32, shift: float = 3.0, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network: nn.Module = SD3Transformer2DModel(
                sample_size=4,
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                caption_projection_dim=16,
                pooled_projection_dim=16,
                pos_embed_max_size=4,
            )
            self.decoder: nn.Module = nn.ConvTranspose2d(4, 3, kernel_size=2, stride=2)
        nn.Module.to(self.network, dtype)  # diffusers' own `to` warns of modules to keep in fp32, and there are none
        self.network.eval()
        self.decoder.to(dtype).requires_grad_(False)
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        self._dtype = dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (4, 4, 4)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def schedule(self, num_steps: int) -> Schedule:
        return flow_schedule(self.scheduler, num_steps)

    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens d"]:
        return torch.stack([torch.randn(3, 16, generator=generator(0, p)) for p in prompts]).to(self._dtype)

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        cond, uncond = self.encode(prompts), self.encode([""] * len(prompts))

        def call(x_t: Latents, t: float, text: Tensor) -> Latents:
            time = torch.full((len(x_t),), t, dtype=self._dtype)
            return self.network(x_t, text, text.mean(1), time, return_dict=False)[0]

        def denoise(x_t: Latents, t: float) -> Latents:
            if guidance == 1:
                return call(x_t, t, cond)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_unconditional):
                v_uncond = call(x_t, t, uncond)
            return v_uncond + guidance * (call(x_t, t, cond) - v_uncond)

        return denoise

    def decode(self, latents: Latents) -> Images:
        return to_images(self.decoder(latents))


def toy_reward(images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """A smooth, nonlinear reward in about [-2, 3]; samples do not interact, and the prompt's length matters."""
    length = images.new_tensor([float(len(p)) for p in prompts])
    h, w = images.shape[-2:]
    ramp = torch.linspace(-1, 1, h * w, dtype=images.dtype, device=images.device).view(h, w)
    slope = (images * ramp).mean((1, 2, 3))
    contrast = (images[:, 0] - images[:, 1] * images[:, 2]).square().mean((1, 2))
    return torch.tanh(5 * slope + 0.1 * length) + (1 + 0.05 * length) * contrast


@dataclass
class Counting:
    """A Reward that is `reward`, and counts its calls and the images that it saw."""

    reward: Any = toy_reward
    calls: int = 0
    images: int = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " b"]:
        self.calls += 1
        self.images += len(images)
        return self.reward(images, prompts)


@dataclass
class Calls:
    """What `count_calls` saw."""

    total: int = 0
    with_grad: int = 0  # calls made with gradient mode on
    rows: list[int] = field(default_factory=list)  # length of each call's first argument

    @property
    def without_grad(self) -> int:
        return self.total - self.with_grad


@contextmanager
def count_calls(module: nn.Module) -> Iterator[Calls]:
    """Count the calls of a module, recomputations under checkpointing included.

    A VAE's decoder is `pipe.vae.decoder`: `vae.decode` does not go through the module's own call.
    """
    calls = Calls()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.total += 1
        calls.with_grad += torch.is_grad_enabled()
        first = args[0] if args else next(iter(kwargs.values()))
        calls.rows.append(len(first))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def batch_of(prompts: Sequence[str] = PROMPTS[:2], *, step: int = 0, seed: int = 0, first_id: int = 0) -> Batch:
    """A Batch of the prompts with consecutive sample ids."""
    return Batch(tuple(prompts), tuple(range(first_id, first_id + len(prompts))), step, seed)


@torch.no_grad()
def randomize_(params: Sequence[Tensor], *, scale: float = 0.1, seed: int = 0) -> None:
    """Replace every value by noise: makes LoRA's B non-zero, so that an adapter does something."""
    source = torch.Generator().manual_seed(seed)
    for p in params:
        p.copy_(scale * torch.randn(p.shape, generator=source))


def gradient_of(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar as one flat vector; zeros for a parameter that it does not depend on."""
    grads = torch.autograd.grad(value, list(params), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params, strict=True)])


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, where all-zero `b` counts as 1."""
    a, b = a.detach(), b.detach()
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / (scale or 1.0)
