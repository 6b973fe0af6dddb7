from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rsaft.errors import CheckpointError
from rsaft.rdrl.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint
from tests.rdrl.disk_faults import at_disk_calls, disk_full_from, killed_at
from tests.rdrl.fork_server import ForkServer

ADAPTER = "adapter/pytorch_lora_weights.safetensors"
FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", ADAPTER, "manifest.json")


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    source = torch.Generator().manual_seed(step)
    draw = {name: torch.randn(12, 9, generator=source) for name in ("weights", "ema", "optimizer")}
    return {name: {"a": t, "b": t.mean().to(torch.bfloat16)} for name, t in draw.items()}


def export(folder: Path) -> None:
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(os.urandom(300))


def save(folder: Path, step: int, *, keep: int = 3, note: str = "") -> Path:
    state = {"step": step, "note": note}
    return save_checkpoint(folder, step=step, tensors=tensors_of(step), state=state, keep=keep, export=export)


def assert_is_step(folder: Path, step: int) -> None:
    found = load_latest(folder)
    assert found is not None
    assert (found.step, found.state["step"]) == (step, step)
    for group, named in tensors_of(step).items():
        for name, tensor in named.items():
            assert torch.equal(found.tensors[group][name], tensor)


def save_forever(folder: str) -> None:
    """Each step twice, with another state: the second replaces the first."""
    found = load_latest(Path(folder))
    step = 0 if found is None else found.step
    while True:
        save(Path(folder), step, keep=1, note=f"first by {os.getpid()}")
        save(Path(folder), step, keep=1, note=f"second by {os.getpid()}")
        step += 1


def save_killed(folder: str, step: int, note: str, n: int) -> None:
    with at_disk_calls(killed_at(n), deletions=True):
        save(Path(folder), step, keep=1, note=note)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("tests.rdrl.test_checkpoint") as started:
        yield started


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, dtype=torch.float64)
    tensors = {
        "weights": {"bf16": torch.randn(5).bfloat16(), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)},
        "ema": {"column": whole[:, 1], "row": whole[0], "same": whole, "transposed": whole.T},
        "optimizer": {"step": torch.tensor(7), "bits": torch.tensor([True, False])},
        "none": {},
    }
    state = {"lr": 0.1, "nan": math.nan, "inf": -math.inf, "text": "é\ud800", "list": [1, {"b": None, "a": True}]}
    path = save_checkpoint(tmp_path / "checkpoints", step=12, tensors=tensors, state=state, keep=1)
    found = load_checkpoint(path)
    assert path == tmp_path / "checkpoints" / "step-000012"
    assert (found.step, found.skipped, found.path) == (12, (), path)
    assert str(found.state) == str(state)
    assert {group: set(named) for group, named in found.tensors.items()} == {g: set(n) for g, n in tensors.items()}
    for group, named in tensors.items():
        for name, tensor in named.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)


def test_exported_files_are_kept_beside_the_tensors(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == sorted(FILES)
    assert len({(path / name).stat().st_mode for name in FILES}) == 1


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for run in ("a", "b"):
        save_checkpoint(tmp_path / run, step=3, tensors=tensors_of(3), state={"x": 0.1}, keep=1)
    for file in (tmp_path / "a" / "step-000003").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "step-000003" / file.name).read_bytes()


def truncate(file: Path, draw: random.Random, other: Path) -> None:
    os.truncate(file, draw.randrange(1, file.stat().st_size))


def zero_tail(file: Path, draw: random.Random, other: Path) -> None:
    content = file.read_bytes()
    start = draw.randrange(1, len(content.rstrip(b"\0")))
    file.write_bytes(content[:start].ljust(len(content), b"\0"))


