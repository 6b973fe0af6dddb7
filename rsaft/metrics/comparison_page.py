"""A comparison as Markdown, as one HTML page and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rsaft.metrics.comparison import JDR, TRAIN, UPDATE, Comparison, Correlation, Row, have_one_train_reward
from rsaft.metrics.figures import NUM_SLOTS, Line, chart, reward_plane
from rsaft.metrics.gauge_panel import verdict
from rsaft.metrics.pages import templates
from rsaft.metrics.records import GOLD, differing, number, truth
from rsaft.metrics.sample_tiles import sample_table

Table = list[list[str]]  # the first row is the head

READING = (
    "Mean over the group's runs; +- is its standard error over seeds. In brackets: the mean difference to the first "
    "group over the n seeds that both have, with its 95 % bootstrap interval over seeds (percentile below 10 seeds, "
    "where it is too narrow; with 2 it is their range).",
    "At a train reward, each run is read where it first reaches it, between two evaluations; update says when. S1 is "
    "the train reward's drop at the worst point nearby, on average. JDR and JCR: the share of samples that beat the "
    "untuned model, or lose to it, on {held_out} at once, same prompt and noise; {chance:.3g} each by chance, if the "
    "rewards were independent.",
)


def tables(found: Comparison) -> dict[str, Table]:
    """The scores, and S1's correlations, by caption."""
    titles = [_title(key) for key in found.columns]
    decimals = {key: _decimals(found.rows, key) for key in found.columns}
    rows = [[row.place, row.group, *(_cell(row, key, decimals[key]) for key in found.columns)] for row in found.rows]
    result = {"Scores at the same place": [["at", "group", *titles], *rows]}
    if found.sharpness:
        held_out = list(next(iter(found.sharpness.values())))
        result["Correlation of S1 with held-out rewards over evaluations"] = [
            ["group", "evaluations", *map(_title, held_out)],
            *(
                [name, str(next(iter(by.values())).checkpoints), *(_pearson(by[key]) for key in held_out)]
                for name, by in found.sharpness.items()
                if by
            ),
        ]
    return {caption: table for caption, table in result.items() if len(table[0]) > 2}


def notes(found: Comparison) -> list[str]:
    """How to read the tables, and what could not be compared."""
    num = sum(key.startswith("held_out/") for key in found.columns)
    texts = [text.format(held_out=f"all {num} held-out rewards", chance=0.5**num) for text in READING]
    if JDR not in found.columns:
        texts[1] = texts[1].partition(" JDR and JCR:")[0]
    if found.sharpness:
        texts.append(
            "Correlations are Pearson's r within a run, averaged over runs (in brackets: over all evaluations of the "
            "group). The evaluations of a run depend on each other, and everything moves with the updates, so there is "
            "no p-value."
        )
    return [*texts, *found.notes]


def markdown(found: Comparison) -> str:
    """The page as text."""
    lines = ["# Comparison", "", *(f"- {g.name}: {_runs(list(g.runs))}" for g in found.groups)]
    for caption, table in tables(found).items():
        head, *rows = [f"| {' | '.join(row)} |" for row in table]
        lines += ["", f"## {caption}", "", head, "|" + "---|" * len(table[0]), *rows]
    return "\n".join([*lines, "", *(f"{text}\n" for text in notes(found))])


def html(found: Comparison) -> str:
    """The page, self-contained."""
    seeds = [min(g.runs) for g in found.groups]  # of the run that stands for its group
    chosen = [g.runs[seed] for g, seed in zip(found.groups, seeds, strict=True)]
    slots = [i % NUM_SLOTS for i, _ in enumerate(found.groups)]
    page = templates().get_template("compare.html")
    return page.render(
        groups=[
            {"name": g.name, "slot": slot, "runs": _runs(list(g.runs))}
            for g, slot in zip(found.groups, slots, strict=True)
        ],
        tables=tables(found),
        notes=notes(found),
        charts=charts(found),
        verdicts=verdicts(found),
        samples=sample_table(chosen),
        seeds=seeds,
        differing=[row for row in differing([run.config for run in chosen]) if row["key"] != "train.seed"],
    )


