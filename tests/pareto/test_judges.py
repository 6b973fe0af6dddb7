"""Judges that ask nobody outside: a script, a person at a terminal, statistics, and a classifier of collapses."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.pareto import Context, HumanJudge, ScriptedJudge, Verdict
from rsaft.pareto.context import JudgeError
from tests.pareto.contexts import scored

IMAGES = torch.zeros(3, 3, 4, 4)
HERE = Context(200, ("clip", "hps"), removed=("hp",), grid=Path("samples/200.png"))


def answer(text: str, context: Context = HERE, tries: int = 5) -> tuple[Verdict, str]:
    shown = io.StringIO()
    return HumanJudge(tries, io.StringIO(text), shown)(context), shown.getvalue()


def test_a_script_in_sequence_counts_checks_and_ends_in_passes():
    judge = ScriptedJudge([Verdict(False), Verdict(True, "hps")])
    assert [judge(replace(HERE, check=i)).breakdown for i in range(4)] == [False, True, False, False]


def test_a_script_by_step_holds_until_its_reward_is_removed():
    judge = ScriptedJudge({200: Verdict(True, "hps"), 300: Verdict(True)})
    assert judge(HERE).reward == "hps"
    assert not judge(replace(HERE, removed=("hp", "hps"))).breakdown
    assert judge(replace(HERE, step=300)).breakdown
    assert not judge(replace(HERE, step=400)).breakdown


@pytest.mark.parametrize(
    ("text", "breakdown", "reward", "stagnant"),
    [
        ("c\n", False, None, False),
        ("  s \n", False, None, True),
        ("b\n", True, None, False),
        ("r hps\n", True, "hps", False),
        ("r   clip", True, "clip", False),
    ],
)
def test_a_persons_answer_is_the_verdict(text: str, breakdown: bool, reward: str | None, stagnant: bool):
    verdict, _ = answer(text)
    assert (verdict.breakdown, verdict.reward, verdict.stagnant) == (breakdown, reward, stagnant)


@pytest.mark.parametrize(
    "text", ["r hp", "r", "r clip hps", "C", "cc", "c now", "continue", "", "remove clip", "r CLIP"]
)
def test_an_answer_of_another_form_is_asked_again(text: str):
    verdict, shown = answer(f"{text}\nr hps\n")
    assert verdict.reward == "hps"
    assert shown.count("c | s | r NAME | b > ") == 2


def test_a_person_is_shown_where_to_look_and_the_means_beside_the_bases():
    context = replace(scored({"reward/hps": 3.0, "held_out/gold": 0.0}, n=4), step=200, grid=Path("samples/200.png"))
    _, shown = answer("c\n", context)
    assert "Step 200, offline." in shown
    assert "gold" not in shown
    assert "Images now: samples/200.png" in shown
    assert "Images of the untuned model: not saved" in shown
    assert f"reward/hps{'':<18}{float(context.base_scores['reward/hps'].mean()):>12.4f}" in shown
    assert f"{float(context.scores['reward/hps'].mean()):>12.4f}" in shown


@pytest.mark.parametrize(("text", "sentence"), [("", "the input ended"), ("x\n" * 9, "no answer in 3 tries")])
def test_without_an_answer_there_is_no_verdict(text: str, sentence: str):
    with pytest.raises(JudgeError, match=sentence):
        answer(text, tries=3)


ASK = (
    "from rsaft.errors import RsaftError\n"
    "from rsaft.pareto import Context, HumanJudge\n"
    "try:\n    print(HumanJudge()(Context(200, ('clip', 'hps'))).reward)\n"
    "except RsaftError as error:\n    print(error)\n"
)


def test_standard_input_that_is_no_terminal_is_refused_in_one_sentence():
    done = subprocess.run([sys.executable, "-c", ASK], input="r hps\n", capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("the human judge: it asks a person, and standard input is no terminal;")
    assert len(done.stdout.splitlines()) == 1


def test_at_a_real_terminal_a_person_is_asked():
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"what?\nr hps\n")
        done = subprocess.run([sys.executable, "-c", ASK], stdin=theirs, capture_output=True, text=True, timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout == "hps\n"
    assert "got 'what?'" in done.stderr


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: scored({"reward/hps": 0.0}, n=4, prompts=("a",) * 3), "'scores of reward/hps': 4"),
        (lambda: Context(100, ("a",), prompts=("a",) * 2, images=IMAGES), "'images': 3"),
        (lambda: Context(100, ("a",), prompts=("a",) * 3, images=IMAGES), r"\(3, 3, 4, 4\), \(0, 3, 1, 1\)"),
    ],
)
def test_a_context_whose_parts_do_not_fit_is_refused(make: Callable[[], Context], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make()
