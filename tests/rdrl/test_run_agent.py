"""The decision agent in a run: rewards go, weights come back, and a killed run decides again as it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rsaft.backbones import load_backbone
from rsaft.errors import ConfigError
from rsaft.pareto import Context, DecisionAgent, FrontierStore, ParetoTransport, ScriptedJudge, Verdict
from rsaft.pareto.context import Judge, JudgeError
from rsaft.rdrl import DRaFT, WeightedSum
from rsaft.rdrl.checkpoint import load_checkpoint
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.train_config import TrainConfig
from rsaft.sampling import Sampling
from rsaft.types import Images, Objective
from tests.helpers import PROMPTS, toy_reward

CONFIG = TrainConfig(
    steps=8, batch_size=4, group_size=2, eval_every=2, eval_samples=2, save_every=3, keep=1, grid=1, ema=0.9
)
REMOVE = Verdict(True, "hps", analysis="stripes")
SOUND = Verdict(False)
SCRIPT = (SOUND, REMOVE, SOUND, Verdict(True), SOUND, SOUND)  # at updates 2, 4, 4 again, 6, 6 again, 8


def brightness(images: Images, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


REWARDS = {"hps": brightness, "ict": toy_reward}


def trainer(folder: Path, run: Path, judge: Judge, *, objective: Objective | None = None, **settings) -> Trainer:
    agent = DecisionAgent(judge, weak=("hps",), interval=2, **settings)
    return Trainer(
        load_backbone(folder),
        algorithm=DRaFT(sampling=Sampling(num_steps=2, guidance=1.0)),
        rewards=REWARDS,
        objective=objective or WeightedSum({"hps": 1.0, "ict": 1.0}),
        prompts=list(PROMPTS[:2]),
        config=CONFIG,
        run_dir=run,
        agent=agent,
    )


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")


def audit(run: Path) -> list[tuple[int, str, int | None]]:
    lines = [json.loads(line) for line in (run / "agent" / "agent.jsonl").read_text().splitlines()]
    return [(line["step"], line["action"], line["revert_to"]) for line in lines]


@pytest.fixture(scope="module")
def finished(tiny_sd, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run whose judge finds a breakdown by hps at update 4, and one by an unknown reward at update 6."""
    run = tmp_path_factory.mktemp("agent") / "run"
    looked: list[Context] = []

    def judge(context: Context) -> Verdict:
        looked.append(context)
        return SCRIPT[context.check]

    made = trainer(tiny_sd, run, judge, n_stable=99)
    made.fit()
    made.looked = looked  # type: ignore[attr-defined]
    return run, made


def test_the_run_goes_back_and_on_as_the_table_says(finished) -> None:
    run, made = finished
    assert audit(run) == [
        (2, "continue", None), (4, "remove", 2), (4, "continue", None), (6, "revert", 4), (6, "continue", None),
        (8, "continue", None),
    ]  # fmt: skip
    assert made.score.objective == WeightedSum({"ict": 1.0})
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 8


