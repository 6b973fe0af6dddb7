"""Evaluation: fixed images, scores by sample, ranks, values that are not finite."""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch

from rsaft.metrics import evaluate, image_grid, joined
from rsaft.rdrl import Min, WeightedSum
from rsaft.sampling import Sampling
from rsaft.schedules import Schedule
from rsaft.types import Backbone

torch.set_num_threads(1)


@dataclass
class Toy:
    """A linear denoiser whose images are its latents."""

    weight: torch.nn.Parameter = field(default_factory=lambda: torch.nn.Parameter(torch.tensor(0.3)))
    latent_shape: tuple[int, int, int] = (3, 4, 4)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def parameters(self):
        return [self.weight]

    def schedule(self, num_steps):
        alpha = torch.linspace(0.1, 1.0, num_steps + 1, dtype=torch.float64).tolist()
        sigma = [math.sqrt(1 - a * a) for a in alpha]
        return Schedule(
            alphas=tuple(alpha),
            sigmas=tuple(sigma),
            timesteps=tuple(float(i) for i in range(num_steps)),
            prediction="eps",
        )

    def denoiser(self, prompts, *, guidance, detach_unconditional):
        shift = torch.tensor([0.1 * len(p) for p in prompts]).view(-1, 1, 1, 1)
        return lambda x, t: self.weight * x + shift

    def decode(self, latents):
        return torch.sigmoid(latents)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def settings(**changes):
    return {
        "seed": 5,
        "num_samples": 7,
        "batch_size": 3,
        "rewards": {"proxy": brightness},
        "held_out": {"gold": lambda x, p: -brightness(x, p)},
        "measures": {"gold": lambda x, p: {"red": x[:, 0].flatten(1).mean(1), "blue": x[:, 2].flatten(1).mean(1)}},
        "sharpness_rho": 0.5,
        **changes,
    }


def run(backbone=None, **changes):
    return evaluate(backbone or Toy(), ["a", "bb", "ccc"], Sampling(num_steps=3, guidance=1.0), **settings(**changes))


def test_the_toy_is_a_backbone():
    assert isinstance(Toy(), Backbone)


def test_every_score_of_every_sample_is_there():
    found = run()
    assert list(found.scores) == [
        "reward/proxy",
        "held_out/gold",
        "measure/gold/red",
        "measure/gold/blue",
        "sharpness/proxy",
        "slope/proxy",
    ]
    assert all(values.shape == (7,) for values in found.scores.values())
    assert found.prompts == ("a", "bb", "ccc", "a", "bb", "ccc", "a")
    assert found.sample_ids == tuple(range(7))
    torch.testing.assert_close(found.scores["reward/proxy"], brightness(found.images, None).double())
    # A mean over 48 values is linear with gradient norm 1/sqrt(48); float32 differences of values near 1/2.
    torch.testing.assert_close(
        found.scores["sharpness/proxy"], torch.full((7,), 0.5 / 48**0.5).double(), rtol=0, atol=1e-6
    )


def test_a_slope_is_the_norm_of_the_rewards_gradient():
    found = run().scores["slope/proxy"]
    torch.testing.assert_close(found, torch.full((7,), 48**-0.5).double(), rtol=1e-6, atol=0)


def contrast(images, prompts):
    return images.flatten(1).std(1)


def test_the_pull_of_a_reward_is_its_slope_through_the_objective():
    found = run(rewards={"proxy": brightness, "contrast": contrast}, objective=WeightedSum({"proxy": 3.0})).scores
    torch.testing.assert_close(found["pull/proxy"], 3 * found["slope/proxy"])
    assert not found["pull/contrast"].any()
    assert found["slope/contrast"].all()


def test_where_one_reward_leads_the_pull_says_which():
    found = run(rewards={"proxy": brightness, "contrast": contrast}, objective=Min({"proxy": 1.0, "contrast": 1.0}))
    least = found.scores["reward/proxy"] < found.scores["reward/contrast"]
    assert torch.equal(found.scores["pull/proxy"] > 0, least)
    assert torch.equal(found.scores["pull/contrast"] > 0, ~least)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": None, "rewards": {"proxy": brightness, "contrast": contrast}},
        {"objective": WeightedSum({"proxy": 1.0})},
        {
            "objective": WeightedSum({"proxy": 1.0}),
            "rewards": {"proxy": brightness, "contrast": contrast},
            "sharpness_rho": None,
        },
    ],
)
def test_there_is_no_pull_without_an_objective_two_rewards_and_slopes(changes):
    assert not any(key.startswith("pull") for key in run(**changes).scores)


