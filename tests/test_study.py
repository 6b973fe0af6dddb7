"""The study: what its methods' names stand for, and one cell from start to finish."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import testbed_study
from benchmarks.controls import CoarseFirstPass, FriendlySAM, LookSAM, ProductMetric, RandomPerturbation
from benchmarks.testbed_study import SETTINGS, TRAINERS, main, method, run_cell, trainer_and_method
from rsaft.flatten import RSAFT
from rsaft.rdrl import ReFL, plain_step
from rsaft.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [
        ("plain", plain_step, 1.0),
        ("half-lr", plain_step, 0.5),
        ("kl-1e-2", plain_step, 1.0),
        ("gated-1e-2", plain_step, 1.0),
        ("annealed-1", plain_step, 1.0),
        ("weight-1e-3", RSAFT(0.0, 0.001, mode="weight"), 1.0),
        ("input-10", RSAFT(10.0, 0.0, mode="input"), 1.0),
        ("both-1-0.01", RSAFT(1.0, 0.01, mode="both"), 1.0),
        ("random-0.01", RandomPerturbation(0.01), 1.0),
        ("cached-0.01", RSAFT(0.0, 0.01, mode="weight", reuse="cached"), 1.0),
        ("last3-0.01", RSAFT(0.0, 0.01, mode="weight", reuse=3), 1.0),
        ("share16-0.01", RSAFT(0.0, 0.01, mode="weight", eps_share=1 / 16), 1.0),
        ("every4-0.01", RSAFT(0.0, 0.01, mode="weight", eps_every=4), 1.0),
        ("linf-0.05", RSAFT(0.05, 0.0, mode="input", norm="linf"), 1.0),
        ("rms-0.02", RSAFT(0.02, 0.0, mode="input", norm="rms"), 1.0),
        ("gaussian-1", RSAFT(1.0, 0.0, mode="input", smoothing="gaussian"), 1.0),
        ("latent-1", RSAFT(1.0, 0.0, mode="input", space="latent"), 1.0),
        ("pgd4-1", RSAFT(1.0, 0.0, mode="input", delta_steps=4), 1.0),
        ("perturbed-1-0.01", RSAFT(1.0, 0.01, mode="both", delta_from="perturbed"), 1.0),
        ("looksam5-0.01", LookSAM(0.01, every=5), 1.0),
        ("fsam-0.01", FriendlySAM(0.01), 1.0),
        ("coarse3-0.01", CoarseFirstPass(0.01, num_steps=3), 1.0),
        ("product-0.01", ProductMetric(0.01), 1.0),
        ("share16every4-0.01", RSAFT(0.0, 0.01, mode="weight", eps_share=1 / 16, eps_every=4), 1.0),
    ],
)
def test_a_name_stands_for_its_step_and_learning_rate(name: str, step: object, factor: float):
    assert method(name) == (step, factor)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"(?s)no method 'wight-1'; .*half-lr"):
        method("wight-1")


def evaluations(out: Path, name: str) -> list[dict[str, float]]:
    """Of one cell of seed 0, made here with few images."""
    run_cell("fashion", name, 0, out, keep_weights=True)
    found: list[dict[str, float]] = json.loads((out / "fashion" / f"{name}.seed0.json").read_text())["evaluations"]
    return found


@pytest.mark.slow
def test_the_baselines_differ_from_plain_after_their_first_update_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = replace(SETTINGS["fashion"], steps=3, batch_size=4, num_steps=2, eval_every=3, eval_samples=2)
    monkeypatch.setitem(testbed_study.SETTINGS, "fashion", small)
    plain, *others = (evaluations(tmp_path, name) for name in ("plain", "kl-1e6", "gated-1e6", "annealed-1"))
    for other in others:
        assert [e["step"] for e in other] == [0, 3]
        assert other[0]["reward/train"] == pytest.approx(plain[0]["reward/train"], abs=1e-6)
        assert other[1]["reward/train"] != pytest.approx(plain[1]["reward/train"], abs=1e-6)
    untrained, annealed = plain[0]["reward/train"], others[2][1]["reward/train"]
    assert abs(annealed - untrained) < abs(plain[1]["reward/train"] - untrained)  # part of the way from the base


def test_annealing_without_kept_weights_says_what_to_run(tmp_path: Path):
    with pytest.raises(SystemExit, match="run plain with --keep-weights first"):
        run_cell("fashion", "annealed-1", 0, tmp_path)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("plain", ("draft", "plain")),
        ("weight-1e-3", ("draft", "weight-1e-3")),
        ("refl:weight-0.01", ("refl", "weight-0.01")),
        ("drtune:plain", ("drtune", "plain")),
    ],
)
def test_a_name_may_carry_a_trainer(name: str, parts: tuple[str, str]):
    assert trainer_and_method(name) == parts


@pytest.mark.parametrize("name", ["grpo:plain", "draft:plain", ":plain"])
def test_a_trainer_that_cannot_be_named_is_refused_with_those_that_can(name: str):
    with pytest.raises(SystemExit, match="before a colon stands alignprop, drtune, refl;"):
        trainer_and_method(name)


def test_every_trainer_samples_and_evaluates_alike():
    assert {algorithm.sampling for algorithm in TRAINERS.values()} == {Sampling(num_steps=10, guidance=1.0)}


def test_refl_stops_in_the_last_quarter_as_its_authors_do():
    refl = TRAINERS["refl"]
    assert isinstance(refl, ReFL)
    assert refl.first_stop == 8  # of 0 to 9; theirs is 30 of 0 to 39
    assert 8 / 10 - 30 / 40 < 1 / 10


def test_a_cell_of_another_trainer_lies_beside_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = replace(SETTINGS["fashion"], steps=2, batch_size=1, num_steps=4, eval_every=2, eval_samples=2)
    monkeypatch.setitem(testbed_study.SETTINGS, "fashion", small)
    monkeypatch.setitem(TRAINERS, "drtune", replace(TRAINERS["drtune"], early_stop=2))
    run_cell("fashion", "drtune:weight-0.01", 0, tmp_path)
    cell = json.loads((tmp_path / "fashion" / "drtune:weight-0.01.seed0.json").read_text())
    assert cell["method"] == "drtune:weight-0.01"
    assert [e["step"] for e in cell["evaluations"]] == [0, 2]


def test_a_cell_of_an_adapter_lies_apart_and_trains_the_adapter_at_the_worlds_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = replace(SETTINGS["fashion"], steps=1, batch_size=1, num_steps=2, eval_every=1, eval_samples=2)
    monkeypatch.setitem(testbed_study.SETTINGS, "fashion", small)
    arguments = ["--methods", "product-0.01", "--seeds", "0", "--lora", "2", "--keep-weights", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["testbed_study", *arguments])
    main()
    assert not (tmp_path / "fashion").exists()
    folder = tmp_path / "fashion-lora2"
    cell = json.loads((folder / "product-0.01.seed0.json").read_text())
    assert (cell["lora"], cell["lr"]) == (2, small.lr)
    weights = load_file(folder / "runs" / "product-0.01.seed0" / "weights" / "step-000001.safetensors")
    assert all(2 in w.shape for w in weights.values())  # the rank


def test_the_product_metric_without_an_adapter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.argv", ["testbed_study", "--methods", "plain", "refl:product-0.01"])
    with pytest.raises(SystemExit):
        main()
    assert "give their rank with --lora" in capsys.readouterr().err


def test_a_cell_holds_its_evaluations_at_its_own_learning_rate_and_is_not_trained_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = replace(SETTINGS["fashion"], steps=1, batch_size=1, num_steps=1, eval_every=1, eval_samples=2)
    monkeypatch.setitem(testbed_study.SETTINGS, "fashion", small)
    run_cell("fashion", "half-lr", 3, tmp_path)
    file = tmp_path / "fashion" / "half-lr.seed3.json"
    cell = json.loads(file.read_text())
    assert (cell["method"], cell["seed"], cell["lr"]) == ("half-lr", 3, small.lr / 2)
    assert [e["step"] for e in cell["evaluations"]] == [0, 1]
    assert set(cell["gold_standard_error"]) == {"0", "1"}
    assert not (tmp_path / "fashion" / "runs" / "half-lr.seed3" / "checkpoints").exists()
    written = file.stat().st_mtime_ns
    run_cell("fashion", "half-lr", 3, tmp_path)
    assert file.stat().st_mtime_ns == written
