"""The decision agent of a run: the first process judges, all follow; its memory is the run directory's audit log.

A check that passed is followed by a checkpoint that stays until the next one. To go back, later checkpoints are deleted
first, then the decision is written, then weights, optimizer, schedule, EMA, evaluations and step counter are read from
the checkpoint. Killed between these, a run repeats the updates since then and comes to the same decision.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from rsaft import distributed
from rsaft.errors import ConfigError, RsaftError
from rsaft.files import write_atomic
from rsaft.metrics.evaluate import Evaluation
from rsaft.pareto.agent import FORMAT, AgentState, Decision, DecisionAgent, audit_line
from rsaft.pareto.context import Context, JudgeError, Strategy, Verdict
from rsaft.pareto.objective import ParetoTransport
from rsaft.randomness import key_of
from rsaft.rdrl.checkpoint_folder import delete, list_checkpoints, step_of
from rsaft.types import Objective

AUDIT, BASE = "agent.jsonl", "base.safetensors"
_log = logging.getLogger(__name__)


class RunAgent:
    """Follows a run's evaluations. Without settings it does nothing.

    Attributes:
        state: where the run stands; None without settings.
    """

    def __init__(
        self, settings: DecisionAgent | None, objective: Objective, names: Sequence[str], run: Path, *, eval_every: int
    ) -> None:
        """Set up.

        Raises:
            ConfigError: if checks would fall between evaluations, or the objective cannot leave a reward out.
        """
        self.settings, self.state = settings, None
        self._run, self._folder = run, run / "agent"
        self._now: Evaluation | None = None
        if settings is None:
            return
        if settings.interval % eval_every:
            raise ConfigError(
                f"agent.interval: a check looks at an evaluation's images, and those come every {eval_every} updates; "
                f"got {settings.interval}; choose a multiple."
            )
        trained = trained_on(objective, names)
        strategy: Strategy = objective.strategy if isinstance(objective, ParetoTransport) else "offline"
        self._start = settings.start(trained, strategy)
        self.state = self._start
        followed(objective, self._start)

    @property
    def pinned(self) -> tuple[int, ...]:
        """Steps whose checkpoints stay, whatever is pruned."""
        return () if self.state is None else (self.state.stable[-1],)

    @property
    def stopped(self) -> bool:
        """Whether the agent has ended the run."""
        return self.state is not None and self.state.stopped

    def seed(self, seed: int) -> int:
        """The seed of prompts and noise: another one after each time the run went back."""
        reverts = 0 if self.state is None else self.state.reverts
        return key_of(seed, "reverts", reverts) if reverts else seed

    def look(self, step: int, evaluation: Evaluation) -> None:
        """Keep the newest evaluation, which all processes hold; write that of the untuned model."""
        if self.settings is None:
            return
        self._now = evaluation
        if step == 0 and distributed.rank() == 0:
            self._folder.mkdir(exist_ok=True)
            tensors = {"images": evaluation.images, **evaluation.scores}
            data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
            write_atomic(self._folder / BASE, data)

    def check(self, step: int, history: Sequence[Mapping[str, float]]) -> Decision | None:
        """The decision after `step` updates, where one is due; `state` is then the one before it.

        A judge that gives no verdict is a warning, and the run goes on as it was. A collective: an error of the judge's
        is raised on every process.
        """
        if self.settings is None or self.state is None or self._now is None or not self.settings.due(step):
            return None
        found: Verdict | RsaftError | None = None
        if distributed.rank() == 0:
            try:
                found = self.settings.judge(self._context(step, self._now, history))
                if not isinstance(found, Verdict):
                    found = ConfigError(f"agent: a judge returns an rsaft.pareto.Verdict; got {type(found).__name__}.")
            except RsaftError as error:  # told to the others, which wait
                found = error
        verdict = distributed.gathered(found)[0]
        if isinstance(verdict, JudgeError):
            _log.warning("update %d: no verdict: %s; the run goes on.", step, verdict)
            return None
        if not isinstance(verdict, Verdict):
            raise verdict or ConfigError("agent: the first process has no verdict.")
        return self.settings.apply(self.state, step, verdict)

    def keep(self, decision: Decision) -> None:
        """Write the decision, and stand where it says."""
        self.state = decision.state
        if distributed.rank() == 0:
            self._folder.mkdir(exist_ok=True)
            path = self._folder / AUDIT
            old = path.read_bytes() if path.exists() else b""
            write_atomic(path, old + audit_line(decision).encode() + b"\n")

    def put_aside(self, step: int) -> None:
        """Before the run goes back to `step`: move what was recorded since, and delete later checkpoints."""
        if self.state is None or distributed.rank() != 0:
            return
        aside = self._folder / f"reverted-{self.state.reverts + 1}"
        aside.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self._run / "metrics.jsonl", aside / "metrics.jsonl")
        for file in sorted((self._run / "samples").glob("step-*")):
            if int(file.stem.removeprefix("step-")) > step:
                file.replace(aside / file.name)
        for checkpoint in reversed(list_checkpoints(self._run / "checkpoints")):
            if (step_of(checkpoint) or 0) > step:
                delete(checkpoint)

    def restore(self, done: int) -> None:
        """Stand where the audit log says that the run stood after `done` updates; later lines are dropped."""
        if self.settings is None:
            return
        self.state = self._start
        path = self._folder / AUDIT
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        states = [AgentState.from_json(json.dumps(json.loads(line)["state"] | {"format": FORMAT})) for line in lines]
        while states and states[-1].step > done:
            states.pop()
        if states:
            self.state = states[-1]
        distributed.barrier()  # all have read it
        if distributed.rank() == 0 and len(states) < len(lines):
            write_atomic(path, "".join(f"{line}\n" for line in lines[: len(states)]).encode())

    def _context(self, step: int, now: Evaluation, history: Sequence[Mapping[str, float]]) -> Context:
        assert self.state is not None
        base = safetensors.torch.load_file(self._folder / BASE)
        images = base.pop("images")
        passed = self._run / "samples" / f"step-{self.state.stable[-1]:06d}.json"
        distances = [(int(m["step"]), m["gauge/weight_distance"]) for m in history if "gauge/weight_distance" in m]
        return Context(
            step=step,
            active=self.state.active,
            strategy=self.state.strategy,
            removed=self.state.removed,
            check=self.state.checks,
            prompts=now.prompts,
            images=now.images,
            base_images=images,
            scores=_of_rewards(now.scores),
            base_scores=_of_rewards(base),
            passed_scores=_of_rewards(_read_scores(passed)) if passed.is_file() else {},
            history=tuple((int(means["step"]), dict(means)) for means in history),
            distances=tuple(distances),
            grid=self._run / "samples" / f"step-{step:06d}.png",
            base_grid=self._run / "samples" / "step-000000.png",
        )


def trained_on(objective: Objective, names: Sequence[str]) -> tuple[str, ...]:
    """The rewards that an objective uses: those of its `active` or `weights`, or all."""
    active, weights = getattr(objective, "active", None), getattr(objective, "weights", None)
    return tuple(active or weights or names)


def followed(objective: Objective, state: AgentState) -> Any:
    """The objective with the rewards that are still active, and, of ParetoTransport, the state's strategy.

    Raises:
        ConfigError: if it names its rewards neither by `weights` nor by `active`.
    """
    settings: Any = objective
    known = {field.name for field in fields(settings)} if is_dataclass(settings) else set()
    if isinstance(settings, ParetoTransport):
        return replace(settings, active=state.active, strategy=state.strategy)
    if "weights" in known:
        return replace(settings, weights={k: w for k, w in settings.weights.items() if k in state.active})
    if "active" in known:
        return replace(settings, active=state.active)
    raise ConfigError(
        "agent: it takes rewards out of the objective by `weights` or `active`, and this one has neither; use "
        "pareto_transport or weighted_sum."
    )


def _of_rewards(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: values for key, values in scores.items() if key.startswith(("reward/", "held_out/"))}


def _read_scores(path: Path) -> dict[str, Tensor]:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
        for key, values in record["scores"].items()
    }
