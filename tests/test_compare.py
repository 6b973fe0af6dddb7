"""`rsaft compare` on real runs: how they are grouped and named, what is written, and what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from rsaft.cli import main
from rsaft.cli.compare import grouped, names
from rsaft.config import build_trainer, load_config
from rsaft.errors import ConfigError
from rsaft.flatten import RSAFT
from rsaft.metrics import comparison
from rsaft.metrics.comparison_page import html
from rsaft.metrics.figures import data_uri, tiles
from rsaft.metrics.records import Run, read_run
from tests.metrics.page import assert_is_self_contained

TOY = "rsaft.testbed.toy:toy_reward"
SETTINGS: dict[str, Any] = {
    "model": {"path": "tiny:sd", "lora": {"rank": 2}},
    "prompts": {"train": "prompts.txt"},
    "algorithm": {"type": "draft", "sampling": {"num_steps": 2, "guidance": 1.0}},
    "rewards": {"toy": {"type": TOY}},
    "held_out": {"gold": {"type": "compare_rewards:red"}, "blue": {"type": "compare_rewards:blue"}},
    "objective": {"type": "weighted_sum", "weights": {"toy": 1.0}},
    "train": {"steps": 2, "batch_size": 2, "lr": 1e-2, "eval_samples": 3, "eval_every": 1, "sharpness_rho": 0.1},
}
OWN = """
def red(images, prompts):
    return images[:, 0].mean((1, 2))

def blue(images, prompts):
    return images[:, 2].mean((1, 2))
