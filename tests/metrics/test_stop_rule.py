"""The stop rule on runs whose story is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.metrics.stop_rule import StopRule, first_alarm, judge

PROMPTS = [f"prompt {i}" for i in range(40)]
NOISE = 0.05


def run(train: list[float], held_out: dict[str, list[float]], *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of 40 prompts, one sample each: base scores of deviation 1, gains with these means and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, generator=generator, dtype=torch.float64)
    base = (base - base.mean()) / base.std()

    def scores(gains: list[float]) -> Tensor:
        noise = torch.randn(len(gains), 40, generator=generator, dtype=torch.float64) * NOISE
        noise[0] = 0
        return base + torch.tensor(gains, dtype=torch.float64)[:, None] + noise - noise.mean(dim=1, keepdim=True)

    return scores(train), {name: scores(gains) for name, gains in held_out.items()}


RISING = [0.0, 0.4, 0.8, 1.2, 1.6, 2.0]
HONEST = {"a": [0.5 * g for g in RISING], "b": [0.2 * g for g in RISING]}
HACKED = {"a": [0.0, 0.2, 0.4, 0.42, 0.44, 0.46], "b": [0.0, 0.1, 0.2, 0.21, 0.2, 0.19]}  # from look 2 on


def test_a_run_that_held_out_rewards_follow_is_kept_to_its_end():
    alarm, verdict = first_alarm(*run(RISING, HONEST), PROMPTS)
    assert alarm is None
    assert verdict.keep == 5
    assert verdict.gap == pytest.approx(0, abs=1e-9)
    assert verdict.following == ("a", "b")


def test_a_run_that_they_stop_following_is_kept_from_there_and_the_alarm_comes_after_the_patience():
    scores = run(RISING, HACKED)
    for patience in (1, 2, 3):
        alarm, verdict = first_alarm(*scores, PROMPTS, StopRule(patience=patience))
        assert (alarm, verdict.keep) == (2 + patience, 2)


def test_the_numbers_are_those_of_the_equations():
    verdict = judge(*run(RISING, HACKED), PROMPTS, StopRule(share=0.5))
    u = min(0.46 / 0.5, 0.19 / 0.25)  # s_a = .2/.4, s_b = .1/.4; the lower half of two is one
    assert verdict.gain == pytest.approx(2.0)
    assert verdict.believed == pytest.approx(u)
    assert verdict.gap == pytest.approx(2.0 - u)
    assert verdict.worth[-1] == pytest.approx(u - 0.5 * 2.0)
    assert verdict.worth[0] == 0


def test_units_of_the_rewards_do_not_matter():
    train, held_out = run(RISING, HACKED)
    mine = judge(train, held_out, PROMPTS)
    other = judge(7 + 3 * train, {name: -2 + 100 * x for name, x in held_out.items()}, PROMPTS)
    assert (other.keep, other.alarm) == (mine.keep, mine.alarm)
    assert other.worth == pytest.approx(mine.worth)


def test_the_doubtful_half_decides():
    scores = {"a": HONEST["a"], "b": HONEST["b"], "c": HACKED["a"], "d": HACKED["b"], "e": [0.1 * g for g in RISING]}
    train, held_out = run(RISING, scores)
    assert judge(train, held_out, PROMPTS).believed == pytest.approx((0.19 / 0.25 + 0.46 / 0.5 + 2.0) / 3)  # of five
    few = {name: held_out[name] for name in ("a", "b", "c")}
    assert judge(train, few, PROMPTS).believed == pytest.approx((0.46 / 0.5 + 2.0) / 2)  # of three


def test_a_held_out_reward_that_does_not_rise_at_first_believes_nothing():
    falling = {"falling": [0.0, -0.1, 0.3, 0.9, 0.9, 0.9]}
    verdict = judge(*run(RISING, {"a": HONEST["a"]} | falling), PROMPTS)
    assert verdict.following == ("a",)
    assert verdict.believed == 0
    assert verdict.keep == 0


def test_where_none_rises_with_the_train_reward_the_base_is_kept():
    alarm, verdict = first_alarm(*run(RISING, {"a": [0.0, -0.1, -0.2, -0.3, -0.4, -0.5]}), PROMPTS)
    assert (alarm, verdict.keep, verdict.following) == (StopRule().patience, 0, ())


def test_before_the_train_reward_has_risen_there_is_no_verdict_and_the_best_held_out_look_is_kept():
    verdict = judge(*run([0.0, 0.0, 0.0], {"a": [0.0, 0.3, 0.1]}), PROMPTS)
    assert (verdict.alarm, verdict.keep) == (False, 1)
    assert math.isnan(verdict.believed)


def test_a_run_that_falls_back_raises_no_alarm():
    train = [0.0, 0.4, 0.8, 0.4, 0.2, 0.1]  # the train reward too: not hacked, only worse
    alarm, verdict = first_alarm(*run(train, {"a": [0.5 * g for g in train]}), PROMPTS)
    assert alarm is None
    assert verdict.keep == 2


def test_samples_that_are_not_finite_are_left_out():
    train, held_out = run(RISING, HACKED)
    broken = train.clone()
    broken[3, 7] = math.nan
    rest = [i for i in range(40) if i != 7]
    mine = judge(broken, held_out, PROMPTS)
    without = judge(train[:, rest], {k: x[:, rest] for k, x in held_out.items()}, [PROMPTS[i] for i in rest])
    assert (mine.keep, mine.alarm, mine.following) == (without.keep, without.alarm, without.following)
    assert mine.worth == pytest.approx(without.worth, abs=1e-12)


def test_samples_of_one_prompt_count_as_one():
    train, held_out = run([0.0, 0.02], {"a": [0.0, 0.02]})
    many = train.repeat(1, 9), {"a": held_out["a"].repeat(1, 9)}, PROMPTS * 9
    assert math.isnan(judge(*many, StopRule(significance=4.0)).believed)  # 9 times the samples would pass, independent
    assert not math.isnan(judge(*many[:2], [f"{i}" for i in range(360)], StopRule(significance=4.0)).believed)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_alarm_waits_for_a_slope_below_the_share(share: float):
    for slope in (share - 0.1, share + 0.1):
        held_out = {"a": [0.5 * (min(g, 0.8) + slope * max(g - 0.8, 0)) for g in RISING]}
        alarm, _ = first_alarm(*run(RISING, held_out), PROMPTS, StopRule(share=share))
        assert (alarm is None) == (slope > share)


def test_what_cannot_be_judged_is_refused_in_one_sentence():
    train, held_out = run(RISING, HONEST)
    with pytest.raises(ValueError, match="hold one out"):
        judge(train, {}, PROMPTS)
    with pytest.raises(ValueError, match=r"a has shape \(5, 40\).*must be \(6, 40\)"):
        judge(train, {"a": held_out["a"][:5]}, PROMPTS)
    with pytest.raises(ValueError, match="at least 2; 1 are finite"):
        judge(train[:, :1], {"a": held_out["a"][:, :1]}, PROMPTS[:1])


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0}, {"significance": -1.0}, {"patience": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]):
    with pytest.raises(ConfigError, match=f"stop rule: {next(iter(settings))}"):
        StopRule(**settings)  # type: ignore[arg-type]
