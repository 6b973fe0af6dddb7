"""The cost table: every mode is one of the study's methods, and a problem's figures are written when it is done."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.flatten_cost import Update, main, modes, of_a_period
from benchmarks.testbed_study import method


def test_a_mode_and_the_studys_method_of_its_name_are_the_same_step():
    for name, mode in modes(1.0, 0.01).items():
        assert method(mode.study) == (mode.step, 1.0), name


def test_an_epsilon_for_n_updates_costs_one_of_n_with_it_new():
    assert of_a_period(Update(2.0, 20.0, 7.0), Update(1.0, 10.0, 5.0), 4) == Update(1.25, 12.5, 7.0)
    every = {name: mode.every for name, mode in modes(1.0, 0.01).items() if mode.every > 1}
    assert every == {
        "weight, every 4": 4,
        "weight, every 16": 16,
        "weight, share 1/16, every 4": 4,
        "weight, LookSAM every 4": 4,
    }


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    """The stored results after a call that measures the plain step and other modes on one sample of two steps."""
    small = ["--problems", "fashion", "--steps", "2", "--batch", "1", "--results", str(folder)]
    monkeypatch.setattr("sys.argv", ["flatten_cost", *small, *arguments])
    main()
    found: dict[str, Any] = json.loads((folder / "flatten_cost.json").read_text())
    return found


def test_modes_that_keep_their_epsilon_are_measured_at_the_calls_of_a_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = ["weight, every 4", "weight, every 16", "weight, LookSAM every 4"]
    results = run(monkeypatch, tmp_path, "--trainers", "draft", "--repeats", "1", "--modes", *chosen)
    rows = results["fashion, draft"]["modes"]
    assert {name: row["calls"] for name, row in rows.items()} == {
        "plain": 2,
        "weight, every 4": 2.5,
        "weight, every 16": 2.125,
        "weight, LookSAM every 4": 2.5,
    }


def test_a_coarse_first_pass_of_3_steps_is_measured_for_drtune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mode = "weight, first pass of 3 steps"
    results = run(monkeypatch, tmp_path, "--trainers", "drtune", "--repeats", "1", "--steps", "6", "--modes", mode)
    rows = results["fashion, drtune"]["modes"]
    assert rows["plain"]["calls"] + 2 <= rows[mode]["calls"] <= rows["plain"]["calls"] + 2 * 3


def test_results_of_an_older_version_are_left_out_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    row = {"seconds": 1.0, "ratio": 1.0, "peak_mib": 2.0, "outcome": None}
    old = {"title": "old", "measured": "long ago", "outcome": "", "modes": {"plain": row}}
    kept = {"title": "kept", "measured": "lately", "outcome": "", "modes": {"plain": row | {"calls": 50.0}}}
    (tmp_path / "flatten_cost.json").write_text(json.dumps({"fashion": old, "narrow, refl": kept, "narrow": {}}))
    results = run(monkeypatch, tmp_path, "--trainers", "draft", "--repeats", "1", "--modes", "input")
    assert list(results) == ["narrow, refl", "fashion, draft"]
    assert results["narrow, refl"] == kept
    assert "flatten_cost.json: fashion, narrow were measured by an older version" in capsys.readouterr().out
    assert "## kept" in (tmp_path / "flatten_cost.md").read_text()


def test_figures_are_written_after_a_problem_and_those_of_other_problems_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    earlier = {"title": "earlier", "measured": "long ago", "outcome": "", "modes": {}}
    (tmp_path / "flatten_cost.json").write_text(json.dumps({"narrow": earlier}))
    results = run(monkeypatch, tmp_path, "--trainers", "draft", "refl", "--repeats", "2", "--modes", "input")
    assert results["narrow"] == earlier
    assert list(results) == ["narrow", "fashion, draft", "fashion, refl"]
    for trainer in ("draft", "refl"):
        found = results[f"fashion, {trainer}"]["modes"]
        assert list(found) == ["plain", "input"]
        assert found["plain"]["ratio"] == 1.0
        assert found["input"]["seconds"] > 0
        assert found["input"]["calls"] == found["plain"]["calls"] == 2  # ReFL stops at the last of 2 steps: also 2
    page = (tmp_path / "flatten_cost.md").read_text()
    assert "## earlier" in page
    assert "| input |" in page
    lines = [line for line in capsys.readouterr().err.splitlines() if ": update " in line]
    assert len(lines) == 2 * 2 * (1 + 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--repeats", "0"], "at least 1; got 0"), (["--modes", "wight"], "['wight']")]
)
def test_arguments_without_a_meaning_are_refused(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.argv", ["flatten_cost", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert sentence in capsys.readouterr().err
