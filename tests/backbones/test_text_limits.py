"""How much of a prompt each family's text encoders read, and what is said of longer ones."""

import logging
from pathlib import Path

import pytest
import yaml

from rsaft.backbones.load import FAMILIES
from rsaft.backbones.text_limits import cut_note, text_readers
from rsaft.config import build_trainer, load_config
from rsaft.testbed.tiny import CLIP_TOKENS, T5_TOKENS, TinyFamily, tiny_pipeline

CLIP, T5 = ("CLIP", CLIP_TOKENS), ("T5", T5_TOKENS)


@pytest.mark.parametrize(
    ("name", "wanted"), [("sd", [CLIP]), ("sdxl", [CLIP]), ("sd3", [CLIP, T5]), ("flux", [CLIP, T5])]
)
def test_each_kind_of_encoder_is_given_once_and_cuts_what_its_tokenizer_would_cut(name: TinyFamily, wanted: list):
    pipe = tiny_pipeline(name)
    readers = text_readers(pipe, next(f for f in FAMILIES if f.pipeline == type(pipe).__name__))
    assert [(reader.name, reader.limit) for reader in readers] == wanted
    for reader in readers:
        most = next(n for n in range(1, 40) if reader.count("x" * (n + 1)) > reader.limit)
        assert not reader.cuts("x" * most)
        assert reader.cuts("x" * (most + 1))


def test_a_length_that_was_asked_for_is_that_of_t5_alone():
    pipe = tiny_pipeline("flux")
    family = next(f for f in FAMILIES if f.pipeline == type(pipe).__name__)
    assert [(reader.name, reader.limit) for reader in text_readers(pipe, family, 9)] == [CLIP, ("T5", 9)]


def test_a_pipeline_without_its_t5_has_no_limit_of_it():
    pipe = tiny_pipeline("sd3")
    pipe.tokenizer_3 = None
    family = next(f for f in FAMILIES if f.pipeline == type(pipe).__name__)
    assert [(reader.name, reader.limit) for reader in text_readers(pipe, family)] == [CLIP]


def test_a_training_run_says_how_many_prompts_are_cut(tmp_path: Path, tiny_sd: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "prompts.txt").write_text("a cat\n" + "y" * 30 + "\n")
    settings = {
        "model": {"path": str(tiny_sd), "lora": {"rank": 1}},
        "prompts": {"train": "prompts.txt"},
        "algorithm": {"type": "draft", "sampling": {"num_steps": 1, "guidance": 1.0}},
        "rewards": {"toy": {"type": "rsaft.testbed.toy:toy_reward"}},
        "objective": {"type": "weighted_sum", "weights": {"toy": 1.0}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    with caplog.at_level(logging.WARNING):
        build_trainer(load_config([tmp_path / "run.yaml"]), tmp_path / "run")
    assert f"of 2, 1 are longer than the {CLIP_TOKENS} tokens that CLIP reads ('yyy" in caplog.text


def test_prompts_that_are_read_to_their_end_are_not_spoken_of():
    pipe = tiny_pipeline("sd")
    assert cut_note(text_readers(pipe, FAMILIES[0]), ["a cat", "a dog"]) is None
