"""The decision agent: when to drop a reward, to go back, or to switch to the online strategy (PG-OT, Sec. 3.3, App. D).

Every `interval` updates a judge looks at images of fixed prompts and noises, and says whether they have broken down and
by which reward. What the run does is then a table; the first row that matches counts:

| strategy | breakdown | named reward is active and weak | strong and stable | action   | next                     |
| any      | yes       | yes                             |                   | remove   | offline, without it      |
| any      | yes       | no                              |                   | revert   | offline                  |
| offline  | no        |                                 | yes               | switch   | online                   |
| offline  | no        |                                 | no                | continue | offline                  |
| online   | no        |                                 |                   | continue | online                   |

A removal reverts too: to the last check that passed, never to the one being judged; step 0 has always passed. The run
stops where no reward would be left, or where it has gone back `max_reverts` times. Strong: no active reward is weak.
Stable: `n_stable` checks in a row passed, this one included, or the judge finds that images have stopped changing.

Nothing here knows of weights: the caller saves at each check that passed, and restores model, optimizer, schedule, EMA
and step counter from `revert_to`. After a revert without a removal the same random numbers give the same breakdown
again, so key them by `state.reverts` too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rsaft.errors import CheckpointError, ConfigError
from rsaft.pareto.context import Context, Judge, Strategy, Verdict

Action = Literal["remove", "revert", "switch", "continue", "stop"]

FORMAT = 1  # of a state's JSON and of a line of the audit log


@dataclass(frozen=True)
class Removal:
    """One reward taken out of a run."""

    step: int  # the check that found the breakdown
    reward: str
    revert_to: int


@dataclass(frozen=True)
class AgentState:
    """Where a run stands; goes into its checkpoint as JSON. `DecisionAgent.start` makes the first one.

    Raises:
        ConfigError: if the fields contradict each other.
    """

    active: tuple[str, ...]  # rewards in training
    strategy: Strategy = "offline"
    step: int = 0  # of the last check that passed, or gone back to
    removals: tuple[Removal, ...] = ()
    stable: tuple[int, ...] = (0,)  # checks that passed, ascending; the last one is what a revert goes back to
    stable_in_a_row: int = 0  # passed since the start or the last revert
    reverts: int = 0  # removals included
    checks: int = 0  # decisions made
    stopped: bool = False  # the agent has ended the run

    def __post_init__(self) -> None:
        removed = [removal.reward for removal in self.removals]
        names = [*self.active, *removed]
        ascending = list(self.stable) == sorted(set(self.stable))
        if not self.active or len(set(names)) < len(names):
            raise ConfigError(f"agent: rewards are active or removed, each once, and one is active; got {names}.")
        if not ascending or self.stable[:1] != (0,) or self.stable[-1] != self.step:
            raise ConfigError(f"agent: passed checks ascend from 0 to step {self.step}; got {self.stable}.")
        if not len(removed) <= self.reverts <= self.checks or not 0 <= self.stable_in_a_row < len(self.stable):
            raise ConfigError(
                "agent: each removal is a revert and each revert a check; the state's counts say otherwise."
            )

    @property
    def removed(self) -> tuple[str, ...]:
        return tuple(removal.reward for removal in self.removals)

    def to_json(self) -> str:
        """One line of JSON, from which `from_json` makes an equal state."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> AgentState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: if the text is damaged or of another format.
        """
        try:
            record = json.loads(text)
            if type(record) is not dict or record.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**_fields(record))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"the decision agent's state cannot be read ({error}); go back to an older checkpoint."
            ) from error


@dataclass(frozen=True)
class Decision:
    """What the run does after a check."""

    action: Action
    step: int  # that was judged
    reward: str | None  # "remove": the reward to take out; "stop" at the last reward: its name
    revert_to: int | None  # "remove", "revert": the step to go on from; "stop": the step whose weights to keep
    strategy: Strategy  # to train by from now on
    state: AgentState
    verdict: Verdict
    reason: str  # one sentence


def transition(
    state: AgentState,
    step: int,
    verdict: Verdict,
    *,
    weak: Collection[str] = (),
    n_stable: int = 3,
    max_reverts: int = 8,
    force: bool = False,
) -> Decision:
    """The decision that follows from a verdict: the table above, a pure function.

    Args:
        state: before the check.
        step: the check's, later than `state.step`.
        verdict: of the judge.
        weak: rewards that may be removed.
        n_stable: checks in a row after which strong rewards are stable.
        max_reverts: at the next breakdown after so many the run stops.
        force: strong rewards may be removed too (they still count as strong).

    Raises:
        ConfigError: if the step is not later, or the agent has ended the run.
    """
    if state.stopped:
        raise ConfigError("agent: it has ended this run, so there is nothing more to decide; start a new run.")
    if step <= state.step:
        raise ConfigError(f"agent: the run stands at step {state.step}, so a check is later than that; got {step}.")
    state = replace(state, checks=state.checks + 1)
    if verdict.breakdown:
        return _after_breakdown(state, step, verdict, weak, max_reverts, force)
    in_a_row = state.stable_in_a_row + 1
    strong = not set(state.active) & set(weak)
    switches = state.strategy == "offline" and strong and (verdict.stagnant or in_a_row >= n_stable)
    strategy: Strategy = "online" if switches else state.strategy
    after = replace(state, strategy=strategy, step=step, stable=(*state.stable, step), stable_in_a_row=in_a_row)
    why = "the images no longer change" if verdict.stagnant else f"{in_a_row} checks in a row passed"
    reason = f"no breakdown; all rewards left are strong, and {why}" if switches else "no breakdown"
    return Decision("switch" if switches else "continue", step, None, None, strategy, after, verdict, reason)


def _after_breakdown(
    state: AgentState, step: int, verdict: Verdict, weak: Collection[str], max_reverts: int, force: bool
) -> Decision:
    back, reward = state.stable[-1], verdict.reward
    kept = tuple(name for name in state.active if name != reward)
    removable = reward in state.active and (force or reward in weak)
    if state.reverts >= max_reverts or (removable and not kept):
        stopped = replace(state, stopped=True)
        why = "no reward would be left" if removable and not kept else f"it has gone back {max_reverts} times already"
        return Decision("stop", step, reward, back, state.strategy, stopped, verdict, f"breakdown, and {why}")
    after = replace(state, strategy="offline", stable_in_a_row=0, reverts=state.reverts + 1)
    if reward is None or not removable:
        unknown = "" if reward is None else "; it is strong" if reward in state.active else "; it is not active"
        reason = f"breakdown by {'an unknown reward' if reward is None else repr(reward)}, which stays{unknown}"
        return Decision("revert", step, None, back, "offline", after, verdict, reason)
    after = replace(after, active=kept, removals=(*state.removals, Removal(step, reward, back)))
    return Decision("remove", step, reward, back, "offline", after, verdict, f"breakdown by '{reward}'")


@dataclass(frozen=True)
class DecisionAgent:
    """A judge and the rule that its verdicts go through (PG-OT, App. D); holds no state.

    On several processes one of them calls `judge`, and all call `apply` with its verdict.

    Cost: the judge's, every `interval` updates.
    """

    judge: Judge
    weak: tuple[str, ...] = ()  # rewards prone to be hacked, which alone may be removed
    interval: int = 100  # updates between checks (PG-OT, D.3)
    n_stable: int = 3
    max_reverts: int = 8
    force: bool = False  # strong rewards may be removed too

    def __post_init__(self) -> None:
        if self.interval < 1 or self.n_stable < 1 or self.max_reverts < 0:
            raise ConfigError(
                "agent: interval and n_stable are at least 1, max_reverts at least 0; got "
                f"{self.interval}, {self.n_stable} and {self.max_reverts}."
            )

    def start(self, rewards: Sequence[str], strategy: Strategy = "offline") -> AgentState:
        """The state of an untrained model.

        Raises:
            ConfigError: if there is no reward, one is given twice, or `weak` names another one.
        """
        unknown = sorted(set(self.weak) - set(rewards))
        if unknown:
            raise ConfigError(f"agent.weak: {unknown} are no rewards of this run, which are {list(rewards)}.")
        return AgentState(tuple(rewards), strategy)

    def due(self, step: int) -> bool:
        """Whether there is a check after so many updates."""
        return step > 0 and step % self.interval == 0

    def decide(self, state: AgentState, context: Context) -> Decision:
        """`apply` of the judge's verdict. Raises what the judge raises, and what `transition` raises."""
        verdict = self.judge(context)
        if not isinstance(verdict, Verdict):
            raise ConfigError(f"agent: a judge returns an rsaft.pareto.Verdict; got {type(verdict).__name__}.")
        return self.apply(state, context.step, verdict)

    def apply(self, state: AgentState, step: int, verdict: Verdict) -> Decision:
        """`transition` with this agent's settings."""
        return transition(
            state,
            step,
            verdict,
            weak=self.weak,
            n_stable=self.n_stable,
            max_reverts=self.max_reverts,
            force=self.force,
        )


