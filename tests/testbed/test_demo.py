"""The demo on a tiny stand-in world, and its handling of processes, old runs and failures."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rsaft
from rsaft.errors import ConfigError, RsaftError
from rsaft.metrics.records import read_run
from rsaft.testbed import DATA, WORLDS, Testbed, demo
from rsaft.testbed.processes import Job, run_side_by_side
from tests.helpers import toy_reward
from tests.metrics.conftest import write

PROMPTS = ("a red coat", "a blue bag", "a green shoe")


class Judge:
    """A gold judge with parts."""

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def parts(self, images, prompts):
        return {"red": images[:, 0].mean((1, 2)), "blue": images[:, 2].mean((1, 2))}


@pytest.fixture
def small(monkeypatch):
    """The demo's own settings, with fewer and shorter samples."""
    monkeypatch.setattr(demo, "SAMPLING", rsaft.Sampling(num_steps=3, guidance=1.0))
    changed = {"batch_size": 4, "eval_every": 2, "eval_samples": 6, "eval_batch": 6, "save_every": 2}
    monkeypatch.setattr(demo, "TRAIN", rsaft.TrainConfig(**(vars(demo.TRAIN) | changed)))


def tiny_world(folder: Path) -> Testbed:
    backbone = rsaft.load_backbone(folder)
    held_out = {"shy": lambda images, prompts: -toy_reward(images, prompts)}
    return Testbed("fashion", backbone, toy_reward, held_out, Judge(), PROMPTS, PROMPTS, folder)


def ready_made(out: Path, steps: int = 100) -> None:
    """Two finished runs as an earlier demo left them."""
    for name, changes in {"plain": {}, "rsaft": {"pace": 0.85, "shift": 0.06}}.items():
        write(out / name, steps=steps, **changes)
        (out / name / "config.yaml").write_text(demo._description(demo.settings(name, "fashion", steps)))
        (out / name / "checkpoints" / f"step-{steps:06d}").mkdir(parents=True)
        (out / name / "timing.jsonl").write_text('{"seconds": 0.5, "step": 1}\n{"seconds": 0.7, "step": 2}\n')
        (out / name / "wall.json").write_text('{"seconds": 61.5}')


def job(folder: Path, name: str, program: str) -> Job:
    (folder / name).mkdir(exist_ok=True)
    return Job([sys.executable, "-c", program, str(folder / name)], folder / name)


RECORDS = """
import json, pathlib, sys, time
with (pathlib.Path(sys.argv[1]) / "metrics.jsonl").open("w") as file:
    for step in range(5):
        kind = {"kind": "eval", "step": step, "reward/proxy": 0.1 * step, "held_out/gold": 0.3}
        print(json.dumps(kind), file=file, flush=True)
        print(json.dumps({"kind": "train", "step": step + 1}), file=file, flush=True)
"""


@pytest.mark.parametrize("name", ["plain", "rsaft"])
def test_each_run_of_the_demo_trains_evaluates_and_is_described(name, tiny_sd, tmp_path, small):
    world = tiny_world(tiny_sd)
    before = [p.detach().clone() for p in world.backbone.parameters()]
    result = demo.train_one(world, name, tmp_path / name, steps=2)
    assert result.step == 2
    assert any(not torch.equal(p, q) for p, q in zip(world.backbone.parameters(), before, strict=True))
    run = read_run(tmp_path / name)
    assert [record["step"] for record in run.evals] == [0, 2]
    expected = {"reward/proxy", "held_out/gold", "held_out/shy", "measure/gold/red", "sharpness/proxy"}
    assert expected <= run.evals[0].keys()
    assert run.config == demo.settings(name, "fashion", 2)
    assert not demo.prepare(tmp_path / name, demo.settings(name, "fashion", 2), fresh=False)


def test_both_runs_start_from_the_same_images(tiny_sd, tmp_path, small):
    for name in demo.STEP_RULES:
        demo.train_one(tiny_world(tiny_sd), name, tmp_path / name, steps=1)
    first, second = (read_run(tmp_path / name) for name in demo.STEP_RULES)
    assert first.evals[0] == second.evals[0]
    # The first batch is the same too, but RSA-FT logs its reward at the perturbed weights, where it is lower.
    assert second.train[0]["reward/proxy"] < first.train[0]["reward/proxy"]


def test_a_finished_demo_is_summarized_without_training_again(tmp_path, capsys):
    ready_made(tmp_path)
    summary = demo.main(tmp_path, steps=100)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    plain, flat = summary["runs"]["plain"], summary["runs"]["rsaft"]
    assert plain["gold"] == {
        "start": pytest.approx(0.36),
        "peak": pytest.approx(0.3970, abs=1e-4),
        "peak_step": 20,
        "end": pytest.approx(0.084),
    }
    assert summary["levels"] == [0.25, 0.5, 0.75, 1.0]
    for level in ("0.25", "0.5", "0.75", "1.0"):
        assert flat["gold_at_train_reward"][level] > plain["gold_at_train_reward"][level]
    assert plain["wall_seconds"] == 61.5
    assert plain["seconds_per_update"] == 0.6
    assert plain["seed"] == 0
    assert flat["settings"]["step"]["rho_w"] == demo.STEP_RULES["rsaft"].rho_w
    out = capsys.readouterr().out
    assert str(tmp_path / "report.html") in out.replace("\n", "")
    assert "rsaft" in (tmp_path / "report.html").read_text()


