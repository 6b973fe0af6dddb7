"""The decision agent makes the paper's decisions, and keeps its promises under any sequence of verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsaft.errors import CheckpointError, ConfigError
from rsaft.pareto import AgentState, Context, Decision, DecisionAgent, ScriptedJudge, Verdict
from rsaft.pareto.agent import Removal, audit_line, transition

PAPER = ("clip", "ict", "hps", "hp")
WEAK = ("clip", "hps")
GOOD, BAD = Verdict(False), Verdict(True)


def run(agent: DecisionAgent, state: AgentState, checks: int) -> list[Decision]:
    """The decisions of a run that trains from where each one leaves it."""
    decisions: list[Decision] = []
    while len(decisions) < checks and not state.stopped:
        step = state.step + agent.interval
        context = Context(step, state.active, state.strategy, state.removed, state.checks)
        decisions.append(agent.decide(state, context))
        state = decisions[-1].state
    return decisions


@pytest.mark.parametrize(
    "script",
    [
        {200: Verdict(True, "hps"), 600: Verdict(True, "clip")},
        [GOOD, Verdict(True, "hps"), *[GOOD] * 4, Verdict(True, "clip"), *[GOOD] * 3],
    ],
    ids=["by step", "in sequence"],
)
def test_the_papers_run_comes_out_decision_by_decision(script):
    """App. D.3; 200 and 600 are trained again after their reverts, and judged again."""
    agent = DecisionAgent(ScriptedJudge(script), weak=WEAK)
    decisions = run(agent, agent.start(PAPER), 10)
    assert [(d.step, d.action, d.reward, d.revert_to, d.strategy, d.state.active) for d in decisions] == [
        (100, "continue", None, None, "offline", PAPER),
        (200, "remove", "hps", 100, "offline", ("clip", "ict", "hp")),
        (200, "continue", None, None, "offline", ("clip", "ict", "hp")),
        (300, "continue", None, None, "offline", ("clip", "ict", "hp")),
        (400, "continue", None, None, "offline", ("clip", "ict", "hp")),
        (500, "continue", None, None, "offline", ("clip", "ict", "hp")),
        (600, "remove", "clip", 500, "offline", ("ict", "hp")),
        (600, "continue", None, None, "offline", ("ict", "hp")),
        (700, "continue", None, None, "offline", ("ict", "hp")),
        (800, "switch", None, None, "online", ("ict", "hp")),
    ]
    assert decisions[-1].state == AgentState(
        active=("ict", "hp"),
        strategy="online",
        step=800,
        removals=(Removal(200, "hps", 100), Removal(600, "clip", 500)),
        stable=(0, 100, 200, 300, 400, 500, 600, 700, 800),
        stable_in_a_row=3,
        reverts=2,
        checks=10,
    )


ONE, STRONG = AgentState(("clip", "ict")), AgentState(("ict", "hp"))
STAGNANT = Verdict(False, stagnant=True)


@pytest.mark.parametrize(
    ("state", "verdict", "action", "strategy", "active", "reason"),
    [
        (ONE, Verdict(True, "clip"), "remove", "offline", ("ict",), "breakdown by 'clip'"),
        (replace(ONE, strategy="online"), Verdict(True, "clip"), "remove", "offline", ("ict",), "breakdown by 'clip'"),
        (ONE, Verdict(True, "ict"), "revert", "offline", ("clip", "ict"), "it is strong"),
        (ONE, Verdict(True, "nobody"), "revert", "offline", ("clip", "ict"), "it is not active"),
        (replace(ONE, strategy="online"), BAD, "revert", "offline", ("clip", "ict"), "an unknown reward"),
        (ONE, STAGNANT, "continue", "offline", ("clip", "ict"), "no breakdown"),
        (STRONG, GOOD, "continue", "offline", ("ict", "hp"), "no breakdown"),
        (STRONG, STAGNANT, "switch", "online", ("ict", "hp"), "no longer change"),
        (replace(STRONG, strategy="online"), STAGNANT, "continue", "online", ("ict", "hp"), "no breakdown"),
        (AgentState(("clip",)), Verdict(True, "clip"), "stop", "offline", ("clip",), "no reward would be left"),
    ],
)
def test_each_row_of_the_table(state, verdict, action, strategy, active, reason):
    decision = transition(state, 100, verdict, weak=("clip",))
    assert (decision.action, decision.strategy, decision.state.active) == (action, strategy, active)
    assert decision.state.strategy == strategy
    assert reason in decision.reason


def test_a_strong_reward_is_removed_by_force_alone():
    assert transition(ONE, 100, Verdict(True, "ict"), weak=("clip",), force=True).state.active == ("clip",)


def test_weak_rewards_keep_a_run_offline_however_long_it_is_stable():
    agent = DecisionAgent(ScriptedJudge([STAGNANT] * 20), weak=("clip",))
    assert {d.action for d in run(agent, agent.start(("clip", "ict")), 20)} == {"continue"}


def test_a_revert_starts_the_count_of_stable_checks_again():
    agent = DecisionAgent(ScriptedJudge([GOOD, GOOD, BAD]), n_stable=3)
    decisions = run(agent, agent.start(("ict",)), 6)
    assert [(d.step, d.action) for d in decisions] == [
        (100, "continue"), (200, "continue"), (300, "revert"), (300, "continue"), (400, "continue"), (500, "switch"),
    ]  # fmt: skip


def test_an_online_run_goes_back_to_offline_and_may_return():
    agent = DecisionAgent(ScriptedJudge([STAGNANT, BAD, STAGNANT]))
    decisions = run(agent, agent.start(("ict",)), 3)
    assert [(d.action, d.strategy) for d in decisions] == [
        ("switch", "online"), ("revert", "offline"), ("switch", "online"),
    ]  # fmt: skip


def test_after_max_reverts_the_run_stops_and_nothing_more_is_decided():
    agent = DecisionAgent(ScriptedJudge([GOOD, *[BAD] * 9]), max_reverts=2)
    decisions = run(agent, agent.start(PAPER), 10)
    assert [d.action for d in decisions] == ["continue", "revert", "revert", "stop"]
    assert decisions[-1].revert_to == 100
    with pytest.raises(ConfigError, match="has ended this run"):
        agent.apply(decisions[-1].state, 200, GOOD)


def test_a_removed_reward_is_not_removed_again():
    agent = DecisionAgent(ScriptedJudge([Verdict(True, "hps")] * 2), weak=WEAK)
    assert [d.action for d in run(agent, agent.start(PAPER), 2)] == ["remove", "revert"]


VERDICTS = st.builds(
    Verdict,
    st.booleans(),
    st.sampled_from([None, *PAPER, "nobody"]),
    stagnant=st.booleans(),
    analysis=st.text(max_size=5),
)
SCRIPTS = st.lists(VERDICTS, max_size=40)
SETTINGS = st.fixed_dictionaries(
    {
        "weak": st.sets(st.sampled_from(PAPER)),
        "interval": st.integers(1, 200),
        "n_stable": st.integers(1, 5),
        "max_reverts": st.integers(0, 10),
        "force": st.booleans(),
    }
)
STARTS = st.sets(st.sampled_from(PAPER), min_size=1).map(lambda names: tuple(sorted(names)))


def started(script: list[Verdict], chosen: dict, rewards: tuple[str, ...]) -> tuple[DecisionAgent, AgentState]:
    weak = tuple(name for name in rewards if name in chosen["weak"])
    agent = DecisionAgent(ScriptedJudge(script), **{**chosen, "weak": weak})
    return agent, agent.start(rewards)


@settings(max_examples=100, deadline=None)
@given(SCRIPTS, SETTINGS, STARTS)
def test_under_any_verdicts_the_promises_hold(script: list[Verdict], chosen: dict, rewards: tuple[str, ...]):
    agent, state = started(script, chosen, rewards)
    passed = {0}
    for decision in run(agent, state, 40):
        after = decision.state
        assert after.active
        assert set(after.active) <= set(state.active)
        assert len(state.active) - len(after.active) == (decision.action == "remove")
        assert set(after.active) | set(after.removed) == set(rewards)
        if decision.action in ("remove", "revert", "stop"):
            assert decision.revert_to == max(step for step in passed if step < decision.step) == after.step
            assert after.strategy == decision.strategy
        else:
            passed.add(decision.step)
            assert decision.revert_to is None
            assert after.step == decision.step
        if decision.action == "switch":
            assert not set(after.active) & set(agent.weak)
        if decision.action == "remove":
            assert agent.force or decision.reward in agent.weak
        assert (after.strategy == "online") <= (state.strategy == "online" or decision.action == "switch")
        assert after.reverts <= agent.max_reverts
        assert after.stopped == (decision.action == "stop")
        state = after
    assert len(state.removed) == len(set(state.removed))


@settings(max_examples=60, deadline=None)
@given(SCRIPTS, SETTINGS, STARTS, st.integers(0, 40))
def test_a_run_resumed_from_json_at_any_check_makes_the_same_decisions(script, chosen, rewards, at):
    agent, state = started(script, chosen, rewards)
    whole = run(agent, state, 40)
    first = run(agent, state, min(at, 40))
    saved = (first[-1].state if first else state).to_json()
    assert "\n" not in saved
    assert first + run(agent, AgentState.from_json(saved), 40 - len(first)) == whole


STATE = AgentState(("ict",), "online", 300, (Removal(200, "hps", 100),), (0, 100, 300), 1, 2, 4)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=3),
    st.lists(st.text(max_size=3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(json.loads(STATE.to_json()))), JUNK)
def test_a_state_with_a_wrong_value_is_refused_or_whole(name: str, junk: object):
    text = json.dumps({**json.loads(STATE.to_json()), name: junk})
    try:
        state = AgentState.from_json(text)
    except CheckpointError:
        return
    assert json.loads(state.to_json()) == json.loads(text)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[" * 100_000, "cannot be read"),
        (lambda text: "[]", "its format is not 1"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "its format is not 1"),
        (lambda text: text.replace('"step": 300,', ""), "its fields are not"),
        (lambda text: text.replace('"step": 300', '"step": 200'), "ascend from 0 to step 200"),
        (lambda text: text.replace("[0, 100, 300]", "[0, 300.0]"), "stable has another form"),
        (lambda text: text.replace('"reverts": 2', '"reverts": 5'), "counts say otherwise"),
        (lambda text: text.replace('"reward": "hps"', '"reward": "ict"'), "each once"),
    ],
)
def test_a_damaged_state_is_refused_in_one_sentence(damage: Callable[[str], str], sentence: str):
    with pytest.raises(CheckpointError, match=sentence) as raised:
        AgentState.from_json(damage(STATE.to_json()))
    assert "\n" not in str(raised.value)


def test_the_audit_log_has_one_line_a_decision_that_says_it_all():
    decision = transition(AgentState(PAPER), 200, Verdict(True, "hps", 0.9, "stripes\nand\u2028more"), weak=WEAK)
    line = audit_line(decision, raw="Action:\r\n[Remove hps]")
    assert len(line.splitlines()) == 1
    record = json.loads(line)
    assert (record["action"], record["step"], record["reward"], record["revert_to"]) == ("remove", 200, "hps", 0)
    assert record["verdict"] == {
        "breakdown": True, "reward": "hps", "confidence": 0.9, "analysis": "stripes\nand\u2028more", "stagnant": False,
    }  # fmt: skip
    assert record["raw"] == "Action:\r\n[Remove hps]"
    assert AgentState.from_json(json.dumps({"format": record["format"], **record["state"]})) == decision.state


def test_checks_are_due_at_multiples_of_the_interval_but_not_before_training():
    assert [step for step in range(301) if DecisionAgent(ScriptedJudge([])).due(step)] == [100, 200, 300]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: DecisionAgent(ScriptedJudge([]), interval=0), "interval and n_stable are at least 1"),
        (lambda: DecisionAgent(ScriptedJudge([]), weak=("hps",)).start(("ict",)), r"\['hps'\] are no rewards"),
        (lambda: DecisionAgent(ScriptedJudge([])).start(()), "one is active"),
        (lambda: AgentState(("ict", "ict")), "each once"),
        (lambda: transition(AgentState(("ict",), step=100, stable=(0, 100)), 100, GOOD), "later than that; got 100"),
        (lambda: Verdict(True, confidence=1.5), r"confidence is in \[0, 1\]; got 1.5"),
        (lambda: DecisionAgent(lambda context: "fine").decide(STRONG, Context(100, ("ict",))), "got str"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], object], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        call()
