"""A KL term to the base model on any pathwise trainer: the usual means against reward hacking, and RSA-FT's baseline.

    (1)  D(x_0) = E_{t, eps} || u_theta(x_t, t, c) - u_base(x_t, t, c) ||^2 / d,   x_t = alpha_t x_0 + sigma_t eps
    (2)  L = L_trainer + weight D

x_0 is the trained model's own sample, without gradient, and d its size. Two Gaussian denoising steps of one variance
have the KL divergence c_t || u_theta - u_base ||^2, where c_t belongs to the noise level and the sampler (DPOK, Fan et
al., 2023); (1) takes c_t = 1, as the simple loss of diffusion training does.

`OverRated` gates the term, after GARDO (2025): only samples that the trained reward ranks above what the other rewards
make of them are held back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.randomness import integer, normal
from rsaft.types import Algorithm, BackboneWithBase, Batch, Denoiser, Latents, Rollout, Sample


@dataclass(frozen=True)
class WithKL:
    """An algorithm whose samples carry the term as their penalty. Is itself an Algorithm.

    Under RSA-FT the term is taken at theta + epsilon, as the loss is, and no perturbation follows its gradient.

    Cost for each sample: one denoiser call with gradient and one without, with the trainer's guidance.
    """

    algorithm: Algorithm
    weight: float

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"kl.weight multiplies a loss, so weight > 0; got {self.weight}; or leave kl out.")

    @property
    def sampling(self) -> Any:
        return self.algorithm.sampling

    def rollout(self, backbone: BackboneWithBase, batch: Batch) -> KLRollout:
        """The trainer's rollout; the noise level is drawn by (seed, step), the noise by (seed, step, sample id)."""
        i = integer(0, self.sampling.num_steps, seed=batch.seed, purpose="kl-step", step=batch.step)
        eps = normal(
            backbone.latent_shape,
            seed=batch.seed,
            purpose="kl-noise",
            step=batch.step,
            sample_ids=batch.sample_ids,
            device=backbone.device,
            dtype=backbone.dtype,
        )
        return KLRollout(self, backbone, self.algorithm.rollout(backbone, batch), i, eps)


class KLRollout:
    """The trainer's rollout, and the term on its samples: nothing is drawn after it is made."""

    def __init__(
        self, settings: WithKL, backbone: BackboneWithBase, inner: Rollout, i: int, eps: Float[Tensor, "b c hz wz"]
    ) -> None:
        self.batch = inner.batch
        self.num_steps = inner.num_steps
        self._settings = settings
        self._backbone = backbone
        self._inner = inner
        self._i = i
        self._eps = eps
        self._schedule = backbone.schedule(settings.sampling.num_steps)
        self._denoise: Denoiser = backbone.denoiser(
            inner.batch.prompts,
            guidance=settings.sampling.guidance,
            detach_unconditional=settings.sampling.detach_unconditional,
        )

    def prefix(self, start: Any = None, stop: int | None = None) -> Any:
        return self._inner.prefix(start=start, stop=stop)

    def tail(self, prefix: Any) -> Sample:
        """The trainer's sample, its penalty larger by weight D of the batch row that each latent belongs to."""
        sample = self._inner.tail(prefix)
        first = torch.stack([(sample.index == row).nonzero()[0, 0] for row in range(len(self._eps))])
        term = self._settings.weight * self._distance(sample.latents[first].detach())[sample.index]
        return replace(sample, penalty=term if sample.penalty is None else sample.penalty + term)

    def _distance(self, x_0: Latents) -> Float[Tensor, " b"]:
        """D of each sample (Eq. 1), with a graph to the trained weights."""
        x_t, t = self._schedule.add_noise(x_0, self._eps, self._i), self._schedule.timesteps[self._i]
        with torch.no_grad(), self._backbone.base():
            base = self._denoise(x_t, t)
        return (self._denoise(x_t, t) - base).square().flatten(1).mean(dim=1)

    def select(self, rows: Sequence[int]) -> KLRollout:
        index = torch.as_tensor(list(rows), device=self._eps.device)
        return KLRollout(self._settings, self._backbone, self._inner.select(rows), self._i, self._eps[index])


@dataclass(frozen=True)
class OverRated:
    """1 for samples that `proxy` over-rates, else 0: where the KL term is to act.

    A score's win rate is the share of reference scores (the base model's samples) below it. A hacked sample beats
    nearly all of them by the proxy and few by rewards that are not trained on, so

        gate_i = 1[ win_proxy(i) - mean_k win_k(i) > margin ].

    The other sign would hold back samples that the proxy under-rates. Win rates against a fixed reference, not ranks in
    the batch: a sample's gate depends on nothing else in its batch. Constant to autograd.
    """

    proxy: str  # the reward that is trained on
    references: Mapping[str, Sequence[float]]  # scores of base samples, of the proxy and of each other reward to ask
    margin: float = 0.1

    def __post_init__(self) -> None:
        if self.proxy not in self.references or len(self.references) < 2:
            raise ConfigError(
                f"kl.gate: references are needed of the proxy '{self.proxy}' and of at least one other reward; got "
                f"those of {sorted(self.references)}."
            )
        empty = sorted(name for name, scores in self.references.items() if not len(scores))
        if empty:
            raise ConfigError(f"kl.gate: the references of '{empty[0]}' are empty; give scores of base samples.")

    def __call__(self, rewards: Float[Tensor, "b m"], names: tuple[str, ...]) -> Float[Tensor, " b"]:
        """Raises ConfigError if a reward with references is not measured."""
        missing = sorted(set(self.references) - set(names))
        if missing:
            raise ConfigError(f"kl.gate: '{missing[0]}' has references and is not among the rewards {list(names)}.")
        wins = {name: self._win_rate(rewards[:, names.index(name)].detach(), name) for name in self.references}
        others = torch.stack([rate for name, rate in wins.items() if name != self.proxy]).mean(dim=0)
        return (wins[self.proxy] - others > self.margin).to(rewards.dtype)

    def _win_rate(self, scores: Float[Tensor, " b"], name: str) -> Float[Tensor, " b"]:
        reference = scores.new_tensor(list(self.references[name]))
        return (scores[:, None] > reference).to(scores.dtype).mean(dim=1)
