"""StatsJudge sees a reward that others do not follow and names it, and passes honest learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats

from rsaft.errors import ConfigError
from rsaft.pareto import StatsJudge
from rsaft.pareto.stats_judge import (
    kendall_tau,
    largest_shift,
    least_confirmed,
    over_error,
    spike_ratio,
    spread_change,
    standardised_gains,
)
from tests.pareto.contexts import glaring, pictures, restyled, scored

HONEST = {"reward/hps": 1.0, "reward/clip": 0.9, "reward/ict": 0.8, "held_out/a": 0.6, "held_out/b": 0.4}
HACKED = {"reward/hps": 2.5, "reward/clip": 0.2, "reward/ict": 0.8, "held_out/a": -0.4, "held_out/b": -0.1}
SEEDS = range(50)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_that_held_out_rewards_do_not_follow_is_named(seed: int):
    verdict = StatsJudge()(scored(HACKED, seed=seed))
    assert (verdict.breakdown, verdict.reward) == (True, "hps")
    assert "held-out rewards do not follow" in verdict.analysis
    assert verdict.confidence > 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_honest_learning_passes(seed: int):
    assert not StatsJudge()(scored(HONEST, seed=seed)).breakdown


def test_a_model_that_has_not_changed_is_rarely_flagged():
    none = dict.fromkeys(HONEST, 0.0)
    flagged = sum(StatsJudge()(scored(none, seed=seed)).breakdown for seed in range(300))
    assert flagged <= 2  # a rise of three standard errors by chance, and a fall of the held-out mean as well


def test_where_no_reward_has_risen_a_breakdown_has_no_name():
    context = replace(scored(dict.fromkeys(HONEST, 0.0)), distances=DISTANCES, history=OPPOSED)
    verdict = StatsJudge()(context)
    assert (verdict.breakdown, verdict.reward, verdict.confidence) == (True, None, 0.0)


def test_the_verdict_depends_on_no_ones_units_nor_on_the_samples_order():
    context = scored(HACKED)
    verdict = StatsJudge()(context)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    moved = {
        name: {key: (3 * x - 7 if key == "reward/hps" else x)[order] for key, x in getattr(context, name).items()}
        for name in ("scores", "base_scores")
    }
    other = StatsJudge()(replace(context, prompts=tuple(context.prompts[i] for i in order), **moved))
    assert (other.reward, other.analysis) == (verdict.reward, verdict.analysis)
    assert other.confidence == pytest.approx(verdict.confidence, abs=1e-12)


def test_samples_that_are_not_finite_change_nothing_but_their_own_weight():
    context = scored(HACKED)
    kept = torch.arange(64) >= 6
    broken = {key: torch.where(kept, x, torch.nan) for key, x in context.scores.items() if key == "held_out/a"}
    rest = replace(
        context,
        prompts=context.prompts[6:],
        scores={key: x[kept] for key, x in context.scores.items()},
        base_scores={key: x[kept] for key, x in context.base_scores.items()},
    )
    gains, _ = standardised_gains(replace(context, scores={**context.scores, **broken}))
    expected, _ = standardised_gains(rest)
    for key, x in expected.items():
        deviations = rest.base_scores[key].std() / context.base_scores[key].std()
        torch.testing.assert_close(gains[key], x * deviations)
    assert StatsJudge()(replace(context, scores={**context.scores, **broken})).reward == "hps"


def test_gains_are_over_the_last_check_that_passed():
    context = scored(HACKED)
    assert not StatsJudge()(replace(context, passed_scores=context.scores)).breakdown


def test_the_testbeds_gold_is_not_looked_at():
    context = scored({**HONEST, "held_out/gold": -5.0})
    history = tuple((100 * t, {"reward/hps": 0.2 + 0.01 * t, "held_out/gold": 0.5 - 0.1 * t}) for t in range(4))
    assert StatsJudge(votes=1)(replace(context, history=history)).analysis == "no sign of a breakdown"


def test_a_removed_reward_and_a_constant_one_are_not_looked_at():
    context = scored({**HACKED, "reward/gone": 5.0, "reward/flat": 5.0})
    flat = {name: {**getattr(context, name), "reward/flat": torch.ones(64)} for name in ("scores", "base_scores")}
    gains, _ = standardised_gains(replace(context, active=("hps", "clip", "ict", "flat"), **flat))
    assert set(gains) == set(HACKED)


DISTANCES = ((0, 0.0), (100, 1.0), (200, 2.1), (300, 3.0), (400, 9.0))
OPPOSED = tuple(
    (100 * t, {"reward/hps": 0.2 + 0.01 * t, "held_out/a": 0.3 - 0.01 * t, "held_out/b": 0.3 - 0.01 * t})
    for t in range(4)
)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ({"distances": DISTANCES}, "the distance from the base jumps, 6.0 times"),
        ({"history": OPPOSED}, "hps goes up while held-out rewards go down"),
    ],
)
def test_one_weak_sign_is_reported_and_two_are_a_breakdown(what: dict, sentence: str):
    context = scored(HONEST)
    one = StatsJudge()(replace(context, **what))
    assert sentence in one.analysis
    assert not one.breakdown
    assert StatsJudge(votes=1)(replace(context, **what)).breakdown
    assert StatsJudge()(replace(context, distances=DISTANCES, history=OPPOSED)).breakdown


def test_a_collapse_of_the_scores_spread_is_one_sign_for_all_rewards():
    context = scored(HONEST)
    narrow = {key: x.mean() + 0.2 * (x - x.mean()) for key, x in context.scores.items()}
    analysis = StatsJudge()(replace(context, scores=narrow)).analysis
    assert analysis.count("the spread of") == 1


def test_images_that_moved_far_are_a_sign():
    base = pictures(64, seed=0)
    far = replace(scored(HONEST), base_images=base, images=glaring(base, 1, factor=4.0))
    assert "of the images moved by" in StatsJudge()(far).analysis
    near = replace(far, images=restyled(base, 1))
    assert "of the images moved by" not in StatsJudge()(near).analysis


def test_rewards_that_no_longer_rise_are_stagnant():
    curve = tuple((100 * t, {"reward/hps": 0.25, "reward/clip": 0.25, "reward/ict": 0.25}) for t in range(4))
    rising = tuple((step, {key: x + step / 1e5 for key, x in means.items()}) for step, means in curve)
    assert StatsJudge()(replace(scored(HONEST), history=curve)).stagnant
    assert not StatsJudge()(replace(scored(HONEST), history=rising)).stagnant
    assert not StatsJudge()(replace(scored(HONEST), history=curve[1:])).stagnant


# PG-OT, Table 9(c): a divergence at five checks; people saw the breakdown, by HPS, from the second on.
PAPERS_KL = {
    "ict": (5.9638, 13.8767, 5.9029, 8.0059, 9.6320),
    "clip": (5.5351, 19.4165, 4.9825, 13.1837, 18.0620),
    "hps": (9.1868, 19.9770, 5.3309, 13.0917, 19.5950),
    "hp": (4.8112, 14.1934, 6.2217, 11.0483, 11.3300),
}


@pytest.mark.parametrize("reward", PAPERS_KL)
def test_the_papers_spike_is_seen_for_every_reward_so_that_it_names_none(reward: str):
    judge = StatsJudge(spike=2.0, spike_of="level", votes=1)
    distances = tuple((100 * (i + 1), kl) for i, kl in enumerate(PAPERS_KL[reward]))
    context = scored(HONEST)
    assert not judge(replace(context, distances=distances[:1])).breakdown
    assert judge(replace(context, distances=distances[:2])).breakdown
    assert not judge(replace(context, distances=distances[:3])).breakdown


def test_steady_growth_is_no_spike():
    assert not StatsJudge(votes=1)(
        replace(scored(HONEST), distances=tuple((50 * t, 0.3 * t) for t in range(9)))
    ).breakdown
    assert spike_ratio([]) == spike_ratio([5.0]) == spike_ratio([0.0, 3.0]) == spike_ratio([1.0, math.nan]) == 0.0


def test_the_statistics_are_those_of_the_books():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    names = [str(i) for i in range(40)]
    assert over_error(x - y + 0.3, names) == pytest.approx(float(stats.ttest_rel(x + 0.3, y).statistic))
    # Pitman and Morgan: the t statistic of the correlation between sums and differences.
    ratio, t = spread_change(0.5 * x, y)
    r = float(stats.pearsonr(0.5 * x + y, 0.5 * x - y).statistic)
    assert t == pytest.approx(r * math.sqrt(38 / (1 - r * r)))
    assert ratio == pytest.approx(float(0.5 * x.std() / y.std()))
    values = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    assert kendall_tau(values) == pytest.approx(float(stats.kendalltau(range(6), values).statistic))
    assert kendall_tau([1.0, 1.0, 1.0]) == 0.0


def test_samples_of_one_prompt_count_as_one():
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert over_error(x.repeat_interleave(5), [p for p in "abc" for _ in range(5)]) == pytest.approx(
        over_error(x, ["a", "b", "c"])
    )
    assert over_error(x, ["a", "a", "a"]) == 0.0
    assert over_error(torch.ones(3), ["a", "b", "c"]) == math.inf


def test_of_two_that_rose_alike_the_one_that_rose_where_no_other_did_is_named():
    generator = torch.Generator().manual_seed(0)
    honest, own, *noise = torch.randn(6, 200, generator=generator, dtype=torch.float64)
    gains = {
        "a": 2 + honest + 0.3 * noise[0],
        "b": 2.1 + own + 0.3 * noise[1],
        "c": 0.5 + honest + 0.3 * noise[2],
        "d": 0.5 + honest + 0.3 * noise[3],
    }
    prompts = [str(i) for i in range(200)]
    rising = {name: gains[name] for name in "ab"}
    assert least_confirmed(rising, gains, prompts)[0] == "b"
    assert least_confirmed(rising, {**gains, "c": 0.5 + own, "d": 0.5 + own}, prompts)[0] == "a"


def test_a_rise_is_confirmed_by_the_correlation_with_all_others_and_its_lead_is_tested_over_prompts():
    gains = {"a": [1.0, 3.0, 2.0, 4.0], "b": [1.0, 1.5, 1.2, 2.0], "c": [0.0, 1.0, 1.0, 0.5]}
    columns = {name: torch.tensor(x, dtype=torch.float64) for name, x in gains.items()}
    prompts = ["p", "q", "r", "s"]
    a, b, c = columns.values()
    left = [1 - max(0.0, float(stats.pearsonr(x, y).statistic)) for x, y in ((a, b + c), (b, a + c))]
    lead = stats.ttest_rel(left[0] * a, left[1] * b).statistic
    name, confidence = least_confirmed({"a": a, "b": b}, columns, prompts)
    assert name == ("a" if lead > 0 else "b")
    assert confidence == pytest.approx(float(stats.norm.cdf(abs(lead))))
    assert least_confirmed({"b": b}, columns, prompts)[0] == "b"
    assert least_confirmed({}, columns, prompts) == (None, 0.0)


def test_the_largest_shift_is_cohens_d_of_the_statistic_that_moved_most():
    from rsaft.metrics import image_statistics

    base = pictures(32, seed=3)
    now = glaring(base, 4)
    name, d = largest_shift(now, base)
    x, y = (image_statistics(images)["saturation"].double() for images in (now, base))
    assert name == "saturation"
    assert d == pytest.approx(float((x.mean() - y.mean()) / ((x.var() + y.var()) / 2).sqrt()))
    assert largest_shift(torch.full((4, 3, 8, 8), 0.5), torch.full((4, 3, 8, 8), 0.25))[1] == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: StatsJudge(significance=0.0),
        lambda: StatsJudge(follow=1.0),
        lambda: StatsJudge(spread=0.0),
        lambda: StatsJudge(votes=0),
        lambda: StatsJudge(looks=2),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], StatsJudge]):
    with pytest.raises(ConfigError, match="significance, spike and shift are above 0"):
        make()
