"""The arguments of `rsaft eval`: many rewards after one option, rewards by name, and help without a library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rsaft.cli.eval import spread
from rsaft.cli.eval_rewards import rewards_named
from rsaft.config import Custom, TestbedReward
from rsaft.config.rewards import HPSv2, PickScore
from rsaft.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["x", "--rewards", "a", "b", "--out", "o"], ["x", "--rewards", "a", "--rewards", "b", "--out", "o"]),
        (["--rewards", "a", "--rewards", "b"], ["--rewards", "a", "--rewards", "b"]),
        (["x", "--rewards=a", "-n", "2"], ["x", "--rewards=a", "-n", "2"]),
        (["x", "y"], ["x", "y"]),
    ],
)
def test_every_value_up_to_the_next_option_is_a_reward(given: list[str], wanted: list[str]):
    assert spread(given, "--rewards") == wanted


def test_rewards_are_built_in_types_own_code_and_a_testbeds():
    found = rewards_named(["hpsv2", "my_pkg.mod:Sharp.of", "testbed:shapes:gold"])
    assert found == {
        "hpsv2": HPSv2(),
        "of": Custom("my_pkg.mod:Sharp.of"),
        "gold": TestbedReward("shapes", "gold"),
    }


def test_a_world_alone_is_all_of_its_rewards():
    found = rewards_named(["testbed:fashion"])
    assert found == {name: TestbedReward("fashion", name) for name in ("reward", "gold", "cnn2", "mixer", "vit")}


def test_a_yaml_file_gives_paths_and_options_and_other_sections_are_not_looked_at(tmp_path: Path):
    path = tmp_path / "r.yaml"
    sections = {
        "rewards": {"hps20": {"type": "hpsv2", "version": "2.0"}},
        "held_out": {"pick": {"type": "pickscore", "dtype": "bf16"}},
        "train": {"no": "such setting"},
    }
    path.write_text(yaml.safe_dump(sections))
    assert rewards_named([str(path)]) == {"hps20": HPSv2(version="2.0"), "pick": PickScore(dtype="bf16")}


def test_a_yaml_file_without_rewards_is_refused(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {}\n")
    with pytest.raises(ConfigError, match="it has no section 'rewards' with a reward in it"):
        rewards_named([str(path)])


def test_help_imports_no_library():
    heavy = ("torch", "numpy", "diffusers", "transformers", "pyarrow", "scipy", "PIL", "yaml")
    code = f"""
import sys
sys.argv = ["rsaft", "eval", "--help"]
from rsaft.cli import main
try:
    main()
except SystemExit:
    pass
print([m for m in {heavy!r} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--rewards" in done.stdout