def audit_line(decision: Decision, raw: str = "") -> str:
    """One line of JSON for the audit log, without a line break: the decision, the verdict, and the state after it.

    Args:
        decision: of the agent.
        raw: what the judge itself said, if `verdict.analysis` does not hold it.
    """
    return json.dumps({"format": FORMAT, **asdict(decision), "raw": raw})


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The state's fields from what JSON holds; refuses other types, which a dataclass would take."""
    checks = {
        "active": _strings, "strategy": lambda x: x in ("offline", "online"), "step": _whole, "removals": _records,
        "stable": lambda x: type(x) is list and all(map(_whole, x)), "stable_in_a_row": _whole, "reverts": _whole,
        "checks": _whole, "stopped": lambda x: type(x) is bool,
    }  # fmt: skip
    if record.keys() != checks.keys():
        raise ValueError(f"its fields are not {', '.join(checks)}")
    for name, good in checks.items():
        if not good(record[name]):
            raise ValueError(f"{name} has another form")
    lists = {name: tuple(record[name]) for name in ("active", "stable")}
    return {**record, **lists, "removals": tuple(Removal(**removal) for removal in record["removals"])}


def _whole(x: object) -> bool:
    return type(x) is int and x >= 0


def _strings(x: object) -> bool:
    return type(x) is list and all(type(name) is str for name in x)


def _records(x: object) -> bool:
    return type(x) is list and all(
        type(r) is dict and r.keys() == {"step", "reward", "revert_to"} and type(r["reward"]) is str
        and _whole(r["step"]) and _whole(r["revert_to"])
        for r in x
    )  # fmt: skip
