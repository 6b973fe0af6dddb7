"""Which prompts and samples an update, a process and a micro-batch get."""

from pathlib import Path

import pytest

from rsaft.errors import ConfigError
from rsaft.rdrl.batches import batches_of, micro_batch_ids, prompt_list, refuse_split_groups
from rsaft.rdrl.train_config import TrainConfig

PROMPTS = [f"prompt {i}" for i in range(7)]


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 3), (2, None), (2, 2), (3, 1), (4, 3)])
def test_the_processes_and_their_micro_batches_share_the_batch_in_equal_parts(world: int, micro: int | None):
    config = TrainConfig(batch_size=12, micro_batch=micro)
    parts = [part for rank in range(world) for part in micro_batch_ids(config, world=world, rank=rank)]
    assert [i for part in parts for i in part] == list(range(12))
    assert {len(part) for part in parts} == {micro or 12 // world}


@pytest.mark.parametrize(("size", "world", "micro"), [(5, 2, None), (8, 2, 3), (4, 8, None)])
def test_an_uneven_split_is_refused_with_a_size_that_works(size: int, world: int, micro: int | None):
    config = TrainConfig(batch_size=size, micro_batch=micro)
    with pytest.raises(ConfigError, match=rf"{size} samples must split evenly over {world} processes"):
        micro_batch_ids(config, world=world, rank=0)


def test_a_sample_has_the_same_prompt_however_the_batch_is_split():
    whole = batches_of(3, prompts=PROMPTS, seed=0, batch_size=4, parts=[range(4)])[0]
    split = batches_of(3, prompts=PROMPTS, seed=0, batch_size=4, parts=[range(0, 1), range(1, 4)])
    assert tuple(p for batch in split for p in batch.prompts) == whole.prompts
    assert tuple(i for batch in split for i in batch.sample_ids) == whole.sample_ids == (0, 1, 2, 3)
    assert {(batch.step, batch.seed) for batch in split} == {(3, 0)}


def test_every_prompt_is_drawn_once_an_epoch():
    drawn = [p for step in range(7) for p in batches_of(step, prompts=PROMPTS, seed=1, batch_size=2, parts=[range(2)])]
    texts = [text for batch in drawn for text in batch.prompts]
    assert sorted(texts[:7]) == sorted(texts[7:]) == PROMPTS


def test_prompts_are_a_list_or_a_file(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n", encoding="utf-8")
    assert prompt_list(file) == prompt_list(str(file)) == prompt_list(("a cat", "a dog")) == ["a cat", "a dog"]


def test_an_empty_prompt_list_is_refused():
    with pytest.raises(ConfigError, match="give at least one prompt"):
        prompt_list([])


@pytest.mark.parametrize("parts", [[range(12)], [range(6), range(6, 12)], [range(i, i + 2) for i in range(0, 12, 2)]])
def test_the_samples_of_a_group_share_their_prompt_however_the_batch_is_split(parts: list[range]):
    batches = batches_of(2, prompts=PROMPTS, seed=0, batch_size=12, parts=parts, group_size=3)
    texts = [text for batch in batches for text in batch.prompts]
    (one_each,) = batches_of(2, prompts=PROMPTS, seed=0, batch_size=4, parts=[range(4)])
    assert texts == [text for text in one_each.prompts for _ in range(3)]
    assert [i for batch in batches for i in batch.sample_ids] == list(range(12))


def test_a_group_size_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ConfigError, match="group_size divides it; got 5"):
        TrainConfig(batch_size=12, group_size=5)


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 4), (1, 8), (2, None), (4, None), (2, 4), (4, 4)])
def test_groups_may_be_spread_over_processes_but_not_over_micro_batches(world: int, micro: int | None):
    config = TrainConfig(batch_size=16, group_size=4, micro_batch=micro)
    refuse_split_groups(config, world=world)
    by_rank = [micro_batch_ids(config, world=world, rank=rank) for rank in range(world)]
    for together in zip(*by_rank, strict=True):  # what all processes have in memory at once
        ids = [i for part in together for i in part]
        assert all(sum(i // 4 == group for i in ids) == 4 for group in {i // 4 for i in ids})


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 2), (1, 1)])
def test_groups_that_micro_batches_cut_apart_are_refused(world: int, micro: int):
    with pytest.raises(ConfigError, match=f"micro-batches of {micro} cut them apart; choose a multiple of 4"):
        refuse_split_groups(TrainConfig(batch_size=16, group_size=4, micro_batch=micro), world=world)
