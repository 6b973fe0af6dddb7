"""Weights are found, read without running anything, and put where they fit; anything else is one sentence."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsaft.errors import ConfigError
from rsaft.rewards.checkpoint import beside, find_file, load_strictly, read_weights

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def refusal(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(weights) -> bool:
    return set(weights) == set(WEIGHTS) and all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_file_is_itself_and_a_folder_gives_the_first_name_it_has(tmp_path):
    (tmp_path / "b.bin").write_bytes(b"")
    assert find_file(tmp_path / "b.bin", ["a.bin"], "R") == tmp_path / "b.bin"
    assert find_file(str(tmp_path), ["a.bin", "b.bin"], "R") == tmp_path / "b.bin"


def test_a_folder_without_the_file_is_named_with_what_it_should_hold(tmp_path):
    assert refusal(lambda: find_file(tmp_path, ["a.bin", "b.bin"], "R")) == (
        f"R: the folder '{tmp_path}' holds none of 'a.bin', 'b.bin'; give the file itself."
    )


@pytest.mark.parametrize("source", ["/no/such/file.pt", "./file", "file.pt", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(source):
    assert refusal(lambda: find_file(source, ["a.bin"], "R")).startswith("R: there is no file or folder '")


def test_a_hub_id_that_cannot_be_reached_says_what_to_do():
    message = refusal(lambda: find_file("xswu/HPSv2", ["HPS_v2.1_compressed.pt"], "HPSv2"))
    assert message.startswith("HPSv2: 'xswu/HPSv2' is no file or folder here, HPS_v2.1_compressed.pt of it is not in")
    assert "give its path" in message


def test_a_file_beside_is_found_only_where_it_is(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"")
    assert beside(path, path, "config.json") is None
    (tmp_path / "config.json").write_text("{}")
    assert beside(path, path, "config.json") == tmp_path / "config.json"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}], ids=["plain", "state_dict"])
def test_a_file_of_torch_save_gives_its_tensors(tmp_path, wrap, legacy):
    torch.save(wrap(WEIGHTS), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert same(read_weights(tmp_path / "w.pt", "R"))


def test_safetensors_gives_its_tensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors", "R"))


def test_the_prefix_of_distributed_training_is_dropped(tmp_path):
    torch.save({f"module.{name}": value for name, value in WEIGHTS.items()}, tmp_path / "w.pt")
    assert same(read_weights(tmp_path / "w.pt", "R"))


class Trap:
    """Runs a command where it is unpickled by a reader that trusts the file."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"state_dict": WEIGHTS, "extra": Trap()}], ids=["module", "trap"])
def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt")
    message = refusal(lambda: read_weights(tmp_path / "w.pt", "MPS"))
    assert message.startswith(f"MPS: '{tmp_path / 'w.pt'}' holds Python objects besides tensors")
    assert "state_dict()" in message
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 40, 400])
def test_a_file_that_is_cut_short_is_named(tmp_path, name, keep):
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(WEIGHTS, path)
    else:
        save_file({"w": torch.zeros(200)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(lambda: read_weights(path, "R")).startswith(f"R: '{path}' cannot be read (")


@pytest.mark.parametrize(
    ("content", "found"),
    [({}, "it holds keys"), ({"a": 1, "b": 2}, "it holds keys 'a', 'b'"), ([torch.zeros(1)], "it holds a list")],
)
def test_a_file_without_tensors_by_name_says_what_it_holds(tmp_path, content, found):
    torch.save(content, tmp_path / "w.pt")
    assert found in refusal(lambda: read_weights(tmp_path / "w.pt", "R"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("bias"), "lacks the key 'bias'; it is no checkpoint of this model"),
        (lambda w: w.update(extra=torch.zeros(1)), "holds the key 'extra', which this model does not have"),
        (lambda w: w.update(bias=torch.zeros(3)), r"key 'bias' has the shape \(3,\), and this model needs \(2,\)"),
        (lambda w: w.clear(), "lacks the key 'weight' and 1 more"),
    ],
)
def test_weights_that_do_not_fit_are_named_with_their_file(tmp_path, change, sentence):
    weights = dict(WEIGHTS)
    change(weights)
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=rf"^R: '.*w.pt'.*{sentence}"):
        load_strictly(module, weights, tmp_path / "w.pt", "R")