"""
RSA_FT = ["step.type=rsaft", "step.rho=0.01", "step.rho_w=0.01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two updates of a tiny model, plain and with RSA-FT, two seeds each, and one run of another evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "compare_rewards.py").write_text(OWN)
    (folder / "prompts.txt").write_text("a red boot\na blue coat\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    wanted = {f"plain{s}": [f"train.seed={s}"] for s in (0, 1)}
    wanted |= {f"rsaft{s}": [*RSA_FT, f"train.seed={s}"] for s in (0, 1)}
    wanted["other"] = ["train.eval_seed=5", "train.steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, settings in wanted.items():
            build_trainer(load_config([folder / "run.yaml"], settings), folder / name).fit()
    return {name: folder / name for name in wanted}


@pytest.fixture
def compare(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `rsaft compare` in this process: exit code, output, errors."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rsaft", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return command


def test_real_runs_are_grouped_by_settings_and_compared_seed_by_seed(runs, compare):
    paths = [runs[name] for name in ("plain0", "rsaft0", "plain1", "rsaft1")]
    before = {path: (path / "metrics.jsonl").read_bytes() for path in paths}
    code, out, err = compare(*paths)
    assert (code, err) == (0, "")
    assert "- step=plain: 2 runs, seeds 0, 1" in out
    assert "- step=rsaft rho=0.01 rho_w=0.01: 2 runs, seeds 0, 1" in out
    assert "| at | group | update | train reward | gold | blue | S1 | JDR | JCR |" in out
    assert re.search(r"\| update 2 \| step=rsaft rho=0.01 rho_w=0.01 \| 2 \|.* n=2\)", out)
    assert "## Correlation of S1 with held-out rewards" in out
    assert {path: (path / "metrics.jsonl").read_bytes() for path in paths} == before


def test_the_numbers_are_those_of_the_runs(runs, compare, tmp_path: Path):
    paths = [runs[name] for name in ("plain0", "plain1", "rsaft0", "rsaft1")]
    code, out, _ = compare(*paths, "--out", tmp_path / "some" / "page.html")
    assert code == 0
    assert f"wrote {tmp_path / 'some' / 'page.json'}" in out
    assert "<table>" in (tmp_path / "some" / "page.html").read_text()
    numbers = json.loads((tmp_path / "some" / "page.json").read_text())
    rows = [r for r in numbers["rows"] if r["at"] == "update 2"]
    ends = {name: read_run(path).evals[-1]["held_out/gold"] for name, path in runs.items()}
    plain, flat = (r["scores"]["held_out/gold"] for r in rows)
    assert plain["values"] == {"0": ends["plain0"], "1": ends["plain1"]}
    differences = [ends[f"rsaft{s}"] - ends[f"plain{s}"] for s in (0, 1)]
    assert flat["difference"] == pytest.approx([sum(differences) / 2, min(differences), max(differences)])
    assert numbers["curves"]["step=plain"]["0"]["JDR"][0] == 0.0  # the untuned model against itself
    assert len(numbers["curves"]["step=plain"]["0"]["JDR"]) == 3


def test_the_page_holds_curves_samples_and_settings_of_every_group(runs, compare, tmp_path: Path):
    paths = [runs[name] for name in ("rsaft1", "plain1", "rsaft0")]
    assert compare(*paths, "--out", tmp_path)[0] == 0
    text = (tmp_path / "compare.html").read_text()
    assert html(comparison.compare(grouped([read_run(path) for path in paths]))) == text  # byte by byte
    page = assert_is_self_contained(text)
    assert page.tags.count("svg") == 4  # gold against train reward, and both and blue against updates
    assert page.tags.count("img") == 3 * 3 * 2  # samples, times, groups
    assert "the run with the smallest seed (0, 1)" in " ".join(page.text.split())
    end = [data_uri(tile) for tile in tiles(runs["rsaft0"] / "samples" / "step-000002.png")]
    assert all(tile in page.addresses for tile in end)
    settings = " ".join(page.text.partition("Settings that differ")[2].split())
    assert "step.type rsaft plain" in settings
    assert "step.rho 0.01 –" in settings
    assert "train." not in settings  # neither what is equal nor the seed, which is no setting of a group


def test_finished_runs_without_pictures_and_settings_still_have_a_page(runs, compare, tmp_path: Path):
    left_out = shutil.ignore_patterns("checkpoints", "config.yaml", "samples")
    for name in ("plain0", "rsaft0"):
        shutil.copytree(runs[name], tmp_path / f"{name[:-1]}.seed0", ignore=left_out)
    code, _, err = compare(tmp_path / "plain.seed0", tmp_path / "rsaft.seed0", "--out", tmp_path / "page.html")
    assert (code, err) == (0, "")
    page = assert_is_self_contained((tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 4
    assert "img" not in page.tags
    assert "Samples" not in page.text
    assert "Settings that differ" not in page.text


def test_one_run_is_compared_with_its_own_start(runs, compare):
    code, out, _ = compare(runs["plain0"])
    assert code == 0
    assert "- all runs: 1 run, seed 0" in out


@pytest.mark.parametrize(
    ("names_of", "sentence"),
    [
        (["plain0", "nowhere"], "nowhere holds no metrics.jsonl, so it is no run directory"),
        (["plain0", "other"], "compare: train.eval_seed is 1000003 in"),
        (["plain0", "plain0"], "have the same settings and seed 0; leave out one."),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_exit_code_2(runs, compare, names_of, sentence: str):
    code, out, err = compare(*[runs.get(name, name) for name in names_of])
    assert (code, out) == (2, "")
    assert err.startswith("rsaft: ")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_refused_before_the_work(runs, compare, tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, _, err = compare(runs["plain0"], "--out", tmp_path / "file")
    assert code == 2
    assert "is in the way; name a file NAME.html or a folder" in err


def test_runs_of_a_study_are_grouped_by_the_names_of_their_folders(runs, tmp_path: Path):
    for name in ("plain0", "plain1", "rsaft0"):
        target = tmp_path / f"{name[:-1]}.seed{name[-1]}"
        shutil.copytree(runs[name], target, ignore=shutil.ignore_patterns("checkpoints", "config.yaml"))
    groups = grouped([read_run(path) for path in sorted(tmp_path.iterdir())])
    assert [(group.name, list(group.runs)) for group in groups] == [("method=plain", [0, 1]), ("method=rsaft", [0])]


def test_a_run_whose_settings_nobody_knows_is_refused(runs, tmp_path: Path):
    shutil.copytree(runs["plain0"], tmp_path / "a", ignore=shutil.ignore_patterns("checkpoints", "config.yaml"))
    unknown = read_run(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"nor is it called METHOD\.seedN"):
        grouped([unknown])
    with pytest.raises(ConfigError, match=r"a has no config\.yaml, and other runs have"):
        grouped([read_run(runs["plain0"]), unknown])


def config(step: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {"step": step, "train": {"lr": 1e-4} | train, "rewards": {"a": {"type": "testbed", "name": "reward"}}}


def flattened(**settings: Any) -> dict[str, Any]:
    return {"type": "rsaft"} | asdict(RSAFT(rho=0.0, rho_w=0.01, **settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([config({"type": "plain"})], ["all runs"]),
        (
            [config({"type": "plain"}), config(flattened(mode="weight")), config(flattened(eps_share=0.5))],
            ["step=plain", "step=rsaft rho=0.0 rho_w=0.01 mode=weight", "step=rsaft rho=0.0 rho_w=0.01 eps_share=0.5"],
        ),
        ([config(flattened()), config(flattened(reuse="cached"))], ["reuse=resample", "reuse=cached"]),
        (
            [config({"type": "plain"}), config({"type": "plain"}, lr=1e-3, batch_size=8)],
            ["lr=0.0001", "lr=0.001 batch_size=8"],
        ),
        (
            [config({"type": "my:A", "args": {"x": 1}}), config({"type": "my:A", "args": {"x": 2}})],
            ["x=1", "x=2"],
        ),
    ],
)
def test_a_group_is_named_by_what_differs(settings: list[dict[str, Any]], expected: list[str]):
    assert names(settings) == expected


def test_a_name_that_two_keys_share_is_written_out():
    first, second = config({"type": "plain"}), config({"type": "plain"})
    second["rewards"] = {"a": {"type": "testbed", "name": "gold"}}
    second["prompts"] = {"name": "b"}
    first["prompts"] = {"name": "c"}
    assert names([first, second]) == [
        "rewards.a.name=reward prompts.name=c",
        "rewards.a.name=gold prompts.name=b",
    ]


def test_no_two_groups_share_a_name():
    older = flattened()
    del older["eps_share"]
    made = names([config({"type": "plain"}), config(older), config(flattened())])
    assert made == ["step=plain", "step=rsaft rho=0.0 rho_w=0.01", "step=rsaft rho=0.0 rho_w=0.01 (2)"]
    assert names([config({"type": "plain"}), config({"type": "plain"}, ema=0.9)]) == ["the other settings", "ema=0.9"]


def test_settings_that_differ_in_nothing_but_the_seed_are_one_group():
    made = [
        Run(Path(f"r{seed}"), f"r{seed}", (), (), {}, {}, config({"type": "plain"}, seed=seed), {}) for seed in (3, 1)
    ]
    (group,) = grouped(made)
    assert list(group.runs) == [3, 1]
