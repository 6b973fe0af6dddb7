"""Files are written whole or not at all, and what cannot be written is said in one sentence."""

import os
from pathlib import Path

import pytest

from rsaft.errors import RunDirectoryError
from rsaft.files import write_atomic
from tests.rdrl.disk_faults import at_disk_calls, disk_full_from


def test_a_file_and_its_folder_are_written(tmp_path: Path):
    write_atomic(tmp_path / "new" / "a.txt", b"one")
    write_atomic(tmp_path / "new" / "a.txt", b"two")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"two"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_on_a_full_disk_the_old_file_stays_whole_and_nothing_lies_beside_it(tmp_path: Path, call: int):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with at_disk_calls(disk_full_from(call), deletions=False):
        with pytest.raises(RunDirectoryError, match=r"a\.txt could not be written .No space left on device"):
            write_atomic(path, b"the new content")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("target", ["file/a.txt", ".", "x" * 300])
def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path: Path, target: str):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RunDirectoryError, match=r"could not be written .*choose a place that can be written"):
        write_atomic(tmp_path / target, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunDirectoryError, match="it is there, and no plain file"):
        write_atomic(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()
