"""ParetoTransport: pull each prompt's samples to reward vectors that dominate them (PG-OT, Eqs. 4 to 7).

    (4)  F = { R(y_j) : no R(y_m) dominates it },  y offline samples of the prompt
    (6)  P = argmin sum_ij P_ij c(r_i, f_j) - eps H(P)  over plans with uniform marginals;   L = sum_ij P_ij c(r_i, f_j)
    (7)  online: D_j = { samples of this update that dominate r_j },   L_j = mean over d in D_j of c(r_j, d)

c is the squared distance of normalised rewards, and the r_i of (6) are those that the frontier dominates. Plan and
targets are constants to autograd. With the plan fixed the gradient in r_i is 2 a_i (r_i - T(r_i)), T the barycentric
projection: by the envelope theorem, that of the entropic value at fixed eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.pareto.dominance import dominates
from rsaft.pareto.frontier import FrontierStore, Normalization
from rsaft.pareto.sinkhorn import sinkhorn
from rsaft.types import Others

Cost = Literal["sqeuclidean", "hinge", "dominance_masked"]


@dataclass(frozen=True)
class ParetoTransport:
    """An objective over several rewards that compares the samples of one prompt (`train.group_size` of them).

    Offline, samples that the prompt's frontier dominates are transported to it. Online, each sample goes to those of
    the same update that dominate it. A sample that nothing dominates has no loss: nothing better is known.

    Cost: for each prompt one plan from its samples to its frontier; online, comparisons alone.
    """

    strategy: Literal["offline", "online"] = "offline"
    frontiers: FrontierStore | None = None  # of the training prompts; online it gives the scales alone
    active: tuple[str, ...] | None = None  # rewards that count; None: all of the run
    source: Literal["any", "all"] = "any"  # samples that some point of the frontier dominates, or that all points do
    # "hinge" does not count what exceeds the target; "dominance_masked" moves a sample only to what dominates it.
    cost: Cost = "sqeuclidean"
    normalize: Normalization | None = None  # None: "prompt_pool" with frontiers, "none" without
    reg: float = 0.05  # eps, relative to the prompt's mean cost
    unroll: bool = False  # differentiate through the sweeps, too, instead of the envelope theorem

    @property
    def by_prompt(self) -> Literal[True]:
        """The loop brings the samples of a prompt together for it."""
        return True

    def __post_init__(self) -> None:
        if self.frontiers is None and self.strategy == "offline":
            raise ConfigError("pareto.frontiers: the offline strategy needs them; build them with `rsaft frontier`.")
        if self.frontiers is None and self.normalize not in (None, "none"):
            raise ConfigError(
                f"pareto.normalize: '{self.normalize}' takes its scales from offline samples, and there are none; give "
                "frontiers, or set it to none."
            )
        if self.unroll and (self.strategy == "online" or self.cost == "dominance_masked"):
            raise ConfigError("pareto.unroll: this plan is found without sweeps to differentiate through; set it off.")
        if not 0 < self.reg < float("inf"):
            raise ConfigError(f"pareto.reg is a share of the mean cost, so reg > 0 and finite; got {self.reg}.")
        if self.active is not None and not self.active:
            raise ConfigError("pareto.active: no reward is left; name at least one.")

    def __call__(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The first two of `judge`, for samples of one process."""
        return self.judge(rewards, names, prompts, None)[:2]

    def judge(
        self, rewards: Float[Tensor, "b m"], names: tuple[str, ...], prompts: Sequence[str], others: Others | None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], dict[str, float]]:
        """Each sample's loss, its direction, which is minus the loss under the same plan, and what to log.

        Args:
            rewards: of this process's samples, finite.
            names: of the rewards.
            prompts: of the samples; equal text is one prompt.
            others: samples of the other processes, which share prompts with these.

        Returns:
            Losses whose mean over all samples of all processes is the mean of their prompt's L (offline), or of L_j
            (online). A sample that has no target has exactly 0, with a graph.
            Logs: "pareto/source", the share of samples that have a target; "pareto/lowered", among their pulls on
            single rewards, the share that lower the reward.

        Raises:
            ConfigError: if an active reward, or a prompt's frontier, is not there.
        """
        active = names if self.active is None else self.active
        own = rewards[:, _columns(active, names)]
        pool = own.detach() if others is None else torch.cat([own.detach(), others.rewards[:, _columns(active, names)]])
        group = Groups.of([*prompts, *(() if others is None else others.prompts)], own.device)
        zero = 0.0 * own.sum(dim=1)
        if not len(own):
            return zero, zero, _logs(zero, zero)
        scale = self._scales(group.prompts, active).to(own)
        # Where a sample stands does not change what dominates it: the scales are positive.
        if self.strategy == "online":
            losses, pull = self._online(own, pool, group, scale)
        elif others is not None and self.unroll:
            raise ConfigError("pareto.unroll: a prompt's samples are on several processes; set it off.")
        else:
            losses, pull = self._offline(own, pool, group, scale, active)
        return zero + losses, -(zero + losses), _logs(losses.detach(), pull)

    def _offline(
        self, own: Tensor, pool: Tensor, group: Groups, scale: Tensor, active: Sequence[str]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
        """Losses, and the way from each sample to its target in normalised rewards; 0 without one."""
        assert self.frontiers is not None
        front, known = (x.to(own.device) for x in self.frontiers.frontiers(group.prompts, active))
        front = front.to(own)
        better = dominates(front, group.padded(pool)) & known[:, :, None]  # (p, f, n)
        beaten = better.any(dim=1) if self.source == "any" else (better | ~known[:, :, None]).all(dim=1)
        source = beaten & group.mask
        target = front / scale[:, None]
        cost = self._costs(group.padded(pool) / scale[:, None], target)
        if self.unroll:
            cost = self._costs(group.padded(own) / scale[:, None], target)
        if self.cost == "dominance_masked":
            plan = _row_plan(cost, source, better.mT & known[:, None], self.reg)
        else:
            plan = sinkhorn(cost, source, known, self.reg, unroll=self.unroll).to(own)
        mass = plan[group.row, group.place][: len(own)]  # (b, f)
        goals, reached = target[group.row][: len(own)], own / scale[group.row][: len(own)]
        losses = (mass * self._costs(reached[:, None], goals)[:, 0]).sum(dim=1) * group.sizes[group.row][: len(own)]
        weight = mass.detach().sum(dim=1, keepdim=True)
        middle = (mass.detach()[:, None] @ goals)[:, 0] / torch.where(weight > 0, weight, 1.0)
        return losses, torch.where(weight > 0, middle - reached.detach(), 0.0)

    def _online(
        self, own: Tensor, pool: Tensor, group: Groups, scale: Tensor
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
        """As `_offline`: the only plan from one sample to its D_j with uniform marginals is uniform."""
        samples = group.padded(pool)
        better = dominates(samples, samples) & group.mask[:, :, None]  # [p, d, j]: d dominates j
        plan = better.to(own) / better.sum(dim=1, keepdim=True).clamp_min(1)
        mass = plan.mT[group.row, group.place][: len(own)]  # (b, n)
        goals = (samples / scale[:, None])[group.row][: len(own)]
        reached = own / scale[group.row][: len(own)]
        losses = (mass * self._costs(reached[:, None], goals)[:, 0]).sum(dim=1)
        return losses, (mass[:, None] @ goals)[:, 0] - mass.sum(dim=1, keepdim=True) * reached.detach()

    def _costs(self, r: Float[Tensor, "p n m"], f: Float[Tensor, "p f m"]) -> Float[Tensor, "p n f"]:
        """c(r_i, f_j) of normalised rewards."""
        way = f[:, None] - r[:, :, None]
        return (way.relu() if self.cost == "hinge" else way).square().sum(dim=-1)

    def _scales(self, prompts: Sequence[str], active: Sequence[str]) -> Float[Tensor, "p m"]:
        if self.frontiers is None:
            return torch.ones(len(prompts), len(active))
        return self.frontiers.scales(self.normalize or "prompt_pool", prompts, active)


@dataclass(frozen=True)
class Groups:
    """Which rows share a prompt: row i stands at [row[i], place[i]] of a padded (P, n, ...) tensor."""

    prompts: tuple[str, ...]
    row: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]
    mask: Bool[Tensor, "p n"]

    @classmethod
    def of(cls, prompts: Sequence[str], device: torch.device | None = None) -> Groups:
        members: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            members.setdefault(prompt, []).append(i)
        row, place = torch.zeros(2, len(prompts), dtype=torch.long)
        mask = torch.zeros(len(members), max(map(len, members.values()), default=0), dtype=torch.bool)
        for p, rows in enumerate(members.values()):
            row[rows], place[rows] = p, torch.arange(len(rows))
            mask[p, : len(rows)] = True
        return cls(tuple(members), row.to(device), place.to(device), mask.to(device))

    @property
    def sizes(self) -> Int[Tensor, " p"]:
        return self.mask.sum(dim=1)

    def padded(self, x: Float[Tensor, "rows m"]) -> Float[Tensor, "p n m"]:
        """The rows by prompt; 0 where a prompt has fewer."""
        return x.new_zeros(*self.mask.shape, x.shape[1]).index_put((self.row, self.place), x)


def _columns(active: Sequence[str], names: Sequence[str]) -> list[int]:
    missing = sorted(set(active) - set(names))
    if missing:
        raise ConfigError(f"pareto.active: {missing} are not among the rewards {list(names)}; name some of these.")
    return [names.index(name) for name in active]


def _row_plan(
    cost: Float[Tensor, "p n f"], source: Bool[Tensor, "p n"], allowed: Bool[Tensor, "p n f"], reg: float
) -> Float[Tensor, "p n f"]:
    """The plan with row sums uniform on the source, and free columns: a softmin over the targets that are allowed.

    argmin of sum(plan * cost) - eps H(plan). With both marginals there may be no plan on the allowed pairs.
    """
    pairs = allowed & source[..., None]
    eps = reg * torch.where(pairs, cost, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)
    logits = (-cost / eps.clamp_min(1e-12)[:, None, None]).masked_fill(~pairs, -torch.inf)
    rows = torch.where(pairs.any(dim=2, keepdim=True), logits, 0.0).softmax(dim=2)
    return torch.where(pairs, rows, 0.0) / source.sum(dim=1).clamp_min(1)[:, None, None]


def _logs(losses: Float[Tensor, " b"], pull: Tensor) -> dict[str, float]:
    moved = pull[pull.ne(0).flatten(1).any(dim=1)] if pull.ndim == 2 else pull[:0]
    return {
        "pareto/source": len(moved) / max(len(losses), 1),
        "pareto/lowered": float((moved < 0).double().mean()) if len(moved) else 0.0,
    }
