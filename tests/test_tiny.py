"""Every shipped run goes through with `--tiny`: trained, saved, exported, checked."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rsaft.config import RunConfig, build_trainer, load_config, to_dict, validate
from rsaft.config.sections import FAMILIES, PIPELINES
from rsaft.config.tiny import SAMPLING_STEPS, few_steps, tiny
from rsaft.errors import ConfigError
from rsaft.rdrl import AlignProp, DRaFT, DRTune, Pretraining, ReFL
from rsaft.testbed.tiny import TINY_FAMILIES
from rsaft.testbed.toy import toy_reward

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
OVERLAY = CONFIGS / "overlays" / "rsa_ft.yaml"
PARETO = (CONFIGS / "sd35" / "pareto.yaml", CONFIGS / "testbed" / "pareto.yaml")
RUNS = sorted(
    set(CONFIGS.glob("*/*.yaml")) - set(CONFIGS.glob("overlays/*")) - set(CONFIGS.glob("testbed/*")) - {*PARETO}
)


PLAIN = ("sd15-alignprop", "sdxl-draft_lv", "sd3-drtune", "sd35-draft_lv", "flux-refl")
WITH_RSA_FT = ("sd15-draft_lv", "sdxl-refl", "sd3-alignprop", "sd35-drtune", "flux-drtune")


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def tiny_run(path: Path, *overlays: Path, settings: list[str] | None = None) -> RunConfig:
    return tiny(load_config([path, *overlays], settings or []))


def assert_goes_through(path: Path, folder: Path, *overlays: Path) -> None:
    """One update of the tiny run: it ends, evaluates at both ends, moves the weights, and exports each of them."""
    config = tiny_run(path, *overlays)
    config = replace(config, train=replace(config.train, steps=1))
    assert config.model.path == f"tiny:{load_config([path]).model.family}"
    trainer = build_trainer(config, folder)
    before = [p.detach().clone() for p in trainer.backbone.parameters()]
    result = trainer.fit()
    assert [e["step"] for e in result.evaluations] == [0, 1]
    assert any(not torch.equal(b, p) for b, p in zip(before, trainer.backbone.parameters(), strict=True))
    saved = load_file(result.checkpoints[-1] / "adapter" / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(before)


def in_turn(path: Path, *, rsa_ft: bool) -> Any:
    """Every family and every trainer goes through plain and with RSA-FT; the other pairs are slow."""
    quick = name_of(path) in (WITH_RSA_FT if rsa_ft else PLAIN)
    return pytest.param(path, marks=() if quick else pytest.mark.slow, id=name_of(path))


@pytest.mark.parametrize("path", [in_turn(path, rsa_ft=False) for path in RUNS])
def test_every_shipped_run_trains_saves_and_exports_when_tiny(path: Path, tmp_path: Path):
    assert_goes_through(path, tmp_path)


@pytest.mark.parametrize("path", [in_turn(path, rsa_ft=True) for path in RUNS])
def test_every_shipped_run_goes_through_with_rsa_ft(path: Path, tmp_path: Path):
    assert_goes_through(path, tmp_path, OVERLAY)


@pytest.mark.parametrize("path", [PARETO[0], pytest.param(PARETO[1], marks=pytest.mark.slow)], ids=name_of)
def test_a_run_towards_frontiers_goes_through_with_random_ones(path: Path, tmp_path: Path):
    config = tiny_run(path)
    assert (config.train.batch_size, config.train.group_size, config.train.micro_batch) == (2, 2, None)
    trainer = build_trainer(config, tmp_path)
    before = [p.detach().clone() for p in trainer.backbone.parameters()]
    result = trainer.fit()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["pareto/source"] for r in records if r["kind"] == "train"] == [1.0] * 3
    assert any(not torch.equal(b, p) for b, p in zip(before, trainer.backbone.parameters(), strict=True))
    again = build_trainer(load_config([tmp_path / "config.yaml"]), tmp_path).fit(resume=True)
    assert (result.step, again.step) == (3, 3)


@pytest.mark.slow
def test_a_run_towards_frontiers_goes_through_with_rsa_ft(tmp_path: Path):
    assert_goes_through(PARETO[0], tmp_path, OVERLAY)


def test_a_run_goes_through_with_a_kl_term(tmp_path: Path):
    assert_goes_through(CONFIGS / "sd3" / "refl.yaml", tmp_path, CONFIGS / "overlays" / "kl.yaml")


def test_a_whole_network_is_trained_with_a_kl_term_to_its_own_copy(tmp_path: Path):
    config = tiny_run(CONFIGS / "sd15" / "refl.yaml", CONFIGS / "overlays" / "kl.yaml", settings=["model.lora=null"])
    trainer = build_trainer(replace(config, train=replace(config.train, steps=1)), tmp_path)
    copy = [p.detach().clone() for p in trainer.backbone.parameters()]
    trainer.fit()
    with trainer.backbone.base():
        kept = [p.detach().clone() for p in trainer.backbone.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(copy, kept, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(copy, trainer.backbone.parameters(), strict=True))


@pytest.mark.parametrize("names", [PLAIN, WITH_RSA_FT], ids=["plain", "rsaft"])
def test_the_quick_runs_cover_every_family_and_every_trainer(names: tuple[str, ...]):
    covered = [path for path in RUNS if name_of(path) in names]
    assert len(covered) == len(names)
    assert {path.parent.name for path in covered} == {path.parent.name for path in RUNS}
    assert {path.stem for path in covered} == {path.stem for path in RUNS}


def test_every_family_has_every_trainer():
    names = ("draft_lv", "refl", "alignprop", "drtune")
    assert {name_of(path) for path in RUNS} == {
        f"{f}-{n}" for f in ("sd15", "sdxl", "sd3", "sd35", "flux") for n in names
    }


@pytest.mark.parametrize("path", [*RUNS, *PARETO], ids=name_of)
def test_a_tiny_run_is_itself_a_run_file(path: Path):
    config = tiny_run(path)
    assert validate(to_dict(config)) == config
    assert tiny(config) == config


def test_tiny_keeps_what_it_does_not_have_to_change():
    path = CONFIGS / "sdxl" / "draft_lv.yaml"
    whole, small = load_config([path, OVERLAY]), tiny_run(path, OVERLAY)
    assert (small.model.lora, small.model.dtype, small.step) == (whole.model.lora, whole.model.dtype, whole.step)
    assert (small.objective, small.prompts, small.train.lr) == (whole.objective, whole.prompts, whole.train.lr)
    assert small.algorithm.sampling.guidance == whole.algorithm.sampling.guidance
    assert (small.algorithm.k, small.algorithm.lv) == (1, 2)


def test_tiny_needs_the_family():
    path = CONFIGS / "sd15" / "draft_lv.yaml"
    with pytest.raises(ConfigError, match=r"^config.model.family: .* so name it: sd, sdxl, sd3"):
        tiny_run(path, settings=["model.family=null"])


def test_the_families_are_those_that_can_be_built():
    assert FAMILIES == TINY_FAMILIES


def test_a_model_of_another_family_than_the_config_names_is_refused(tmp_path: Path):
    config = load_config([CONFIGS / "sd15" / "draft_lv.yaml"], ["model.path=tiny:sd3", "model.family=sdxl"])
    with pytest.raises(ConfigError, match=f"'sdxl' is a {PIPELINES['sdxl']}, and 'tiny:sd3' is a {PIPELINES['sd3']}"):
        build_trainer(tiny(config), tmp_path)


@pytest.mark.parametrize(
    ("whole", "cut"),
    [
        (DRaFT(k=9), {"k": 2}),
        (DRaFT(k=1, lv=2), {"k": 1, "lv": 2}),
        (ReFL(last=10), {"last": 2}),
        (ReFL(pretrain=Pretraining("pairs.safetensors")), {"pretrain": None}),
        (AlignProp(truncation=42), {"truncation": 3}),
        (AlignProp(), {"truncation": "gaussian"}),
        (DRTune(k=5, early_stop=20), {"k": 2, "early_stop": 2}),
    ],
)
def test_few_steps_fit_what_counts_them(whole: Any, cut: dict[str, Any]):
    few = few_steps(whole)
    assert few.sampling == replace(whole.sampling, num_steps=SAMPLING_STEPS)
    assert {key: vars(few)[key] for key in cut} == cut


def test_the_toy_reward_has_a_gradient_at_every_pixel_row_and_knows_the_prompt():
    images = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64, requires_grad=True)
    scores = toy_reward(images, ["a", "a longer prompt"])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores.shape == (2,)
    assert bool((gradient != 0).all())
    assert not torch.equal(gradient[0], gradient[1])


def test_a_tiny_run_starts_from_the_command_line(tmp_path: Path):
    command = [sys.executable, "-m", "rsaft", "train", CONFIGS / "sd15" / "drtune.yaml", "--tiny", "--run", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: 3 steps" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
