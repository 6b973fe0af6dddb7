"""The study of PG-OT: what its methods are, what it says of samples whose story is known, and one short cell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import pareto_study, testbed_study
from benchmarks.pareto_study import NAMES, joint, method, run_cell, table
from rsaft.pareto import FrontierStore, ParetoTransport
from rsaft.rdrl import WeightedSum
from rsaft.testbed import DATA


@pytest.fixture
def store() -> FrontierStore:
    return FrontierStore(("p",), NAMES, torch.rand(1, 5, 4, dtype=torch.float64))


def test_methods_are_named_after_what_they_do(store: FrontierStore) -> None:
    assert method("sum-4411", store) == (WeightedSum(dict(zip(NAMES, (0.4, 0.4, 0.1, 0.1), strict=True))), None)
    assert method("single-vit", store)[0] == WeightedSum({"vit": 1.0})
    full, agent = method("pg-ot", store)
    assert isinstance(full, ParetoTransport)
    assert agent is not None
    assert agent.weak == ("mixer", "vit")
    assert method("offline", store) == (full, None)
    assert method("online", store)[0].strategy == "online"
    assert method("reg-0.5", store)[0].reg == 0.5
    assert (method("bound-1111", store)[0].bound, method("global-1111", store)[0].bound) == ("prompt", "mean")
    with pytest.raises(SystemExit, match="there is no method 'sum-9999'"):
        method("sum-9999", store)


def write(run: Path, step: int, **scores: list[float]) -> None:
    (run / "samples").mkdir(exist_ok=True)
    named = {f"reward/{name}": scores[name] for name in NAMES} | {"held_out/gold": scores["gold"]}
    (run / "samples" / f"step-{step:06d}.json").write_text(json.dumps({"step": step, "scores": named}))


def test_rates_are_taken_over_the_strong_over_all_trained_and_over_the_judges(tmp_path: Path) -> None:
    zeros = {key: [0.0, 0.0] for key in (*NAMES, "gold")}
    write(tmp_path, 0, **zeros)
    write(tmp_path, 50, train=[1, 1], cnn2=[1, -1], mixer=[1, -1], vit=[-1, -1], gold=[-1, 1])
    first, last = joint(tmp_path)
    assert set(first.values()) == {0.0}
    rates = {key: last[key] for key in ("jdr/strong", "jdr/trained", "jcr/trained", "jdr/judged", "jcr/judged")}
    assert rates == {"jdr/strong": 0.5, "jdr/trained": 0.0, "jcr/trained": 0.0, "jdr/judged": 0.5, "jcr/judged": 0.5}
    assert last["win/reward/train"] == 1.0


def test_the_table_has_the_mean_over_seeds() -> None:
    rates = dict.fromkeys(pareto_study.COLUMNS[:-1], 0.25)
    cells = [
        {"method": "offline", "joint": [{"step": 50, **rates}], "evaluations": [{"step": 50, "held_out/gold": gold}]}
        for gold in (0.4, 0.6)
    ]
    row = table(cells, 50)[2]
    assert row.startswith("| offline | 2 | 0.250 [0.250, 0.250] |")
    assert row.endswith("| 0.500 [0.400, 0.600] |")


@pytest.mark.slow
def test_a_short_cell_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(testbed_study.SETTINGS["fashion"], steps=2, eval_every=1, eval_samples=4)
    monkeypatch.setitem(testbed_study.SETTINGS, "fashion", short)
    monkeypatch.setattr(pareto_study, "CANDIDATES", 3)
    monkeypatch.setattr(pareto_study, "INTERVAL", 2)
    run_cell("fashion", "pg-ot", 0, DATA / "fashion" / "rewards", tmp_path)
    cell = json.loads((tmp_path / "fashion" / "pg-ot.seed0.json").read_text())
    assert [row["step"] for row in cell["joint"]] == [0, 1, 2]
    assert "held_out/B-train" in cell["evaluations"][0]
    assert (tmp_path / "fashion/runs/pg-ot.seed0/agent/agent.jsonl").is_file()
    assert FrontierStore.load(tmp_path / "fashion" / "frontiers").rewards.shape == (48, 3, 4)
