"""The trainers that the shared tests run over, and each one's images as a plain function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from rsaft.randomness import normal
from rsaft.rdrl import AlignProp, DRaFT, DRTune, ReFL
from rsaft.sampling import Sampling
from rsaft.types import Batch
from tests.reference.alignprop import alignprop_latents
from tests.reference.draft import Grid, ddim_grid, final_latents, flow_grid, guided, renoise, step
from tests.reference.drtune import drtune_latents
from tests.reference.refl import refl_latents

T = 4
GUIDANCE = 3.0
SAMPLING = Sampling(T, guidance=GUIDANCE)

TRAINERS: dict[str, Any] = {
    "refl": ReFL(last=3, sampling=SAMPLING),
    "draft-1": DRaFT(k=1, sampling=SAMPLING),
    "draft-3": DRaFT(k=3, sampling=SAMPLING),
    "draft-lv": DRaFT(k=1, lv=2, sampling=SAMPLING),
    "alignprop": AlignProp(truncation="uniform", sampling=SAMPLING),
    "drtune-vjp": DRTune(k=2, early_stop=2, sampling=SAMPLING),
    "drtune-graph": DRTune(k=2, early_stop=2, backend="graph", sampling=SAMPLING),
}


@dataclass(frozen=True)
class Parts:
    """What a reference needs of a model: nothing of `rsaft.sampling` or of the backbone's own denoiser."""

    grid: Grid
    names: list[str]  # of the trainable tensors
    network: Callable[[dict[str, Tensor], Tensor, float, Tensor], Tensor]  # (weights, x, t, text) -> output
    encode: Callable[[Sequence[str]], Tensor]
    decode: Callable[[Tensor], Tensor]


def parts_of(backbone: Any, kind: str) -> Parts:
    """Of a `Toy`, a `TinyFlow` or a Stable Diffusion."""
    names = [n for n, p in backbone.network.named_parameters() if p.requires_grad]
    if type(backbone).__name__ == "Toy":
        scheduler = backbone.scheduler
        encode, decoder = backbone.encode, backbone.decoder

        def network(weights, x, t, text):
            return functional_call(backbone.network, weights, (x, t, text))

    elif kind == "flow":
        scheduler = backbone.scheduler
        encode, decoder = backbone.encode, backbone.decoder

        def network(weights, x, t, text):
            args = (x, text, text.mean(1), torch.full((len(x),), t, dtype=x.dtype))
            return functional_call(backbone.network, weights, args, {"return_dict": False})[0]

    else:
        pipe = backbone.pipe
        scheduler = pipe.scheduler

        def encode(prompts):
            length = pipe.tokenizer.model_max_length
            tokens = pipe.tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            return pipe.text_encoder(tokens.input_ids)[0].detach()

        def network(weights, x, t, text):
            return functional_call(backbone.network, weights, (x, t, text), {"return_dict": False})[0]

        def decoder(z):
            return pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample

    def decode(z):
        image = decoder(z) / 2 + 0.5
        return image + (image.clamp(0, 1) - image).detach()

    grid = flow_grid(scheduler, T) if kind == "flow" else ddim_grid(scheduler, T, kind)
    return Parts(grid, names, network, encode, decode)


def reference_images(
    backbone: Any, kind: str, algorithm: Any, batch: Batch, *, detach_unconditional: bool = False
) -> Callable[[Sequence[Tensor]], Tensor]:
    """theta -> images of the trainer's tail, by its reference; only noise and indices are drawn by rsaft."""
    parts, rollout = parts_of(backbone, kind), algorithm.rollout(backbone, batch)
    cond, uncond = parts.encode(batch.prompts), parts.encode([""] * len(batch.prompts))
    keys = {"seed": batch.seed, "step": batch.step, "sample_ids": batch.sample_ids}
    draw = partial(normal, device=torch.device("cpu"), dtype=torch.float64, **keys)
    shape = backbone.latent_shape
    x_T = draw(shape, purpose="rollout")

    def latents(denoise: Callable) -> Tensor:
        match algorithm:
            case ReFL():
                noises = draw((rollout.stop, *shape), purpose="refl-noise")
                return refl_latents(parts.grid, denoise, x_T, noises, rollout.stop)
            case AlignProp():
                noises = draw((T, *shape), purpose="alignprop-noise")
                return alignprop_latents(parts.grid, denoise, x_T, noises, rollout.first)
            case DRTune():
                stop, early = rollout.num_steps - 1, algorithm.early_stop != 0
                return drtune_latents(parts.grid, denoise, x_T, stop, rollout.train, early)
        found, last = [final_latents(parts.grid, denoise, x_T, algorithm.k)], T - 1
        for j in range(algorithm.lv):
            x = renoise(parts.grid, found[0].detach(), draw(shape, purpose=f"draft-lv-{j}"), last)
            found.append(step(parts.grid, x, denoise(x, parts.grid.timesteps[last]), last))
        return torch.cat(found)

    def images(theta: Sequence[Tensor]) -> Tensor:
        weights = dict(zip(parts.names, theta, strict=True))

        def network(x: Tensor, t: float, text: Tensor) -> Tensor:
            out = parts.network(weights, x, t, text)
            return out.detach() if detach_unconditional and text is uncond else out

        return parts.decode(latents(guided(network, cond, uncond, algorithm.sampling.guidance)))

    return images