def test_what_was_undone_is_put_aside_with_its_pictures(finished) -> None:
    run, _ = finished
    for number, step in ((1, 4), (2, 6)):
        aside = run / "agent" / f"reverted-{number}"
        assert (aside / f"step-{step:06d}.png").is_file()
        assert json.loads((aside / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_judge_sees_the_base_the_last_passed_check_and_the_history(finished) -> None:
    run, made = finished
    second = made.looked[1]
    assert (second.step, second.active, second.check) == (4, ("hps", "ict"), 1)
    assert torch.equal(second.base_images, load_file(run / "agent" / "base.safetensors")["images"])
    assert not torch.equal(second.images, second.base_images)
    assert second.passed_scores["reward/hps"].tolist() == pytest.approx(made.looked[0].scores["reward/hps"].tolist())
    assert [step for step, _ in second.history] == [0, 2, 4]
    assert made.looked[2].removed == ("hps",)


def test_after_each_return_prompts_and_noise_are_others(finished) -> None:
    run, _ = finished
    now = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (run / "agent/reverted-2/metrics.jsonl").read_text().splitlines()]
    rewards = [[r["reward/ict"] for r in part if r["kind"] == "train" and r["step"] == 5] for part in (now, before)]
    assert rewards[0] != rewards[1]


@pytest.mark.parametrize("lost", [(), pytest.param((4, 6), marks=pytest.mark.slow)], ids=["stopped", "killed"])
def test_a_run_goes_on_to_the_same_end(finished, tiny_sd, tmp_path: Path, lost: tuple[int, ...]) -> None:
    """Stopped after update 6, resumed from there, or as if a kill had come before the last checkpoints were written."""
    whole, _ = finished
    part = trainer(tiny_sd, tmp_path / "part", ScriptedJudge(SCRIPT), n_stable=99)
    part.config = replace(CONFIG, steps=6, keep=9)
    part.fit()
    for step in lost:
        shutil.rmtree(tmp_path / f"part/checkpoints/step-{step:06d}")
    rest = trainer(tiny_sd, tmp_path / "part", ScriptedJudge(SCRIPT), n_stable=99)
    rest.fit(resume=True)
    assert audit(tmp_path / "part") == audit(whole)
    assert (tmp_path / "part/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name, tensor in weights(whole, 8).items():
        assert torch.equal(tensor, weights(tmp_path / "part", 8)[name])


def test_a_run_that_the_agent_ends_has_all_of_the_last_passed_checkpoint_back(tiny_sd, tmp_path: Path) -> None:
    made = trainer(tiny_sd, tmp_path / "run", ScriptedJudge({4: Verdict(True)}), max_reverts=0)
    result = made.fit()
    assert audit(tmp_path / "run") == [(2, "continue", None), (4, "stop", 2)]
    assert result.step == 2
    kept = load_checkpoint(tmp_path / "run/checkpoints/step-000002")
    now = made.optimization.tensors()
    assert now.keys() == kept.tensors.keys() >= {"weights", "ema", "optimizer"}
    for group, tensors in kept.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(now[group][name], tensor)


def test_a_transport_loses_the_reward_and_goes_online(tiny_sd, tmp_path: Path) -> None:
    pool = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    objective = ParetoTransport(frontiers=FrontierStore(tuple(PROMPTS[:2]), ("hps", "ict"), pool))
    judge = ScriptedJudge([REMOVE, Verdict(False, stagnant=True)])
    made = trainer(tiny_sd, tmp_path / "run", judge, objective=objective)
    made.config = replace(CONFIG, steps=4)
    made.fit()
    assert audit(tmp_path / "run")[:2] == [(2, "remove", 0), (2, "switch", None)]
    assert made.score.objective == replace(objective, active=("ict",), strategy="online")


def test_a_judge_without_a_verdict_stops_nothing(tiny_sd, tmp_path: Path, caplog) -> None:
    def judge(context: Context) -> Verdict:
        raise JudgeError("the server is away")

    made = trainer(tiny_sd, tmp_path / "run", judge)
    made.config = replace(CONFIG, steps=2)
    assert made.fit().step == 2
    assert "no verdict: the server is away; the run goes on" in caplog.text


def test_a_judge_that_returns_something_else_is_refused(tiny_sd, tmp_path: Path) -> None:
    made = trainer(tiny_sd, tmp_path / "run", lambda context: "fine")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"a judge returns an rsaft.pareto.Verdict; got str"):
        made.fit()


def test_settings_that_do_not_fit_are_refused(tiny_sd, tmp_path: Path) -> None:
    class Own:
        def __call__(self, rewards, names, prompts):
            return -rewards.sum(dim=1), rewards.sum(dim=1)

    with pytest.raises(ConfigError, match="takes rewards out of the objective by `weights` or `active`"):
        trainer(tiny_sd, tmp_path / "a", ScriptedJudge({}), objective=Own())
    agent = DecisionAgent(ScriptedJudge({}), interval=3)
    with pytest.raises(ConfigError, match=r"agent.interval: .* every 2 updates; got 3"):
        Trainer(
            load_backbone(tiny_sd), algorithm=DRaFT(), rewards=REWARDS, objective=WeightedSum({"ict": 1.0}),
            prompts=["p"], config=CONFIG, run_dir=tmp_path / "b", agent=agent,
        )  # fmt: skip
    shutil.rmtree(tmp_path)
