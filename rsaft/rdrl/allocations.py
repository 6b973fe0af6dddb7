"""How much memory tensor code takes, found out without taking it.

The code runs on tensors that have shapes and no data: on the meta device, or fake ones (torch's FakeTensorMode), which
run real weights' code as on their own device. Every storage that comes to life is counted until it is freed:
activations that autograd keeps, recomputed blocks, gradients, temporaries. It belongs to the part that is named when it
is made.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

_DEVICE = torch.ops.prim.device.default
_MOVE = torch.ops.aten._to_copy.default
_READ_A_VALUE = torch.ops.aten._local_scalar_dense.default


class Allocations(TorchDispatchMode):
    """Counts live bytes by part: of meta tensors `with Allocations()`, of fake ones `with fake, Allocations(fake)`.

    A value that code reads from a tensor is 1 or True: there is no data, and "is it finite?" is to be yes.

    Attributes:
        live: bytes alive now, by part.
        peak: bytes alive, by part, at the moment when most were alive.
        outside: bytes of tensors that were used and not made here (weights), by part.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self._fake = fake
        self._real: dict[int, tuple[Tensor, Tensor]] = {}  # by id: real tensors with the fakes that stand for them
        self._real_storages: set[int] = set()
        self._part = "other"
        self._total = self._most = 0
        self._owner: dict[int, tuple[str, int]] = {}  # storage -> its part and size; size 0 for what came from outside

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside belongs to `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def take(self, num_bytes: int) -> Tensor:
        """A storage of that size on the meta device; it is alive as long as the tensor is."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def give(self, tensor: Tensor, part: str | None) -> None:
        """Count a tensor's storage as another part's; as nobody's and nothing, if `part` is None."""
        key = tensor.untyped_storage()._cdata
        owner, size = self._owner[key]
        self._count(owner, -size)
        self._owner[key] = (owner, 0) if part is None else (part, size)
        if part is not None:
            self._count(part, size)

    def forget_peak(self) -> None:
        """Begin a new peak at what is alive now."""
        self._most, self.peak = self._total, self.live.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # most calls on fake tensors are this question, and asking FakeTensorMode is slow
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        if self._fake is not None and not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
            tensors = list(_tensors((*args, *kwargs.values())))
        for tensor in tensors:
            if tensor.untyped_storage()._cdata not in self._owner:
                self.outside[self._part] += tensor.untyped_storage().nbytes()
                self._watch(tensor, 0)
        if func is _READ_A_VALUE:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is _MOVE and args[0].is_meta:
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}  # there is no data to move
        out = func(*args, **kwargs)
        for tensor in _tensors(out if isinstance(out, list | tuple) else (out,)):
            if tensor.untyped_storage()._cdata not in self._owner:
                self._watch(tensor, tensor.untyped_storage().nbytes())
        return out

    def _faked(self, tensor: Tensor) -> Tensor:
        """The fake that stands for a real tensor, always the same one."""
        if self._fake is None or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._real:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._real_storages:
                self._real_storages.add(storage._cdata)
                self.outside[self._part] += storage.nbytes()
            self._real[id(tensor)] = (tensor, self._fake.from_tensor(tensor))
            self._watch(self._real[id(tensor)][1], 0)
        return self._real[id(tensor)][1]

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        self._owner[storage._cdata] = (self._part, size)
        self._count(self._part, size)
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        part, size = self._owner.pop(key)
        self._count(part, -size)

    def _count(self, part: str, size: int) -> None:
        self.live[part] += size
        self._total += size
        if self._total > self._most:
            self.forget_peak()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@dataclass(frozen=True)
class Price:
    """What one call of a function costs in bytes, and what it returns."""

    shape: tuple[int, ...]  # of the result
    dtype: torch.dtype  # of the result
    has_gradient: bool  # whether the result has one
    kept: int  # from the call until its backward pass, without the result
    forward: int  # on top of that while the call runs
    backward: int  # on top of what is kept while the backward pass runs; parameters' gradients are not counted
    outside: int  # weights that it uses


def price(
    function: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    with_gradient: bool,
    fake: FakeTensorMode,
) -> Price:
    """Run a function forward and, if its result has a gradient, backward, and note what it takes.

    The weights that it uses may be real; they are not changed, and `gradients_dropped` keeps their `.grad` empty.

    Args:
        function: of one tensor.
        shape, dtype, device: of its argument.
        with_gradient: whether the argument requires a gradient.
        fake: mode to run in; no other mode and no hook on saved tensors reaches inside.
    """
    plain = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    allocations = Allocations(fake)
    with _disable_current_modes(), fake, allocations, plain:
        with allocations.part("argument"):
            argument = torch.empty(shape, dtype=dtype, device=device, requires_grad=with_gradient)
        before = sum(allocations.live.values())
        out = function(argument)
        result = out.untyped_storage().nbytes()
        after = sum(allocations.live.values())
        forward = sum(allocations.peak.values()) - after
        backward = 0
        if out.requires_grad:
            gradient = torch.empty_like(out)
            allocations.forget_peak()
            alive = sum(allocations.live.values())
            out.backward(gradient)
            backward = sum(allocations.peak.values()) - alive
        outside = sum(allocations.outside.values())
        return Price(
            tuple(out.shape), out.dtype, out.requires_grad, after - before - result, forward, backward, outside
        )


@contextmanager
def gradients_dropped(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a gradient that reaches one of the parameters' `.grad` is dropped at once."""

    def drop(p: Tensor) -> None:
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in params]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
