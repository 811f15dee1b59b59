# SPDX-License-Identifier: Apache-2.0
"""Tokenizers with a mask token: an existing one extended, or a byte-level BPE trained on local text."""

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.arguments import check_whole


END_OF_TEXT = "<|endoftext|>"
# A space before a word belongs to the word's token: one before a blank is part of what is to be written there.
MASK = AddedToken("<|mask|>", lstrip=True, special=True)


def add_mask_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give `tokenizer` a mask token if it has none (for GPT-2 the id 50257), so that prompts can hold blanks.

    The token takes the white space before it.
    """
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, among them `<|endoftext|>` (BOS and EOS) and `<|mask|>` (last id).

    Args:
        texts (`Iterable[str]`): Documents; `None` among them, a row without text, is left out.
        vocab_size (`int`): At least 258: 256 bytes and the two special tokens.

    Raises:
        `ValueError`: for a smaller vocabulary, a text too small to fill it, or a document that is no string.
    """
    vocab_size = check_whole("vocab_size", vocab_size, minimum=258, unit="tokens (256 bytes and two special ones)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_documents(texts), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast = add_mask_token(fast)
    if len(fast) != vocab_size:
        raise ValueError(f"`vocab_size`={vocab_size}, but the text gives {len(fast)} tokens only: ask for fewer.")
    return fast


def _documents(texts: Iterable[str]) -> Iterator[str]:  # one by one: they need not fit into memory
    if isinstance(texts, str):
        raise ValueError("`texts` is one string: give documents, such as a list of strings.")
    for index, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"`texts`[{index}] is {text!r}, of type {type(text).__name__}: give strings.")
        if text is not None:
            yield text
