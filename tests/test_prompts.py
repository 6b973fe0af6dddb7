"""Prompt files are read as they are, or refused in one sentence with the line."""

import json
from pathlib import Path

import pytest

from rsaft.errors import ConfigError
from rsaft.prompts import read_prompts

HOSTILE = [
    "../../x",
    "a/b",
    "nul\0byte",
    "=HYPERLINK('x')",
    "<script>alert(1)</script>",
    "😀" * 50,
    "مرحبا بالعالم",
    "word " * 10_000,
    "a\u2028b\x0cc",
    "'; DROP TABLE prompts; --",
    '"quoted", with commas',
    "é",
    "null",
    "%s%n{0}",
]


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path):
    found = read_prompts(written(tmp_path / "p.txt", "a red boot\r\n  a blue coat \n"))
    assert found.prompts == ("a red boot", "a blue coat")
    assert found.note is None


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path):
    assert read_prompts(written(tmp_path / "p.txt", b"\xef\xbb\xbfboot\n")).prompts == ("boot",)


def test_jsonl_and_csv_hold_prompts_with_line_breaks(tmp_path: Path):
    jsonl = written(tmp_path / "p.jsonl", json.dumps({"prompt": "two\nlines", "seed": 3}) + "\n")
    table = written(tmp_path / "p.csv", 'id,prompt\n1,"two\nlines"\n2,one\n')
    assert read_prompts(jsonl).prompts == ("two\nlines",)
    assert read_prompts(table).prompts == ("two\nlines", "one")


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_hostile_prompt_is_read_as_it_is(tmp_path: Path, prompt: str):
    jsonl = written(tmp_path / "p.jsonl", json.dumps({"prompt": prompt}))
    assert read_prompts(jsonl).prompts == (prompt.strip(),)
    assert read_prompts(written(tmp_path / "p.txt", prompt)).prompts == (prompt.strip(),)


def test_empty_and_repeated_prompts_are_reported_with_their_lines(tmp_path: Path):
    found = read_prompts(written(tmp_path / "p.txt", "boot\n\ncoat\n   \nboot\n"))
    assert found.prompts == ("boot", "coat", "boot")
    assert found.note is not None
    assert "2 empty (line 2 and on), left out" in found.note
    assert "1 repeated (line 5), kept" in found.note


def test_what_is_odd_about_a_file_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    read_prompts(written(tmp_path / "p.txt", "boot\n\ncoat\n"))
    assert ["1 empty" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"", "it holds no prompt"),
        ("p.txt", b"\n \n\t\n", "it holds no prompt"),
        ("p.txt", b"boot\nco\xe9t\n", "line 2: byte 3 of the line is not UTF-8"),
        ("p.txt", "boot\n".encode("utf-16"), "line 1: byte 1 of the line is not UTF-8"),
        ("p.jsonl", b'{"prompt": "boot"}\n{"prompt": \n', "line 2: this is not JSON"),
        ("p.jsonl", b'{"prompt": "boot"}\n{"text": "coat"}\n', 'line 2: an object with a text under "prompt"'),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: an object"),
        ("p.jsonl", b'["boot"]\n', "line 1: an object"),
        ("p.jsonl", b"[" * 100_000, "line 1: this is not JSON"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: the prompt holds a lone surrogate"),
        ("p.csv", b"", "a column 'prompt' is expected"),
        ("p.csv", b"text,seed\nboot,1\n", r"a column 'prompt' is expected; its columns are \['text', 'seed'\]"),
        ("p.csv", b'prompt\n"boot" x\n', "line 2: this is not CSV"),
        ("p.csv", b"seed,prompt\n1\n", "it holds no prompt"),
        ("p.parquet", b"", "ends in one of .txt, .jsonl, .csv"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, name: str, data: bytes, sentence: str):
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_prompts(written(tmp_path / name, data))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("none.txt", "folder.txt"):
        with pytest.raises(ConfigError, match="there is no such file"):
            read_prompts(tmp_path / name)