def flip_bit(file: Path, draw: random.Random, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def remove(file: Path, draw: random.Random, other: Path) -> None:
    file.unlink()


def empty(file: Path, draw: random.Random, other: Path) -> None:
    file.write_bytes(b"")


def swap(file: Path, draw: random.Random, other: Path) -> None:
    shutil.copyfile(other, file)


@pytest.mark.parametrize("draws", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, zero_tail, flip_bit, remove, empty, swap])
def test_a_damaged_file_is_named_and_its_checkpoint_skipped(
    tmp_path: Path, damage: Callable[[Path, random.Random, Path], None], name: str, draws: int
) -> None:
    save(tmp_path, 1)
    good = save(tmp_path, 2)
    content, draw = (good / name).read_bytes(), random.Random(name)
    for _ in range(draws if damage in (truncate, zero_tail, flip_bit) else 1):
        damage(good / name, draw, tmp_path / "step-000001" / name)
        with pytest.raises(CheckpointError, match=rf"step-000002: {name}"):
            load_checkpoint(good)
        (good / name).write_bytes(content)
    damage(good / name, draw, tmp_path / "step-000001" / name)
    assert_is_step(tmp_path, 1)
    found = load_latest(tmp_path)
    assert found is not None
    assert len(found.skipped) == 1
    assert f"step-000002: {name}" in found.skipped[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path / "state.json", 7), r"state.json is truncated: 7 of \d+ bytes; delete"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing; delete"),
        (
            lambda path: flip_bit(path / "ema.safetensors", random.Random(0), path),
            "ema.safetensors is altered: its sha",
        ),
        (lambda path: (path / "adapter" / "new").touch(), "adapter/new is not listed in manifest.json"),
    ],
)
def test_the_message_says_what_is_wrong(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    path = save(tmp_path, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_link_is_refused_even_if_it_leads_to_the_same_bytes(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").rename(tmp_path / "elsewhere.json")
    (path / "state.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"state\.json is not a plain file"):
        load_checkpoint(path)


def test_an_export_that_writes_a_link_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    def linking(folder: Path) -> None:
        folder.mkdir()
        (folder / "link").symlink_to("/")

    with pytest.raises(CheckpointError, match="adapter/link as a link"):
        save_checkpoint(tmp_path, step=1, tensors={}, state={}, keep=1, export=linking)
    assert list(tmp_path.iterdir()) == []


def test_another_format_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    text = (path / "manifest.json").read_text().replace('"format_version": 1', '"format_version": 2')
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"format version 2; this rsaft reads 1: resume it with the rsaft that"):
        load_checkpoint(path)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step-000009")
    with pytest.raises(CheckpointError, match=r"manifest\.json is that of step 1"):
        load_checkpoint(tmp_path / "step-000009")


def test_a_checkpoint_can_be_copied_under_a_free_name(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "best")
    assert load_checkpoint(tmp_path / "best").step == 1


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "missing") is None
    assert load_latest(tmp_path) is None
    for path in [save(tmp_path, 1), save(tmp_path, 2)]:
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"all 2 are damaged.*step-000002: state.json is missing"):
        load_latest(tmp_path)


def test_the_newest_ones_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-000007-1").mkdir()
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_a_visibly_damaged_checkpoint_does_not_count_among_the_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-000003" / "ema.safetensors", 1)
    save(tmp_path, 4, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003", "step-000004"]


def test_the_one_just_written_and_newer_ones_are_never_pruned(tmp_path: Path) -> None:
    for step in (50, 60, 45):
        save(tmp_path, step, keep=1 if step == 45 else 3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000045", "step-000050", "step-000060"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert_is_step(tmp_path, 1_000_000)
    save(tmp_path, 1_000_001, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1000001"]


def test_a_deletion_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="could not be deleted .Permission denied"):
        save(tmp_path, 2, keep=1)
    assert_is_step(tmp_path, 2)


def test_saving_the_same_again_changes_nothing_and_another_state_replaces(tmp_path: Path) -> None:
    path = save(tmp_path, 1, note="old")
    inode = path.stat().st_ino
    save(tmp_path, 1, note="old")
    assert path.stat().st_ino == inode
    save(tmp_path, 1, note="new")
    assert load_checkpoint(path).state["note"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_bytes(b"")
    save(tmp_path, 1)
    assert_is_step(tmp_path, 1)


@pytest.mark.parametrize(
    ("step", "tensors", "state", "keep", "message"),
    [
        (-1, {}, {}, 1, "step >= 0"),
        (0, {}, {}, 0, "keep >= 1"),
        (0, {"../up": {}}, {}, 1, "letters, digits"),
        (0, {}, {"a": [{"b": torch.zeros(1)}]}, 1, r"state\['a'\]\[0\]\['b'\]: .* got Tensor"),
        (0, {}, {"a": {3: 1}}, 1, r"state\['a'\]: JSON keys are text; got 3"),
    ],
)
def test_arguments_that_could_not_come_back_are_refused(tmp_path, step, tensors, state, keep, message) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, step=step, tensors=tensors, state=state, keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_the_rename_and_pruning_comes_last(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path, 2, keep=1)
    renamed = events.index(("rename", "step-000002"))
    synced = {Path(path).name for kind, path in events[:renamed] if kind == "fsync"}
    assert {Path(name).name for name in FILES} | {"adapter", f".tmp-step-000002-{os.getpid()}"} == synced
    assert events[renamed + 1 :] == [("fsync", str(tmp_path)), ("rename", ".tmp-step-000001")]


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1234, 1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with at_disk_calls(lambda n: None, deletions=True) as calls:
        with pytest.raises(CheckpointError, match=r"step-000002 was not written: it needs \d+ bytes and 1234 bytes"):
            save(tmp_path, 2, keep=1)
    assert calls.count == 0
    assert_is_step(tmp_path, 1)


def test_a_disk_that_fills_at_any_call_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with at_disk_calls(lambda n: None, deletions=False) as calls:
        shutil.rmtree(save(tmp_path, 2))
    assert calls.count >= 25
    for n in range(1, calls.count + 1):
        with at_disk_calls(disk_full_from(n), deletions=False):
            with pytest.raises(CheckpointError, match=r"step-000002 .* \d+ bytes and \d+ bytes are free .No space"):
                save(tmp_path, 2)
        assert load_checkpoint(tmp_path / "step-000001").step == 1
        left = {path.name for path in tmp_path.iterdir()} - {"step-000001"}
        assert left == (set() if n < calls.count else {"step-000002"})  # the last call is the fsync after the rename
    save(tmp_path, 2)
    assert_is_step(tmp_path, 2)


def test_a_small_disk_that_is_really_full_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch) -> None:
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", tmp_path]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        save(tmp_path / "run", 1)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # the look ahead would stop it
        for pages in range(12):  # a checkpoint takes 6 files of one page and 3 folders
            with (tmp_path / "ballast").open("wb") as ballast:
                monkeypatch.undo()
                ballast.write(bytes(max(0, shutil.disk_usage(tmp_path).free - 4096 * pages)))
                monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
            if pages < 6:
                with pytest.raises(CheckpointError, match="No space left"):
                    save(tmp_path / "run", 2)
                assert_is_step(tmp_path / "run", 1)
            (tmp_path / "ballast").unlink()
        save(tmp_path / "run", 2)
        assert_is_step(tmp_path / "run", 2)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("same_step", [False, True])
def test_a_kill_in_any_call_of_a_save_leaves_a_good_checkpoint(
    server: ForkServer, tmp_path: Path, same_step: bool
) -> None:
    step = 1 if same_step else 2
    save(tmp_path / "before", 1, note="old")
    for n in range(1, 200):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "before", folder)
        code = server.run("save_killed", folder=str(folder), step=step, note="new", n=n)
        found = load_latest(folder)
        assert found is not None
        assert found.state in ({"step": 1, "note": "old"}, {"step": step, "note": "new"})
        assert all(load_checkpoint(path) for path in list_checkpoints(folder))  # nor is an old one half deleted
        if n % 4 == 0:
            save(folder, 3, keep=1)
            assert [p.name for p in folder.iterdir()] == ["step-000003"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert 35 < n < 199


def test_a_process_killed_at_random_moments_always_leaves_a_good_checkpoint(server: ForkServer, tmp_path: Path) -> None:
    begun = time.monotonic()
    save(tmp_path, 0)
    one_save = time.monotonic() - begun
    draw, reached = random.Random(0), [0]
    while len(reached) <= 20 or reached[-1] == 0:  # on a busy machine the first tries may be too short for any save
        pid = server.start("save_forever", folder=str(tmp_path))
        time.sleep(draw.uniform(0.0, (6 + len(reached)) * one_save))
        os.kill(pid, signal.SIGKILL)
        assert server.wait(pid) == -signal.SIGKILL
        found = load_latest(tmp_path)
        assert found is not None
        assert found.skipped == ()
        assert_is_step(tmp_path, found.step)
        reached.append(found.step)
    assert reached == sorted(reached)


def test_the_manifest_lists_every_other_file_with_its_size(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["step"]) == (1, 1)
    assert {n: e["bytes"] for n, e in manifest["files"].items()} == {
        n: (path / n).stat().st_size for n in FILES if n != "manifest.json"
    }
