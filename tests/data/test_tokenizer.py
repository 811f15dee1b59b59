# SPDX-License-Identifier: Apache-2.0
"""Tokenizers trained here and extended by a mask token."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fpmgm.data import add_mask_token, train_tokenizer

from ..testing_utils import SHARED, needs_shared, refused


SIZE = 290
TEXTS = ["the cat sat on the mat, and the other cat sat on the other mat"] * 3 + ["naïve café: 1,234 – “quoted”"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), SIZE)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text())
@example(text=" leading, trailing \n\t, a ' s . and\r\n line ends")
@example(text="e\u0301 is not \u00e9, 😀 \U0010ffff \x00")
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(id_ not in (tokenizer.mask_token_id, tokenizer.eos_token_id) for id_ in ids)


def test_the_vocabulary_is_full_and_ends_with_the_mask(tokenizer):
    assert len(tokenizer) == SIZE
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))
    assert tokenizer.mask_token_id == SIZE - 1 and len(add_mask_token(tokenizer)) == SIZE  # it is added once
    assert tokenizer.eos_token_id == tokenizer.bos_token_id is not None
    assert len(tokenizer("the cat")["input_ids"]) < len("the cat")  # merges were learned
    blank = tokenizer(f"the {tokenizer.mask_token} sat")["input_ids"]
    assert blank.count(SIZE - 1) == 1


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for name in ("mask_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    text = f" A cat – “sat” .{tokenizer.mask_token} 😀<|endoftext|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_impossible_sizes_are_refused():
    refused("`vocab_size`=257", train_tokenizer, TEXTS, 257)
    assert len(train_tokenizer(TEXTS, 258)) == 258
    refused("`vocab_size`=5000", train_tokenizer, TEXTS, 5000)


def test_documents_are_strings(tokenizer):
    assert train_tokenizer([None, *TEXTS, None], SIZE).get_vocab() == tokenizer.get_vocab()
    refused(r"`texts`\[1\] is 3, of type int", train_tokenizer, ["a", 3], 258)
    refused("`texts` is one string", train_tokenizer, "a text", 258)


def test_a_blank_takes_the_space_before_it(tokenizer):
    """In training text no space stands alone between words: a blank leaves none for the model to wonder at."""
    blank, written = tokenizer.mask_token, tokenizer(" mat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(written)[0].startswith("Ġ")
    expected = tokenizer("on the mat, and")["input_ids"]
    prompt = tokenizer(f"on the {blank * len(written)}, and")["input_ids"]
    holes = iter(written)
    assert [next(holes) if id_ == tokenizer.mask_token_id else id_ for id_ in prompt] == expected


@needs_shared
def test_gpt2_gets_the_mask_of_the_published_checkpoints():
    tokenizer = add_mask_token(AutoTokenizer.from_pretrained(SHARED / "data/tokenizer_gpt2"))
    assert tokenizer.mask_token_id == 50257
    assert len(tokenizer) == 50258
    assert tokenizer("returns <|mask|>")["input_ids"] == [*tokenizer("returns")["input_ids"], 50257]
    assert tokenizer.eos_token_id == 50256
