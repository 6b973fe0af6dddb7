"""FrontierStore: frontiers of what is kept, scales, files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rsaft.errors import ConfigError
from rsaft.pareto import FrontierStore
from rsaft.pareto.frontier import DESCRIPTION, MIN_SCALE, TENSORS
from tests.reference import pareto_transport as reference

PROMPTS, NAMES = ("a cat", "a dög"), ("clip", "hps", "ict")


def rewards(seed: int = 0) -> Tensor:
    return torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(store: FrontierStore, prompt: str, names: tuple[str, ...]) -> set[tuple[float, ...]]:
    front, mask = store.frontiers([prompt], names)
    return {tuple(row) for row in front[0][mask[0]].tolist()}


def as_set(rows: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(row) for row in rows.tolist()}


def test_frontiers_are_those_of_a_double_loop_and_padded_to_the_longest() -> None:
    store = FrontierStore(PROMPTS, NAMES, rewards())
    front, mask = store.frontiers(["a dög", "a cat"], NAMES)
    assert int(mask.sum(dim=1).max()) == front.shape[1]
    for row, prompt in enumerate(PROMPTS):
        assert points(store, prompt, NAMES) == as_set(reference.frontier(store.rewards[row].numpy()))
    assert front[1][mask[1]].tolist() == store.frontiers(["a cat"], NAMES)[0][0].tolist()


def test_the_frontier_without_a_reward_is_not_the_projection_of_the_old_one() -> None:
    values = torch.tensor([[[2.0, 2.0, 0.0], [1.0, 1.0, 5.0]]], dtype=torch.float64)
    store = FrontierStore(PROMPTS[:1], NAMES, values)
    assert points(store, "a cat", NAMES) == {(2.0, 2.0, 0.0), (1.0, 1.0, 5.0)}
    assert points(store, "a cat", NAMES[:2]) == {(2.0, 2.0)}


def test_a_sample_with_a_broken_reward_is_none() -> None:
    values = rewards()
    values[0, 3, 1], values[0, 5, 0] = torch.nan, torch.inf
    store = FrontierStore(PROMPTS, NAMES, values)
    good = torch.tensor([i for i in range(12) if i not in (3, 5)])
    assert points(store, "a cat", NAMES) == as_set(reference.frontier(values[0, good].numpy()))
    clean = FrontierStore(PROMPTS[:1], NAMES, values[:1, good])
    alone = FrontierStore(PROMPTS[:1], NAMES, values[:1])
    torch.testing.assert_close(alone.scales("prompt_pool", [], NAMES), clean.scales("prompt_pool", [], NAMES))


def test_scales_are_deviations_within_prompts_over_all_or_the_frontiers_width() -> None:
    values = rewards() + torch.tensor([[[0.0, 0.0, 0.0]], [[50.0, 0.0, 0.0]]])
    store = FrontierStore(PROMPTS, NAMES, values)
    within = values.var(dim=1, correction=0).mean(dim=0).sqrt()
    torch.testing.assert_close(store.scales("prompt_pool", PROMPTS, NAMES), within.expand(2, 3))
    over_all = values.flatten(0, 1).std(dim=0, correction=0)
    torch.testing.assert_close(store.scales("global", PROMPTS, NAMES), over_all.expand(2, 3))
    assert over_all[0] > 10 * within[0]
    front = reference.frontier(values[1].numpy())
    width = torch.from_numpy(front.max(axis=0) - front.min(axis=0))
    torch.testing.assert_close(store.scales("minmax", ["a dög"], NAMES)[0], width)
    assert torch.equal(store.scales("none", PROMPTS, NAMES), torch.ones(2, 3, dtype=torch.float64))


def test_a_reward_that_does_not_vary_is_not_blown_up() -> None:
    values = rewards()
    values[..., 1] = 7.0
    assert float(FrontierStore(PROMPTS, NAMES, values).scales("prompt_pool", PROMPTS, NAMES)[0, 1]) == MIN_SCALE


def test_saving_and_loading_is_exact(tmp_path: Path) -> None:
    values = rewards()
    values[0, 0, 0] = torch.nan
    store = FrontierStore(PROMPTS, NAMES, values, {"base": "abc", "steps": 10})
    store.save(tmp_path / "store")
    again = FrontierStore.load(tmp_path / "store")
    assert (again.prompts, again.names, dict(again.origin)) == (PROMPTS, NAMES, {"base": "abc", "steps": 10})
    assert torch.equal(again.rewards.view(torch.int64), values.view(torch.int64))


def damage_tensors(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)


def newer(folder: Path) -> None:
    about = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(about | {"format_version": 99}))


@pytest.mark.parametrize(
    ("hurt", "sentence"),
    [
        (damage_tensors, "rewards.safetensors is damaged"),
        (lambda folder: (folder / TENSORS).unlink(), "there is no .*rewards.safetensors; build them"),
        (lambda folder: (folder / DESCRIPTION).unlink(), "there is no .*frontier.json; build them"),
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "is damaged"),
        (newer, "has format 99, and this rsaft reads 1"),
    ],
    ids=["bit", "no tensors", "no description", "no json", "newer"],
)
def test_a_damaged_store_is_one_sentence(tmp_path: Path, hurt, sentence: str) -> None:
    FrontierStore(PROMPTS, NAMES, rewards()).save(tmp_path)
    hurt(tmp_path)
    with pytest.raises(ConfigError, match=sentence) as error:
        FrontierStore.load(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_run_that_the_frontiers_were_not_made_for_is_refused() -> None:
    store = FrontierStore(PROMPTS, NAMES, rewards(), {"base": "abc"})
    store.check({"base": "abc", "new": 1}, NAMES[1:])
    with pytest.raises(ConfigError, match="built with base = 'abc', and the run has 'xyz'"):
        store.check({"base": "xyz"}, NAMES)
    with pytest.raises(ConfigError, match=r"built without \['hp'\]"):
        store.check({"base": "abc"}, ("hp",))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((PROMPTS, NAMES[:2], rewards()), "2 prompts and 2 rewards need rewards of shape"),
        ((("p", "p"), NAMES, rewards()), "stands twice"),
        ((PROMPTS, NAMES, torch.full((2, 4, 3), torch.nan)), "'a cat' has no sample with finite rewards"),
    ],
)
def test_rewards_that_are_no_store_are_refused(arguments, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        FrontierStore(*arguments)
