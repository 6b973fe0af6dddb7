"""Counter-based randomness: every draw comes from a generator keyed by (seed, purpose, step, sample id).

Nothing is read from a global generator, so a draw does not depend on what was drawn before it, on the number of
processes, or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def key_of(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit key; different arguments give independent streams (BLAKE2b, so no linear relations between them)."""
    text = "/".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose. CPU, so that a draw is the same whatever device the run is on.

    Torch seeds it with the low 32 bits of the key, so of n streams about n^2 / 2^33 pairs are the same: the first in
    some 90 000 streams. Two samples of a long run may share their noise, which training does not notice.
    """
    return torch.Generator("cpu").manual_seed(key_of(seed, purpose, *counters))


def normal(
    shape: tuple[int, ...],
    *,
    seed: int,
    purpose: str,
    step: int,
    sample_ids: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b ..."]:
    """Standard normal noise, one independent stream a sample; drawn in fp32 whatever the dtype.

    Args:
        shape: shape of one sample, without the batch.
        seed: seed of the run.
        purpose: what the noise is for; streams of different purposes are independent.
        step: update that the noise belongs to.
        sample_ids: b positions in the global batch.
        device: where the noise is put; it is drawn on the CPU.
        dtype: dtype of the result.
    """
    draws = [torch.randn(shape, generator=generator(seed, purpose, step, i), dtype=torch.float32) for i in sample_ids]
    return torch.stack(draws).to(device, dtype)


def integer(low: int, high: int, *, seed: int, purpose: str, step: int) -> int:
    """One integer in [low, high), the same on every rank and micro-batch of the update."""
    return int(torch.randint(low, high, (), generator=generator(seed, purpose, step)))


def prompt_rows(num_prompts: int, *, seed: int, step: int, batch_size: int) -> list[int]:
    """Rows of the prompt list that update `step` uses: epochs of shuffled prompts, addressed by step.

    Position p = step * batch_size + i lies in epoch p // num_prompts, whose order is keyed by (seed, epoch): no state,
    so any step can be asked for.
    """
    if num_prompts < 1:
        raise ValueError("the prompt list is empty; give at least one prompt.")
    rows, orders = [], {}
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_prompts)
        if epoch not in orders:
            orders[epoch] = torch.randperm(num_prompts, generator=generator(seed, "prompts", epoch))
        rows.append(int(orders[epoch][place]))
    return rows
