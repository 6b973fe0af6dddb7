"""The gauge on evaluations whose story is known, and on broken ones."""

from __future__ import annotations

import math

import pytest
import torch

from rsaft.metrics import Evaluation, Gauge, HackingGauge, StopRule

PROMPTS = tuple(f"prompt {i}" for i in range(20))
EAGER = Gauge(rule=StopRule(significance=0.0, patience=1))


def evaluation(reward: float, held_out: float, **more: torch.Tensor) -> Evaluation:
    """Scores with these means over 20 prompts, and images that are brighter for a larger reward."""
    spread = torch.linspace(-1, 1, 20, dtype=torch.float64)
    scores = {"reward/proxy": spread + reward, "held_out/vit": spread.flip(0) + held_out} | more
    scores["held_out/gold"] = torch.full((20,), math.nan, dtype=torch.float64)  # whoever looks at it is lost
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.1 * reward
    return Evaluation(scores, images, PROMPTS, tuple(range(20)))


def watched(*looks: Evaluation, settings: Gauge = EAGER) -> HackingGauge:
    gauge = HackingGauge(settings)
    for t, look in enumerate(looks):
        gauge.look(10 * t, look)
    return gauge


FOLLOWED = [evaluation(g, 0.5 * g) for g in (0.0, 1.0, 2.0)]


def test_gains_are_in_deviations_of_the_base_and_gold_is_not_read():
    values = watched(*FOLLOWED).reading().values
    deviation = float(torch.linspace(-1, 1, 20).std())
    assert values["gauge/gain"] == pytest.approx(2 / deviation, rel=1e-6)
    assert values["gauge/gap"] == pytest.approx(0, abs=1e-9)
    assert values["gauge/jdr"] == 1
    assert values["gauge/jcr"] == 0
    assert values["gauge/drift"] == pytest.approx(0.2, rel=1e-3)
    assert values["gauge/keep_step"] == 20


def test_the_mean_of_several_train_rewards_is_taken_in_their_own_deviations():
    scale = {"reward/other": 100 * torch.linspace(-1, 1, 20, dtype=torch.float64)}
    looks = [evaluation(g, g, **{k: x + 100 * g for k, x in scale.items()}) for g in (0.0, 1.0)]
    one = watched(evaluation(0, 0), evaluation(1, 1)).reading().values["gauge/gain"]
    # The mean of two standardised rewards that always agree has their gain.
    assert watched(*looks).reading().values["gauge/gain"] == pytest.approx(one)


def test_a_reward_that_is_the_same_for_all_of_the_base_is_left_out():
    flat = [evaluation(g, 0.5 * g, **{"reward/flat": torch.full((20,), g).double()}) for g in (0.0, 1.0, 2.0)]
    mine, without = (watched(*looks).reading() for looks in (flat, FOLLOWED))
    assert mine.values == pytest.approx(without.values)


def test_an_evaluation_without_a_finite_score_leaves_the_verdict_as_it_was():
    nothing = Evaluation({}, torch.full((20, 3, 8, 8), torch.nan), PROMPTS, tuple(range(20)))
    half = evaluation(3.0, math.nan)
    for broken in (nothing, half):
        reading = watched(*FOLLOWED, broken).reading()
        assert (reading.step, reading.keep_step, reading.alarm) == (30, 20, False)
    after = watched(*FOLLOWED, nothing, evaluation(3.0, 1.5)).reading()
    assert after.keep_step == 40


def test_without_the_bases_evaluation_there_is_no_verdict():
    gauge = HackingGauge(EAGER)
    for step, look in ((10, FOLLOWED[1]), (20, FOLLOWED[2])):
        reading = gauge.look(step, look)
    assert reading.keep_step is None
    assert reading.sentence.startswith("no verdict")


def test_off_measures_without_a_verdict():
    hacked = [evaluation(g, h) for g, h in ((0.0, 0.0), (1.0, 0.5), (2.0, 0.5), (3.0, 0.5))]
    assert watched(*hacked).reading().alarm
    reading = watched(*hacked, settings=Gauge(stop="off", rule=EAGER.rule)).reading()
    assert (reading.alarm, reading.keep_step) == (False, None)
    assert "gauge/alarm" not in reading.values
    assert reading.values["gauge/gap"] > 0


def test_other_prompts_are_refused():
    gauge = watched(FOLLOWED[0])
    other = Evaluation(FOLLOWED[1].scores, FOLLOWED[1].images, PROMPTS[::-1], tuple(range(20)))
    with pytest.raises(ValueError, match="evaluate the same ones"):
        gauge.look(10, other)
    with pytest.raises(ValueError, match="give it the base's first"):
        HackingGauge().reading()
