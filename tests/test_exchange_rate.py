"""The exchange rate: weights come back, every direction is read at one gain, and plain's rate is its own measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import exchange_rate
from benchmarks.exchange_rate import AGAIN, GAIN, at_gain, cosine, direction, gradient, moved, scores, table
from benchmarks.testbed_study import TRAINERS, method
from rsaft import testbed


@pytest.fixture(scope="module")
def bed() -> testbed.Testbed:
    return testbed.load("fashion")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_rate, "SAMPLES", 8)
    monkeypatch.setattr(exchange_rate, "UPDATES", 2)
    monkeypatch.setattr(exchange_rate, "BATCH", 8)
    monkeypatch.setattr(exchange_rate, "GAIN", 0.03)  # two updates' mean is too noisy for more


def test_scores_are_read_at_the_gain_and_weights_come_back(bed: testbed.Testbed) -> None:
    before = [p.detach().clone() for p in bed.backbone.parameters()]
    start = scores(bed)
    slope = gradient(bed, TRAINERS["draft"], method("plain")[0], first=0)
    changes = at_gain(bed, direction(slope, slope), start)
    assert sum(changes["reward/train"]) / 8 == pytest.approx(0.03, abs=1e-5)
    assert all(len(x) == 8 for x in changes.values())
    assert all(torch.equal(p, b) for p, b in zip(bed.backbone.parameters(), before, strict=True))


def test_a_direction_of_length_zero_changes_no_score(bed: testbed.Testbed) -> None:
    start = scores(bed)
    still = moved(bed, [torch.ones_like(p) for p in bed.backbone.parameters()], 0.0)
    assert all(torch.equal(still[k], start[k]) for k in start)


def test_a_direction_that_lowers_the_reward_is_said_to_reach_no_gain(bed: testbed.Testbed) -> None:
    start = scores(bed)
    slope = gradient(bed, TRAINERS["draft"], method("plain")[0], first=0)
    assert at_gain(bed, [-d for d in direction(slope, slope)], start) == {}


def test_the_cosine_is_that_of_all_tensors_together() -> None:
    a, b = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])], [torch.tensor([3.0]), torch.tensor([4.0, 0.0])]
    assert cosine(a, b) == pytest.approx(9 / 25)


def test_a_direction_goes_downhill_and_weighs_all_tensors_alike() -> None:
    plain = [torch.tensor([3.0, -4.0]), torch.tensor([0.01, 0.01])]
    first, second = direction(plain, plain)
    assert first.square().mean() == pytest.approx(1.0)
    assert second.square().mean() == pytest.approx(1.0)
    assert torch.equal(first.sign(), torch.tensor([-1.0, 1.0]))


def test_the_table_gives_each_gain_in_gold_and_its_difference_to_plain(tmp_path: Path) -> None:
    def write(name: str, gold: list[float]) -> None:
        changes = {"reward/train": [GAIN, GAIN], "held_out/vit": [0.1, 0.3], "held_out/gold": gold} if gold else {}
        (tmp_path / f"{name}.json").write_text(json.dumps({"method": name, "cosine": 0.5, "changes": changes}))

    write("plain", [0.02, 0.04])
    write(AGAIN, [0.03, 0.05])
    write("input-10", [])
    rows = table(tmp_path)
    assert any(row.startswith("| plain | 0.500 | +0.0300 |  | +0.200 |") for row in rows)
    assert any(row.startswith(f"| {AGAIN} | 0.500 | +0.0400 | +0.0100 [+0.0100, +0.0100]") for row in rows)
    assert any(row.startswith("| input-10 | 0.500 | the train reward does not rise |") for row in rows)
