# SPDX-License-Identifier: Apache-2.0
"""Tokenizers with a mask token: an existing one extended, or a byte-level BPE trained on local text."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"


def add_mask_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give `tokenizer` a mask token if it has none (for GPT-2 the id 50257), so that prompts can hold blanks."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, among them `<|endoftext|>` (BOS and EOS) and `<|mask|>` (last id).

    Args:
        texts (`Iterable[str]`): Documents.
        vocab_size (`int`): At least 258: 256 bytes and the two special tokens.

    Raises:
        `ValueError`: for a smaller vocabulary, or a text too small to fill it.
    """
    if vocab_size < 258:
        raise ValueError(f"`vocab_size`={vocab_size} must be at least 258: 256 bytes and two special tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast = add_mask_token(fast)
    if len(fast) != vocab_size:
        raise ValueError(f"`vocab_size`={vocab_size}, but the text gives {len(fast)} tokens only: ask for fewer.")
    return fast
