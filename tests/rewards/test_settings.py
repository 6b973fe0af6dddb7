"""A run file names a built-in reward by its type, with the keys and defaults of its constructor."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch

from rsaft import rewards
from rsaft.config import TYPES, to_dict, validate
from rsaft.config.assemble import components
from rsaft.config.rewards import MODELS, HPSv2
from rsaft.errors import ConfigError
from tests.rewards import layouts
from tests.test_config import BASE


def run_file(**entry):
    return validate(BASE | {"rewards": {"proxy": entry}})


@pytest.mark.parametrize("settings", MODELS, ids=lambda cls: cls.__name__)
def test_settings_are_the_keywords_and_defaults_of_the_constructor(settings):
    parameters = list(inspect.signature(getattr(rewards, settings.__name__)).parameters.values())
    assert [p.name for p in parameters] == [field.name for field in fields(settings)]
    given = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    assert given == {field.name: field.default for field in fields(settings) if field.default is not MISSING}


def test_every_reward_model_is_public_and_has_a_type():
    models = {cls.__name__ for cls in MODELS}
    assert models <= {path.rpartition(":")[2] for path in TYPES["reward"].values()}
    assert models <= set(rewards.__all__)


MODEL_TYPES = [name for name, path in TYPES["reward"].items() if path.startswith("rsaft.config.rewards:")]
MODEL_TYPES.remove("remote")  # no model: its address has no default, and it has no dtype


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_run_file_with_a_built_in_reward_validates_and_resolves_to_itself(name):
    config = run_file(type=name, dtype="bf16")
    assert config.rewards["proxy"].dtype == "bf16"
    assert to_dict(config)["rewards"]["proxy"]["type"] == name
    assert validate(to_dict(config)) == config


def test_a_wrong_key_of_a_reward_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"^config.rewards.proxy.versoin: unknown key; .* did you mean 'version'\?"):
        run_file(type="hpsv2", versoin="2.0")
    with pytest.raises(ConfigError, match=r"^config.rewards.proxy.version: allowed is '2.0' or '2.1'; got 2.1"):
        run_file(type="hpsv2", version=2.1)


def test_the_reward_of_a_run_file_is_loaded_with_its_settings(tmp_path: Path):
    path = str(layouts.write_hpsv2(tmp_path))
    config = run_file(type="hpsv2", path_or_id=path, device="cpu", antialias=False)
    assert config.rewards["proxy"] == HPSv2(path_or_id=path, device="cpu", antialias=False)
    reward = components(validate(BASE | {"rewards": {"proxy": to_dict(config)["rewards"]["proxy"]}})).rewards["proxy"]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reward(images, ["a"]), rewards.HPSv2(path, device="cpu", antialias=False)(images, ["a"]))


def test_a_missing_checkpoint_is_named_with_its_place_in_the_run_file(tmp_path: Path):
    config = run_file(type="pickscore", path_or_id=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^config.rewards.proxy: PickScore: the folder '.*' holds none of "):
        components(config)


def test_a_remote_reward_needs_an_address():
    assert run_file(type="remote", url="http://127.0.0.1:8700").rewards["proxy"].encoding == "png"
    with pytest.raises(ConfigError, match=r"config\.rewards\.proxy\.url"):
        run_file(type="remote")
