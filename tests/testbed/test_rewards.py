"""Preferences, and reward models learned from them."""

import pytest
import torch

from rsaft import testbed
from rsaft.testbed import fashion
from rsaft.testbed.preferences import (
    Pool,
    PreferenceRecipe,
    disjoint_sets,
    draw_pairs,
    evaluate_reward,
    learn_reward,
    standardise,
)
from rsaft.testbed.rewards import ARCHITECTURES, LearnedReward, caption_words, load_reward, save_reward

QUIET = lambda line: None  # noqa: E731
WORDS = caption_words(fashion.PROMPTS)


def pool_of_brightness(n=400):
    """Flat images whose gold score is their brightness."""
    gold = torch.rand(n, generator=torch.Generator().manual_seed(0))
    images = (gold.view(-1, 1, 1, 1).expand(n, 3, 32, 32) * 255).to(torch.uint8)
    return Pool(images, tuple(fashion.PROMPTS[i % 6] for i in range(n)), gold)


def fresh(architecture):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LearnedReward(architecture, WORDS).eval()


def test_sets_of_images_are_disjoint():
    sets, held = disjoint_sets(pool_of_brightness(), 4, validation=0.1, seed=0)
    everything = torch.cat([*sets, held]).tolist()
    assert len(everything) == len(set(everything)) == 400
    assert len(held) == 40


def test_pairs_share_a_caption_and_prefer_the_better_image_as_often_as_they_should():
    pool = pool_of_brightness()
    pairs = draw_pairs(pool, torch.arange(400), 4000, slope=10.0, seed=1)
    assert all(
        pool.prompts[a] == pool.prompts[b] for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    )
    assert not bool((pairs.first == pairs.second).any())
    right = ((pool.gold[pairs.first] > pool.gold[pairs.second]) == (pairs.prefers_first > 0.5)).float().mean().item()
    assert right == pytest.approx(pairs.ceiling, abs=0.03)  # 4,000 draws: standard error below 0.007


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a == "cnn" else pytest.mark.slow) for a in ARCHITECTURES]
)
def test_a_reward_model_learns_a_visible_truth(architecture):
    pool = pool_of_brightness()
    sets, held = disjoint_sets(pool, 1, validation=0.2, seed=0)
    train = draw_pairs(pool, sets[0], 320, slope=50.0, seed=1)
    validation = draw_pairs(pool, held, 200, slope=50.0, seed=2)
    recipe = PreferenceRecipe(epochs=4, batch=32)
    reward = learn_reward(architecture, WORDS, pool, train, validation, seed=0, recipe=recipe, log=QUIET)
    assert evaluate_reward(reward, pool, validation)[1] > 0.8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_image_is_scored_alone_with_a_gradient(architecture):
    reward = fresh(architecture)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    prompts = list(fashion.PROMPTS[::17])
    scores = reward(images, prompts)
    assert scores.shape == (4,)
    torch.testing.assert_close(reward(images[2:3], prompts[2:3]), scores[2:3], atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(scores[2], images)
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_caption_changes_the_score(architecture):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    reward = fresh(architecture)
    assert reward(image, [fashion.PROMPTS[0]]) != reward(image, [fashion.PROMPTS[-1]])


def test_a_saved_reward_comes_back_frozen_with_its_standardisation(tmp_path):
    reward = fresh("cnn")
    images, prompts = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(1)), fashion.PROMPTS[:30]
    save_reward(reward, tmp_path / "r.safetensors")
    again = load_reward(tmp_path / "r.safetensors")
    standardise(again, images, prompts)
    save_reward(again, tmp_path / "r.safetensors")
    scores = load_reward(tmp_path / "r.safetensors")(images, prompts)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    assert not scores.requires_grad


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="allowed: cnn, vit, mixer"):
        LearnedReward("resnet", WORDS)


def test_an_unknown_world_is_refused():
    with pytest.raises(ValueError, match="allowed: fashion, shapes"):
        testbed.load("emoji")


def test_a_folder_without_rewards_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.safetensors is missing"):
        testbed.load("fashion", rewards=tmp_path)
