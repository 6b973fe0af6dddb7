"""The training loop's promises, on a tiny Stable Diffusion."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import rsaft
from rsaft.errors import CheckpointError, ConfigError, NonFiniteError, RunDirectoryError
from rsaft.flatten import RSAFT
from rsaft.rdrl import DRaFT, WeightedSum, plain_step
from rsaft.rdrl.loop import Trainer
from rsaft.rdrl.train_config import TrainConfig
from rsaft.rdrl.trained import load_trained
from rsaft.sampling import Sampling
from tests.helpers import PROMPTS, toy_reward

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "eval_every": 2,
    "eval_samples": 4,
    "save_every": 2,
    "lr": 1e-3,
}


def held_out(images, prompts):
    return -toy_reward(images, prompts)


@pytest.fixture
def trainer(tiny_sd: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(
        name: str = "run", *, lora: rsaft.LoRA | None = None, step: Any = plain_step, reward=toy_reward, **settings: Any
    ) -> Trainer:
        return Trainer(
            rsaft.load_backbone(tiny_sd, lora=lora),
            algorithm=DRaFT(k=1, sampling=Sampling(num_steps=3, guidance=1.0)),
            rewards={"toy": reward},
            objective=WeightedSum({"toy": 1.0}),
            step=step,
            prompts=PROMPTS,
            held_out={"other": held_out},
            config=TrainConfig(**(SETTINGS | settings)),
            run_dir=tmp_path / name,
        )

    return make


def metrics_of(trainer: Trainer) -> bytes:
    return (trainer.run_dir / "metrics.jsonl").read_bytes()


def records_of(trainer: Trainer, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, metrics_of(trainer).splitlines()) if r["kind"] == kind]


def weights_of(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.backbone.parameters()])


def test_the_reward_rises(trainer):
    run = trainer(steps=8, lr=5e-3, eval_every=8)
    run.fit()
    before, after = records_of(run, "eval")
    assert after["reward/toy"] > before["reward/toy"] + 0.01


def test_the_same_seed_gives_the_same_bytes(trainer):
    one, two = trainer("one", step=RSAFT(0.1, 0.01)), trainer("two", step=RSAFT(0.1, 0.01))
    one.fit(), two.fit()
    assert metrics_of(one) == metrics_of(two)
    assert torch.equal(weights_of(one), weights_of(two))


def test_another_seed_gives_another_run(trainer):
    one, two = trainer("one"), trainer("two", seed=1)
    one.fit(), two.fit()
    assert not torch.equal(weights_of(one), weights_of(two))


@pytest.mark.parametrize(
    "step",
    [pytest.param(plain_step, marks=pytest.mark.slow), RSAFT(0.1, 0.01, eps_every=2)],
    ids=["plain", "rsaft-kept-epsilon"],
)
def test_resuming_from_every_step_is_exact_bit_for_bit(trainer, step):
    settings: dict[str, Any] = {
        "step": step,
        "save_every": 1,
        "keep": 9,
        "ema": 0.9,
        "lr_schedule": "cosine",
        "warmup_steps": 1,
    }
    whole = trainer("whole", **settings)
    whole.fit()
    for done in range(1, 5):
        again = trainer(f"from-{done}", **settings)
        shutil.copytree(whole.run_dir, again.run_dir)
        for later in range(done + 1, 5):
            shutil.rmtree(again.run_dir / "checkpoints" / f"step-{later:06d}")
        again.fit(resume=True)
        assert metrics_of(again) == metrics_of(whole)
        assert torch.equal(weights_of(again), weights_of(whole))
        averages = zip(again.optimization.ema.shadow_params, whole.optimization.ema.shadow_params, strict=True)
        assert all(torch.equal(a, b) for a, b in averages)


@pytest.mark.slow
def test_resuming_a_run_without_a_checkpoint_starts_it(trainer):
    whole, again = trainer("whole"), trainer("again")
    whole.fit()
    again.run_dir.mkdir()
    (again.run_dir / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    again.fit(resume=True)
    assert metrics_of(again) == metrics_of(whole)


def test_a_finished_run_is_left_as_it_is_by_resume(trainer):
    run = trainer()
    run.fit()
    before = metrics_of(run)
    assert trainer().fit(resume=True).step == 4
    assert metrics_of(run) == before


def test_a_second_run_in_the_same_directory_is_refused(trainer):
    trainer().fit()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        trainer().fit()


def test_resume_with_another_batch_size_is_refused(trainer):
    trainer().fit()
    with pytest.raises(CheckpointError, match=r"began with train.batch_size = 4"):
        trainer(batch_size=2).fit(resume=True)


def test_resume_with_another_model_is_refused(trainer):
    trainer().fit()
    with pytest.raises(CheckpointError, match="trainable ones"):
        trainer(lora=rsaft.LoRA(rank=2)).fit(resume=True)


@pytest.mark.parametrize(
    "step", [pytest.param(plain_step, marks=pytest.mark.slow), RSAFT(0.1, 0.01)], ids=["plain", "rsaft"]
)
def test_micro_batches_give_the_whole_batchs_run(trainer, step):
    whole, split = trainer("whole", step=step), trainer("split", step=step, micro_batch=1)
    whole.fit(), split.fit()
    torch.testing.assert_close(weights_of(split), weights_of(whole), rtol=0, atol=1e-6)


def test_clipping_bounds_the_update_of_a_plain_gradient(trainer):
    run = trainer(max_grad_norm=1e-12, weight_decay=0.0, steps=1)
    before = weights_of(run).clone()
    run.fit()
    # AdamW divides by |g| + 1e-8, so a gradient clipped to 1e-12 moves a weight by less than lr * 1e-12 / 1e-8.
    assert float((weights_of(run) - before).abs().max()) <= 1e-3 * 1e-4


def test_ema_weights_are_what_is_exported_and_evaluated(trainer, tiny_sd):
    run = trainer(ema=0.5)
    result = run.fit()
    unet = UNet2DConditionModel.from_pretrained(result.checkpoints[-1] / "adapter", subfolder="unet")
    exported = torch.cat([p.detach().flatten() for p in unet.parameters()])
    average = torch.cat([p.flatten() for p in run.optimization.ema.shadow_params])
    assert torch.equal(exported, average)
    assert not torch.equal(average, weights_of(run))


def test_a_lora_checkpoint_gives_the_trained_model_in_a_fresh_pipeline(trainer, tiny_sd):
    run = trainer(lora=rsaft.LoRA(rank=2, alpha=6.0))
    result = run.fit()
    fresh = StableDiffusionPipeline.from_pretrained(tiny_sd)
    fresh.load_lora_weights(str(result.checkpoints[-1] / "adapter"), weight_name="pytorch_lora_weights.safetensors")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = run.backbone.encode(["a cat", "rain"]).text
    with torch.no_grad():
        assert torch.equal(
            fresh.unet(x, 10, encoder_hidden_states=text).sample,
            run.backbone.network(x, 10, encoder_hidden_states=text).sample,
        )


def test_load_trained_gives_the_checkpoints_weights(trainer, tiny_sd):
    run = trainer()
    run.fit()
    backbone = rsaft.load_backbone(tiny_sd)
    assert load_trained(backbone, run.run_dir) == 4
    assert torch.equal(torch.cat([p.detach().flatten() for p in backbone.parameters()]), weights_of(run))


def poisoned(value: float, prompt: str) -> Callable[..., torch.Tensor]:
    """The toy reward, but `value` for one prompt."""

    def reward(images, prompts):
        return toy_reward(images, prompts) * images.new_tensor([value if p == prompt else 1.0 for p in prompts])

    return reward


@pytest.mark.parametrize(
    ("value", "step"),
    [(math.nan, plain_step), (math.nan, RSAFT(0.1, 0.01)), (math.inf, RSAFT(0.1, 0.01)), (-math.inf, plain_step)],
    ids=["nan-plain", "nan-rsaft", "inf-rsaft", "-inf-plain"],
)
def test_a_non_finite_reward_masks_its_sample_and_no_nan_reaches_the_weights(trainer, value, step):
    run = trainer(reward=poisoned(value, PROMPTS[0]), step=step)
    run.fit()
    records = records_of(run, "train")
    assert [r["nonfinite/reward"] for r in records] == [1, 1, 1, 1]
    assert [r["nonfinite/grad"] for r in records] == [0, 0, 0, 0]
    assert bool(torch.isfinite(weights_of(run)).all())


def test_a_masked_sample_leaves_the_update_of_the_others_as_it_was(trainer):
    masked = trainer("masked", reward=poisoned(float("nan"), PROMPTS[0]), steps=1)
    masked.fit()
    # With one epoch a step, all four prompts are in the batch; the mean is over the three that count.
    without = trainer("without", steps=1)
    without.rewards["toy"] = lambda x, p: toy_reward(x, p) * x.new_tensor([0 if q == PROMPTS[0] else 4 / 3 for q in p])
    without.score = type(without.score)(without.backbone, without.rewards, without.score.objective)
    without.fit()
    a, b = records_of(masked, "train")[0], records_of(without, "train")[0]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_a_gradient_that_is_not_finite_skips_the_update(trainer):
    def cusp(images, prompts):  # finite values, infinite gradient
        return (images - images.detach()).square().sum((1, 2, 3)).sqrt() + toy_reward(images, prompts)

    run = trainer(reward=cusp, steps=2, eval_every=2)
    before = weights_of(run).clone()
    run.fit()
    assert [r["nonfinite/grad"] for r in records_of(run, "train")] == [1, 1]
    assert torch.equal(weights_of(run), before)


def test_updates_without_a_finite_gradient_stop_the_run_and_name_the_reward(trainer):
    run = trainer(reward=lambda x, p: x.sum((1, 2, 3)) * float("nan"), max_nonfinite=3, steps=9, eval_every=9)
    before = weights_of(run).clone()
    with pytest.raises(NonFiniteError, match=r"step 3: no finite gradient for 3 updates in a row .*\['toy'\]"):
        run.fit()
    assert torch.equal(weights_of(run), before)


def test_a_run_directory_holds_what_is_promised(trainer):
    run = trainer(sharpness_rho=0.1)
    run.fit()
    names = {"env.json", "metrics.jsonl", "timing.jsonl", "checkpoints", "samples", "report.html", "README.md"}
    assert names <= {p.name for p in run.run_dir.iterdir()}
    assert (run.run_dir / "samples" / "step-000002.png").exists()
    scores = json.loads((run.run_dir / "samples" / "step-000002.json").read_text())
    of_rewards = {key for key in scores["scores"] if not key.startswith("image/")}
    assert of_rewards == {"reward/toy", "held_out/other", "sharpness/toy", "slope/toy"}
    assert set(scores["scores"]) - of_rewards >= {"image/saturation", "image/drift", "image/diversity"}
    assert len(scores["scores"]["held_out/other"]) == 4


def test_the_best_step_is_that_of_the_best_held_out_reward(trainer):
    result = trainer(steps=8, lr=5e-3).fit()
    best = max(result.evaluations, key=lambda e: e["held_out/other"])
    assert result.best_step == best["step"]


def test_prompts_may_be_a_file(tiny_sd, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n", encoding="utf-8")
    run = Trainer(
        rsaft.load_backbone(tiny_sd),
        algorithm=DRaFT(sampling=Sampling(num_steps=2, guidance=1.0)),
        rewards={"toy": toy_reward},
        objective=WeightedSum({"toy": 1.0}),
        prompts=file,
    )
    assert run.prompts == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "micro_batch": 2}, "must split evenly"),
        ({"lr": 0.0}, r"train.lr is larger than 0"),
        ({"keep": 0}, r"train.keep counts"),
        ({"ema": 1.0}, r"0 < ema < 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(trainer, settings, message):
    with pytest.raises(ConfigError, match=message):
        trainer(**settings)


def test_no_reward_is_refused(tiny_sd):
    with pytest.raises(ConfigError, match="name at least one"):
        Trainer(
            rsaft.load_backbone(tiny_sd),
            algorithm=DRaFT(),
            rewards={},
            objective=WeightedSum({"toy": 1.0}),
            prompts=["a cat"],
        )
