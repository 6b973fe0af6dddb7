"""The exchanged shapes: batches keep their samples' keys, and plain callables meet the Protocols."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from rsaft.backbones import load_backbone
from rsaft.rdrl import DRaFT
from rsaft.sampling import Sampling
from rsaft.types import Algorithm, Backbone, Batch, Loss, Reward, Rollout, Sample
from tests.helpers import Counting, TinyFlow, batch_of, toy_reward


def test_selected_rows_keep_their_sample_ids():
    batch = Batch(("a", "b", "c"), (4, 5, 6), step=2, seed=3)
    assert batch.select([2, 0]) == Batch(("c", "a"), (6, 4), step=2, seed=3)


def test_a_batch_needs_one_id_for_each_prompt():
    with pytest.raises(ValueError, match="got 2 prompts and 1 ids"):
        Batch(("a", "b"), (0,), step=0, seed=0)


@pytest.mark.parametrize("reward", [toy_reward, lambda images, prompts: images.mean((1, 2, 3)), Counting()])
def test_any_callable_is_a_reward(reward):
    assert isinstance(reward, Reward)


def test_diffusers_and_flow_models_are_backbones(tiny_sd):
    assert isinstance(load_backbone(tiny_sd), Backbone)
    assert isinstance(TinyFlow(), Backbone)


def test_draft_is_an_algorithm_that_makes_rollouts():
    algorithm = DRaFT(sampling=Sampling(2))
    assert isinstance(algorithm, Algorithm)
    assert isinstance(algorithm.rollout(TinyFlow(), batch_of()), Rollout)


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        Loss(torch.zeros(()), torch.zeros(3), torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        Sample(torch.zeros(2, 4, 8), ("a", "b"), torch.arange(2))
