"""Keyed randomness: no draw depends on another, on the batch it is in, or on torch's global state."""

from __future__ import annotations

import pytest
import torch

from rsaft.randomness import generator, integer, key_of, normal, prompt_rows

CPU = torch.device("cpu")


def _normal(sample_ids, *, purpose="p", step=0, seed=0, dtype=torch.float32):
    return normal((4, 8, 8), seed=seed, purpose=purpose, step=step, sample_ids=sample_ids, device=CPU, dtype=dtype)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = _normal([0, 1, 2, 3])
    assert torch.equal(torch.cat([_normal([0, 1]), _normal([2, 3])]), whole)
    assert torch.equal(_normal([3, 1]), whole[[3, 1]])


@pytest.mark.parametrize("other", [{"purpose": "q"}, {"step": 1}, {"seed": 1}, {"sample_ids": [1]}])
def test_another_key_is_another_stream(other):
    a, b = _normal([0]).flatten(), _normal(**{"sample_ids": [0], **other}).flatten()
    # Independent noise: |correlation| of 256 values has a standard error of 1/16.
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.25


def test_noise_is_standard_normal():
    x = _normal(range(400))  # 102 400 values
    assert x.mean().abs() < 0.02
    assert x.std() == pytest.approx(1, abs=0.02)
    assert x.pow(4).mean() == pytest.approx(3, abs=0.15)


def test_noise_in_float64_is_the_noise_in_float32():
    assert torch.equal(_normal([0, 1], dtype=torch.float64), _normal([0, 1]).double())


def test_noise_is_drawn_in_float32_whatever_the_default():
    expected = _normal([0])
    torch.set_default_dtype(torch.float64)
    assert torch.equal(_normal([0]), expected)


def test_keys_do_not_run_into_each_other():
    keys = [key_of(s, p, i) for s in range(20) for p in ("a", "ab", "1") for i in range(20)]
    keys += [key_of(1, "a"), key_of(1, "a", 1, 1), key_of(11, "a", 1), key_of(1, "a", 11)]
    assert len(set(keys)) == len(keys) - 2  # (11, "a", 1) and (1, "a", 11) are there twice, on purpose
    assert all(0 <= k < 2**63 for k in keys)


def test_keys_are_the_same_in_every_version():
    # Old runs must be resumable, so the key of an argument never changes.
    assert key_of(0, "rollout", 3, 1) == KEY


KEY = 8_862_366_475_676_394_405


@pytest.mark.parametrize(
    "draw",
    [
        lambda: _normal([0, 1]),
        lambda: integer(0, 10, seed=0, purpose="p", step=0),
        lambda: prompt_rows(5, seed=0, step=3, batch_size=4),
        lambda: generator(0, "p"),
    ],
)
def test_a_draw_neither_reads_nor_moves_torchs_global_generator(draw):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = draw()
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif not isinstance(first, torch.Generator):
        assert first == second


def test_integers_cover_their_range():
    draws = [integer(3, 7, seed=0, purpose="p", step=s) for s in range(200)]
    assert set(draws) == {3, 4, 5, 6}


def test_every_epoch_shows_every_prompt_once():
    n, b = 10, 4
    rows = [r for step in range(5) for r in prompt_rows(n, seed=0, step=step, batch_size=b)]  # two epochs
    assert sorted(rows[:n]) == sorted(rows[n:]) == list(range(n))
    assert rows[:n] != rows[n:]


def test_any_step_can_be_asked_for_first():
    assert (
        prompt_rows(7, seed=0, step=100, batch_size=3)
        == [prompt_rows(7, seed=0, step=s, batch_size=3) for s in range(101)][100]
    )


def test_prompts_do_not_depend_on_how_positions_fall_into_batches():
    one = [r for s in range(12) for r in prompt_rows(5, seed=0, step=s, batch_size=1)]
    four = [r for s in range(3) for r in prompt_rows(5, seed=0, step=s, batch_size=4)]
    assert one == four


def test_a_batch_may_be_longer_than_the_prompt_list():
    assert sorted(prompt_rows(2, seed=0, step=0, batch_size=6)) == [0, 0, 0, 1, 1, 1]


def test_an_empty_prompt_list_is_refused():
    with pytest.raises(ValueError, match="the prompt list is empty"):
        prompt_rows(0, seed=0, step=0, batch_size=1)
