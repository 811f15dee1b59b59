# SPDX-License-Identifier: Apache-2.0
"""Text on its way into recipes: prompts with blanks, and where training text comes from."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sample
import train_owt
from fpmgm.data import pack, train_tokenizer
from tests.testing_utils import refused, tiny_model, word_tokenizer
from text_data import DataArguments, load_blocks, load_tokenizer


def trained() -> PreTrainedTokenizerBase:
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 3, 270)


def saved_without_lstrip() -> PreTrainedTokenizerBase:
    """As tokenizers that were made elsewhere."""
    tokenizer = Tokenizer.from_str(trained().backend_tokenizer.to_str().replace('"lstrip":true', '"lstrip":false'))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", mask_token="<|mask|>")


def without_a_mask() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=trained().backend_tokenizer, bos_token="<|endoftext|>")


def metaspace() -> PreTrainedTokenizerBase:
    """Puts a space before the beginning of a text, as Llama's first tokenizer does."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), *((f"▁{word}", -2.0) for word in ("the", "cat", "sat", "mat")), (",", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("\n", -2.0), ("<mask>", -2.0)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerBase:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "mat", ","]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


FRAMES = {  # what stands before and behind
    trained: ([0], [0]),
    saved_without_lstrip: ([0], [0]),
    without_a_mask: ([0], []),
    metaspace: ([], []),
    word_pieces: ([2], [3]),
}


@pytest.mark.parametrize("make", FRAMES)
@pytest.mark.parametrize("blank", ["<|mask|*{}>", "<|mask|>"])
def test_a_prompt_is_tokenized_as_the_text_that_it_becomes(make, blank):
    tokenizer, mask, (begin, end) = make(), 999, FRAMES[make]
    before, hole, after = "the cat", " sat", " the mat, the"
    whole = tokenizer(before + hole + after, add_special_tokens=False)["input_ids"]
    written = tokenizer(hole if make is not metaspace else hole[1:], add_special_tokens=False)["input_ids"]
    blanks = blank.format(len(written)) if "*" in blank else blank * len(written)
    for space in ("", " "):
        (ids,) = sample.encode_prompt(tokenizer, f"{before}{space}{blanks}{after}", mask).tolist()
        found = iter(written)
        assert [next(found) if token == mask else token for token in ids] == [*begin, *whole, *end]


def test_line_ends_before_a_blank_stay_and_the_tokenizers_own_mask_is_a_blank():
    tokenizer = trained()
    (ids,) = sample.encode_prompt(tokenizer, "the\n\n<|mask|*2>,", 269).tolist()
    assert tokenizer.decode(ids) == "<|endoftext|>the\n\n<|mask|><|mask|>,<|endoftext|>"
    (ids,) = sample.encode_prompt(word_pieces(), "the [MASK] sat<|mask|>", 4).tolist()
    assert word_pieces().decode(ids) == "[CLS] the [MASK] sat [MASK] [SEP]"


def test_blanks_that_no_text_has_are_refused_before_they_are_made():
    assert sample.encode_prompt(trained(), "the <|mask|*0002>", 269).eq(269).sum() == 2
    for count in ("1000001", "9" * 12, "9" * 5000):
        refused("`prompt` has a blank of [0-9]+ tokens", sample.encode_prompt, trained(), f"the <|mask|*{count}>", 269)


def test_sampling_needs_neither_bos_nor_eos(tmp_path):
    word_tokenizer(["<unk>", *"abcdefghi", "<mask>"], mask_token="<mask>").save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--budget", "12", "--device", "cpu"]
    options += ["--output", str(tmp_path / "texts.jsonl")]
    (text,) = sample.main([*options, "--prompt", "a b <|mask|*2> c"])
    assert len(text.split()) == 5 and text.split()[:2] == ["a", "b"] and text.split()[-1] == "c"
    saved = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert saved == [{"text": text}]
    (text,) = sample.main([*options, "--prompt", "a b", "--max_new_tokens", "4", "--order", "entropy"])
    assert len(text.split()) == 6 and text.split()[:2] == ["a", "b"]
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    refused(f"no tokenizer can be read from '{tmp_path}'", sample.main, options)


def test_a_tokenizer_of_bert_begins_and_ends_texts_by_cls_and_sep():
    config = train_owt.load_config(train_owt.ModelArguments(), None, word_pieces())
    assert (config.bos_token_id, config.eos_token_id, config.mask_token_id) == (2, 3, 4)
    text = Dataset.from_dict({"text": ["the [MASK] sat on the mat"]})
    (block,) = pack(text, word_pieces(), 8)["input_ids"]
    assert block == [2, 5, 1, 1, 1, 7, 1, 3]  # `[MASK]` is three unknown pieces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_text_files": ["a.txt"], "eval_share": 0.1}, "`eval_share`=0.1 does nothing beside `eval_text_files`"),
        ({"eval_text_files": ["a.txt"], "eval_split": "test"}, "`eval_split`=test does nothing beside"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    refused(message, DataArguments, text_files=["b.txt"], **options)


def test_a_text_ends_where_the_model_says_or_else_the_tokenizer(tmp_path):
    tokenizer = trained()
    letter = tokenizer("t", add_special_tokens=False)["input_ids"][0]
    model = tiny_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    with torch.no_grad():
        model.lm_head.bias[letter] += 100  # all that it writes
    tokenizer.save_pretrained(tmp_path)
    for ends, expected in (([letter, 7], "t"), (None, "t" * 5)):
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path)
        argv = ["--model", str(tmp_path), "--length", "5", "--stop_at_eos", "True", "--budget", "12"]
        assert sample.main([*argv, "--device", "cpu"]) == [expected]


@pytest.mark.parametrize(("given", "model"), [("tokenizer", None), ("model_name_or_path", "folder")])
def test_a_size_beside_a_tokenizer_that_is_there_is_refused(given, model):
    data = DataArguments(tokenizer=None if model else "folder", tokenizer_vocab_size=300)
    refused(f"`tokenizer_vocab_size`=300 does nothing beside `{given}`.*or at 2048", load_tokenizer, data, model)


def test_rows_without_text_train_a_tokenizer_and_are_packed(tmp_path):
    rows = [{"text": "the cat sat on the mat" if i % 2 else None, "id": i} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = DataArguments(text_files=[str(tmp_path)], tokenizer_vocab_size=262, eval_share=0.2)
    tokenizer = load_tokenizer(data, None)
    train, validation = load_blocks(data, tokenizer, 16)
    tokens = 30 * (len(tokenizer("the cat sat on the mat")["input_ids"]) + 1)
    assert len(train) + len(validation) == tokens // 14 and len(validation) == round(0.2 * (tokens // 14))
    apart = DataArguments(text_files=[str(tmp_path)], train_split="train[:40]", eval_split="train[40:]")
    parts = load_blocks(apart, tokenizer, 16)
    assert [len(part) for part in parts] == [20 * tokens // 30 // 14, 10 * tokens // 30 // 14]
    data.eval_share = 1.5
    refused(r"`eval_share`=1.5 must lie between 0 and 1", load_blocks, data, tokenizer, 16)
