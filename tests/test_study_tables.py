"""The tables of a study: who is compared with whom, and what is said where a run does not reach a level."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.testbed_tables import GOLD, S1, at_reward, at_step, best_of_run, compared, load, main, report

LEVEL = 0.5


def cell(method: str, seed: int, train: list[float], gold: list[float], lr: float = 1e-4) -> dict[str, Any]:
    rows = zip(train, gold, strict=True)
    evaluations = [
        {"step": 10 * i, "reward/train": t, GOLD: g, "held_out/vit": 2 * g, S1: t} for i, (t, g) in enumerate(rows)
    ]
    return {"world": "fashion", "method": method, "seed": seed, "lr": lr, "evaluations": evaluations}


def write(study: Path, *cells: dict[str, Any]) -> Path:
    (study / "fashion").mkdir(parents=True, exist_ok=True)
    for c in cells:
        (study / "fashion" / f"{c['method']}.seed{c['seed']}.json").write_text(json.dumps(c))
    return study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Plain has three seeds; `weight-0.1` two of them and one of its own, better by 0.1 and 0.3 where matched."""
    plain = [cell("plain", s, [0.0, 1.0, 2.0], [0.4, 0.4 + 0.1 * s, 0.2]) for s in (0, 1, 2)]
    weight = [
        cell("weight-0.1", 1, [0.0, 1.0, 1.5], [0.4, 0.7, 0.3]),
        cell("weight-0.1", 2, [0.0, 0.5, 1.2], [0.4, 0.8, 0.3]),
        cell("weight-0.1", 9, [0.0, 1.0, 1.2], [0.4, 9.9, 9.9]),
    ]
    slow = [cell("half-lr", s, [0.0, 0.3, 0.4 + s], [0.4, 0.5, 0.6], lr=5e-5) for s in (0, 1)]
    return write(tmp_path, *plain, *weight, *slow)


def test_methods_come_in_the_order_plain_controls_names_radii(study: Path):
    write(study, cell("weight-0.03", 0, [0.0], [0.0]), cell("both-1-0.01", 0, [0.0], [0.0]))
    names = list(load(study, "fashion"))
    assert names == ["plain", "half-lr", "both-1-0.01", "weight-0.03", "weight-0.1"]


def test_a_difference_is_over_the_seeds_that_both_have(study: Path):
    found = at_reward(load(study, "fashion"), GOLD, LEVEL)["weight-0.1"]
    # Halfway to 1.0: plain 0.45 (seed 1), 0.5 (seed 2); weight 0.55 and 0.8. Seed 9 has no partner.
    assert found.seeds == (1, 2)
    assert found.difference is not None
    assert found.difference[0] == pytest.approx((0.1 + 0.3) / 2)
    assert found.values == {1: pytest.approx(0.55), 2: pytest.approx(0.8), 9: pytest.approx(5.15)}


def test_plain_is_not_compared_with_itself_and_shows_its_standard_error(study: Path):
    found = at_reward(load(study, "fashion"), GOLD, LEVEL)["plain"]
    assert found.difference is None
    assert found.text == "0.450 +- 0.029"  # 0.40, 0.45, 0.50: deviation 0.05, over the root of 3


def test_where_a_run_does_not_reach_the_level_no_difference_is_given_and_it_is_said(study: Path):
    found = at_reward(load(study, "fashion"), GOLD, LEVEL)["half-lr"]
    assert found.difference is None
    assert (len(found.values), found.runs) == (1, 2)
    assert found.text.endswith("(1 of 2)")
    assert at_reward(load(study, "fashion"), GOLD, 1.9)["weight-0.1"].text == "0 of 3"


def test_a_plain_run_that_does_not_reach_the_level_takes_the_difference_away_too():
    found = compared({0: 1.0, 1: 2.0}, {0: 0.5, 1: None})
    assert found.difference is None
    assert found.values == {0: 1.0, 1: 2.0}


@pytest.mark.parametrize(("seeds", "has_interval"), [(1, False), (2, False), (3, True)])
def test_an_interval_needs_three_seeds(seeds: int, has_interval: bool):
    found = compared({s: 1.0 + 0.1 * s for s in range(seeds)}, dict.fromkeys(range(seeds), 0.5))
    assert ("[" in found.text) == has_interval
    assert found.text.endswith(f"n={seeds})")


def test_steps_and_the_best_of_the_run_are_compared_by_seed_as_well(study: Path):
    cells = load(study, "fashion")
    at_end = at_step(cells, GOLD, 20)["weight-0.1"].difference
    best = best_of_run(cells, GOLD)["weight-0.1"].difference
    assert at_end is not None
    assert best is not None
    assert at_end[0] == pytest.approx(0.1)
    assert best[0] == pytest.approx(((0.7 - 0.5) + (0.8 - 0.6)) / 2)


def test_runs_at_different_learning_rates_are_not_mixed(study: Path):
    write(study, cell("plain", 7, [0.0, 1.0, 2.0], [0.4, 0.4, 0.2], lr=1e-3))
    with pytest.raises(SystemExit, match="plain: its runs differ in lr"):
        load(study, "fashion")


def test_a_study_without_plain_runs_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="no finished cell of plain"):
        load(write(tmp_path, cell("half-lr", 0, [0.0], [0.0])), "fashion")


def test_cells_of_another_trainer_have_a_table_of_their_own(study: Path):
    write(study, cell("refl:plain", 0, [0.0, 1.0], [0.4, 0.5]), cell("refl:weight-0.1", 0, [0.0, 1.0], [0.4, 0.7]))
    assert list(load(study, "fashion")) == ["plain", "half-lr", "weight-0.1"]
    refl = load(study, "fashion", "refl")
    assert list(refl) == ["plain", "weight-0.1"]
    found = at_reward(refl, GOLD, LEVEL)["weight-0.1"].difference
    assert found is not None
    assert found[0] == pytest.approx(0.1)
    with pytest.raises(SystemExit, match=r"no finished cell of plain \(drtune\)"):
        load(study, "fashion", "drtune")


def test_the_page_has_held_out_rewards_sharpness_and_the_runs_that_reach_a_level(study: Path):
    text, numbers = report(load(study, "fashion"), "fashion", [LEVEL])
    for title in ("Gold at matched train reward", "held_out/vit at matched train reward", "S1 of the train reward"):
        assert f"## {title}" in text
    assert "| half-lr | 1 of 2 |" in text
    assert numbers["at_train_reward"]["held_out/vit"]["0.5"]["weight-0.1"]["difference"][0] == pytest.approx(0.4)


def test_the_command_writes_page_numbers_and_plot(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "results"
    monkeypatch.setattr("sys.argv", ["tables", str(study), "--methods", "weight-0.1", "--results", str(out)])
    main()
    assert {p.name for p in out.iterdir()} == {"rsa_ft_fashion.md", "rsa_ft_fashion.json", "rsa_ft_fashion.png"}
    saved = json.loads((out / "rsa_ft_fashion.json").read_text())
    assert list(saved["cells"]) == ["plain", "weight-0.1"]
    assert saved["levels"] == sorted(saved["levels"])
