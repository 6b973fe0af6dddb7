"""The hacking gauge in a run: readings, the alarm, the best checkpoint, and all of it again after a stop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rsaft
from rsaft.errors import CheckpointError
from rsaft.metrics import Gauge, HackingGauge, Reading, StopRule, evaluate
from rsaft.rdrl import DRaFT, WeightedSum
from rsaft.rdrl.checkpoint import list_checkpoints
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from tests.helpers import PROMPTS, toy_reward

SAMPLING = Sampling(num_steps=3, guidance=1.0)
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 2, "eval_every": 1, "eval_samples": 4, "save_every": 2, "keep": 1}
SETTINGS |= {"lr": 1e-2}
EAGER = StopRule(significance=0.0, patience=1)


def against(images, prompts):
    """Falls as the train reward rises."""
    return -toy_reward(images, prompts)


@pytest.fixture
def trainer(tiny_sd: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(name: str = "run", *, held_out=against, on_reading=None, **settings: Any) -> Trainer:
        gauge = settings.pop("gauge", Gauge())
        return Trainer(
            rsaft.load_backbone(tiny_sd, lora=rsaft.LoRA(rank=2, alpha=2)),
            algorithm=DRaFT(k=1, sampling=SAMPLING),
            rewards={"toy": toy_reward},
            objective=WeightedSum({"toy": 1.0}),
            prompts=PROMPTS,
            held_out={"other": held_out},
            gauge=gauge,
            on_reading=on_reading,
            config=TrainConfig(**(SETTINGS | settings)),
            run_dir=tmp_path / name,
        )

    return make


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "eval"]


def test_every_evaluation_has_its_reading_and_the_callback_gets_it(trainer):
    seen: list[Reading] = []
    result = trainer(on_reading=seen.append, steps=2).fit()
    assert [r.step for r in seen] == [0, 1, 2]
    for reading, record in zip(seen, evaluations_of(result.run_dir), strict=True):
        assert reading.values == {k: v for k, v in record.items() if k.startswith("gauge/")}
    first, last = seen[0].values, seen[-1].values
    assert first["gauge/drift"] == first["gauge/weight_distance"] == 0
    assert last["gauge/drift"] > 0
    assert last["gauge/weight_distance"] > 0
    assert first["gauge/image/saturation"] == 0


def test_an_alarm_ends_a_run_that_is_to_stop_and_only_warns_another(trainer, caplog):
    caplog.set_level(logging.WARNING)
    stopped = trainer("stop", gauge=Gauge(stop="stop", rule=EAGER)).fit()
    assert stopped.reading is not None
    assert stopped.reading.alarm
    assert stopped.step < 4
    assert stopped.signal is None
    assert list_checkpoints(stopped.run_dir / "checkpoints")[-1].name == f"step-{stopped.step:06d}"
    caplog.clear()
    warned = trainer("warn", gauge=Gauge(stop="warn", rule=EAGER)).fit()
    assert warned.step == 4
    assert len([r for r in caplog.records if "hacked, it seems" in r.message]) == 1


def test_a_reward_that_is_followed_keeps_the_last_checkpoint_as_best(trainer):
    result = trainer(held_out=toy_reward).fit()
    assert result.best_step == 4
    best = result.run_dir / "checkpoints" / "best"
    assert best.is_symlink()
    assert best.resolve().name == "step-000004"


def test_the_checkpoint_to_keep_is_saved_when_it_is_found_and_outlives_the_newer_ones(trainer):
    looks = []

    def followed_for_two_updates(images, prompts):
        looks.append(len(images))
        return toy_reward(images, prompts) - (0.5 if len(looks) > 3 else 0.0)

    result = trainer(held_out=followed_for_two_updates, gauge=Gauge(rule=EAGER), save_every=3).fit()
    assert result.best_step == 2
    names = [path.name for path in list_checkpoints(result.run_dir / "checkpoints")]
    assert names == ["step-000002", "step-000004"]  # keep is 1
    assert (result.run_dir / "checkpoints" / "best").resolve().name == "step-000002"


def test_a_base_model_that_is_best_has_no_checkpoint(trainer):
    result = trainer(gauge=Gauge(rule=EAGER)).fit()
    assert result.best_step == 0
    assert not (result.run_dir / "checkpoints" / "best").exists()


def test_a_resumed_run_reads_the_same(trainer, tmp_path: Path):
    whole = trainer("whole").fit()
    trainer("again", steps=2).fit()
    again = trainer("again").fit(resume=True)
    assert (again.run_dir / "metrics.jsonl").read_bytes() == (whole.run_dir / "metrics.jsonl").read_bytes()
    assert again.reading == whole.reading


def test_the_same_trainer_may_go_on(trainer):
    whole = trainer("whole").fit()
    run = trainer("again", steps=2)
    run.fit()
    run.config = replace(run.config, steps=4)
    assert run.fit(resume=True).reading == whole.reading


def test_a_run_that_the_alarm_ended_ends_at_once_when_it_is_resumed(trainer):
    gauge = Gauge(stop="stop", rule=EAGER)
    first = trainer(gauge=gauge).fit()
    assert trainer(gauge=gauge).fit(resume=True).step == first.step
    assert trainer(gauge=Gauge(rule=EAGER)).fit(resume=True).step == 4  # warn goes on


def test_evaluations_of_other_samples_are_no_continuation(trainer):
    trainer(steps=2).fit()
    with pytest.raises(CheckpointError, match=r"train.eval_samples = 4, and now it is 6"):
        trainer(eval_samples=6).fit(resume=True)


@pytest.mark.slow
def test_a_folder_in_the_place_of_the_link_does_not_end_the_run(trainer):
    trainer(steps=2, held_out=toy_reward).fit()
    best = trainer().run_dir / "checkpoints" / "best"
    best.unlink()
    best.mkdir()
    with pytest.warns(UserWarning, match="could not be linked"):
        assert trainer(held_out=toy_reward).fit(resume=True).step == 4


def test_without_a_gauge_nothing_is_read(trainer):
    result = trainer(gauge=None, steps=2).fit()
    assert result.reading is None
    assert not any(key.startswith(("gauge/", "image/")) for e in result.evaluations for key in e)


def test_the_same_readings_come_from_a_loop_of_ones_own(trainer):
    run = trainer(steps=2, eval_every=2)
    gauge = HackingGauge()

    def look(step: int) -> Reading:
        c = run.config
        found = evaluate(
            run.backbone,
            PROMPTS,
            SAMPLING,
            seed=c.eval_seed,
            num_samples=4,
            batch_size=8,
            rewards={"toy": toy_reward},
            held_out={"other": against},
        )
        return gauge.look(step, found)

    look(0)
    result = run.fit()
    mine, its = look(2).values, result.reading.values
    assert mine == pytest.approx({k: its[k] for k in mine}, rel=1e-5)
    assert set(its) - set(mine) == {"gauge/weight_distance"}
