"""Pairs, means over prompts, dropped scores and the tidy table, on numbers that can be checked by hand."""

import io

import pyarrow.parquet as pq
import pytest
import torch

from rsaft.metrics.score_page import as_json, markdown
from rsaft.metrics.score_table import PartScores, parquet, summary
from rsaft.metrics.scoring import Item

NAN = float("nan")


def part(run: str, keys: list[tuple[int, int]], **scores: list[float]) -> PartScores:
    """Scores of images with these (prompt_id, seed)."""
    items = tuple(Item(i, f"prompt {i}", seed) for i, seed in keys)
    return PartScores(run, 5, items, {name: torch.tensor(v, dtype=torch.float64) for name, v in scores.items()})


KEYS = [(0, 0), (0, 1), (1, 0), (2, 0)]
TUNED = part("run", KEYS, a=[1.0, 3.0, 5.0, NAN], b=[0.0, 0.0, 1.0, 9.0])
BASE = part("base", KEYS, a=[0.0, 4.0, 1.0, 0.0], b=[0.0, 1.0, 0.0, 0.0])


def test_every_prompt_counts_once_and_pairs_with_a_score_that_is_not_finite_are_dropped():
    found = summary(TUNED, BASE).rewards["a"]
    assert found.tuned.values == {0: 2.0, 1: 5.0}
    assert found.tuned.mean == 3.5
    assert found.base_mean == 1.5  # of 2 and 1
    assert found.tuned.difference is not None
    assert found.tuned.difference[0] == 2.0  # of (1 - 1) / 2 = 0 and 4
    assert (found.pairs, found.nonfinite) == (3, {"tuned": 1, "base": 0})
    assert found.win_rate is not None
    assert found.win_rate[0] == 0.75  # of 1/2 and 1


def test_joint_rates_are_over_pairs_with_all_scores_finite():
    joint = summary(TUNED, BASE).joint
    assert joint is not None
    assert joint.pairs == 3
    assert joint.jdr[0] == 0.5  # prompt 0: a tie in b, and a loss; prompt 1: a win
    assert joint.jcr[0] == 0.25
    assert joint.ties == 0.25
    assert joint.chance == 0.25


def test_images_pair_by_prompt_and_seed_whatever_their_order():
    order = [2, 0, 3, 1]
    shuffled = part("base", [KEYS[i] for i in order], **{k: v[order].tolist() for k, v in BASE.scores.items()})
    assert as_json(summary(TUNED, shuffled)) == as_json(summary(TUNED, BASE))


def test_images_without_a_counterpart_are_counted_and_left_out():
    found = summary(TUNED, part("base", [(0, 0), (7, 0)], a=[0.0, 1.0], b=[0.0, 1.0]))
    assert found.unpaired == {"tuned": 3, "base": 1}
    assert found.rewards["b"].pairs == 1
    assert "left out: 3 of the tuned model and 1 of the base model" in markdown(found)


def test_an_interval_is_over_prompts_and_not_over_images():
    alike = [(i, k) for i in range(12) for k in range(50)]
    values = [float(i) for i, _ in alike]
    many = summary(part("r", alike, a=values), None).rewards["a"].interval
    few = summary(part("r", [(i, 0) for i in range(12)], a=[float(i) for i in range(12)]), None).rewards["a"].interval
    assert many == few


def test_a_model_against_itself_has_no_difference_and_no_wins():
    keys = [(i, 0) for i in range(12)]
    mine = part("r", keys, a=list(range(12)), b=[1.0] * 12)
    found = summary(mine, mine)
    assert found.rewards["a"].tuned.difference == (0.0, 0.0, 0.0)
    assert found.rewards["a"].win_rate == (0.0, 0.0, 0.0)
    assert found.joint is not None
    assert (found.joint.jdr[0], found.joint.jcr[0], found.joint.ties) == (0.0, 0.0, 1.0)


def test_categories_hold_their_own_prompts_only():
    found = summary(TUNED, BASE, {0: "Animals", 1: "Food"})
    assert set(found.categories) == {"Animals", "Food"}
    assert found.categories["Food"]["a"].tuned.difference == (4.0, 4.0, 4.0)
    assert "| Animals " in markdown(found)


def test_nothing_finite_has_a_count_and_no_mean():
    found = summary(part("r", [(0, 0)], a=[NAN]), part("base", [(0, 0)], a=[1.0]))
    assert as_json(found)["rewards"]["a"]["mean"] is None
    assert found.joint is None
    assert "| a " in markdown(found)


def test_parts_with_other_rewards_are_refused():
    with pytest.raises(ValueError, match="both parts have the same rewards"):
        summary(TUNED, part("base", KEYS, a=[0.0] * 4))


def test_the_table_is_tidy_has_null_for_what_is_not_finite_and_the_same_bytes_each_time():
    data = parquet([BASE, TUNED])
    table = pq.read_table(io.BytesIO(data))
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("run", "string"),
        ("step", "int64"),
        ("prompt_id", "int64"),
        ("prompt", "string"),
        ("seed", "int64"),
        ("reward", "string"),
        ("score", "double"),
    ]
    assert table.num_rows == 16
    assert table.slice(14, 1).to_pylist() == [
        {"run": "run", "step": 5, "prompt_id": 2, "prompt": "prompt 2", "seed": 0, "reward": "a", "score": None}
    ]
    assert parquet([BASE, TUNED]) == data
