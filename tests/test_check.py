"""`rsaft check`: what a good run prints, and the one sentence that a bad one ends with."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rsaft.cli import main
from rsaft.cli.check import check_run, device_memory, table
from rsaft.config import load_config
from rsaft.config.tiny import tiny
from rsaft.errors import ConfigError
from rsaft.rdrl.memory import MemoryEstimate

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAY = CONFIGS / "overlays" / "rsa_ft.yaml"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("overlays", "testbed"))
CHECKED = ("sd15-drtune", "sd35-pareto", "flux-refl")  # the others: --runslow
SD3 = CONFIGS / "sd3" / "draft_lv.yaml"
SD35_PARETO = CONFIGS / "sd35" / "pareto.yaml"
NO_HELD_OUT = ["held_out.pickscore=null", "held_out.image_reward=null"]
TOY = ["rewards.hpsv2.type=rsaft.testbed.toy:toy_reward", *NO_HELD_OUT]

OWN_REWARDS = """
import torch

def nan(images, prompts):
    return images.mean((1, 2, 3)) * float("nan")

def detached(images, prompts):
    return images.detach().mean((1, 2, 3))
"""


@pytest.fixture
def check(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs `rsaft check` in this process, in a folder with rewards of the user's own; exit code, output, errors."""
    (tmp_path / "own_bad_rewards.py").write_text(OWN_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rsaft", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if name in CHECKED else pytest.mark.slow, id=name)
        for name, path in {f"{path.parent.name}-{path.stem}": path for path in RUNS}.items()
    ],
)
def test_every_shipped_run_passes_its_check_when_tiny(path: Path):
    lines: list[str] = []
    check_run(tiny(load_config([path])), lines.append)
    text = "\n".join(lines)
    trained = re.search(r"trained: (\d+) adapters, ([\d,]+) parameters", text)
    assert trained
    assert int(trained[1]) > 0
    assert re.search(r"step     one sample: (hpsv2|ict) -?[\d.e-]+, .*; loss .*, gradient norm [\d.e-]+", text)
    assert re.search(r"total +\d+\.\d\d +\d+\.\d\d", text)
    assert "fits: " in text
    assert lines[-1].startswith("ready")


def test_a_sample_without_a_target_is_tried_under_a_sum_of_the_rewards():
    lines: list[str] = []
    config = tiny(load_config([CONFIGS / "testbed" / "pareto.yaml"], ["objective.strategy=online"]))
    check_run(config, lines.append)
    assert "step     the sample has no target under the objective, so a sum of the rewards is tried" in lines
    assert re.search(r"one sample: proxy .*, gold .*, gradient norm [\d.e-]+", "\n".join(lines))
    assert lines[-1].startswith("ready")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.yaml"], "config file 'none.yaml': there is no such file"),
        ([SD3, "prompts.train=none.txt", "--tiny"], "config.prompts.train: there is no file 'none.txt'"),
        ([SD3, "train.micro_batch=3"], "train.batch_size: 32 samples must split evenly"),
        ([SD35_PARETO, "train.micro_batch=2"], "config.objective: frontiers: there is no runs/frontiers/sd35-pareto/"),
        (
            [SD3, "model.path=tiny:sd3", "model.resolution=null", "model.lora.targets=[to_x]", *TOY],
            "lora.targets: no linear layer ends in one of ['to_x']; this network's layers end in [",
        ),
        ([SD3, "model.path=none/such", "model.family=null", *TOY], "model 'none/such': no diffusers pipeline"),
        ([SD3, "rewards.hpsv2.type=own_bad_rewards:nothing"], "config.rewards.hpsv2.type: 'own_bad_rewards' has no"),
    ],
    ids=["config", "prompts", "split", "frontiers", "targets", "model", "reward"],
)
def test_what_is_missing_is_one_sentence_and_exit_code_2(check: Callable[..., Any], arguments: Any, sentence: str):
    code, _, err = check(*arguments)
    assert code == 2
    assert err.startswith(f"rsaft: {sentence}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nan", "reward 'hpsv2' gave nan for an image of"), ("detached", "reward 'hpsv2' is not differentiable")],
)
def test_a_reward_that_cannot_be_trained_on_is_one_sentence_and_exit_code_2(
    check: Callable[..., Any], name: str, sentence: str
):
    tiny_model = ["model.path=tiny:sd3", "model.resolution=null", *NO_HELD_OUT]
    code, out, err = check(SD3, OVERLAY, *tiny_model, f"rewards.hpsv2.type=own_bad_rewards:{name}")
    assert code == 2
    assert err.startswith(f"rsaft: {sentence}")
    assert len(err.splitlines()) == 1
    assert "StableDiffusion3Pipeline" in out


@pytest.mark.slow
def test_where_memory_is_too_small_the_switches_that_save_are_named():
    config = tiny(load_config([SD3]))
    model = replace(config.model, gradient_checkpointing=False, vae_checkpointing=False)
    lines: list[str] = []
    check_run(replace(config, model=model), lines.append, memory=2**19)
    text = "\n".join(lines)
    assert re.search(r"too much: [\d.]+ MiB of 0.5 MiB on cpu", text)
    saved = [float(m[1]) for m in re.finditer(r"=\w+ +saves ([\d.]+) MiB", text)]
    assert saved == sorted(saved, reverse=True)
    assert "vae_checkpointing=true" in text


@pytest.mark.slow
def test_text_encoders_that_the_run_drops_are_not_in_its_estimate(tmp_path: Path):
    config = tiny(load_config([SD3]))

    def said(**changes: Any) -> str:
        lines: list[str] = []
        check_run(replace(config, model=replace(config.model, **changes)), lines.append)
        return "\n".join(lines)

    cache = str(tmp_path / "prompts")
    kept, dropped = said(prompt_cache=cache), said(prompt_cache=cache, drop_text_encoders=True)
    assert "text encoders: weights" in kept
    assert "text encoders: weights" not in dropped
    assert re.search(r"weights are [\d.]+ MiB until the text encoders are dropped", dropped)
    with pytest.raises(ConfigError, match="this backbone has no prompt cache"):
        said(drop_text_encoders=True)


def test_a_machines_memory_is_found():
    assert 2**28 < device_memory(torch.device("cpu")) < 2**50


def test_the_table_adds_up_and_names_what_is_not_counted():
    moments = {"update": {"denoiser: weights": 3 * 2**30, "EMA": 2**30}, "evaluation": {"denoiser: weights": 3 * 2**30}}
    lines = table(MemoryEstimate(moments, not_traced=("odd",)))
    assert [line.split() for line in lines] == [
        ["GiB", "update", "evaluation"],
        ["denoiser:", "weights", "3.00", "3.00"],
        ["EMA", "1.00", "0.00"],
        ["total", "4.00", "3.00"],
        ["reward", "odd:", "not", "counted,", "its", "code", "does", "not", "run", "without", "data"],
    ]
