"""ReFL: its stop step, its one prediction, its hinge, its settings. The laws are in test_trainers.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rdrl import DRaFT, Hinge, ImageScore, ReFL
from rsaft.sampling import Sampling, initial_noise, ode
from rsaft.types import Batch
from tests import asserts
from tests.helpers import PROMPTS, batch_of, gradient_of, relative_difference, toy_reward
from tests.rdrl.toy import Toy

ONE = batch_of(PROMPTS[:1])


def _stops(algorithm: ReFL, draws: int) -> Counter[int]:
    toy = Toy("eps")
    return Counter(algorithm.rollout(toy, Batch(ONE.prompts, (0,), step, 0)).stop for step in range(draws))


def test_the_defaults_are_the_authors_code():
    # 40 DDPM steps, no guidance, mid = randint(30, 39) with both ends.
    refl = ReFL()
    assert (refl.sampling, refl.eta, refl.pretrain) == (Sampling(num_steps=40, guidance=1.0), 1.0, None)
    assert sorted(_stops(refl, 200)) == list(range(30, 40))


def test_the_stop_step_is_uniform_over_the_last_ones():
    # 300 draws among 3: each count has a standard deviation of 8.
    stops = _stops(ReFL(last=3, eta=0.0, sampling=Sampling(7, guidance=1.0)), 300)
    assert sorted(stops) == [4, 5, 6]
    assert all(abs(count - 100) < 40 for count in stops.values())


def test_all_samples_of_an_update_stop_at_one_step():
    toy, refl = Toy("eps"), ReFL(last=6, sampling=Sampling(6, guidance=1.0))
    for step in range(5):
        rollouts = [refl.rollout(toy, batch_of([p], step=step, first_id=i)) for i, p in enumerate(PROMPTS)]
        assert len({r.stop for r in rollouts}) == 1


def test_the_trajectory_ends_at_its_stop_step():
    refl = ReFL(last=3, sampling=Sampling(7, guidance=1.0))
    for step in range(4):
        rollout = refl.rollout(Toy("v"), batch_of(step=step))
        assert rollout.num_steps == rollout.stop + 1
        assert rollout.prefix().i == rollout.stop


def test_one_step_in_all_is_draft_1():
    # Flow, whose last noise level is 0: the last step is the prediction itself.
    toy, sampling = Toy("flow"), Sampling(1, guidance=2.0)
    rollouts = [a.rollout(toy, batch_of()) for a in (ReFL(sampling=sampling), DRaFT(k=1, sampling=sampling))]
    asserts.assert_same_gradient(*rollouts, toy, tolerance=asserts.TOLERANCE)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_without_noise_the_prediction_is_from_the_deterministic_trajectory(kind):
    toy, batch = Toy(kind), batch_of()
    rollout = ReFL(last=3, eta=0.0, sampling=Sampling(6, guidance=1.0)).rollout(toy, batch)
    denoise, schedule = toy.denoiser(batch.prompts, guidance=1.0, detach_unconditional=False), toy.schedule(6)
    x = initial_noise(toy, seed=0, purpose="rollout", step=0, sample_ids=batch.sample_ids)
    with torch.no_grad():
        x = ode(denoise, schedule, x, start=0, stop=rollout.stop)
        x_0, _ = schedule.x_0_and_eps(denoise(x, schedule.timesteps[rollout.stop]), x, rollout.stop)
    assert torch.equal(rollout.tail(rollout.prefix()).latents, x_0)


def test_above_the_hinge_there_is_no_gradient_but_a_direction():
    toy = Toy("eps")
    rollout = ReFL(sampling=Sampling(4, guidance=1.0)).rollout(toy, batch_of())
    sample = rollout.tail(rollout.prefix())
    score = ImageScore(toy, {"toy": toy_reward}, Hinge({"toy": 1.0}, margin=-100.0, scale=1e-3))
    loss = score(score.view(sample), sample)
    assert gradient_of(loss.direction.sum(), toy.parameters()).abs().max() > 1e-6
    loss = score(score.view(sample), sample)
    assert loss.value == 0
    sample = rollout.tail(rollout.prefix())
    loss = score(score.view(sample), sample)
    assert gradient_of(loss.value, toy.parameters()).abs().max() == 0


def test_below_the_hinge_the_gradient_is_the_rewards_times_the_scale():
    toy = Toy("eps")
    rollout = ReFL(sampling=Sampling(4, guidance=1.0)).rollout(toy, batch_of())
    score = ImageScore(toy, {"toy": toy_reward}, Hinge({"toy": 1.0}, margin=100.0, scale=1e-3))
    sample = rollout.tail(rollout.prefix())
    found = gradient_of(score(score.view(sample), sample).value, toy.parameters())
    rewards = asserts.reward_gradient(toy, rollout.tail(rollout.prefix()))
    assert relative_difference(found, -1e-3 * rewards / 2) <= asserts.TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last": 41}, r"algorithm\.last: .*last of 40 steps, so 1 <= last <= 40; got 41\."),
        ({"last": 0}, r"got 0\."),
        ({"eta": 1.5}, r"algorithm\.eta .* 0 <= eta <= 1; got 1\.5\."),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReFL(**settings)
