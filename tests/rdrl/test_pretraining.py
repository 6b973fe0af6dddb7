"""The pretraining term: its value, its keys, its place in the loss, its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.randomness import integer, key_of, normal
from rsaft.rdrl import Hinge, ImageScore, Pretraining, ReFL, WeightedSum, plain_step
from rsaft.rdrl.pretraining import save_pairs
from rsaft.sampling import Sampling
from tests import asserts
from tests.helpers import PROMPTS, batch_of, count_calls, gradient_of, relative_difference, toy_reward
from tests.rdrl.toy import Toy
from tests.rdrl.trainers import T, parts_of
from tests.reference.refl import pretraining_loss

KINDS = ("eps", "v", "flow")
PAIRS = tuple(f"picture {i}" for i in range(7))


def _latents(n: int = len(PAIRS), size: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    save_pairs(tmp_path / "pairs.safetensors", _latents(), PAIRS)
    return str(tmp_path / "pairs.safetensors")


def _refl(pairs: str | None, weight: float = 0.5) -> ReFL:
    pretrain = None if pairs is None else Pretraining(pairs, weight)
    return ReFL(last=2, pretrain=pretrain, sampling=Sampling(T, guidance=3.0))


def _score(toy: Toy, reward=toy_reward) -> ImageScore:
    return ImageScore(toy, {"toy": reward}, WeightedSum({"toy": 1.0}))


def _loss(algorithm: ReFL, toy: Toy, batch):
    rollout, score = algorithm.rollout(toy, batch), _score(toy)
    sample = rollout.tail(rollout.prefix())
    return score(score.view(sample), sample)


def _expected_term(toy: Toy, batch) -> torch.Tensor:
    """The reference's loss, one sample at a time; only the draws are rsaft's."""
    parts = parts_of(toy, toy.kind)
    weights = dict(zip(parts.names, toy.parameters(), strict=True))
    i = integer(0, T, seed=batch.seed, purpose="pretrain-step", step=batch.step)
    losses = []
    for sample_id in batch.sample_ids:
        row = key_of(batch.seed, "pretrain-pair", batch.step, sample_id) % len(PAIRS)
        eps = normal(
            toy.latent_shape,
            seed=batch.seed,
            purpose="pretrain-noise",
            step=batch.step,
            sample_ids=[sample_id],
            device=torch.device("cpu"),
            dtype=torch.float64,
        )
        text = parts.encode([PAIRS[row]])

        def denoise(x, t, text=text):
            return parts.network(weights, x, t, text)

        losses.append(pretraining_loss(parts.grid, denoise, _latents()[row : row + 1], eps, i))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1])
def test_the_term_is_the_weighted_denoising_loss_of_the_reference(pairs, kind, step):
    toy, batch = Toy(kind), batch_of(step=step)
    with_term, without = (_loss(_refl(p), toy, batch) for p in (pairs, None))
    expected = 0.5 * _expected_term(toy, batch)
    torch.testing.assert_close(with_term.value - without.value, expected, rtol=1e-10, atol=1e-12)
    ours = gradient_of(with_term.value, toy.parameters()) - gradient_of(without.value, toy.parameters())
    assert relative_difference(ours, gradient_of(expected, toy.parameters())) <= 1e-9


def test_the_term_enters_the_loss_and_not_the_direction(pairs):
    toy, batch = Toy("eps"), batch_of()
    with_term, without = (_loss(_refl(p), toy, batch) for p in (pairs, None))
    assert torch.equal(with_term.direction, without.direction)
    assert torch.equal(with_term.rewards, without.rewards)


def test_rsa_ft_takes_its_epsilon_from_the_reward_alone(pairs):
    # Nothing but the term is left of the loss: above the hinge the reward's part is 0.
    toy = Toy("eps")
    score = ImageScore(toy, {"toy": toy_reward}, Hinge({"toy": 1.0}, margin=-100.0))
    rollout = _refl(pairs).rollout(toy, batch_of())
    RSAFT(0.0, 0.1)([rollout], score, toy.parameters())
    found = torch.cat([p.grad.flatten() for p in toy.parameters()])
    eps = asserts.reward_gradient(toy, rollout.tail(rollout.prefix()))
    eps = -0.1 * eps / eps.norm()
    with torch.no_grad():
        for p, e in zip(toy.parameters(), eps.split([p.numel() for p in toy.parameters()]), strict=True):
            p.add_(e.view_as(p))
    expected = gradient_of(0.5 * _expected_term(toy, batch_of()), toy.parameters())
    assert relative_difference(found, expected) <= 1e-9


def test_the_laws_hold_with_the_term(pairs):
    toy, algorithm, batch = Toy("v", lora=True), _refl(pairs), batch_of(PROMPTS)
    rollout = algorithm.rollout(toy, batch)
    first, second = rollout.tail(rollout.prefix()), rollout.tail(rollout.prefix())
    asserts.assert_same_sample(first, second)
    assert torch.equal(first.penalty, second.penalty)
    part = rollout.select([2, 0])
    picked = part.tail(part.prefix()).penalty
    assert relative_difference(picked, first.penalty[[2, 0]]) <= asserts.TOLERANCE


def test_micro_batches_give_the_gradient_of_the_whole_batch(pairs):
    toy, batch, gradients = Toy("eps"), batch_of(PROMPTS), []
    for split in ([[0, 1, 2, 3]], [[2, 3], [0, 1]]):
        plain_step([_refl(pairs).rollout(toy, batch.select(rows)) for rows in split], _score(toy), toy.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in toy.parameters()]))
        for p in toy.parameters():
            p.grad = None
    assert relative_difference(*gradients) <= asserts.TOLERANCE


def test_a_masked_sample_has_no_term(pairs):
    toy, batch = Toy("eps"), batch_of()

    def reward(images, prompts):
        scores = toy_reward(images, prompts)
        return torch.where(torch.tensor([len(p) > 5 for p in prompts]), scores, torch.nan)  # "a cat" is masked

    rollout = _refl(pairs).rollout(toy, batch)
    sample = rollout.tail(rollout.prefix())
    score = _score(toy, reward)
    loss = score(score.view(sample), sample)
    assert loss.valid.tolist() == [False, True]
    torch.testing.assert_close(loss.value, (sample.penalty[1] - loss.rewards[1, 0]) / 2)


def test_the_term_costs_one_network_call_with_gradient(pairs):
    toy = Toy("eps")
    rollout = _refl(pairs).rollout(toy, batch_of())
    prefix = rollout.prefix()
    with count_calls(toy.network) as calls:
        rollout.tail(prefix)
    assert (calls.with_grad, calls.without_grad) == (2, 0)


def test_each_sample_and_each_update_has_a_pair_of_its_own(pairs):
    toy = Toy("eps")
    seen = [_refl(pairs).rollout(toy, batch_of(PROMPTS, step=step))._pretraining.x_0.flatten(1) for step in range(6)]
    assert len(torch.cat(seen).unique(dim=0)) >= 5  # 24 draws among 7 pairs


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "is no file of pairs"),
        (lambda path: path.write_bytes(b"no safetensors file at all"), "is no file of pairs"),
        (lambda path: save_pairs(path, _latents(size=5), PAIRS), r"holds latents \(7, 2, 5, 5\) for 7 prompts"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, write, message):
    path = tmp_path / "pairs.safetensors"
    write(path)
    with pytest.raises(ConfigError, match=message):
        _refl(str(path)).rollout(Toy("eps"), batch_of())


def test_a_weight_that_does_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"pretrain\.weight multiplies a loss, so weight > 0; got 0; or drop"):
        Pretraining("a", 0)


def test_pairs_need_as_many_latents_as_prompts(tmp_path):
    with pytest.raises(ValueError, match="got 7 latents and 2 prompts"):
        save_pairs(tmp_path / "a.safetensors", _latents(), ["a", "b"])
