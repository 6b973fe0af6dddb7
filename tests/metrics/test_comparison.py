"""Groups of runs with known curves: what is paired with what, what is matched, and what is said to be missing."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.metrics.comparability import refuse_incomparable
from rsaft.metrics.comparison import JCR, JDR, S1, TIES, TRAIN, UPDATE, Comparison, Group, Row, compare, pearson
from rsaft.metrics.comparison_page import as_json, charts, html, markdown, verdicts
from rsaft.metrics.figures import NUM_SLOTS
from rsaft.metrics.paired import compared
from rsaft.metrics.records import GOLD, Run

N = 8  # samples of an evaluation
STEPS = (0, 10, 20)
CONFIG = {"train": {"eval_seed": 7}, "algorithm": {"sampling": {"num_steps": 4, "guidance": 1.0}}}


def run(
    name: str,
    *,
    train: tuple[float, ...] = (0.0, 1.0, 2.0),
    gold: tuple[float, ...] = (0.4, 0.6, 0.3),
    vit: tuple[float, ...] = (0.0, 0.5, 0.7),
    sharp: tuple[float, ...] | None = (3.0, 2.0, 3.5),
    steps: tuple[int, ...] = STEPS,
    config: dict[str, Any] | None = None,
    has_samples: bool = True,
) -> Run:
    """Sample i of N is the mean plus i, in every score, so an evaluation moves all samples alike."""
    columns = {"reward/proxy": train, GOLD: gold, "held_out/vit": vit}
    if sharp is not None:
        columns["sharpness/proxy"] = sharp
    evals = [{"step": s} | {key: values[k] for key, values in columns.items()} for k, s in enumerate(steps)]
    samples = {
        s: {
            "prompts": [f"prompt {i}" for i in range(N)],
            "sample_ids": list(range(N)),
            "scores": {key: [values[k] + i for i in range(N)] for key, values in columns.items()},
        }
        for k, s in enumerate(steps)
    }
    return Run(Path(name), name, (), tuple(evals), samples if has_samples else {}, {}, config or CONFIG, {})


@pytest.fixture(scope="module")
def page(two: Comparison) -> str:
    return html(two)


def row(found: Comparison, place: str, group: str) -> Row:
    return next(r for r in found.rows if (r.place, r.group) == (place, group))


@pytest.fixture(scope="module")
def two() -> Comparison:
    """`b` is slower by half, and its gold is higher by 0.1 and 0.3 at update 20 in the seeds that both have."""
    plain = {s: run(f"a{s}", gold=(0.4, 0.6, 0.3 + 0.1 * s)) for s in (0, 1)}
    better = {s: run(f"b{s}", train=(0.0, 0.5, 1.0), gold=(0.4, 0.5, 0.4 + 0.3 * s)) for s in (0, 1)}
    return compare([Group("a", plain), Group("b", better | {9: run("b9", gold=(9.0, 9.0, 9.0))})])


def test_a_difference_is_over_the_seeds_that_both_have(two: Comparison):
    gold = row(two, "update 20", "b").scores[GOLD]
    assert gold.seeds == (0, 1)
    assert gold.values == {0: pytest.approx(0.4), 1: pytest.approx(0.7), 9: 9.0}
    assert gold.difference == pytest.approx((0.2, 0.1, 0.3))  # of two seeds, the interval is their range
    assert any("share the seeds [0, 1]" in note for note in two.notes)


def test_at_a_train_reward_a_run_is_read_where_it_first_reaches_it(two: Comparison):
    level = next(r.place for r in two.rows if r.axis == TRAIN)
    reward = float(level.split()[-1])
    a, b = (row(two, level, group).scores for group in "ab")
    assert a[UPDATE].values[0] == pytest.approx(10 * reward)
    assert b[UPDATE].values[0] == pytest.approx(20 * reward)
    assert a[TRAIN].values[0] == pytest.approx(reward)


def test_levels_are_reached_by_every_run(two: Comparison):
    levels = [float(r.place.split()[-1]) for r in two.rows if r.axis == TRAIN and r.group == "a"]
    assert levels
    assert all(0 < level <= 1.0 for level in levels)
    assert all(len(score.values) == score.runs for r in two.rows for score in r.scores.values())


def test_domination_is_against_the_run_before_any_update():
    up = compare([Group("up", {0: run("up", gold=(0.4, 0.5, 0.3), vit=(0.0, 0.5, -1.0))})])
    assert up.curves["up"][0][JDR] == [0.0, 1.0, 0.0]
    assert up.curves["up"][0][JCR] == [0.0, 0.0, 1.0]
    assert up.curves["up"][0][TIES] == [1.0, 0.0, 0.0]
    mixed = compare([Group("mixed", {0: run("mixed", gold=(0.4, 0.5, 0.4), vit=(0.0, -0.5, 0.7))})])
    assert mixed.curves["mixed"][0][JDR] == [0.0, 0.0, 0.0]
    assert mixed.curves["mixed"][0][TIES] == [1.0, 0.0, 1.0]


def test_a_sample_whose_score_is_not_finite_is_in_no_rate():
    odd = run("odd")
    odd.samples[10]["scores"][GOLD][0] = None
    odd.samples[10]["scores"][GOLD][1] = -5.0
    found = compare([Group("odd", {0: odd})]).curves["odd"][0]
    assert found[JDR][1] == pytest.approx(6 / 7)


def test_equal_groups_differ_by_nothing():
    found = compare([Group(name, {s: run(f"{name}{s}") for s in range(3)}) for name in ("a", "b")])
    for r in found.rows:
        if r.group == "b":
            assert all(score.difference == (0.0, 0.0, 0.0) for score in r.scores.values())


def test_intervals_over_twelve_seeds_cover_the_true_difference():
    generator = torch.Generator().manual_seed(0)
    trials, covered = 150, 0
    for _ in range(trials):
        base = torch.randn(12, generator=generator, dtype=torch.float64)
        other = base + 0.3 + 0.5 * torch.randn(12, generator=generator, dtype=torch.float64)
        difference = compared(dict(enumerate(other.tolist())), dict(enumerate(base.tolist()))).difference
        assert difference is not None
        covered += difference[1] <= 0.3 <= difference[2]
    assert 0.86 <= covered / trials <= 0.99  # 95 % nominal; the bootstrap of 12 is a little narrow


def test_pearson_is_exact_on_lines_and_refuses_to_guess():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([0, 1, 0, 1], [0, 0, 1, 1]) == pytest.approx(0)
    assert pearson([1, 2, math.nan, 3], [2, 4, 100, 6]) == pytest.approx(1)
    assert pearson([1, 2], [2, 4]) is None
    assert pearson([1, 1, 1], [1, 2, 3]) is None


def test_the_correlation_is_within_runs_and_over_all_of_them():
    """Two runs, each with gold falling in S1, one of them higher in both: within -1, pooled above it."""
    low, high = run("low", sharp=(1, 2, 3), gold=(3, 2, 1)), run("high", sharp=(11, 12, 13), gold=(13, 12, 11))
    found = compare([Group("a", {0: low, 1: high})]).sharpness["a"][GOLD]
    assert found.runs == {0: pytest.approx(-1), 1: pytest.approx(-1)}
    assert found.mean == pytest.approx(-1)
    assert found.pooled is not None
    assert found.pooled > 0.9
    assert found.checkpoints == 6


def test_what_is_missing_is_one_sentence_and_no_column():
    bare = run("bare", sharp=None, has_samples=False)
    found = compare([Group("a", {0: bare})])
    assert not {S1, JDR, JCR} & set(found.columns)
    assert sum("No S1 of bare: train.sharpness_rho was not set." in note for note in found.notes) == 1
    assert sum(note.startswith("No JDR and JCR of bare") for note in found.notes) == 1
    assert "JDR" not in markdown(found).partition("No JDR")[0]


def test_one_run_without_samples_leaves_the_others_their_rates():
    found = compare([Group("a", {0: run("a0"), 1: run("a1", has_samples=False)})])
    assert row(found, "update 20", "a").scores[JDR].values == {0: 0.0}
    assert "(1 of 2)" in markdown(found)


def test_runs_on_different_rewards_are_matched_by_update_only():
    other = run("b")
    evals = tuple({k.replace("reward/proxy", "reward/other"): v for k, v in e.items()} for e in other.evals)
    found = compare([Group("a", {0: run("a")}), Group("b", {0: replace(other, evals=evals)})])
    first = charts(found)[0]
    assert (first["label"], first["note"]) == ("train reward", "not the same reward in all runs")
    assert all(r.axis == UPDATE for r in found.rows)
    assert any("different rewards" in note for note in found.notes)


def test_a_missing_value_at_an_update_is_not_filled_in():
    found = compare([Group("a", {0: run("a", gold=(0.4, math.nan, 0.3))})])
    assert row(found, "update 10", "a").scores[GOLD].values == {}


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (run("b", config={"train": {"eval_seed": 8}}), "train.eval_seed is 7 in a and 8 in b"),
        (run("b", config={"algorithm": {"sampling": {"guidance": 5.0}}}), "guidance is 1.0 in a and 5.0 in b"),
        (Run(Path("b"), "b", (), (), {}, {}, CONFIG, {}), "b has no evaluation yet"),
    ],
)
def test_another_evaluation_is_refused(other: Run, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        refuse_incomparable([run("a"), other])


@pytest.mark.parametrize("what", ["prompts", "sample_ids"])
def test_other_samples_are_refused(what: str):
    other = run("b")
    for sample in other.samples.values():
        sample[what] = sample[what][::-1]
    with pytest.raises(ConfigError, match=f"b was evaluated on other {what.replace('_', ' ')} than a"):
        refuse_incomparable([run("a"), other])


def test_without_settings_the_scores_before_any_update_say_whether_noises_are_the_same():
    def bare(name: str, start: float) -> Run:
        whole = run(name, train=(start, 1.0, 2.0))
        return Run(whole.path, name, (), whole.evals, whole.samples, {}, {}, {})

    refuse_incomparable([bare("a", 0.0), bare("b", 1e-4)])  # another machine's rounding
    with pytest.raises(ConfigError, match="before any update b has other scores of 'reward/proxy' than a"):
        refuse_incomparable([bare("a", 0.0), bare("b", 0.5)])


def test_runs_without_a_common_evaluation_are_refused():
    with pytest.raises(ConfigError, match=r"no evaluation after the start in common \(a at 0, 10, 20; b at 0, 7, 14\)"):
        compare([Group("a", {0: run("a")}), Group("b", {0: run("b", steps=(0, 7, 14))})])


def test_the_page_and_the_numbers_say_the_same(two: Comparison, page: str):
    text, numbers = markdown(two), as_json(two)
    assert "0.350 +- 0.050" in text  # gold of a at update 20: 0.3 and 0.4
    assert "(+0.200 [+0.100, +0.300], n=2)" in text
    assert "(+0.200 [+0.100, +0.300], n=2)" in page
    entry = next(r for r in numbers["rows"] if (r["at"], r["group"]) == ("update 20", "b"))
    assert entry["scores"][GOLD]["difference"] == pytest.approx((0.2, 0.1, 0.3))
    assert numbers["curves"]["a"][0][GOLD] == [0.4, 0.6, 0.3]


def drawn(page: str, name: str, slot: int) -> int:
    """Lines of a colour in one chart of the page."""
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    (svg,) = [svg for svg in svgs if f'aria-label="{name}"' in svg]
    return len(re.findall(rf"fill: none; stroke: var\(--run-{slot}\); stroke-width: 2[;\"]", svg))


def test_each_run_is_a_line_in_the_colour_of_its_group(page: str):
    assert "Hacking gauge" not in page  # none of them had one
    assert "update 20<" not in page.partition("</svg>")[0].partition("<svg")[2]  # nobody could tell whose end it is
    for name in ("gold against train reward", "train reward against update", "gold against update"):
        assert [drawn(page, name, slot) for slot in range(3)] == [2, 3, 0]


def test_without_a_common_gold_the_plane_shows_the_mean_of_common_held_out_rewards():
    other = run("other")
    evals = tuple({k: v for k, v in e.items() if k != GOLD} for e in other.evals)
    found = compare([Group("a", {0: run("a")}), Group("b", {0: replace(other, evals=evals)})])
    drawings = charts(found)
    assert "update 20<" in drawings[0]["svg"]  # each line has its own colour
    lines = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--run-\d\); stroke-width: 2[;"]', drawings[0]["svg"])
    assert len(lines) == 2
    assert len(set(lines)) == 1  # both have the same curve of vit, and only one has gold
    assert [chart["label"] for chart in drawings] == [
        "mean held-out reward against train reward",
        "train reward",
        "vit",
    ]


def test_the_gauge_has_a_line_for_each_run_that_had_one_and_names_are_escaped(two: Comparison):
    gauge = [{"gauge/keep_step": s, "gauge/alarm": a} for s, a in ((0, 0), (10, 0), (10, 1))]
    hacked = run("a0")
    evals = tuple(record | more for record, more in zip(hacked.evals, gauge, strict=True))
    found = compare([Group("<script>x</script>", {1: run("a1"), 0: replace(hacked, evals=evals)})])
    assert verdicts(found) == ["<script>x</script>, seed 0: keep the weights of update 10; alarm at update 20"]
    page = html(found)
    assert "&lt;script&gt;x&lt;/script&gt;, seed 0: keep the weights of update 10; alarm at update 20</li>" in page
    assert "<script>" not in page
    assert verdicts(two) == []


def test_groups_beyond_the_colours_take_them_again():
    found = compare([Group(f"g{i}", {0: run(f"r{i}", gold=(0.4, 0.5, 0.1 * i))}) for i in range(NUM_SLOTS + 1)])
    page = html(found)
    assert f'<span class="key run-0"></span>g{NUM_SLOTS}' in page
    assert f"run-{NUM_SLOTS}" not in page
    assert [drawn(page, "vit against update", slot) for slot in (0, 1)] == [2, 1]
