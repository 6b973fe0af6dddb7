"""Judges without a model: a script, for tests and replays, and a person at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOBase

from rsaft.pareto.context import GOLD, Context, JudgeError, Verdict

SOUND = Verdict(breakdown=False)


@dataclass(frozen=True)
class ScriptedJudge:
    """Verdicts written in advance.

    A sequence is read check by check, those before a revert counted, and a resumed run goes on where it was. A mapping
    is read by step: `{200: Verdict(True, "hps")}` holds as long as the reward is in training, so the check at step 200
    passes once it was removed. Where the script says nothing, the check passes.
    """

    verdicts: Sequence[Verdict] | Mapping[int, Verdict]

    def __call__(self, context: Context) -> Verdict:
        if isinstance(self.verdicts, Mapping):
            found = self.verdicts.get(context.step, SOUND)
            return SOUND if found.reward in context.removed else found
        return self.verdicts[context.check] if context.check < len(self.verdicts) else SOUND


@dataclass(frozen=True)
class HumanJudge:
    """Asks a person at the terminal, who looks at the pictures named there. Waits as long as it takes.

    Answers: `c` passes the check; `s` passes it and says that the images no longer change; `r NAME` is a breakdown by
    that reward; `b` is one whose cause is not known. Anything else is asked again.
    """

    tries: int = 5  # answers that cannot be read, before it gives up
    # Streams to ask through; by default the terminal: standard input, and standard error for the question.
    source: TextIOBase | None = field(default=None, repr=False, compare=False)
    sink: TextIOBase | None = field(default=None, repr=False, compare=False)

    def __call__(self, context: Context) -> Verdict:
        """The person's verdict.

        Raises:
            JudgeError: if standard input is no terminal, ends, or gives no answer that can be read.
        """
        source, sink = self.source or sys.stdin, self.sink or sys.stderr
        if self.source is None and (source is None or not source.isatty()):
            raise JudgeError(
                "the human judge: it asks a person, and standard input is no terminal; run in a terminal, or choose "
                "another judge."
            )
        sink.write(question(context))
        for _ in range(self.tries):
            sink.write("c | s | r NAME | b > ")
            sink.flush()
            line = source.readline()
            if not line:
                raise JudgeError("the human judge: the input ended before an answer; run in a terminal.")
            verdict = answered(line, context.active)
            if not isinstance(verdict, str):
                return verdict
            sink.write(f"{verdict}\n")
        raise JudgeError(f"the human judge: no answer in {self.tries} tries; c, s, r NAME or b is asked for.")


def answered(line: str, active: Sequence[str]) -> Verdict | str:
    """The verdict of an answer, or what is wrong with it in one sentence."""
    match line.split():
        case ["c"]:
            return Verdict(False, analysis="a person: continue")
        case ["s"]:
            return Verdict(False, analysis="a person: continue, no more change", stagnant=True)
        case ["b"]:
            return Verdict(True, analysis="a person: breakdown, cause unknown")
        case ["r", name] if name in active:
            return Verdict(True, name, analysis=f"a person: breakdown by {name}")
        case ["r", *names]:
            return f"r is followed by one of {', '.join(active)}; got '{' '.join(names)}'."
    return f"c, s, r NAME or b is asked for; got '{line.strip()[:40]}'."


def question(context: Context) -> str:
    """What a person is shown before the answer: where to look, and the mean of each score beside the base's."""
    removed = f"; removed: {', '.join(context.removed)}" if context.removed else ""
    lines = [
        f"Step {context.step}, {context.strategy}. Trained on: {', '.join(context.active)}{removed}.",
        f"Images now: {context.grid or 'not saved'}",
        f"Images of the untuned model: {context.base_grid or 'not saved'}",
    ]
    scores = {key: values for key, values in context.scores.items() if key != GOLD}
    if scores:
        lines.append(f"{'mean':<28}{'base':>12}{'now':>12}")
    for key, values in scores.items():
        base = context.base_scores.get(key)
        shown = "" if base is None else f"{float(base.double().nanmean()):.4f}"
        lines.append(f"{key:<28}{shown:>12}{float(values.double().nanmean()):>12.4f}")
    return "\n".join([*lines, "Have the images broken down since the last check?", ""])
