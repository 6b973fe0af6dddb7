"""Prompts become the ids that the originals give, and a tokenizer that does not fit is refused."""

import pytest
import torch

from rsaft.errors import ConfigError
from rsaft.rewards.clip_tokens import ClipTokens, check_tokens, like_open_clip, load_tokens
from tests.rewards.layouts import CONTEXT, TOKENIZER, VOCABULARY, save_tokenizer

TOKENS = ClipTokens(TOKENIZER, CONTEXT)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [  # open_clip 3.3.0 with ftfy 6.3.1 gives the same, letter case aside
        ("a  “cat” &amp;amp; ‘dog’", "a \"cat\" & 'dog'"),
        ("ＡＢＣ１　full ｗｉｄｔｈ", "ABC1 full width"),
        ("ﬁne ﬂower’s", "fine flower's"),
        ("café naïve Straße", "café naïve Straße"),
        ("it’s… a\u00a0b\tc\nd ", "it's… a b c d"),
    ],
)
def test_a_prompt_is_cleaned_as_open_clip_does(text, cleaned):
    assert like_open_clip(text) == cleaned


def test_ids_have_one_length_and_end_where_the_prompt_does():
    ids = TOKENS(["", "a", "x" * 100])
    assert ids.shape == (3, CONTEXT)
    assert ids[0].tolist() == [TOKENIZER.bos_token_id] + [TOKENIZER.eos_token_id] * (CONTEXT - 1)
    assert ids[2, -1] == TOKENIZER.eos_token_id  # cut off, and still ended
    assert (ids[2, 1:-1] != TOKENIZER.eos_token_id).all()


def test_cleaning_comes_before_the_tokenizer():
    assert torch.equal(ClipTokens(TOKENIZER, CONTEXT, like_open_clip)(["&amp; ’"]), TOKENS(["& '"]))
    assert not torch.equal(TOKENS(["&amp;"]), TOKENS(["&"]))


def test_a_tokenizer_beside_the_weights_is_found(tmp_path):
    save_tokenizer(tmp_path)
    tokens = load_tokens(None, tmp_path, "nobody/nothing", CONTEXT, "HPSv2")
    assert torch.equal(tokens(["a cat"]), TOKENS(["a cat"]))


def test_a_missing_tokenizer_is_named_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"^HPSv2: no CLIP tokenizer .* at '.*nothing'; put one beside"):
        load_tokens(None, tmp_path, tmp_path / "nothing", CONTEXT, "HPSv2")


def test_an_empty_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"^HPSv2: .*tokenizer"):
        load_tokens(tmp_path, tmp_path, tmp_path, CONTEXT, "HPSv2")


@pytest.mark.parametrize("eos", [2, TOKENIZER.eos_token_id])
def test_a_network_that_reads_at_the_end_of_prompts_is_accepted(eos):
    check_tokens(TOKENS, VOCABULARY, eos, "HPSv2")


def test_a_network_that_would_read_every_prompt_alike_is_refused():
    # 49407 is in no prompt of a small vocabulary, so transformers would pool at the first token of each
    with pytest.raises(ConfigError, match="meaning at the token 49407, and the tokenizer ends prompts with 513"):
        check_tokens(TOKENS, VOCABULARY, 49407, "HPSv2")


def test_a_tokenizer_with_more_words_than_the_network_is_refused():
    with pytest.raises(ConfigError, match=f"has {VOCABULARY} tokens and the network knows 100"):
        check_tokens(TOKENS, 100, 2, "HPSv2")
