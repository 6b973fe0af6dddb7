from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsaft.errors import RunDirectoryError
from rsaft.rdrl.run_directory import JsonLines, environment, free_run_dir, locked, write_json_atomic
from tests.rdrl.fork_server import ForkServer


def hold(run: str) -> None:
    with locked(Path(run)):
        (Path(run) / "held").touch()
        signal.pause()


def write_on_a_full_disk(path: str) -> None:
    lines = JsonLines(Path(path), None)
    lines.write({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
    with pytest.raises(RunDirectoryError, match=r"records\.jsonl: a record could not be written .File too large"):
        lines.write({"step": 2})


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("tests.rdrl.test_run_directory") as started:
        yield started


def test_a_second_process_is_refused_with_the_first_ones_pid_until_it_is_killed(
    server: ForkServer, tmp_path: Path
) -> None:
    pid = server.start("hold", run=str(tmp_path))
    while not (tmp_path / "held").exists():
        time.sleep(0.001)
    with pytest.raises(RunDirectoryError, match=rf"process {pid} uses it, .* one process at a time; wait .* or choose"):
        with locked(tmp_path):
            pass
    os.kill(pid, signal.SIGKILL)
    assert server.wait(pid) == -signal.SIGKILL
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_run_directory_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with locked(tmp_path / "new"):
            raise ZeroDivisionError
    with locked(tmp_path / "new"):
        with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} uses it"):
            with locked(tmp_path / "new"):
                pass


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"file: it cannot be made or written .*choose another one"):
        with locked(tmp_path / "file"):
            pass


def test_json_is_sorted_and_keeps_every_bit_of_a_float(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": 0.1 + 0.2, "a": [math.nan, {"c": -math.inf}], "é": "\n"})
    text = (tmp_path / "a.json").read_text()
    assert text.index('"a"') < text.index('"b"')
    assert json.loads(text) == {"b": 0.1 + 0.2, "a": [None, {"c": None}], "é": "\n"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_json_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"file/a\.json could not be written .its folder is a file"):
        write_json_atomic(tmp_path / "file" / "a.json", 1)


def test_the_environment_holds_no_secrets_names_or_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-of-a-secret")
    text = json.dumps(environment())
    assert json.loads(text)["versions"]["torch"]
    assert not [word for word in ("canary", socket.gethostname(), str(Path.home()), os.getcwd()) if word in text]


def test_records_are_appended_in_one_deterministic_form(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl", None)
    lines.write({"step": 1, "loss": 0.1 + 0.2, "prompt": "é\n", "best": -math.inf, "a": [math.nan]})
    assert (tmp_path / "m.jsonl").read_text() == (
        '{"a": [null], "best": null, "loss": 0.30000000000000004, "prompt": "\\u00e9\\n", "step": 1}\n'
    )
    lines.sync()
    lines.close()
    lines.close()


@pytest.mark.parametrize("torn", ["", '{"loss": 0.3, "st', '{"step": 1}'])
def test_a_resume_keeps_records_up_to_its_step_and_drops_a_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 2, 3))
    path.write_text(whole + torn)
    JsonLines(path, 2).write({"step": 9})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 2, 9]


def test_a_fresh_start_empties_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n')
    JsonLines(tmp_path / "m.jsonl", None).close()
    assert (tmp_path / "m.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", ["no json", '{"loss": 1}', "[1]", '{"step": null}', "\0\0"])
def test_a_damaged_line_before_the_last_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(RunDirectoryError, match=r"m\.jsonl, line 2: it is no record with a step"):
        JsonLines(tmp_path / "m.jsonl", 2)


def test_a_record_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole number as 'step'; got None"):
        JsonLines(tmp_path / "m.jsonl", None).write({"loss": 1.0})


def test_a_full_disk_is_one_sentence_and_its_half_line_is_dropped_on_resume(server: ForkServer, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert server.run("write_on_a_full_disk", path=str(path)) == 0
    assert path.read_bytes() == b'{"step": 1}\n{"step":'[:20]
    JsonLines(path, 5).close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_the_free_run_directory_is_the_first_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny-1").mkdir(parents=True)
    Path("runs/tiny-3").mkdir()
    assert free_run_dir("tiny") == Path("runs/tiny-2")
    assert free_run_dir("other") == Path("runs/other-1")
