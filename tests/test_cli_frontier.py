"""`rsaft frontier` end to end: its samples, more of them later, kills, signals, several processes, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from rsaft.backbones.fingerprint import fingerprint
from rsaft.backbones.load import load_backbone
from rsaft.cli import main
from rsaft.cli.frontier_records import keys_of, records_of
from rsaft.config import build_trainer, load_config
from rsaft.errors import ConfigError
from rsaft.pareto import FrontierStore, non_dominated
from rsaft.randomness import key_of
from rsaft.sampling import Sampling, sample
from tests.helpers import tiny_sd_folder
from tests.rdrl.disk_faults import at_disk_calls, killed_at
from tests.rdrl.fork_server import ForkServer
from tests.rdrl.process_worker import meet

OWN = """
def red(images, prompts):
    return images[:, 0].mean((1, 2))

def blue(images, prompts):
    return images[:, 2, ::2].square().mean((1, 2))

def no_rain(images, prompts):
    return images.mean((1, 2, 3)) + images.new_tensor([float("nan") if "rain" in p else 0.0 for p in prompts])

def stop(images, prompts):
    import os, signal
    if not os.path.exists(os.environ["STOPPED"]):
        open(os.environ["STOPPED"], "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return images.mean((1, 2, 3))

def stop_second(images, prompts):
    import os, signal
    if os.environ["RANK"] == "1" and not os.path.exists("stopped"):
        open("stopped", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return images.mean((1, 2, 3))
"""
PROMPTS = ("a cat", "two red dogs", "rain")
SAMPLING = Sampling(num_steps=2, guidance=1.5)
SETTINGS: dict[str, Any] = {
    "model": {"path": "sd", "lora": {"rank": 2}},
    "prompts": {"train": "prompts.txt"},
    "algorithm": {"type": "draft", "sampling": {"num_steps": 2, "guidance": 1.5}},
    "rewards": {"red": {"type": "frontier_rewards:red"}, "blue": {"type": "frontier_rewards:blue"}},
    "objective": {"type": "pareto_transport", "frontiers": "front"},
    "train": {"steps": 1, "batch_size": 4, "group_size": 2, "eval_samples": 1, "lr": 1e-2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """A folder with a model, prompts (one of them twice), rewards and a run file. Read it, never write it."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_sd, folder / "sd")
    (folder / "frontier_rewards.py").write_text(OWN)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return folder


@pytest.fixture
def frontier(
    home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs `rsaft frontier run.yaml` in this process, in `home`: exit code, output, errors."""
    monkeypatch.setattr(sys, "path", [str(home), *sys.path])
    monkeypatch.chdir(home)

    def command(*arguments: Any) -> tuple[int, str, str]:
        code = run_command(*arguments)
        return (code, *capsys.readouterr())

    return command


def run_command(*arguments: Any) -> int:
    before, sys.argv = sys.argv, ["rsaft", "frontier", "run.yaml", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("the command line ends by SystemExit")


def run_killed(home: str, arguments: list[str], n: int) -> None:
    """In a process of its own: `rsaft frontier`, killed in the n-th call that changes the disk."""
    os.chdir(home)
    with at_disk_calls(killed_at(n), deletions=True):
        sys.exit(run_command(*arguments))


def run_together(home: str, arguments: list[str], meeting: str, rank: int, world: int) -> None:
    """In a process of its own, one of several that torchrun would have started."""
    Path(meeting).mkdir(exist_ok=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    meet(meeting, rank, world)
    os.chdir(home)
    sys.exit(run_command(*arguments))


@pytest.fixture(scope="module")
def server():
    with ForkServer("tests.test_cli_frontier") as running:
        running.ready()
        yield running


@pytest.fixture
def several(server: ForkServer, home: Path, tmp_path: Path) -> Callable[..., list[int]]:
    """Runs `rsaft frontier run.yaml` on some processes; their exit codes."""

    def command(world: int, *arguments: Any) -> list[int]:
        meeting = tmp_path / f"meeting-{len(list(tmp_path.glob('meeting-*')))}"
        common = {"home": str(home), "arguments": [str(a) for a in arguments], "meeting": str(meeting), "world": world}
        started = [server.start("run_together", rank=rank, **common) for rank in range(world)]
        return [server.wait(pid) for pid in started]

    return command


def rewards(out: Path) -> Tensor:
    return FrontierStore.load(out).rewards


def done(out: Path) -> list[tuple[int, int]]:
    return [key for record in records_of(out) for key in keys_of(record)]


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples of each prompt, made by one process at once, in batches of 4. Read it, never write it."""
    out = tmp_path_factory.mktemp("whole") / "front"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        patch.chdir(home)
        assert run_command("--out", out, "-n", 6, "--batch", 4) == 0
    return out


def test_the_store_holds_the_rewards_of_the_base_model_at_noises_of_their_own(home: Path, whole: Path):
    store = FrontierStore.load(whole)
    assert (store.prompts, store.names, tuple(store.rewards.shape)) == (PROMPTS, ("red", "blue"), (3, 6, 2))
    backbone = load_backbone(home / "sd", device="cpu")
    for row, prompt in enumerate(PROMPTS):
        ids = [key_of(0, "frontier", row, k) for k in range(6)]
        images = sample(backbone, [prompt] * 6, SAMPLING, seed=0, sample_ids=ids)  # another batch size
        wanted = torch.stack([images[:, 0].mean((1, 2)), images[:, 2, ::2].square().mean((1, 2))], dim=1).double()
        torch.testing.assert_close(store.rewards[row], wanted, rtol=0, atol=1e-6)
    assert len(store.rewards.flatten().unique()) == store.rewards.numel()
    wanted = {"model.fingerprint": fingerprint(backbone), "sampling.num_steps": 2, "sampling.guidance": 1.5}
    wanted |= {"samples": 6, "seed": 0, "rewards.red.type": "frontier_rewards:red"}
    assert {key: store.origin[key] for key in wanted} == wanted
    assert Image.open(whole / "frontiers.png").size[0] > 1000


def test_it_prints_how_much_is_frontier_and_how_the_rewards_go_together(frontier, whole: Path):
    before = {path.name: path.stat().st_mtime_ns for path in whole.glob("scores-*")}
    code, out, err = frontier("--out", whole, "-n", 6)  # nothing is left to do
    assert (code, {path.name: path.stat().st_mtime_ns for path in whole.glob("scores-*")}) == (0, before), err
    front = non_dominated(rewards(whole)).sum(dim=1).double()
    assert f"| 3 | 6 | {float(front.mean()):.2f} | {float(front.sum()) / 18:.1%} |" in out
    centred = rewards(whole) - rewards(whole).mean(dim=1, keepdim=True)
    together = torch.corrcoef(centred.flatten(0, 1).T)[0, 1]
    assert f"| red | {float(centred[..., 0].square().mean().sqrt()):.3g} | 1.00 | {float(together):.2f} |" in out
    assert f"wrote {whole}, for objective.frontiers" in out


def test_more_samples_are_added_to_those_there_and_fewer_need_no_new_ones(frontier, whole: Path, tmp_path: Path):
    assert frontier("--out", tmp_path / "o", "-n", 4, "--batch", 5)[0] == 0
    first = (tmp_path / "o" / "scores-0.jsonl").read_bytes()
    code, out, _ = frontier("--out", tmp_path / "o", "-n", 6, "--batch", 5)
    assert (code, "12 of 18 images were scored already" in out) == (0, True)
    assert (tmp_path / "o" / "scores-0.jsonl").read_bytes().startswith(first)
    assert len(done(tmp_path / "o")) == len(set(done(tmp_path / "o"))) == 18
    torch.testing.assert_close(rewards(tmp_path / "o"), rewards(whole), rtol=0, atol=1e-6)
    assert frontier("--out", tmp_path / "o", "-n", 3)[0] == 0
    assert len(done(tmp_path / "o")) == 18
    torch.testing.assert_close(rewards(tmp_path / "o"), rewards(whole)[:, :3], rtol=0, atol=1e-6)


def test_another_seed_gives_other_samples(frontier, whole: Path, tmp_path: Path):
    assert frontier("--out", tmp_path, "-n", 2, "--seed", 1)[0] == 0
    assert not (rewards(tmp_path)[..., None, :] == rewards(whole)[:, None]).any()


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
    home: Path, frontier, server, whole: Path, tmp_path: Path
):
    arguments = ["-n", "6", "--batch", "4", "--out"]
    with at_disk_calls(lambda n: None, deletions=True) as calls:
        assert frontier(*arguments, tmp_path / "counted")[0] == 0
    killed = tmp_path / "killed"
    code = server.run("run_killed", home=str(home), arguments=[*arguments, str(killed)], n=int(0.4 * calls.count))
    kept = len(done(killed))
    assert (code, 0 < kept < 18, (killed / "frontier.json").exists()) == (-9, True, False)
    code, out, err = frontier(*arguments, killed)
    assert (code, f"{kept} of 18 images were scored already" in out) == (0, True), err
    for name in ("rewards.safetensors", "frontier.json", "frontiers.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_kill_in_any_call_that_changes_the_disk_loses_one_batch_at_most(
    home: Path, frontier, server, whole: Path, tmp_path: Path
):
    arguments = ["-n", "6", "--batch", "4", "--out"]
    before = 0
    for n in range(1, 200):
        out = tmp_path / str(n)
        code = server.run("run_killed", home=str(home), arguments=[*arguments, str(out)], n=n)
        kept = len(done(out)) if out.is_dir() else 0
        assert kept >= before  # what was recorded once stays
        before = kept
        assert frontier(*arguments, out)[0] == 0
        assert (out / "rewards.safetensors").read_bytes() == (whole / "rewards.safetensors").read_bytes()
        if code == 0:
            break
        assert code == -9
    assert 20 < n < 199


def test_a_signal_stops_after_the_batch_with_its_exit_code_and_the_same_command_goes_on(
    frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STOPPED", str(tmp_path / "stopped"))
    arguments = ["rewards.blue.type=frontier_rewards:stop", "--batch", 4, "-n", 3, "--out", tmp_path / "o"]
    code, out, _ = frontier(*arguments)
    assert code == 143
    assert "stopped: 4 of 9 images are scored; the same command goes on with the others." in out
    assert frontier(*arguments)[0] == 0
    assert len(done(tmp_path / "o")) == 9


def test_two_processes_share_the_work_and_any_number_goes_on(several, frontier, whole: Path, tmp_path: Path):
    assert several(2, "--out", tmp_path / "a", "-n", 4, "--batch", 3) == [0, 0]
    assert {p.name for p in (tmp_path / "a").glob("scores-*")} == {"scores-0.jsonl", "scores-1.jsonl"}
    assert sorted(done(tmp_path / "a")) == [(row, k) for row in range(3) for k in range(4)]
    torch.testing.assert_close(rewards(tmp_path / "a"), rewards(whole)[:, :4], rtol=0, atol=1e-6)
    assert frontier("--out", tmp_path / "a", "-n", 6)[0] == 0
    assert len(done(tmp_path / "a")) == 18
    torch.testing.assert_close(rewards(tmp_path / "a"), rewards(whole), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(several, tmp_path: Path, server):
    arguments = ["rewards.blue.type=frontier_rewards:stop_second", "--batch", 2, "-n", 4, "--out", tmp_path / "o"]
    assert several(2, *arguments) == [143, 143]
    assert 0 < len(done(tmp_path / "o")) <= 4  # the batches that were being worked on, at most
    assert several(2, *arguments) == [0, 0]
    assert sorted(done(tmp_path / "o")) == [(row, k) for row in range(3) for k in range(4)]


def test_other_settings_and_another_model_are_refused_once_something_is_scored(
    home: Path, frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert frontier("--out", tmp_path / "o", "-n", 1)[0] == 0
    for override, found in (
        ("algorithm.sampling.guidance=2", "sampling.guidance: 1.5 there, 2.0 now"),
        (
            "rewards.blue.type=frontier_rewards:no_rain",
            "rewards.blue.type: frontier_rewards:blue there, frontier_rewards:no_rain now",
        ),
        ("model.dtype=bf16", "model.dtype: fp32 there, bf16 now"),
    ):
        code, _, err = frontier(override, "--out", tmp_path / "o", "-n", 1)
        assert code == 2
        assert err.splitlines()[-1].startswith(
            f"rsaft: out: '{tmp_path / 'o'}' holds frontiers with other settings ({found})"
        )
    tiny_sd_folder(tmp_path / "other", seed=1)
    code, _, err = frontier(f"model.path={tmp_path / 'other'}", "--out", tmp_path / "o", "-n", 2)
    assert (code, "other settings (model.fingerprint: " in err) == (2, True)
    assert len(done(tmp_path / "o")) == 3
    code, _, err = frontier("--out", home)
    assert (code, err.splitlines()[-1]) == (
        2,
        f"rsaft: out: '{home}' is not empty, and holds no frontiers; choose another folder with --out.",
    )


def test_scores_that_are_not_finite_are_counted_and_a_prompt_without_others_is_refused(frontier, tmp_path: Path):
    arguments = ["--out", tmp_path, "-n", 2]
    code, out, err = frontier("rewards.blue.type=frontier_rewards:no_rain", *arguments)
    assert code == 2
    assert "reward 'blue': 2 of 6 scores are not finite; these samples are left out" in out
    assert err.splitlines()[-1].startswith("rsaft: frontier: 1 prompts have no sample with finite scores, the first is")
    assert len(done(tmp_path)) == 6


def test_with_tiny_any_config_makes_frontiers_of_a_few_prompts(frontier, tmp_path: Path):
    config = Path(__file__).parent.parent / "configs" / "sd35" / "pareto.yaml"
    before, sys.argv = sys.argv, ["rsaft", "frontier", str(config), "--tiny", "--out", str(tmp_path)]
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        sys.argv = before
    assert not caught.value.code
    assert tuple(rewards(tmp_path).shape) == (4, 4, 4)


def test_a_run_trains_on_its_frontiers(home: Path, frontier, whole: Path, tmp_path: Path):
    config = load_config([home / "run.yaml"], [f"objective.frontiers={whole}"])
    trainer = build_trainer(config, tmp_path / "run")
    assert trainer.fit().step == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["pareto/source"] > 0 for r in records if r["kind"] == "train"] == [True]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["algorithm.sampling.num_steps=3"], "sampling.num_steps = 2, and the run has 3; build them anew, or set"),
        (["rewards.red.type=frontier_rewards:blue"], "rewards.red.type = 'frontier_rewards:red', and the run has"),
        (["rewards.more.type=frontier_rewards:blue"], "without ['more'], and hold ['red', 'blue']"),
        (["model.resolution=32"], "model.resolution = None, and the run has 32"),
        (["prompts.train=other.txt"], "there is none for the prompt 'a hat'"),
        (["objective.frontiers=none"], "there is no none/frontier.json; build them with `rsaft frontier`"),
        (["objective.frontiers=null"], "the offline strategy needs them; build them with `rsaft frontier`"),
        (["model.path=OTHER"], "model.fingerprint = "),
        (["objective.reg=-1"], "so reg > 0 and finite; got -1"),
    ],
)
def test_a_run_that_the_frontiers_were_not_made_for_is_refused_in_one_sentence(
    home: Path, frontier, whole: Path, tmp_path: Path, overrides: list[str], sentence: str
):
    (tmp_path / "other.txt").write_text("a hat\n")
    if overrides == ["model.path=OTHER"]:
        overrides = [f"model.path={tiny_sd_folder(tmp_path / 'other', seed=1)}"]
    overrides = [o.replace("other.txt", str(tmp_path / "other.txt")) for o in overrides]
    with pytest.raises(ConfigError) as caught:
        build_trainer(load_config([home / "run.yaml"], [f"objective.frontiers={whole}", *overrides]), tmp_path / "run")
    assert str(caught.value).startswith("config.objective: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_that_does_not_count_need_not_be_in_the_frontiers(home: Path, frontier, whole: Path, tmp_path: Path):
    overrides = [f"objective.frontiers={whole}", "objective.active=[red]", "rewards.blue.type=frontier_rewards:no_rain"]
    trainer = build_trainer(load_config([home / "run.yaml"], overrides), tmp_path)
    assert trainer.score.objective.active == ("red",)  # type: ignore[attr-defined]


def test_one_sample_a_prompt_is_warned_of_offline_and_refused_online(
    home: Path, frontier, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    overrides = [f"objective.frontiers={whole}", "train.group_size=1"]
    build_trainer(load_config([home / "run.yaml"], overrides), tmp_path)
    assert [r.message[:30] for r in caplog.records if "group" in r.message] == ["train.group_size is 1: alone, "]
    with pytest.raises(ConfigError, match=r"^config.train.group_size: the online strategy compares"):
        load_config([home / "run.yaml"], [*overrides, "objective.strategy=online"])


def test_the_active_rewards_are_some_of_the_run(home: Path):
    with pytest.raises(
        ConfigError, match=r"^config.objective.active: there is no reward 'rad'; .*did you mean 'red'\?"
    ):
        load_config([home / "run.yaml"], ["objective.active=[rad]"])
