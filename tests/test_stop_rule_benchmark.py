"""The stop rule's benchmark: what it takes for truth, and what it says of runs whose story is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import stop_rule
from benchmarks.stop_rule import BASELINES, Looks, alarm_table, groups, read, regret, regret_table, truth

STEPS = [0, 25, 50, 75, 100, 125]
RISING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
FOLLOWING = [0.0, 0.5, 1.0, 1.02, 1.04, 1.06]  # until update 50
GOLD = [0.5, 0.6, 0.7, 0.6, 0.5, 0.4]


def write_cell(study: Path, name: str, gold: list[float], held_out: list[float] = FOLLOWING) -> None:
    """A finished cell of the study on fashion: its JSON, and 12 samples an evaluation."""
    samples = study / "fashion" / "runs" / name / "samples"
    samples.mkdir(parents=True)
    spread = [((5 * i) % 12) / 6 - 1 for i in range(12)]
    for step, *means in zip(STEPS, RISING, held_out, gold, strict=True):
        wobble = [0.01 * ((3 * i + step) % 5 - 2) for i in range(12)]
        noisy = [[m + s + w for s, w in zip(spread, wobble, strict=True)] for m in means]
        keys = ("reward/train", "held_out/vit", "held_out/gold")
        record = {"step": step, "prompts": [f"p{i}" for i in range(12)], "scores": dict(zip(keys, noisy, strict=True))}
        (samples / f"step-{step:06d}.json").write_text(json.dumps(record))
    (study / "fashion" / f"{name}.json").write_text(json.dumps({"evaluations": STEPS}))


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Looks]:
    write_cell(tmp_path, "plain.seed0", GOLD)
    write_cell(tmp_path, "refl:half-lr.seed3", sorted(GOLD), RISING)
    (tmp_path / "fashion" / "runs" / "unfinished.seed0" / "samples").mkdir(parents=True)
    return {f"{run.trainer}:{run.method}": run for run in read(tmp_path)}


def test_finished_cells_are_read_with_their_trainer_method_and_seed(runs):
    assert set(runs) == {"draft:plain", "refl:half-lr"}
    assert (runs["refl:half-lr"].seed, runs["refl:half-lr"].steps) == (3, STEPS)
    assert "held_out/gold" not in runs["draft:plain"].held_out


def test_a_run_is_hacked_from_the_first_significant_fall_of_gold(runs):
    assert (truth(runs["draft:plain"]).best, truth(runs["draft:plain"]).hacked) == (2, 3)
    assert truth(runs["draft:plain"]).gain == pytest.approx(0.2)
    assert truth(runs["refl:half-lr"]).hacked is None


def test_regret_is_what_the_kept_look_lacks(runs):
    run = runs["draft:plain"]
    assert regret(run, 2) == 0
    assert regret(run, BASELINES["last checkpoint"](run)) == pytest.approx(0.3)
    assert regret(run, BASELINES["best train reward"](run)) == pytest.approx(0.3)
    assert regret(run, BASELINES["the base model"](run)) == pytest.approx(0.2)


def test_the_tables_tell_hacked_runs_from_honest_ones(runs):
    by_group = groups(list(runs.values()))
    assert list(by_group) == ["draft, fashion, plain (calibration)", "refl, fashion, others"]
    first, second = regret_table(by_group)[2:]
    assert "**0.000** (0% of the gain)" in first
    assert "**0.000** (0% of the gain)" in second
    hacked, honest = alarm_table(by_group)[2:]
    assert hacked == "| draft, fashion, plain (calibration) | 1 | 1 | 1 | +2 | 0 of 1 |"
    assert honest == "| refl, fashion, others | 1 | 0 | 0 | – | 0 of 1 |"


def test_the_kl_baseline_keeps_the_last_look_below_its_threshold(tmp_path: Path):
    write_cell(tmp_path, "plain.seed0", GOLD)
    distances = {str(step): 0.05 * k for k, step in enumerate(STEPS)}
    (tmp_path / "fashion" / "runs" / "plain.seed0" / "kl.json").write_text(json.dumps(distances))
    (run,) = read(tmp_path)
    assert stop_rule.below_kl(run) == 2  # .10 is below .12, .15 is not


def test_the_page_and_its_numbers_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    write_cell(tmp_path, "plain.seed0", GOLD)
    monkeypatch.setattr("sys.argv", ["stop_rule", str(tmp_path), "--results", str(tmp_path / "out")])
    stop_rule.main()
    (cell,) = json.loads((tmp_path / "out" / "stop_rule.json").read_text())["runs"]
    assert (cell["keep"], cell["alarm"]) == (2, 5)
    assert "## Median regret" in capsys.readouterr().out
