# SPDX-License-Identifier: Apache-2.0
"""Plain text is text for every kind of tokenizer; rows of ids are read from whatever holds them."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from fpmgm.data import train_tokenizer
from fpmgm.models.text_input import boundary_ids, encode_text, read_tokenizer, text_list, token_rows
from tests.testing_utils import refused, word_tokenizer


PIECES = ["▁", "a", "b", "<", ">", "mask", "/s", "</s>"]


def unigram(unk: str | None = "<unk>") -> PreTrainedTokenizerFast:
    """Its vocabulary holds the mask token among the ordinary pieces, as XLM-R's does."""
    vocabulary = [("<unk>", 0.0), *((piece, -2.0) for piece in PIECES), ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", mask_token="<mask>", unk_token=unk)


def words() -> PreTrainedTokenizerFast:
    return word_tokenizer(["<unk>", "a", "b", "<mask>"], mask_token="<mask>", unk_token="<unk>")


def word_pieces() -> BertTokenizer:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "[", "]", "mask", "sep"]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)})


def slow_bytes() -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a b mask sep"], 259)


TOKENIZERS = [trained, word_pieces, unigram, words, slow_bytes]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_names_of_special_tokens_in_a_text_are_text(make):
    tokenizer = make()
    mask, unknown = tokenizer.mask_token, tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown}
    texts = ["a b", f"a {mask} b", f"{mask}{mask}", "", f"b {tokenizer.eos_token or tokenizer.sep_token} a"]
    rows = encode_text(tokenizer, iter(texts))
    assert special & {token for row in rows for token in row} == set()
    assert rows[0] == tokenizer("a b", add_special_tokens=False)["input_ids"] and rows[3] == []
    assert len(rows[1]) > len(rows[0])  # the name has not vanished
    marked = tokenizer(f"a {mask} b", add_special_tokens=False)["input_ids"]
    assert marked.count(tokenizer.mask_token_id) == 1  # who marks a blank still gets one


def test_a_mask_that_can_be_read_in_no_other_way_is_refused():
    message = r"`texts`\[1\] holds '<mask>', which the tokenizer can only read as its mask"
    refused(message, encode_text, unigram(unk=None), ["a", "b <mask>"])
    canine = CanineTokenizer()  # its mask is a character
    refused(r"`texts`\[0\] holds", encode_text, canine, [f"a{canine.mask_token}"])


def test_texts_are_several_strings():
    assert text_list(word for word in ("a", "b")) == ["a", "b"]
    for wrong, message in (("ab", "is of type str"), (["a", None], r"`texts`\[1\] is None"), (3, "is of type int")):
        refused(message, text_list, wrong)


def test_texts_begin_and_end_with_what_the_tokenizer_has():
    assert boundary_ids(trained()) == (0, 0)
    assert boundary_ids(word_pieces()) == (2, 3)  # CLS and SEP
    assert boundary_ids(words()) == (None, None)
    only_end = words()
    only_end.eos_token = "b"
    assert boundary_ids(only_end) == (2, 2)


ROWS = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        np.array(ROWS, dtype=np.uint16),
        torch.tensor(ROWS, dtype=torch.int32),
        [torch.tensor(row) for row in ROWS],
        (row for row in ROWS),
        [{"input_ids": row, "attention_mask": [1] * 3} for row in ROWS],
        Dataset.from_dict({"input_ids": ROWS}),
        Dataset.from_dict({"input_ids": ROWS}).with_format("torch"),
        Dataset.from_dict({"input_ids": ROWS}).with_format("numpy"),
        Dataset.from_dict({"input_ids": ROWS}).to_iterable_dataset(),
        Dataset.from_dict({"input_ids": ROWS})["input_ids"],
    ],
    ids=lambda given: type(given).__name__,
)
def test_rows_of_ids_are_read_from_whatever_holds_them(given):
    assert token_rows(given) == ROWS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "`rows` is of type str: give rows of token ids"),
        (["text"], r"`rows`\[0\] is the text 'text'"),
        ([[1], ["2"]], r"`rows`\[1\] is no row of token ids"),
        ([[1], None], r"`rows`\[1\] is no row of token ids"),
        ([[1, None]], r"`rows`\[0\] is no row of token ids"),
        ([[1.5, 2]], r"`rows`\[0\] is of shape \(2,\) and type float32"),
        ([[True]], "type bool"),
        ([[[1]]], r"shape \(1, 1\)"),
        ([1, 2], r"`rows`\[0\] is of shape \(\)"),
        (5, "`rows` is of type int"),
        ({"input_ids": ROWS}, "`rows` is of type dict"),
        ([{"text": "a"}], r"`rows`\[0\] has the columns \['text'\], and no `input_ids`"),
        ([[1, 2], [3, 9]], r"`rows`\[1\] holds the mask id 9 at position 1"),
    ],
)
def test_what_is_no_row_of_ids_is_refused_with_its_number(given, message):
    refused(message, token_rows, given, "rows", mask_token_id=9)


def test_a_broken_tokenizer_is_named_with_its_folder(tmp_path):
    trained().save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).mask_token_id == 258
    file = tmp_path / "tokenizer.json"
    whole = file.read_text(encoding="utf-8")
    for broken in (whole[: len(whole) // 2], json.dumps({"model": None}), "[]", ""):
        file.write_text(broken, encoding="utf-8")
        refused(f"no tokenizer can be read from '{tmp_path}'", read_tokenizer, tmp_path)
    refused(r"no tokenizer can be read from .*nowhere", read_tokenizer, tmp_path / "nowhere")
