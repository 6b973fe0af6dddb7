"""The examples run, and do what they say."""

import math
from pathlib import Path

import examples.own_loop as own_loop


def test_rsa_ft_in_a_loop_of_ones_own_trains():
    history = own_loop.train(steps=4, batch_size=4)
    assert len(history) == 4
    assert all(math.isfinite(reward) for reward in history)
    assert len(set(history)) == 4  # the weights moved, and the prompts differ


def test_the_loop_of_ones_own_is_short_and_uses_no_trainer():
    source = Path(own_loop.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    assert "Trainer(" not in source
