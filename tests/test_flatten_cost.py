"""The cost table: every mode is one of the study's methods, and a problem's figures are written when it is done."""

import json
from pathlib import Path

import pytest

from benchmarks.flatten_cost import EVERY, main, modes
from benchmarks.testbed_study import method


def test_a_mode_and_the_studys_method_of_its_name_are_the_same_step():
    for name, mode in modes(1.0, 0.01).items():
        assert method(mode.study) == (mode.step, 1.0), name


def test_figures_are_written_after_a_problem_and_those_of_other_problems_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    earlier = {"title": "earlier", "measured": "long ago", "outcome": "", "modes": {}}
    (tmp_path / "flatten_cost.json").write_text(json.dumps({"narrow": earlier}))
    arguments = [
        "--problems",
        "fashion",
        "--trainers",
        "draft",
        "refl",
        "--modes",
        "input",
        "--steps",
        "2",
        "--batch",
        "1",
        "--results",
        tmp_path,
    ]
    monkeypatch.setattr("sys.argv", ["flatten_cost", *map(str, arguments)])
    main()
    results = json.loads((tmp_path / "flatten_cost.json").read_text())
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
    assert len(lines) == 2 * 2 * (1 + EVERY)


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--repeats", "3"], "a multiple of it; got 3"), (["--modes", "wight"], "['wight']")]
)
def test_arguments_without_a_meaning_are_refused(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.argv", ["flatten_cost", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert sentence in capsys.readouterr().err
