"""A Backbone small enough to hold every trainer to every law: one hidden layer, real noise levels, real LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rsaft.backbones.decode import to_images
from rsaft.backbones.schedules import ddim_schedule, flow_schedule
from rsaft.randomness import generator
from rsaft.schedules import Schedule
from rsaft.types import Denoiser, Images, Latents
from tests.helpers import randomize_

Kind = Literal["eps", "v", "flow"]

TEXT = 5


class Network(nn.Module):
    """out = W_2 silu(W_1 x + W_t text + sin(t / 100)): mixes all of a latent, and nothing between samples."""

    def __init__(self, size: int, width: int = 12) -> None:
        super().__init__()
        self.inner, self.text, self.outer = nn.Linear(size, width), nn.Linear(TEXT, width), nn.Linear(width, size)

    def forward(self, x: Tensor, t: float, text: Tensor) -> Tensor:
        time = torch.sin(torch.arange(self.inner.out_features, dtype=x.dtype) + t / 100)
        hidden = nn.functional.silu(self.inner(x.flatten(1)) + self.text(text) + time)
        return self.outer(hidden).view_as(x)


class Toy:
    """A Backbone on 2x3x3 latents and 3x6x6 images, in float64 unless said.

    Args:
        kind: what the network predicts.
        lora: train adapters (with B non-zero), or the whole network.
        dtype: of everything.
    """

    def __init__(self, kind: Kind, *, lora: bool = False, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network: nn.Module = Network(2 * 3 * 3)
            self.decoder: nn.Module = nn.ConvTranspose2d(2, 3, kernel_size=2, stride=2)
            if lora:
                self.network.requires_grad_(False)
                config = LoraConfig(r=2, lora_alpha=4, target_modules=["inner", "outer"], lora_dropout=0.0)
                self.network = inject_adapter_in_model(config, self.network)
        self.network.to(dtype).eval()
        self.decoder.to(dtype).requires_grad_(False)
        if lora:
            randomize_(self.parameters(), scale=0.3)
        self.kind, self._dtype = kind, dtype
        self._schedules: dict[int, Schedule] = {}
        prediction = {"eps": "epsilon", "v": "v_prediction"}
        self.scheduler = (
            FlowMatchEulerDiscreteScheduler(shift=3.0)
            if kind == "flow"
            else DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction[kind],
            )
        )

    latent_shape = (2, 3, 3)
    device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def schedule(self, num_steps: int) -> Schedule:
        if num_steps not in self._schedules:
            make = flow_schedule if self.kind == "flow" else ddim_schedule
            self._schedules[num_steps] = make(self.scheduler, num_steps)
        return self._schedules[num_steps]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([torch.randn(TEXT, generator=generator(0, p)) for p in prompts]).to(self._dtype)

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        cond, uncond = self.encode(prompts), self.encode([""] * len(prompts))

        def denoise(x_t: Latents, t: float) -> Latents:
            if guidance == 1:
                return self.network(x_t, t, cond)
            if detach_unconditional:
                with torch.no_grad():
                    out = self.network(x_t, t, uncond)
                return out + guidance * (self.network(x_t, t, cond) - out)
            out, out_cond = self.network(torch.cat([x_t, x_t]), t, torch.cat([uncond, cond])).chunk(2)
            return out + guidance * (out_cond - out)

        return denoise

    def decode(self, latents: Latents) -> Images:
        return to_images(self.decoder(latents))
