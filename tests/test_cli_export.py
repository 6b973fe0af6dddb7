"""`rsaft export RUN`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

from rsaft.backbones.comfyui import COMFYUI_FILE
from rsaft.backbones.export import LORA_FILE
from rsaft.cli import main
from rsaft.cli.eval_source import find_target
from rsaft.config import build_trainer, load_config
from rsaft.rdrl.checkpoint import load_checkpoint

OWN_REWARD = """
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""


def _train(folder: Path, model: Path, *, lora: dict | None) -> Path:
    """A finished run of two updates with a moving average that lags far behind."""
    settings = {
        "model": {"path": str(model), "lora": lora},
        "prompts": {"train": str(folder / "prompts.txt")},
        "algorithm": {"type": "draft", "sampling": {"num_steps": 2, "guidance": 1.0}},
        "rewards": {"bright": {"type": "own_brightness_of_exports:brightness"}},
        "objective": {"type": "weighted_sum", "weights": {"bright": 1.0}},
        "train": {
            "steps": 2,
            "batch_size": 1,
            "eval_samples": 1,
            "save_every": 1,
            "keep": 2,
            "lr": 0.01,
            "ema": 0.9,
        },
    }
    (folder / "prompts.txt").write_text("a red boot\n")
    (folder / "own_brightness_of_exports.py").write_text(OWN_REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        build_trainer(load_config([folder / "run.yaml"], []), folder / "run").fit()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    return _train(tmp_path_factory.mktemp("lora"), tiny_sd, lora={"rank": 2, "alpha": 6})


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    return _train(tmp_path_factory.mktemp("full"), tiny_sd, lora=None)


@pytest.fixture
def export(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs `rsaft export ...` in this process: (exit code, lines of its output, its error)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rsaft", "export", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        out, err = capsys.readouterr()
        return (code if isinstance(code, int) else 0), out.splitlines(), err

    return command


def test_an_export_says_where_it_lies_that_it_is_exact_and_how_to_load_it(export, run):
    code, lines, err = export(run)
    folder = run / "export" / "diffusers-step-000002"
    assert (code, err) == (0, "")
    assert lines == [
        f"export {folder} (step 2, moving average)",
        "largest difference from the trained model, reloaded: 0",
        f'load it: pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")',
    ]
    assert (folder / LORA_FILE).is_file()


def test_the_moving_average_is_what_is_exported(export, run, tmp_path):
    export(run, "--out", tmp_path / "out")
    found = [t for _, t in sorted(load_file(tmp_path / "out" / LORA_FILE).items())]
    tensors = load_checkpoint(run / "checkpoints" / "step-000002").tensors

    def total(values):
        return sum(float(t.double().abs().sum()) for t in values)

    average, last = total(tensors["ema"].values()), total(tensors["weights"].values())
    assert total(found) == pytest.approx(average, rel=1e-12)
    assert abs(average - last) > 1e-3


def test_an_export_is_the_checkpoints_own_adapter(export, run, tmp_path):
    export(run, "--step", 1, "--out", tmp_path / "out")
    own = run / "checkpoints" / "step-000001" / "adapter" / LORA_FILE
    assert (tmp_path / "out" / LORA_FILE).read_bytes() == own.read_bytes()


def test_the_best_checkpoint_is_exported_and_sampled_where_asked(export, run, tmp_path, monkeypatch):
    best = run / "checkpoints" / "best"
    best.unlink(missing_ok=True)
    best.symlink_to("step-000001")
    export(run, "--best", "--out", tmp_path / "out")
    own = run / "checkpoints" / "step-000001" / "adapter" / LORA_FILE
    assert (tmp_path / "out" / LORA_FILE).read_bytes() == own.read_bytes()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boot\n")
    images = []
    for name, which in (("best", ["--best"]), ("first", ["--step", "1"]), ("newest", [])):
        arguments = ["sample", str(run), "--prompts", str(prompts), "--out", str(tmp_path / name), *which]
        monkeypatch.setattr(sys, "argv", ["rsaft", *arguments])
        with pytest.raises(SystemExit):
            main()
        images.append((tmp_path / name / "000000.png").read_bytes())
    assert images[0] == images[1]
    assert images[0] != images[2]
    assert find_target(str(best), base=None, step=None, dtype=None).step == 1
    best.unlink()
    assert "has no checkpoints/best" in export(run, "--best", "--out", tmp_path / "none")[2]


def test_every_format_is_written_and_loads(export, run, tiny_sd, tmp_path):
    for format in ("peft", "merged", "comfyui"):
        code, lines, err = export(run, "--format", format, "--out", tmp_path / format)
        assert (code, err) == (0, "")
        assert float(lines[1].rpartition(": ")[2]) <= (1e-4 if format == "merged" else 0.0)
    PeftModel.from_pretrained(DiffusionPipeline.from_pretrained(tiny_sd).unet, str(tmp_path / "peft"))
    DiffusionPipeline.from_pretrained(tmp_path / "merged")
    DiffusionPipeline.from_pretrained(tiny_sd).load_lora_weights(str(tmp_path / "comfyui"), weight_name=COMFYUI_FILE)


def test_a_fully_trained_run_is_exported_as_a_network_or_a_pipeline(export, full_run, tmp_path):
    code, lines, _ = export(full_run, "--out", tmp_path / "network")
    assert code == 0
    assert lines[2] == (
        f'load it: pipe.unet = UNet2DConditionModel.from_pretrained("{tmp_path}/network", subfolder="unet")'
    )
    code, lines, _ = export(full_run, "--format", "merged", "--out", tmp_path / "pipeline")
    assert (code, lines[1]) == (0, "largest difference from the trained model, reloaded: 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "format: got 'onnx'; there is none; allowed are diffusers, peft, merged, comfyui."),
        (["--step", 7], "has no checkpoint of step 7; kept are those of steps 1, 2."),
        (["--out", "."], "out: '.' is not empty; delete it, or choose another with --out."),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(export, run, arguments, message):
    code, lines, err = export(run, *arguments)
    assert (code, lines) == (2, [])
    assert err.startswith("rsaft: ")
    assert err.endswith(message + "\n")
    assert err.count("\n") == 1


def test_an_adapter_format_for_a_fully_trained_run_is_refused(export, full_run):
    code, _, err = export(full_run, "--format", "peft")
    assert (code, err) == (
        2,
        "rsaft: format: got 'peft'; peft holds an adapter, and the whole network was trained; allowed are diffusers, "
        "merged.\n",
    )
    assert not (full_run / "export").exists()


def test_a_folder_without_a_run_is_refused(export, tmp_path):
    code, _, err = export(tmp_path)
    assert (code, err) == (
        2,
        f"rsaft: run '{tmp_path}': there is no run (no config.yaml) there; name a run directory.\n",
    )