def charts(found: Comparison) -> list[dict[str, Any]]:
    """Truth against train reward, where all runs have the same; then train reward and held-out rewards by update.

    One line a run, in the colour of its group.
    """
    runs = [(slot, seed, run) for slot, g in enumerate(found.groups) for seed, run in sorted(g.runs.items())]
    held_out = [key for key in found.columns if key.startswith("held_out/")]
    everything = [run for _, _, run in runs]
    is_one_reward = have_one_train_reward(everything)
    result = []
    if is_one_reward:
        name = "gold" if GOLD in held_out else "mean held-out reward"
        truths = [truth(run, held_out) for run in everything]
        plane = reward_plane(everything, [slot for slot, _, _ in runs], truths, name)
        if plane:
            result.append({"label": f"{name} against train reward", "note": "higher: less hacking", "svg": plane})
    captions = {
        TRAIN: "" if is_one_reward else "not the same reward in all runs",
        **dict.fromkeys(held_out, "held out"),
    }
    curves = [(slot, found.curves[found.groups[slot].name][seed]) for slot, seed, _ in runs]
    for i, key in enumerate(key for key in found.columns if key in captions):
        lines = [Line(slot, columns[UPDATE], columns[key]) for slot, columns in curves]
        result.append(chart(f"chart-{i}", lines, _title(key), captions[key]))
    return result


def verdicts(found: Comparison) -> list[str]:
    """What the gauge says of each run that had one, by group and seed."""
    said = {f"{g.name}, seed {seed}": verdict(run) for g in found.groups for seed, run in sorted(g.runs.items())}
    return [f"{name}: {text}" for name, text in said.items() if text]


def as_json(found: Comparison) -> dict[str, Any]:
    """Every number: by place and group, the correlations, and the curves of each run."""
    return {
        "groups": [
            {"name": g.name, "runs": {str(seed): str(run.path) for seed, run in g.runs.items()}} for g in found.groups
        ],
        "rows": [
            {
                "at": row.place,
                "group": row.group,
                "scores": {key: asdict(score) | {"mean": score.mean} for key, score in row.scores.items()},
            }
            for row in found.rows
        ],
        "sharpness_correlation": {
            name: {key: asdict(r) | {"mean": r.mean} for key, r in by.items()} for name, by in found.sharpness.items()
        },
        "curves": found.curves,
        "notes": notes(found),
    }


def _cell(row: Row, key: str, decimals: int) -> str:
    """The score and its difference; where the place itself says the score, that alone."""
    score = row.scores[key]
    if key == row.axis and score.mean is not None:
        return f"{score.mean:.{decimals}f}"
    return score.shown(decimals=decimals, min_pairs=2)


def _title(key: str) -> str:
    return "gold" if key == GOLD else key.removeprefix("held_out/")


def _runs(seeds: list[int]) -> str:
    plural = "s" if len(seeds) > 1 else ""
    return f"{len(seeds)} run{plural}, seed{plural} {', '.join(map(str, sorted(seeds)))}"


def _decimals(rows: tuple[Row, ...], key: str) -> int:
    """Three decimals for scores about 1, more for smaller ones, fewer for larger ones, none for updates."""
    if key == UPDATE:
        return 0
    largest = max((abs(number(row.scores[key].mean)) for row in rows if row.scores[key].mean is not None), default=0.0)
    if largest == 0 or 0.1 <= largest < 10:
        return 3
    return min(6, max(0, 2 - math.floor(math.log10(largest))))


def _pearson(r: Correlation) -> str:
    texts = ["none" if value is None else f"{value:+.2f}" for value in (r.mean, r.pooled)]
    return f"{texts[0]} ({texts[1]})"
