"""A Backbone that takes the memory of another one, and computes nothing: for `memory.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from rsaft.rdrl.allocations import Allocations, Price, price
from rsaft.schedules import Schedule
from rsaft.types import Backbone, Denoiser, Images, Latents, Reward

PARAMETER_PARTS = 16  # trainable values are handled in equal parts: their number costs time, and no memory
PRICED_ROWS = 4  # samples that a denoiser call is priced at; for more its price is affine in their number


class Rehearsal:
    """Stands for `backbone`. Its denoiser, decoder and rewards pay the price of the real ones (`allocations.price`).

    Its tensors are on the meta device; only prices are found on fake tensors of the backbone's own device.

    Attributes:
        allocations: what counts its tensors; set by `begin`.
        params: as large together as the backbone's trainable tensors; made by `begin`.
        reward_prices: of the rewards that were called, by name.
        not_traced: names of rewards that fail on fake tensors; they cost nothing here.
    """

    TRAINABLE = "trainable"

    def __init__(self, backbone: Backbone, prompts: Sequence[str]) -> None:
        self.allocations = Allocations()
        self.params: list[Any] = []
        self.reward_prices: dict[str, Price] = {}
        self.not_traced: set[str] = set()
        first = backbone.parameters()[0]  # may be fake itself: a model of true size without its weights
        self._fake = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
        self._backbone = backbone
        self._prompts = list(prompts)
        self._denoisers: dict[Any, Denoiser] = {}
        self._prices: dict[Any, Price] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._backbone.latent_shape

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    @property
    def dtype(self) -> torch.dtype:
        return self._backbone.dtype

    def parameters(self) -> list[Any]:
        return self.params

    def schedule(self, num_steps: int) -> Schedule:
        return self._backbone.schedule(num_steps)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The base model costs what the trained one does without gradient."""
        yield

    @property
    def on_gpu(self) -> bool:
        """Whether the backbone is on a GPU."""
        return self._backbone.device.type == "cuda"

    @contextmanager
    def begin(self) -> Iterator[Allocations]:
        """Inside, everything is counted, and there are new parameters in the part TRAINABLE."""
        trainable = self._backbone.parameters()
        total = sum(p.numel() for p in trainable)
        with Allocations() as allocations:
            self.allocations = allocations
            with allocations.part(self.TRAINABLE):
                sizes = [len(part) for part in torch.empty(total, device="meta").chunk(PARAMETER_PARTS)]
                self.params = [
                    torch.nn.Parameter(torch.empty(n, dtype=trainable[0].dtype, device="meta")) for n in sizes
                ]
            allocations.forget_peak()
            for p in self.params:
                p.register_post_accumulate_grad_hook(lambda p: allocations.give(p.grad, "gradients"))
            yield allocations

    def texts(self, number: int) -> tuple[str, ...]:
        """That many prompts."""
        return tuple(self._prompts[i % len(self._prompts)] for i in range(number))

    def denoiser(self, prompts: Sequence[str], *, guidance: float, detach_unconditional: bool) -> Denoiser:
        how = {"guidance": guidance, "detach_unconditional": detach_unconditional}

        def denoise(x_t: Latents, t: float) -> Latents:
            def real(x: Tensor) -> Tensor:
                return self._real_denoiser(len(x), how)(x, t)

            return self._call("denoiser: activations", self._denoiser_price(real, x_t, how), x_t, self.params)

        return denoise

    def decode(self, latents: Latents) -> Images:
        part = "decode: activations"
        return self._call(part, self._price(part, self._backbone.decode, latents), latents, [])

    def reward(self, name: str, reward: Reward) -> Reward:
        """A Reward that pays the price of another."""
        part = f"reward {name}: activations"

        def stand_in(images: Images, prompts: Sequence[str]) -> Tensor:
            if name not in self.not_traced:
                try:
                    cost = self._price(part, lambda x: reward(x, list(prompts)), images)
                except Exception:  # it is anybody's code, and may leave torch
                    self.not_traced.add(name)
            if name in self.not_traced:
                return images.flatten(1).mean(1)
            self.reward_prices[name] = cost
            return self._call(part, cost, images, [])

        return stand_in

    def _real_denoiser(self, rows: int, how: dict[str, Any]) -> Denoiser:
        key = (rows, *how.values())
        if key not in self._denoisers:
            with _disable_current_modes():  # encodes prompts, perhaps into a cache on disk: not with fakes
                self._denoisers[key] = self._backbone.denoiser(self.texts(rows), **how)
        return self._denoisers[key]

    def _denoiser_price(self, real: Callable[[Tensor], Tensor], x: Tensor, how: dict[str, Any]) -> Price:
        rows = len(x)
        if rows <= PRICED_ROWS:
            return self._price(("denoiser", *how.values()), real, x)
        low, high = (self._price(("denoiser", *how.values()), real, x[:n]) for n in (PRICED_ROWS // 2, PRICED_ROWS))

        def at_rows(a: int, b: int) -> int:
            return b + max(b - a, 0) * (rows - PRICED_ROWS) // (PRICED_ROWS - PRICED_ROWS // 2)

        return replace(
            high,
            kept=at_rows(low.kept, high.kept),
            forward=at_rows(low.forward, high.forward),
            backward=at_rows(low.backward, high.backward),
        )

    def _price(self, what: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Price:
        with_grad = torch.is_grad_enabled()
        key = (what, tuple(x.shape), with_grad, x.requires_grad and with_grad)
        if key not in self._prices:
            self._prices[key] = price(function, tuple(x.shape), x.dtype, self._backbone.device, key[-1], self._fake)
        return self._prices[key]

    def _call(self, part: str, cost: Price, x: Tensor, params: Sequence[Tensor]) -> Tensor:
        shape = (len(x), *cost.shape[1:])
        with self.allocations.part(part):
            if not cost.has_gradient:
                self.allocations.take(cost.kept + cost.forward)
                return torch.empty(shape, dtype=cost.dtype, device="meta")
            tokens = [_GradientOf.apply(p, self.allocations) for p in params]
            return _Call.apply(self.allocations, part, cost, shape, x, *tokens)


class _Call(torch.autograd.Function):
    """A call with the memory of a real one, forward and backward."""

    @staticmethod
    def forward(ctx: Any, allocations: Allocations, part: str, cost: Price, shape: Any, x: Tensor, *tokens: Any) -> Any:
        kept = allocations.take(cost.kept)
        ctx.save_for_backward(kept)
        ctx.allocations, ctx.part, ctx.cost, ctx.like, ctx.tokens = allocations, part, cost, x.shape, len(tokens)
        allocations.take(cost.forward)
        return torch.empty(shape, dtype=cost.dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        with ctx.allocations.part("backward pass"):
            ctx.allocations.take(ctx.cost.backward)
            ctx.allocations.give(kept, None)  # what the real call kept is freed while its gradients are made
            wanted = ctx.needs_input_grad
            x = torch.empty(ctx.like, dtype=gradient.dtype, device="meta") if wanted[4] else None
            token = torch.empty((), device="meta")
            return None, None, None, None, x, *[token if want else None for want in wanted[5:]]


class _GradientOf(torch.autograd.Function):
    """A number that depends on a parameter, so that each parameter's gradient is made in a backward step of its own."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, allocations: Allocations) -> Any:
        ctx.shape, ctx.dtype, ctx.allocations = p.shape, p.dtype, allocations
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with ctx.allocations.part("backward pass"):
            return torch.empty(ctx.shape, dtype=ctx.dtype, device="meta"), None
