"""Noisy pairwise preferences drawn from gold scores, and reward models learned from them (Bradley-Terry)."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rsaft.testbed.rewards import LearnedReward

Log = Callable[[str], None]


@dataclass(frozen=True)
class PreferenceRecipe:
    """Sizes of the preference data and how the reward models are trained on it."""

    generated: int = 6400  # images by the base at several ages, half of them at each guidance
    real: int = 1600  # real images, half with their own caption and half with a near miss
    guidances: tuple[float, ...] = (1.0, 2.5)
    pairs: int = 6000  # for each reward model; all of one caption each
    slope: float = 10.0  # P(a preferred to b) = sigmoid(slope (gold a - gold b))
    validation: float = 0.12  # share of the images kept for early stopping and for the reported accuracy
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    epochs: int = 10
    patience: int = 2


@dataclass(frozen=True)
class Pool:
    """Images with their captions and gold scores."""

    images: UInt8[Tensor, "n 3 32 32"]
    prompts: tuple[str, ...]
    gold: Float[Tensor, " n"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of pool images of one caption each, and which one was preferred."""

    first: Int[Tensor, " p"]
    second: Int[Tensor, " p"]
    prefers_first: Float[Tensor, " p"]  # 1.0 or 0.0
    ceiling: float  # accuracy of whoever knows the gold scores, on average over the label noise


def disjoint_sets(pool: Pool, parts: int, *, validation: float, seed: int) -> tuple[list[Tensor], Tensor]:
    """Indices of the pool's images: `parts` equal disjoint sets, and one validation set of that share of the images."""
    order = torch.randperm(len(pool.prompts), generator=torch.Generator().manual_seed(seed))
    held = round(validation * len(order))
    each = (len(order) - held) // parts
    return [order[held + i * each : held + (i + 1) * each] for i in range(parts)], order[:held]


def draw_pairs(pool: Pool, members: Int[Tensor, " k"], n: int, *, slope: float, seed: int) -> Pairs:
    """`n` pairs of images of the same caption among `members`, with labels sigmoid(slope * gold difference)."""
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, list[int]] = {}
    for index in members.tolist():
        groups.setdefault(pool.prompts[index], []).append(index)
    usable = [torch.tensor(group) for group in groups.values() if len(group) > 1]
    # A caption is drawn as often as it has images, so that no image is used much more than another.
    sizes = torch.tensor([float(len(group)) for group in usable])
    which = torch.multinomial(sizes, n, replacement=True, generator=generator).tolist()
    chosen = torch.stack([usable[w][torch.randperm(len(usable[w]), generator=generator)[:2]] for w in which])
    first, second = chosen.unbind(dim=1)
    chance = torch.sigmoid(slope * (pool.gold[first] - pool.gold[second]))
    label = (torch.rand(n, generator=generator) < chance).float()
    return Pairs(first, second, label, torch.maximum(chance, 1 - chance).mean().item())


def learn_reward(
    architecture: str,
    words: Sequence[str],
    pool: Pool,
    train: Pairs,
    validation: Pairs,
    *,
    seed: int,
    recipe: PreferenceRecipe,
    log: Log,
) -> LearnedReward:
    """A reward model by the Bradley-Terry loss, stopped where the validation loss is lowest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # fixes the initial weights and the dropout masks
        reward = LearnedReward(architecture, words)
        steps = recipe.epochs * math.ceil(len(train.first) / recipe.batch)
        optimizer = torch.optim.AdamW(reward.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, best_loss, waited = copy.deepcopy(reward.state_dict()), math.inf, 0
        for epoch in range(recipe.epochs):
            for rows in _batches(len(train.first), recipe.batch, seed=seed + epoch):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(
                    _margin(reward.train(), pool, train, rows), train.prefers_first[rows]
                ).backward()
                torch.nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            loss, accuracy = evaluate_reward(reward.eval(), pool, validation)
            log(f"  {architecture} epoch {epoch}: validation loss {loss:.4f}, accuracy {accuracy:.3f}")
            if loss < best_loss:
                best, best_loss, waited = copy.deepcopy(reward.state_dict()), loss, 0
            else:
                waited += 1
            if waited >= recipe.patience:
                break
    reward.load_state_dict(best)
    return reward.eval().requires_grad_(False)


@torch.no_grad()
def evaluate_reward(reward: LearnedReward, pool: Pool, pairs: Pairs) -> tuple[float, float]:
    """(Bradley-Terry loss, share of pairs ordered like their noisy label)."""
    margin = torch.cat([_margin(reward, pool, pairs, rows) for rows in torch.arange(len(pairs.first)).split(256)])
    loss = F.binary_cross_entropy_with_logits(margin, pairs.prefers_first)
    return loss.item(), ((margin > 0) == (pairs.prefers_first > 0.5)).float().mean().item()


@torch.no_grad()
def standardise(reward: LearnedReward, images: Float[Tensor, "n 3 32 32"], prompts: Sequence[str]) -> None:
    """Set the reward's mean and deviation over `images` to 0 and 1, in place."""
    scores = torch.cat([reward(images[i : i + 120], prompts[i : i + 120]) for i in range(0, len(prompts), 120)])
    reward.center += reward.spread * scores.mean()
    reward.spread *= scores.std()


def _margin(reward: LearnedReward, pool: Pool, pairs: Pairs, rows: Tensor) -> Tensor:
    both = torch.cat([pairs.first[rows], pairs.second[rows]])
    scores = reward(pool.images[both].float() / 255, [pool.prompts[i] for i in both.tolist()])
    first, second = scores.chunk(2)
    return first - second


def _batches(n: int, batch: int, *, seed: int) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=torch.Generator().manual_seed(seed)).split(batch)
