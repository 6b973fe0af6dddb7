"""`rsaft eval` end to end on real parts: pairs, resumption after kills, exports, image folders, and what it refuses."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from rsaft.backbones.export import export
from rsaft.cli import main
from rsaft.cli.eval_store import records_of
from rsaft.config import Model, build_trainer, load_config
from rsaft.config.assemble import load_model
from rsaft.metrics import joint_domination_rate
from rsaft.rdrl.trained import load_trained
from rsaft.sampling import Sampling, sample
from tests.rdrl.disk_faults import at_disk_calls, killed_at
from tests.rdrl.fork_server import ForkServer

TOY = "rsaft.testbed.toy:toy_reward"
OWN = """
def red(images, prompts):
    return images[:, 0].mean((1, 2))

def blue(images, prompts):
    return images[:, 2].mean((1, 2))

def no_rain(images, prompts):
    bad = images.new_tensor([float("nan") if "rain" in p else 0.0 for p in prompts])
    return images.mean((1, 2, 3)) + bad

def stop(images, prompts):
    import os, signal
    if not os.path.exists(os.environ["STOPPED"]):
        open(os.environ["STOPPED"], "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return images.mean((1, 2, 3))

def wrong(images, prompts):
    return images.mean()
"""
PROMPTS = (
    "Prompts,Category\na cat,Animals\ntwo red dogs,Animals\n,\nrain,Weather\na very small house on a hill,Places\n"
)
TEXTS = ("a cat", "two red dogs", "rain", "a very small house on a hill")
SAMPLING = Sampling(num_steps=2, guidance=1.0)
SETTINGS: dict[str, Any] = {
    "model": {"path": "sd", "lora": {"rank": 2}},
    "prompts": {"train": "prompts.csv"},
    "algorithm": {"type": "draft", "sampling": {"num_steps": 2, "guidance": 1.0}},
    "rewards": {"toy": {"type": TOY}},
    "held_out": {"red": {"type": "eval_rewards:red"}},
    "objective": {"type": "weighted_sum", "weights": {"toy": 1.0}},
    "train": {"steps": 2, "batch_size": 2, "lr": 3e-2, "eval_samples": 2, "eval_every": 2, "save_every": 1},
}
COLUMNS = ["run", "step", "prompt_id", "prompt", "seed", "reward", "score"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """A folder with a model, prompts, rewards of the user's own, and a run of two updates. Read it, never write it."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_sd, folder / "sd")
    (folder / "eval_rewards.py").write_text(OWN)
    (folder / "prompts.csv").write_text(PROMPTS)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        build_trainer(load_config([folder / "run.yaml"]), folder / "run").fit()
    return folder


@pytest.fixture
def evaluate(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs `rsaft eval` in this process, in the folder of the run: exit code, output, errors."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(home)

    def command(*arguments: Any) -> tuple[int, str, str]:
        code = run_command(*arguments)
        return (code, *capsys.readouterr())

    return command


def run_command(*arguments: Any) -> int:
    before, sys.argv = sys.argv, ["rsaft", "eval", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the command line ends by SystemExit")


def run_killed(home: str, arguments: list[str], n: int) -> None:
    """In a process of its own: `rsaft eval`, killed in the n-th call that changes the disk."""
    os.chdir(home)
    with at_disk_calls(killed_at(n), deletions=True):
        sys.exit(run_command(*arguments))


@pytest.fixture(scope="module")
def server():
    with ForkServer("tests.test_eval") as running:
        running.ready()
        yield running


def rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "scores.parquet").to_pylist()


def scores(out: Path, run: str, reward: str) -> list[float]:
    return [row["score"] for row in rows(out) if (row["run"], row["reward"]) == (run, reward)]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_a_run_is_paired_with_its_own_base_at_the_same_prompts_seeds_and_noises(home: Path, evaluate, tmp_path: Path):
    code, out, err = evaluate(
        "run", "--prompts", "prompts.csv", "--rewards", "eval_rewards:red", "eval_rewards:blue", TOY,
        "--out", tmp_path / "o", "--seed", 3, "-n", 2, "--batch", 3,
    )  # fmt: skip
    assert (code, "JDR" in out, "Differences by category" in out) == (0, True, True), err
    table = pq.read_table(tmp_path / "o" / "scores.parquet")
    assert table.column_names == COLUMNS
    keys = {(r["run"], r["step"], r["prompt_id"], r["prompt"], r["seed"], r["reward"]) for r in rows(tmp_path / "o")}
    wanted = {
        (run, step, i, prompt, seed, reward)
        for run, step in (("base", 0), ("run", 2))
        for i, prompt in enumerate(TEXTS)
        for seed in (3, 4)
        for reward in ("red", "blue", "toy_reward")
    }
    assert keys == wanted
    assert table.num_rows == len(wanted)

    plain, tuned = (
        load_model(Model(str(home / "sd")), seed=0),
        load_model(load_config([home / "run.yaml"]).model, seed=0),
    )
    load_trained(tuned, home / "run")
    for name, backbone in (("base", plain), ("run", tuned)):
        images = torch.stack([sample(backbone, TEXTS, SAMPLING, seed=seed) for seed in (3, 4)], dim=1).flatten(0, 1)
        found = torch.tensor(scores(tmp_path / "o", name, "red"), dtype=torch.float64)
        torch.testing.assert_close(found, images[:, 0].mean((1, 2)).double(), rtol=0, atol=1e-6)  # other batches
    assert scores(tmp_path / "o", "base", "red") != scores(tmp_path / "o", "run", "red")


def test_the_summary_is_what_the_table_says(home: Path, evaluate, tmp_path: Path):
    code, _, err = evaluate(
        "run", "--prompts", "prompts.csv", "--rewards", "eval_rewards:no_rain", "eval_rewards:blue", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    found = summary(tmp_path)
    columns = {
        run: torch.tensor(
            [[float("nan") if s is None else s for s in scores(tmp_path, run, r)] for r in ("no_rain", "blue")]
        ).T
        for run in ("run", "base")
    }
    kept = columns["base"].isfinite().all(dim=1) & columns["run"].isfinite().all(dim=1)
    difference = columns["run"] - columns["base"]
    assert kept.tolist() == [True, True, False, True]
    assert found["rewards"]["no_rain"]["nonfinite"] == {"tuned": 1, "base": 1}
    assert found["rewards"]["no_rain"]["pairs"] == 3
    assert found["rewards"]["blue"]["pairs"] == 4
    assert found["rewards"]["blue"]["difference"]["mean"] == pytest.approx(float(difference[:, 1].mean()))
    assert found["rewards"]["blue"]["win_rate"]["mean"] == float((difference[:, 1] > 0).double().mean())
    assert found["joint"]["jdr"]["mean"] == pytest.approx(
        float(joint_domination_rate(columns["run"][kept], columns["base"][kept]))
    )
    assert found["categories"]["Animals"]["blue"]["prompts"] == 2
    assert found["prompt_file"]["report"] == {
        "prompts": 4,
        "empty": {"count": 1, "lines": [4], "first": None},
    }
    assert set(found["throughput"]) == {"images", "reward/no_rain", "reward/blue"}
    assert min(found["throughput"].values()) > 0


def test_without_arguments_a_run_is_scored_on_its_own_prompts_and_rewards(home: Path, evaluate, tmp_path: Path):
    code, _, err = evaluate("run/checkpoints/step-000001", "--base", "none", "--out", tmp_path)
    assert code == 0, err
    assert {(row["run"], row["step"], row["reward"]) for row in rows(tmp_path)} == {
        ("run", 1, "toy"),
        ("run", 1, "red"),
    }
    assert summary(tmp_path)["joint"] is None


def test_prompts_that_the_text_encoder_cuts_are_reported_with_their_lines(
    evaluate, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "p.txt").write_text(f"a cat\n\n{'x' * 40}\n")
    arguments = ("run", "--prompts", tmp_path / "p.txt", "--rewards", TOY, "--base", "none", "--out", tmp_path / "o")
    code, _, err = evaluate(*arguments)
    assert code == 0, err
    assert "1 longer than the 12 tokens that CLIP reads (line 3), cut there." in caplog.text
    again = evaluate(*arguments)  # all is done, and no model is loaded
    assert again[0] == 0
    for name in ("summary.json", "prompts.json"):
        found = json.loads((tmp_path / "o" / name).read_text())
        found = found.get("prompt_file", found)
        assert found["over_long"] == {"CLIP, 12 tokens": {"count": 1, "lines": [3], "first": None}}
    listed = json.loads((tmp_path / "o" / "prompts.json").read_text())["prompts"]
    assert [(row["prompt_id"], row["line"], row["prompt"][:5]) for row in listed] == [(0, 1, "a cat"), (1, 3, "xxxxx")]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(home: Path, evaluate, server, tmp_path: Path):
    arguments = ["run", "--rewards", "eval_rewards:red", "--batch", "2", "--steps", "1", "--save-images", "--out"]
    with at_disk_calls(lambda n: None, deletions=True) as calls:
        assert evaluate(*arguments, tmp_path / "whole")[0] == 0
    killed = tmp_path / "killed"
    code = server.run("run_killed", home=str(home), arguments=[*arguments, str(killed)], n=int(0.6 * calls.count))
    done = len(records_of(killed))
    assert (code, 1 <= done <= 3, (killed / "scores.parquet").exists()) == (-9, True, False)
    code, out, err = evaluate(*arguments, killed)
    assert code == 0, err
    assert f"{done} of 4 batches were done already" in out
    for name in ("scores.parquet", "images/tuned/000003-0.png", "images/base/metadata.jsonl"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_stops_after_the_batch_with_its_exit_code_and_the_same_command_goes_on(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STOPPED", str(tmp_path / "stopped"))
    arguments = ["run", "--rewards", "eval_rewards:stop", "--batch", "3", "--steps", "1", "--out", tmp_path / "o"]
    code, out, _ = evaluate(*arguments)
    assert code == 143
    assert "stopped: 3 of 8 images are scored; the same command goes on with the others." in out
    assert evaluate(*arguments)[0] == 0
    assert len(rows(tmp_path / "o")) == 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small images in two sizes, with a table. Read it, never write it."""
    folder = tmp_path_factory.mktemp("pictures") / "tuned"
    folder.mkdir()
    lines = []
    for i in range(4):
        Image.new("RGB", (8 + 8 * (i % 2), 8), (60 * i, 10, 255 - 60 * i)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"prompt {i // 2}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_kill_in_any_call_that_changes_the_disk_loses_one_batch_at_most(
    home: Path, pictures: Path, evaluate, server, tmp_path: Path, request: pytest.FixtureRequest
):
    arguments = [str(pictures), "--rewards", "eval_rewards:red", "--batch", "2", "--out"]
    assert evaluate(*arguments, tmp_path / "whole")[0] == 0
    wanted = (tmp_path / "whole" / "scores.parquet").read_bytes()
    before = 0
    for n in range(1, 200, 1 if request.config.getoption("--runslow") else 3):
        out = tmp_path / str(n)
        code = server.run("run_killed", home=str(home), arguments=[*arguments, str(out)], n=n)
        done = len(records_of(out)) if (out / "scores.jsonl").is_file() else 0
        assert done >= before  # what was recorded once stays
        before = done
        assert not (out / "scores.parquet").exists() or (out / "scores.parquet").read_bytes() == wanted
        assert evaluate(*arguments, out)[0] == 0
        assert (out / "scores.parquet").read_bytes() == wanted
        if code == 0:
            break
        assert code == -9
    assert 20 < n < 199


def test_other_settings_in_the_same_folder_are_refused_once_a_batch_is_done(home: Path, evaluate, tmp_path: Path):
    arguments = ["run", "--rewards", "eval_rewards:red", "--base", "none", "--out", tmp_path]
    assert evaluate(*arguments)[0] == 0
    code, _, err = evaluate(*arguments, "--guidance", "2.0")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"rsaft: out: '{tmp_path}' holds an evaluation with other settings (sampling.guidance: 1.0 there, 2.0 now); "
        "repeat its command to go on with it, or choose another folder with --out."
    )
    assert evaluate("run", "--rewards", TOY, "--base", "none", "--out", tmp_path)[0] == 2
    (tmp_path / "scores.jsonl").unlink()
    assert evaluate(*arguments, "--guidance", "2.0")[0] == 0


@pytest.mark.parametrize("format", ["diffusers", "peft", "merged"])
def test_exported_weights_score_as_the_run_that_they_come_from(home: Path, evaluate, tmp_path: Path, format: str):
    config = load_config([home / "run.yaml"])
    tuned = load_model(config.model, seed=0)
    load_trained(tuned, home / "run")
    export(tuned, tmp_path / format, format)  # type: ignore[arg-type]
    common = ["--prompts", "prompts.csv", "--rewards", "eval_rewards:red", "--steps", 2, "--guidance", 1]
    assert evaluate("run", *common, "--out", tmp_path / "run")[0] == 0
    code, _, err = evaluate(tmp_path / format, *common, "--base", "sd", "--out", tmp_path / "o")
    assert code == 0, err
    base = "sd" if format == "merged" else "base"  # a model of its own, with a base of another name
    assert scores(tmp_path / "o", base, "red") == scores(tmp_path / "run", "base", "red")
    found, wanted = (torch.tensor(scores(tmp_path / p, r, "red")) for p, r in (("o", format), ("run", "run")))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if format == "merged" else 0.0)


def test_an_adapter_in_a_run_finds_its_base_and_sampling_there(home: Path, evaluate, tmp_path: Path):
    adapter = home / "run" / "checkpoints" / "step-000002" / "adapter"
    assert evaluate("run", "--rewards", "eval_rewards:red", "--out", tmp_path / "run")[0] == 0
    code, _, err = evaluate(adapter, "--rewards", "eval_rewards:red", "--out", tmp_path / "o")
    assert code == 0, err
    assert scores(tmp_path / "o", "run-adapter", "red") == scores(tmp_path / "run", "run", "red")
    assert {row["step"] for row in rows(tmp_path / "o") if row["run"] == "run-adapter"} == {2}


def test_a_run_may_be_paired_with_another_checkpoint_or_model(home: Path, evaluate, tmp_path: Path):
    common = ["run", "--rewards", "eval_rewards:red", "--base"]
    assert evaluate(*common, "run/checkpoints/step-000001", "--out", tmp_path / "a")[0] == 0
    assert {(row["run"], row["step"]) for row in rows(tmp_path / "a")} == {("run", 2), ("base", 1)}
    assert (
        evaluate("run", "--rewards", "eval_rewards:red", "--step", 1, "--base", "none", "--out", tmp_path / "b")[0] == 0
    )
    assert scores(tmp_path / "a", "base", "red") == scores(tmp_path / "b", "run", "red")
    shutil.copytree(home / "sd", tmp_path / "other")
    assert evaluate(*common, tmp_path / "other", "--out", tmp_path / "c")[0] == 0
    assert evaluate("run", "--rewards", "eval_rewards:red", "--out", tmp_path / "d")[0] == 0
    assert scores(tmp_path / "c", "other", "red") == scores(tmp_path / "d", "base", "red")


def test_saved_images_of_model_and_base_are_scored_as_two_folders_in_pairs(home: Path, evaluate, tmp_path: Path):
    first = ["run", "--prompts", "prompts.csv", "--rewards", "eval_rewards:red", "--save-images", "-n", 2]
    assert evaluate(*first, "--out", tmp_path / "a")[0] == 0
    folders = tmp_path / "a" / "images"
    code, out, err = evaluate(
        folders / "tuned", "--base", folders / "base", "--rewards", "eval_rewards:red", "--out", tmp_path / "b"
    )
    assert code == 0, err
    assert f"images '{folders / 'tuned'}': 8, prompts from metadata.jsonl" in out
    for run, name in (("run", "tuned"), ("base", "base")):
        found, wanted = scores(tmp_path / "b", name, "red"), scores(tmp_path / "a", run, "red")
        assert found == pytest.approx(wanted, abs=0.5 / 255)  # 8 bits
        assert found != wanted
    assert summary(tmp_path / "b")["rewards"]["red"]["pairs"] == 8
    assert summary(tmp_path / "b")["unpaired"] == {"tuned": 0, "base": 0}


def test_an_image_that_cannot_be_read_is_counted_and_scores_null(pictures: Path, evaluate, tmp_path: Path):
    shutil.copytree(pictures, tmp_path / "p")
    (tmp_path / "p" / "3.png").write_bytes(b"no image")
    code, out, _ = evaluate(tmp_path / "p", "--rewards", "eval_rewards:red", "--out", tmp_path / "o")
    assert code == 0
    assert "1 images could not be read as images of 8 bits, the first:" in out
    assert [score is None for score in scores(tmp_path / "o", "p", "red")] == [False] * 3 + [True]
    assert summary(tmp_path / "o")["rewards"]["red"]["nonfinite"] == {"tuned": 1}


def test_the_testbed_is_evaluated_under_all_its_rewards(evaluate, tmp_path: Path):
    code, _, err = evaluate(
        "testbed:fashion", "--prompts", "testbed:fashion", "--rewards", "testbed:fashion", "--steps", 2,
        "--guidance", 1, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert {row["reward"] for row in rows(tmp_path)} == {"reward", "gold", "cnn2", "mixer", "vit"}
    assert all(0 <= score <= 1 for score in scores(tmp_path, "testbed-fashion", "gold"))


RED = ["--rewards", "eval_rewards:red"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sd", *RED], "prompts: 'sd' has none of its own; name a file with --prompts."),
        (["sd", "--prompts", "prompts.csv"], "rewards: name at least one, as in --rewards hpsv2"),
        (["run", "--rewards", "hpsv3"], "rewards.hpsv3.type: there is no reward 'hpsv3'; allowed are testbed, "),
        (["run", "--rewards", "eval_rewards:green"], "rewards.green.type: 'eval_rewards' has no 'green'"),
        (["run", *RED, "eval_rewards:red"], "rewards: there are two called 'red', the second by 'eval_rewards:red'"),
        (["run", "--rewards", "eval_rewards:wrong"], "reward 'wrong': it returned a tensor of shape () for 4 images"),
        (["run", "--rewards", "none.yaml"], "config file 'none.yaml': there is no such file"),
        (["run", "--rewards", "testbed:fashon"], "rewards 'testbed:fashon': there is no world 'fashon'; allowed are "),
        (["run", *RED, "--step", "7"], "step: run has no checkpoint of step 7; kept are those of steps 1, 2."),
        (["sd", *RED, "--step", "7"], "step: only a run has checkpoints of several steps"),
        (["run", *RED, "--dtype", "fp8"], "dtype: found 'fp8', allowed are fp32, bf16, fp16, fp64."),
        (["run", *RED, "--prompts", "none.txt"], "prompts 'none.txt': there is no such file"),
        (["no/model", *RED, "--prompts", "prompts.csv"], "model 'no/model': no diffusers pipeline"),
        (["run/samples", *RED, "--prompts", "x"], "prompts: 'run/samples' is a folder of images, which has its own"),
        (["run/samples", *RED], "images 'run/samples': no image (.png"),
        (["run/checkpoints", *RED, "--prompts", "x"], "model 'run/checkpoints': it is neither a run (config.yaml)"),
        (["run", *RED, "--base", "run/samples"], "base: 'run/samples' is a folder of images, and a model is paired"),
        (["run", *RED, "--out", "prompts.csv"], "out: 'prompts.csv' is a file, and a folder is needed"),
        (["run", *RED, "--out", "run"], "out: 'run' is not empty, and holds no evaluation"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(evaluate, tmp_path: Path, arguments: list[str], sentence: str):
    out = [] if "--out" in arguments else ["--out", tmp_path / "o"]
    code, _, err = evaluate(*arguments, *out)
    said = [line for line in err.splitlines() if not line.startswith("prompts 'prompts.csv': 1 empty")]
    assert (code, len(said)) == (2, 1), err
    assert said[0].startswith(f"rsaft: {sentence}")


def test_an_adapter_without_a_base_or_on_a_wrong_one_is_refused(home: Path, evaluate, tmp_path: Path):
    shutil.copytree(home / "run" / "checkpoints" / "step-000002" / "adapter", tmp_path / "adapter")
    common = [tmp_path / "adapter", *RED, "--prompts", "prompts.csv", "--out", tmp_path / "o", "--steps", 1]
    code, _, err = evaluate(*common)
    assert code == 2
    assert "which model do these weights belong to? Name it with --base." in err
    code, _, err = evaluate(*common, "--base", "tiny:sd3", "--guidance", 1)
    assert code == 2
    assert "name its own" in err


def test_a_damaged_checkpoint_is_passed_over_by_name(
    home: Path, evaluate, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(home / "run", tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = evaluate(tmp_path / "run", *RED, "--base", "none", "--out", tmp_path / "o")
    assert code == 0, err
    assert "step-000002: weights.safetensors is truncated" in caplog.text
    assert {row["step"] for row in rows(tmp_path / "o")} == {1}