def test_the_pull_is_nan_where_a_reward_is_not_finite_and_nowhere_else():
    def broken(images, prompts):
        return torch.where(torch.tensor([p == "bb" for p in prompts]), torch.nan, contrast(images, prompts))

    found = run(rewards={"proxy": brightness, "broken": broken}, objective=WeightedSum({"proxy": 1.0, "broken": 1.0}))
    assert found.scores["pull/proxy"].isnan().tolist() == [p == "bb" for p in found.prompts]


def test_the_same_weights_give_the_same_images_and_other_weights_others():
    first, again = run(), run()
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, run(Toy(torch.nn.Parameter(torch.tensor(0.4)))).images)
    assert not torch.equal(first.images, run(seed=6).images)


def test_samples_of_one_prompt_have_noise_of_their_own():
    images = run().images
    assert not torch.equal(images[0], images[3])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_together_see_what_one_process_sees(ranks):
    whole = run()
    parts = [run(rows=slice(rank, None, ranks)) for rank in range(ranks)]
    together = joined([part for part in parts if part.sample_ids])
    assert together.sample_ids == whole.sample_ids
    assert together.prompts == whole.prompts
    torch.testing.assert_close(together.images, whole.images)
    for key, values in whole.scores.items():
        torch.testing.assert_close(together.scores[key], values)


def test_a_rank_without_samples_has_an_empty_part():
    part = run(rows=slice(7, None))
    assert part.sample_ids == ()
    assert part.means() == {}
    assert joined([part, run()]).sample_ids == tuple(range(7))


def test_scores_that_are_not_finite_are_dropped_and_counted():
    def spotty(images, prompts):
        return torch.where(torch.tensor([p == "bb" for p in prompts]), torch.inf, brightness(images, prompts))

    found = run(held_out={"spotty": spotty, "gone": lambda x, p: brightness(x, p) * torch.nan})
    means = found.means()
    assert means["nonfinite/held_out/spotty"] == 2
    assert math.isfinite(means["held_out/spotty"])
    assert means["nonfinite/held_out/gone"] == 7
    assert "held_out/gone" not in means
    json.dumps(means, allow_nan=False)


def test_an_image_that_is_not_finite_is_judged_by_nobody():
    class Broken(Toy):
        def decode(self, latents):
            images = torch.sigmoid(latents)
            images[0, 0, 0, 0] = torch.nan
            return images

    def strict(images, prompts):
        assert images.isfinite().all()
        return brightness(images, prompts)

    found = run(Broken(), held_out={"gold": strict})
    assert found.scores["held_out/gold"].isnan().tolist() == [True, False, False, True, False, False, True]
    assert found.means()["nonfinite/held_out/gold"] == 3


def test_without_a_radius_there_is_no_sharpness_and_rewards_need_no_gradient():
    found = run(rewards={"judge": lambda x, p: brightness(x.detach(), p)}, sharpness_rho=None)
    assert not any(key.startswith("sharpness") for key in found.scores)


def test_evaluation_leaves_no_gradient():
    toy = Toy()
    run(toy)
    assert toy.weight.grad is None


def test_a_reward_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match="'held_out/pair'"):
        run(held_out={"pair": lambda x, p: x.flatten(1)[:, :2]})


@pytest.mark.parametrize(("prompts", "n", "message"), [([], 4, "prompt list is empty"), (["a"], 0, "num_samples >= 1")])
def test_nothing_to_evaluate_is_refused(prompts, n, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Toy(), prompts, Sampling(num_steps=3, guidance=1.0), **settings(num_samples=n))


def test_the_grid_holds_the_images_in_reading_order():
    images = torch.zeros(5, 3, 4, 4)
    images[4] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    images[0] = torch.nan
    grid = image_grid(images, columns=3)
    assert grid.size == (3 * 6 - 2, 2 * 6 - 2)
    assert grid.getpixel((6, 6)) == (255, 0, 0, 255)
    assert grid.getpixel((4, 0))[3] == 0
    assert grid.getpixel((12, 6))[3] == 0
    assert grid.getpixel((0, 0)) == (0, 0, 0, 255)
