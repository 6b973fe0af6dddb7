"""What the record of an update says of its samples."""

import pytest
import torch

from rsaft.rdrl.update_record import nonfinite_sentence, update_record
from rsaft.types import Batch, Loss, StepOutput

NAN = float("nan")


def loss(value: float, rewards: list[list[float]], valid: list[bool]) -> Loss:
    return Loss(torch.tensor(value), torch.zeros(len(valid)), torch.tensor(rewards), torch.tensor(valid))


def test_a_record_is_the_mean_over_the_samples_that_were_not_masked():
    losses = (loss(0.5, [[1.0, 2.0], [3.0, 6.0]], [True, True]), loss(0.25, [[8.0, NAN], [5.0, 4.0]], [False, True]))
    record, share = update_record(StepOutput(losses, {"extra": 7.0}), ["a", "b"], step=3, device=torch.device("cpu"))
    assert share == 0.75
    assert record == {
        "kind": "train",
        "step": 3,
        "loss": pytest.approx(1.5 / 3),
        "reward/a": 3.0,
        "reward/b": 4.0,
        "nonfinite/reward": 1,
        "extra": 7.0,
    }


def test_with_every_sample_masked_a_reward_is_none():
    output = StepOutput((loss(0.0, [[NAN]], [False]),))
    record, share = update_record(output, ["a"], step=1, device=torch.device("cpu"))
    assert share == 0.0
    assert record["reward/a"] is None


def test_the_sentence_names_the_rewards_that_were_not_finite():
    output = StepOutput((loss(0.0, [[1.0, NAN], [2.0, 3.0]], [False, True]),))
    batch = Batch(("a cat", "a dog"), (0, 1), step=6, seed=0)
    sentence = nonfinite_sentence(output, ["good", "bad"], batch, in_a_row=4)
    assert "step 7: no finite gradient for 4 updates in a row" in sentence
    assert "['bad']" in sentence
    assert "first prompt 'a cat'" in sentence
