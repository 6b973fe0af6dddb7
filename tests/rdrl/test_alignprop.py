"""AlignProp: its truncation and its noise. The laws are in test_trainers.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rdrl import AlignProp, DRaFT
from rsaft.sampling import Sampling
from rsaft.types import Batch
from tests import asserts
from tests.helpers import PROMPTS, batch_of
from tests.rdrl.toy import Toy


def test_the_defaults_are_the_authors_code():
    # DDIM with eta = 1, 50 steps, guidance 5, k = int(normal(42, 5)), gradient checkpointing.
    algorithm = AlignProp()
    assert (algorithm.sampling, algorithm.eta) == (Sampling(num_steps=50, guidance=5.0), 1.0)
    assert (algorithm.mean * 50, algorithm.std * 50) == (42, 5)
    assert algorithm.gradient_checkpointing


@pytest.mark.parametrize("num_steps", [50, 10])
def test_the_chances_are_those_of_a_normal_draw_rounded_down_and_repeated_until_it_fits(num_steps):
    # 200 000 draws: each share has a standard deviation of at most 0.0011.
    algorithm = AlignProp(sampling=Sampling(num_steps, guidance=5.0))
    draws = num_steps * torch.empty(200_000).normal_(0.84, 0.1, generator=torch.Generator().manual_seed(0))
    draws = draws.long()[(draws.long() >= 1) & (draws.long() < num_steps)]
    shares = torch.bincount(draws, minlength=num_steps) / len(draws)
    chances = algorithm.probabilities() / algorithm.probabilities().sum()
    assert chances[0] == 0
    assert (shares - chances).abs().max() < 0.005


@pytest.mark.parametrize("truncation", ["gaussian", "uniform", 2])
def test_truncation_steps_are_drawn_with_these_chances(truncation):
    # 300 draws: each share has a standard deviation of at most 0.029.
    algorithm, toy = AlignProp(truncation=truncation, eta=0.0, sampling=Sampling(5, guidance=1.0)), Toy("eps")
    first = Counter(algorithm.rollout(toy, Batch(("a",), (0,), step, 7)).first for step in range(300))
    chances = algorithm.probabilities() / algorithm.probabilities().sum()
    for k in range(5):
        assert first[k] / 300 == pytest.approx(float(chances[k]), abs=0.12)
    assert first[0] == 0


def test_all_samples_of_an_update_are_truncated_at_one_step():
    toy, algorithm = Toy("eps"), AlignProp(truncation="uniform", sampling=Sampling(8, guidance=1.0))
    for step in range(5):
        rollouts = [algorithm.rollout(toy, batch_of([p], step=step, first_id=i)) for i, p in enumerate(PROMPTS)]
        assert len({r.first for r in rollouts}) == 1


@pytest.mark.parametrize("k", [1, 3, 4])
def test_without_noise_and_with_a_fixed_truncation_it_is_draft_k(k):
    toy, sampling = Toy("v", lora=True), Sampling(4, guidance=2.0)
    ours = AlignProp(truncation=4 - k, eta=0.0, sampling=sampling).rollout(toy, batch_of())
    asserts.assert_same_gradient(ours, DRaFT(k=k, sampling=sampling).rollout(toy, batch_of()), toy)


def test_each_step_has_noise_of_its_own():
    toy, batch = Toy("eps"), batch_of()
    algorithm = AlignProp(sampling=Sampling(6, guidance=1.0))
    noises = algorithm.rollout(toy, batch)._noises
    assert noises.shape == (2, 6, *toy.latent_shape)
    assert torch.nn.functional.pdist(noises.flatten(0, 1).flatten(1)).min() > 1
    deterministic = AlignProp(eta=0.0, sampling=algorithm.sampling).rollout(toy, batch)
    first, second = (r.tail(r.prefix()).latents for r in (algorithm.rollout(toy, batch), deterministic))
    assert (first - second).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": 50}, r"algorithm\.truncation: .*of 50 steps .* 0 <= truncation < 50; got 50\."),
        ({"truncation": -1}, r"got -1\."),
        ({"sampling": Sampling(1)}, r"algorithm\.truncation: .* T >= 2 sampling steps; got 1; set it to 0\."),
        ({"mean": 42.0}, r"algorithm\.mean is of k / T, so 0 <= mean <= 1; got 42\.0\."),
        ({"std": 0.0}, r"algorithm\.std .* std > 0; got 0\.0; truncation takes a fixed k\."),
        ({"eta": -0.1}, r"algorithm\.eta .* 0 <= eta <= 1; got -0\.1\."),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        AlignProp(**settings)


def test_a_mean_far_outside_still_gives_a_step():
    algorithm = AlignProp(mean=0.0, std=1e-6, sampling=Sampling(5, guidance=1.0))
    assert 1 <= algorithm.rollout(Toy("eps"), batch_of()).first < 5