def test_runs_with_other_settings_are_not_mixed_in(tmp_path):
    ready_made(tmp_path)
    with pytest.raises(ConfigError, match="other settings; choose another --out, or replace it with --fresh"):
        demo.main(tmp_path, steps=7)
    assert (tmp_path / "plain" / "metrics.jsonl").is_file()


def test_fresh_deletes_the_demos_own_runs_and_nothing_else(tmp_path):
    ready_made(tmp_path)
    wanted = demo.settings("plain", "fashion", 7)
    assert demo.prepare(tmp_path / "plain", wanted, fresh=True)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["config.yaml"]
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no run of the demo"):
        demo.prepare(foreign, wanted, fresh=True)
    assert (foreign / "chapter.txt").read_text() == "mine"


@pytest.mark.parametrize("missing", ["checkpoints/step-000100", "metrics.jsonl"])
def test_a_run_that_was_cut_off_is_to_be_resumed(tmp_path, missing):
    ready_made(tmp_path)
    path = tmp_path / "plain" / missing
    path.rmdir() if path.is_dir() else path.unlink()
    assert demo.prepare(tmp_path / "plain", demo.settings("plain", "fashion", 100), fresh=False)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"threads": 0}])
def test_counts_below_one_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=">= 1; got 0"):
        demo.main(tmp_path, **wrong)


def test_an_unknown_world_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no world 'fasion'; allowed: fashion, shapes"):
        demo.main(tmp_path, world="fasion")


def test_each_world_has_its_own_learning_rate():
    rates = {world: demo.settings("plain", world, 3)["train"]["lr"] for world in WORLDS}
    assert rates == demo.LR
    assert len(set(rates.values())) == len(WORLDS)


def test_a_summary_of_runs_without_evaluations_holds_nulls(tmp_path):
    for name in demo.STEP_RULES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    wanted = {name: demo.settings(name, "fashion", 3) for name in demo.STEP_RULES}
    summary = demo.summarize([read_run(tmp_path / name) for name in demo.STEP_RULES], wanted)
    assert summary["runs"]["plain"]["gold"]["end"] is None
    json.dumps(summary, allow_nan=False)
    demo.results_table(summary)


def test_jobs_run_at_once_and_their_evaluations_are_shown(tmp_path):
    wait = "import pathlib,sys,time; own=pathlib.Path(sys.argv[1]); (own/'here').touch()\n"
    wait += "end=time.time()+60\nwhile not all((own.parent/n/'here').exists() for n in 'ab'): assert time.time()<end\n"
    with (tmp_path / "shown.txt").open("w") as file:
        jobs = {name: job(tmp_path, name, wait + RECORDS) for name in "ab"}
        run_side_by_side(jobs, total=5, console=Console(file=file, width=100))
    text = (tmp_path / "shown.txt").read_text()
    assert "a 4/5 · gold 0.300 · proxy 0.400" in text or "a 4/5 · proxy 0.400 · gold 0.300" in text
    assert "b 4/5" in text


def test_on_a_terminal_there_is_one_row_a_run(tmp_path):
    with (tmp_path / "shown.txt").open("w") as file:
        console = Console(file=file, width=100, force_terminal=True)
        run_side_by_side({name: job(tmp_path, name, RECORDS) for name in "ab"}, total=5, console=console)
    last = (tmp_path / "shown.txt").read_text().split("\n")
    assert sum("5/5" in line for line in last[-4:]) == 2


def test_a_failed_job_is_named_with_its_last_words_and_stops_the_others(tmp_path):
    jobs = {
        "bad": job(tmp_path, "bad", "import sys; print('hm'); sys.exit('the disk is full.')"),
        "good": job(tmp_path, "good", "import time; time.sleep(100)"),
    }
    begun = time.monotonic()
    with pytest.raises(RsaftError, match=r"the run 'bad' failed: the disk is full\. \(log: .*bad\.log\)"):
        run_side_by_side(jobs, total=5, console=Console(quiet=True))
    assert time.monotonic() - begun < 50


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_jobs_save_and_end(tmp_path, number, code):
    program = """
import pathlib, signal, sys, time
own = pathlib.Path(sys.argv[1])
def save(*_):
    (own / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(own / "here").touch()
time.sleep(100)
"""
    jobs = {name: job(tmp_path, name, program) for name in "ab"}

    def send() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not all((tmp_path / name / "here").exists() for name in jobs):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        run_side_by_side(jobs, total=5, console=Console(quiet=True))
    thread.join()
    assert stopped.value.code == code
    assert all((tmp_path / name / "saved").exists() for name in jobs)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "fashion" / "pipeline").is_dir(), reason="the fashion world is not built yet")
def test_the_demo_runs_from_nothing_and_again_from_what_it_left(tmp_path):
    first = demo.main(tmp_path, steps=2)
    page = (tmp_path / "report.html").read_bytes()
    begun = time.monotonic()
    assert demo.main(tmp_path, steps=2) == first
    assert time.monotonic() - begun < 30
    assert (tmp_path / "report.html").read_bytes() == page
