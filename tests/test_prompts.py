"""Prompt files are read as they are, or refused in one sentence with the line."""

import json
from pathlib import Path

import pytest

from rsaft.errors import ConfigError
from rsaft.prompts import Finding, TextReader, over_long, read_prompts

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
    assert "2 empty (lines 2, 4), left out" in found.note
    assert "1 repeated (line 5), kept" in found.note
    assert found.lines == (1, 3, 5)


def test_what_is_odd_about_a_file_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    read_prompts(written(tmp_path / "p.txt", "boot\n\ncoat\n"))
    assert ["1 empty" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"", "it holds no prompt"),
        ("p.txt", b"\n \n\t\n", "it holds no prompt"),
        ("p.txt", b"\nco\xe9t\n", "line 2: it holds bytes that are not UTF-8"),
        ("p.txt", "boot\n".encode("utf-16"), "it is not UTF-8 but UTF-16"),
        ("p.jsonl", b'{"prompt": \n', "line 1: this is not JSON"),
        ("p.jsonl", b'{"text": "coat"}\n', 'line 1: an object with a text under "prompt"'),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: an object"),
        ("p.jsonl", b'["boot"]\n', "line 1: an object"),
        ("p.jsonl", b"[" * 100_000, "line 1: this is not JSON"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: the prompt holds a lone surrogate"),
        ("p.csv", b"", "a column 'prompt' is expected"),
        ("p.csv", b"text,seed\nboot,1\n", r"a column 'prompt' is expected; its columns are \['text', 'seed'\]"),
        ("p.csv", b'prompt\n"boot" x\n', "line 2: this is not CSV"),
        ("p.csv", b"seed,prompt\n1\n", "it holds no prompt"),
        ("p.tsv", b"", "a column 'prompt' is expected"),
        ("p.tsv", b"prompt\tid\na\tb\tc\n", "line 2: 3 fields, and the header names 2"),
        ("p.parquet", b"", "ends in one of .txt, .jsonl, .csv, .tsv"),
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


DRAWBENCH = """Prompts,Category
A red colored car.,Colors
"One cat and two dogs, sitting on the grass.",Counting
"""
PARTI = """Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\tBiology-inspired concepts
The words "Fly an airplane" are written on the wall.\tOutdoor Scenes\tComplex\t
"Dogs" on a "sign"\tAnimals\tComplex\tDescription of "Dogs Playing Poker"
"""


def test_the_published_layouts_of_drawbench_and_partiprompts_are_read_with_their_categories(tmp_path: Path):
    drawbench = read_prompts(written(tmp_path / "drawbench.csv", DRAWBENCH))
    assert drawbench.prompts == ("A red colored car.", "One cat and two dogs, sitting on the grass.")
    assert drawbench.categories == ("Colors", "Counting")
    parti = read_prompts(written(tmp_path / "PartiPrompts.tsv", PARTI))
    assert parti.prompts == (
        "bond",
        'The words "Fly an airplane" are written on the wall.',
        '"Dogs" on a "sign"',
    )
    assert parti.categories == ("Abstract", "Outdoor Scenes", "Animals")
    assert parti.note is drawbench.note is None


def test_a_tsv_file_of_a_spreadsheet_loses_the_quotes_that_were_put_in(tmp_path: Path):
    some = read_prompts(written(tmp_path / "some.tsv", 'Prompt\tId\n"the words ""Fly"""\t1\n'))
    everything = read_prompts(written(tmp_path / "all.tsv", '"Prompt"\t"Id"\r\n"boot"\t"1"\r\n'))
    assert some.prompts == ('the words "Fly"',)
    assert everything.prompts == ("boot",)


def test_json_lines_of_geneval_are_read_beside_their_other_keys(tmp_path: Path):
    row = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    assert read_prompts(written(tmp_path / "p.jsonl", json.dumps(row))).prompts == ("a photo of a bench",)


def test_rows_that_cannot_be_used_are_left_out_counted_and_named(tmp_path: Path):
    data = b'{"prompt": "boot"}\n{"prompt": \n{"prompt": "co\xe9t"}\n["coat"]\n{"prompt": "coat"}\n'
    found = read_prompts(written(tmp_path / "p.jsonl", data))
    assert found.prompts == ("boot", "coat")
    assert found.lines == (1, 5)
    assert {kind: (one.count, one.lines) for kind, one in found.findings.items()} == {
        "not_utf8": (1, (3,)),
        "broken": (2, (2, 4)),
    }
    assert found.note is not None
    assert "1 not UTF-8 (line 3), left out; 2 broken (lines 2, 4: this is not JSON" in found.note


def test_a_prompt_with_an_unquoted_comma_is_broken_and_not_cut_there(tmp_path: Path):
    found = read_prompts(written(tmp_path / "p.csv", 'id,prompt\n1,a cat, asleep\n2,"a dog, awake"\n'))
    assert found.prompts == ("a dog, awake",)
    assert found.findings["broken"].lines == (2,)


def test_only_the_first_lines_of_a_kind_are_listed(tmp_path: Path):
    found = read_prompts(written(tmp_path / "p.txt", "boot\n" * 8))
    assert found.findings["duplicate"] == Finding(7, (2, 3, 4, 5, 6))
    assert found.note is not None
    assert "7 repeated (lines 2, 3, 4, 5, 6, ...)" in found.note


def test_prompts_over_a_text_encoders_length_are_found_with_their_lines():
    words = TextReader("words", limit=3, count=lambda prompt: len(prompt.split()))
    assert over_long(["a b c", "a b c d", "a", "a b c d e"], [1, 2, 5, 7], words) == Finding(2, (2, 7))
    assert over_long(["a b c"], [1], words) is None
