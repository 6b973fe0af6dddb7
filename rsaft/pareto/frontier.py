"""FrontierStore: rewards of offline samples of each prompt, and the frontiers among them (PG-OT, Eq. 4).

All rewards of all samples are kept, not the frontiers: when a reward is removed the frontier is computed anew from the
other columns, and the projection of the old frontier is not the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.files import write_atomic
from rsaft.pareto.dominance import non_dominated

Normalization = Literal["prompt_pool", "global", "minmax", "none"]

FORMAT_VERSION = 1
FILES = TENSORS, DESCRIPTION = "rewards.safetensors", "frontier.json"
MIN_SCALE = 1e-6  # a reward that hardly varies is not blown up


@dataclass(frozen=True)
class FrontierStore:
    """Rewards of M samples of each of P prompts. Immutable; `save` and `load` are exact."""

    prompts: tuple[str, ...]
    names: tuple[str, ...]  # of the rewards, in the order of the last axis
    rewards: Float[Tensor, "p n m"]  # float64; a sample with a NaN or an infinity is none
    # What the samples came from: the base model's digest, the rewards' settings, sampling, seed. Compared by `check`.
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.rewards.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (len(self.prompts), len(self.names)):
            raise ConfigError(
                f"frontiers: {len(self.prompts)} prompts and {len(self.names)} rewards need rewards of shape "
                f"({len(self.prompts)}, M, {len(self.names)}); got {shape}."
            )
        if len(set(self.prompts)) < len(self.prompts) or len(set(self.names)) < len(self.names):
            raise ConfigError("frontiers: a prompt or a reward stands twice; give each once.")
        empty = [p for p, any_left in zip(self.prompts, self.mask.any(dim=1).tolist(), strict=True) if not any_left]
        if empty:
            raise ConfigError(f"frontiers: '{empty[0]}' has no sample with finite rewards; sample it again.")

    @cached_property
    def mask(self) -> Bool[Tensor, "p n"]:
        """The samples all of whose rewards are finite."""
        return self.rewards.isfinite().all(dim=2)

    @cached_property
    def _row(self) -> dict[str, int]:
        return {prompt: row for row, prompt in enumerate(self.prompts)}

    def columns(self, names: Sequence[str]) -> list[int]:
        """Where the rewards stand.

        Raises:
            ConfigError: if one is not in the store.
        """
        missing = sorted(set(names) - set(self.names))
        if missing:
            raise ConfigError(
                f"frontiers: they were built without {missing}, and hold {list(self.names)}; build them with all "
                "rewards of the run, or train on these alone."
            )
        return [self.names.index(name) for name in names]

    def rows(self, prompts: Sequence[str]) -> list[int]:
        """Where the prompts stand.

        Raises:
            ConfigError: if one is not in the store.
        """
        missing = [p for p in prompts if p not in self._row]
        if missing:
            raise ConfigError(
                f"frontiers: there is none for the prompt '{missing[0]}'; build them for the training prompts."
            )
        return [self._row[p] for p in prompts]

    def pool(self, prompts: Sequence[str], names: Sequence[str]) -> tuple[Float[Tensor, "p n m"], Bool[Tensor, "p n"]]:
        """All samples of some prompts, in some rewards, with the mask of the good ones; 0 elsewhere."""
        rows = self.rows(prompts)
        mask = self.mask[rows]
        return torch.where(mask[..., None], self.rewards[rows][..., self.columns(names)], 0.0), mask

    def frontiers(
        self, prompts: Sequence[str], names: Sequence[str]
    ) -> tuple[Float[Tensor, "p f m"], Bool[Tensor, "p f"]]:
        """The frontiers of some prompts in some rewards, padded to the longest, with a mask of what is none."""
        pool, mask = self.pool(prompts, names)
        front = non_dominated(pool, mask=mask)
        order = front.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(front.sum(dim=1).max())]
        return pool.gather(1, order[..., None].expand(-1, -1, pool.shape[2])), front.gather(1, order)

    def scales(self, kind: Normalization, prompts: Sequence[str], names: Sequence[str]) -> Float[Tensor, "p m"]:
        """What each reward is divided by before distances are taken, for each of some prompts. Fixed for a run.

        "prompt_pool": the deviation within a prompt, pooled over all prompts of the store. "global": that over all
        samples. "minmax": the width of the prompt's frontier, ideal less nadir. "none": 1.
        """
        if kind == "none":
            return torch.ones(len(prompts), len(names), dtype=self.rewards.dtype)
        if kind == "minmax":
            front, mask = self.frontiers(prompts, names)
            high = front.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
            return (high - front.masked_fill(~mask[..., None], torch.inf).amin(dim=1)).clamp_min(MIN_SCALE)
        pool, mask = self.pool(self.prompts, names)
        counts = mask.sum(dim=1)[:, None, None]
        mean = pool.sum(dim=1, keepdim=True) / counts
        if kind == "global":
            mean = (mean * counts).sum(dim=0, keepdim=True) / counts.sum()
        squares = torch.where(mask[..., None], (pool - mean).square(), 0.0).sum(dim=(0, 1)) / counts.sum()
        return squares.sqrt().clamp_min(MIN_SCALE).expand(len(prompts), -1)

    def check(self, origin: Mapping[str, Any], names: Sequence[str]) -> None:
        """Refuse a run that the frontiers were not made for.

        Args:
            origin: of the run: the keys that it shares with the store's must be equal.
            names: rewards that the run needs.

        Raises:
            ConfigError: if a reward is missing, or something differs.
        """
        self.columns(names)
        for key in sorted(set(origin) & set(self.origin)):
            if origin[key] != self.origin[key]:
                raise ConfigError(
                    f"frontiers: they were built with {key} = {self.origin[key]!r}, and the run has {origin[key]!r}; "
                    "build them anew, or set it back."
                )

    def save(self, folder: Path) -> None:
        """Write rewards.safetensors, and then frontier.json with its sha256: a killed save leaves no readable store."""
        folder.mkdir(parents=True, exist_ok=True)
        content = save({"rewards": self.rewards.contiguous()})
        write_atomic(folder / TENSORS, content)
        description = {
            "format_version": FORMAT_VERSION,
            "prompts": self.prompts,
            "names": self.names,
            "origin": self.origin,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_atomic(folder / DESCRIPTION, json.dumps(description, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: str | Path) -> FrontierStore:
        """The store of a folder.

        Raises:
            ConfigError: if there is none, it is damaged, or of a newer version.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if about["format_version"] != FORMAT_VERSION:
                raise ConfigError(
                    f"frontiers: '{folder}' has format {about['format_version']}, and this rsaft reads "
                    f"{FORMAT_VERSION}; build them anew."
                )
            content = (folder / TENSORS).read_bytes()
            if hashlib.sha256(content).hexdigest() != about["sha256"]:
                raise ConfigError(f"frontiers: {folder / TENSORS} is damaged (its sha256 is another); build them anew.")
            return cls(tuple(about["prompts"]), tuple(about["names"]), load(content)["rewards"], about["origin"])
        except FileNotFoundError as error:
            raise ConfigError(
                f"frontiers: there is no {error.filename}; build them with `rsaft frontier`, or name their folder."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"frontiers: '{folder}' is damaged ({error}); build them anew.") from error
