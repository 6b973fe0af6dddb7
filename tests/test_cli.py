"""The command line: what it says, what it returns, and what it does not import."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rsaft.cli import _finish, main, run_directory, split_settings
from rsaft.errors import ConfigError
from rsaft.rdrl.run_result import RunResult
from tests.rdrl.disk_faults import at_disk_calls, disk_full_from

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "matplotlib", "scipy", "PIL")

LONG = "a" * 300  # longer than a file's name may be

OWN_REWARD = """
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""


class Outcome:
    """Exit code and output of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def rsaft(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rsaft", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture
def run_file(tmp_path: Path, tiny_sd: Path) -> Path:
    """A run of two updates on a tiny model, with a reward of the user's own."""
    (tmp_path / "own_brightness.py").write_text(OWN_REWARD)
    (tmp_path / "prompts.txt").write_text("a red boot\n\n../../a blue coat\n")
    settings = {
        "model": {"path": str(tiny_sd), "lora": {"rank": 2}},
        "prompts": {"train": "prompts.txt"},
        "algorithm": {"type": "draft", "sampling": {"num_steps": 2, "guidance": 1.0}},
        "rewards": {"bright": {"type": "own_brightness:brightness"}},
        "objective": {"type": "weighted_sum", "weights": {"bright": 1.0}},
        "train": {"steps": 2, "batch_size": 2, "eval_samples": 2, "eval_every": 1, "save_every": 1, "grid": 2},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["compare", "--help"], ["list"], ["train", "no.yaml"]]
)
def test_help_and_list_import_no_library_of_the_models(arguments: list[str]):
    code = f"""
import sys
sys.argv = ["rsaft", *{arguments!r}]
from rsaft.cli import main
try:
    main()
except SystemExit:
    pass
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_does_not_load_the_settings_either():
    code = "import sys; from rsaft import cli; print([m for m in ('pydantic', 'yaml', 'rich') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_are_these(rsaft):
    found = rsaft("list", "commands").out.split()
    for name in ("demo", "train", "resume", "sample", "show", "list", "report", "compare"):
        assert name in found


def test_list_names_what_exists_only(rsaft):
    out = rsaft("list").out
    for name in ("draft", "plain", "rsaft", "weighted_sum", "hinge", "softmin", "testbed", "hpsv2", "vlm"):
        assert f"  {name} " in out
    assert "hpsv3" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "tiny.yml"], "config file 'tiny.yml': there is no such file; did you mean 'tiny.yaml'?"),
        (["train", "tiny.yaml", "train.lrr=1"], "config.train.lrr: unknown key; allowed are steps, "),
        (
            ["train", "tiny.yaml", "algorithm.k=9"],
            "config.algorithm.k: DRaFT keeps gradients for the last k of 2 steps",
        ),
        (["train", "tiny.yaml", "rewards.bright.type=nothing:here"], "config.rewards.bright.type: there is no module"),
        (["train", "train.lr=1"], "a run file is needed"),
        (["train", "tiny.yaml", "--run", "."], "run: '.' is not empty; continue it with 'rsaft resume .'"),
        (["train", "tiny.yaml", "--run", "tiny.yaml"], "run: 'tiny.yaml' is a file, and a folder is needed"),
        (["train", "."], "config file '.': it is a folder; give the path of a YAML file."),
        (["train", LONG], f"'{LONG}': File name too long; name a path"),
        (["train", "tiny.yaml", "--run", LONG], f"'{LONG}': File name too long; name a path"),
        (
            ["train", "tiny.yaml", "--run", "/proc/run"],
            "run directory /proc/run: it cannot be made or written",
        ),
        (["demo", "--out", "tiny.yaml"], "'tiny.yaml/plain': Not a directory; name a path"),
        (["demo", "--out", "/proc/demo"], "'/proc/demo': No such file or directory; name a path"),
        (["resume", "nothing"], "run 'nothing': there is no run (no config.yaml) there"),
        (["report", "nothing"], "run 'nothing': there is no run (no config.yaml) there"),
        (["show", "tiny.yaml", "prompts.train=none.txt"], "config.prompts.train: there is no file 'none.txt'"),
        (["list", "reward"], "list: there are no 'reward'; allowed are rewards, trainers, "),
        (["sample", "tiny.yaml", "--prompts", "prompts.txt", "--out", "."], "out: '.' is not empty"),
        (["sample", "no/model", "--prompts", "none.txt", "--out", "o"], "prompts 'none.txt': there is no such file"),
        (["sample", "no/model", "--prompts", "prompts.txt", "--out", "o"], "model 'no/model': no diffusers pipeline"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(rsaft, run_file: Path, arguments: list[str], sentence: str):
    outcome = rsaft(*arguments)
    lines = [line for line in outcome.err.splitlines() if not line.startswith("prompts 'prompts.txt': 1 empty")]
    assert outcome.code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"rsaft: {sentence}")
    assert not (run_file.parent / "runs").exists()


def test_a_full_disk_at_the_start_of_a_run_is_one_sentence_and_exit_code_2(rsaft, run_file: Path):
    with at_disk_calls(disk_full_from(1), deletions=False):
        outcome = rsaft("train", run_file, "--run", "full")
    assert outcome.code == 2
    assert [line for line in outcome.err.splitlines() if line.startswith("rsaft: ")] == [
        "rsaft: run directory full: it cannot be made or written (No space left on device); choose another one."
    ]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "a.yaml", "--rum", "x"], ["sample", "x"]])
def test_a_wrong_command_or_option_is_exit_code_2(rsaft, arguments: list[str]):
    outcome = rsaft(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_under_several_processes_only_the_first_speaks_of_settings(rsaft, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("rsaft.cli.complaints.HEAD_START", 0.0)
    outcome = rsaft("train", "none.yaml")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "")


def test_several_processes_need_a_named_run_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--run-dir DIR"):
        run_directory(None, "tiny")


def test_the_default_run_directory_is_the_first_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run_directory(None, "tiny") == Path("runs/tiny-1")
    Path("runs/tiny-1").mkdir(parents=True)
    assert run_directory(None, "tiny") == Path("runs/tiny-2")


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path):
    odd = tmp_path / "lr=1.yaml"
    odd.touch()
    assert split_settings(["a.yaml", str(odd), "x=1"]) == ([Path("a.yaml"), odd], ["x=1"])


def test_show_prints_a_file_that_train_would_read(rsaft, run_file: Path):
    shown = yaml.safe_load(rsaft("show", run_file, "train.lr=1e-4").out)
    assert shown["train"]["lr"] == 1e-4
    assert shown["algorithm"] == {
        "type": "draft",
        "k": 1,
        "lv": 0,
        "sampling": {"num_steps": 2, "guidance": 1.0, "detach_unconditional": False},
        "gradient_checkpointing": False,
    }


def test_show_schema_prints_json(rsaft):
    assert json.loads(rsaft("show", "--schema").out)["title"] == "rsaft run"


def test_a_run_is_trained_sampled_resumed_and_reported(rsaft, run_file: Path):
    folder = run_file.parent / "runs" / "tiny-1"
    trained = rsaft("train", run_file)
    assert trained.code == 0, trained.err
    assert "done: 2 steps" in trained.out
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 2
    metrics = (folder / "metrics.jsonl").read_bytes()

    resumed = rsaft("resume", folder)
    assert resumed.code == 0, resumed.err
    assert (folder / "metrics.jsonl").read_bytes() == metrics

    sampled = rsaft("sample", folder, "--prompts", run_file.parent / "prompts.txt", "--out", "images", "-n", 2)
    assert sampled.code == 0, sampled.err
    rows = [json.loads(line) for line in (run_file.parent / "images" / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red boot"] * 2 + ["../../a blue coat"] * 2
    names = sorted(path.name for path in (run_file.parent / "images").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "000003.png", "metadata.jsonl"]
    with Image.open(run_file.parent / "images" / "000000.png") as image:
        assert image.mode == "RGB"

    reported = rsaft("report", folder, "--out", "report.html")
    assert reported.code == 0, reported.err
    assert (run_file.parent / "report.html").is_file()

    for place in (".", "tiny.yaml/report.html", LONG, "/dev/full", "/proc/report.html"):
        refused = rsaft("report", folder, "--out", place)
        assert refused.code == 2
        assert len(refused.err.splitlines()) == 1
    with at_disk_calls(disk_full_from(1), deletions=False):
        refused = rsaft("report", folder)
    assert refused.code == 2
    assert "report.html could not be written (No space left on device)" in refused.err


@pytest.mark.parametrize(("signal", "code"), [(2, 130), (15, 143)])
def test_a_stopped_run_ends_with_the_signals_exit_code(
    signal: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit) as caught:
        _finish(RunResult(tmp_path, step=3, best_step=0, evaluations=(), checkpoints=(), signal=signal))
    assert caught.value.code == code
    assert f"rsaft resume {tmp_path}" in capsys.readouterr().out
