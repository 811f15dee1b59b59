# SPDX-License-Identifier: Apache-2.0
"""Text and token ids as users give them: plain text to ids, rows of ids, tokenizers of folders."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def text_list(texts: Iterable[str], name: str = "texts") -> list[str]:
    """`texts` as a list; a `ValueError` that names what is no text."""
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"`{name}` is of type {type(texts).__name__}: give several texts, such as a list of strings.")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}`[{i}] is {text!r}, of type {type(text).__name__}: give strings.")
    return texts


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of plain texts, without special tokens: what a text says is text, also where it says `<|mask|>`.

    A vocabulary may hold a special token's name among its ordinary tokens (Unigram, words): it is unknown then.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any.
        texts (`Iterable[str]`): Plain texts; to place special tokens is the caller's.

    Raises:
        `ValueError`: for what is no text, or text that the tokenizer can only read as its mask token.

    Example:

    ```python
    >>> from fpmgm.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["the cat sat on the mat"], 258)
    >>> len(tokenizer("<|mask|>")["input_ids"]), len(encode_text(tokenizer, ["<|mask|>"])[0])
    (1, 8)

    ```
    """
    texts = text_list(texts)
    if not texts:
        return []
    # verbose=False: texts longer than the tokenizer's model_max_length are cut or packed by the caller.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    rows = tokenizer(texts, split_special_tokens=True, **options)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [_without_special(tokenizer, row, special, i) if special & set(row) else row for i, row in enumerate(rows)]


def _without_special(tokenizer: PreTrainedTokenizerBase, row: list[int], special: set[int], i: int) -> list[int]:
    """`row` with unknown tokens where the tokenizer reads special ones out of plain text."""
    if tokenizer.unk_token_id is not None:
        return [tokenizer.unk_token_id if token in special else token for token in row]
    if tokenizer.mask_token_id in row:
        raise ValueError(
            f"`texts`[{i}] holds {tokenizer.mask_token!r}, which the tokenizer can only read as its mask token: take "
            "it out of the text, or give the tokenizer an `unk_token`."
        )
    return row


def encode_marked(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of texts whose special tokens are meant, such as a chat template's; the mask's name alone is text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any.
        texts (`Iterable[str]`): Texts; none is added to what they name.

    Raises:
        `ValueError`: as [`encode_text`].
    """
    texts = text_list(texts)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    rows = tokenizer(texts, **options)["input_ids"] if texts else []
    for i, row in enumerate(rows):
        if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in row:
            first, *others = texts[i].split(tokenizer.mask_token)
            name = encode_text(tokenizer, [tokenizer.mask_token])[0]
            parts = [tokenizer(part, **options)["input_ids"] for part in (first, *others)]
            rows[i] = parts[0] + [token for part in parts[1:] for token in (*name, *part)]
    return rows


def framing_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What `tokenizer(text)` puts before and behind the ids of a text: BERT's CLS and SEP, GPT-2's nothing."""
    ordinary = (text for text in ("a", *tokenizer.get_vocab()) if text not in tokenizer.all_special_tokens)
    text = next(text for text in ordinary if tokenizer(text, add_special_tokens=False)["input_ids"])
    plain, framed = (tokenizer(text, add_special_tokens=add)["input_ids"] for add in (False, True))
    start = next(i for i in range(len(framed) + 1) if framed[i : i + len(plain)] == plain)
    return framed[:start], framed[start + len(plain) :]


def boundary_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """What begins and what ends a text: BOS and EOS, or else CLS and SEP, as MDLM has it; `None` where there is none.

    A tokenizer without either begins texts with what ends them.
    """
    begin = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    return _first(begin, end), end


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that are no text: of tokens that have a part to play, such as EOS, and of those that the vocabulary alone
    says are special, such as `<|eot_id|>` of Llama 3."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def _first(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)


def read_tokenizer(name: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Args:
        name (`str` or `Path`): Folder or hub name.
        options: Of `AutoTokenizer.from_pretrained`.

    Raises:
        `ValueError`: names the folder that holds none, or a broken one, and says why.
    """
    try:
        return AutoTokenizer.from_pretrained(str(name), **options)
    except Exception as error:  # broken files end in almost any exception, few of which name the file
        raise ValueError(f"no tokenizer can be read from {str(name)!r}: {type(error).__name__}: {error}") from error


def tokenizer_contents(tokenizer: PreTrainedTokenizerBase) -> list:
    """What a tokenizer makes of text, as plain values: its vocabulary, its rules and its special tokens.

    Left out is what changes while it is used (truncation, padding).
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    rules = {name: backend.get(name) for name in ("model", "normalizer", "pre_tokenizer")}
    return [tokenizer.get_vocab(), rules, tokenizer.special_tokens_map]


def token_rows(sequences: Any, name: str = "sequences", mask_token_id: int | None = None) -> list[list[int]]:
    """Rows of token ids as plain lists, from whatever holds them.

    Args:
        sequences (`Dataset`, `torch.Tensor`, `np.ndarray` or `Iterable`): Rows of ids, or of a dataset with
            `input_ids`, as `fpmgm.data.pack` gives them.
        name (`str`, defaults to `"sequences"`): Of the argument, for messages.
        mask_token_id (`int`, *optional*): An id that no row may hold. `None`: any may be there.

    Raises:
        `ValueError`: for text, or a row that is not made of whole numbers, or holds the mask id; it names the row.

    >>> token_rows([{"input_ids": [1, 2]}, torch.tensor([3])])
    [[1, 2], [3]]
    """
    if isinstance(sequences, str | Mapping) or not isinstance(sequences, Iterable):
        raise ValueError(f"`{name}` is of type {type(sequences).__name__}: give rows of token ids.")
    rows = [_token_row(row, f"`{name}`[{i}]") for i, row in enumerate(sequences)]
    for i, row in enumerate(rows if mask_token_id is not None else []):
        if mask_token_id in row:
            raise ValueError(
                f"`{name}`[{i}] holds the mask id {mask_token_id} at position {row.index(mask_token_id)}: a mask is "
                "no text. Leave the row out, or encode its text with `split_special_tokens=True`."
            )
    return rows


def _token_row(row: Any, name: str) -> list[int]:
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise ValueError(
                f"{name} has the columns {sorted(row)}, and no `input_ids`: `fpmgm.data.pack` makes them of text, "
                "`fpmgm.trainers.encode_prompts` of prompts."
            )
        row = row["input_ids"]
    if isinstance(row, str):
        raise ValueError(f"{name} is the text {row[:40]!r}: give token ids, such as `tokenizer(text).input_ids`.")
    try:
        ids = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is no row of token ids: {error}.") from error
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        kind = str(ids.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is of shape {tuple(ids.shape)} and type {kind}: give a row of whole numbers.")
    return ids.tolist()


def padded(rows: Iterable[Iterable[int]]) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """(B, L) numbers of `rows` of any lengths, with 0 behind them, and where they are real.

    >>> padded([[5, 6], [7]])[0].tolist()
    [[5, 6], [7, 0]]
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    numbers = pad_sequence(rows, batch_first=True)
    return numbers, torch.arange(numbers.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def scored_rows(sequences: Any, mask_token_id: int | None = None) -> tuple[list[list[int]], list[list[bool]]]:
    """[`token_rows`], and which of their positions are scored: those that `completion_mask` or `labels` of a row say,
    or all.

    Raises:
        `ValueError`: also for a mask of another length, or a row that has padding.

    >>> scored_rows([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, [8]])[1]
    [[False, True, True], [True]]
    """
    if isinstance(sequences, Iterable) and not isinstance(sequences, str | Mapping):
        sequences = list(sequences)
    rows = token_rows(sequences, mask_token_id=mask_token_id)
    return rows, [
        _scored(row, ids, f"`sequences`[{i}]") for i, (row, ids) in enumerate(zip(sequences, rows, strict=True))
    ]


def _scored(row: Any, ids: list[int], name: str) -> list[bool]:
    columns = {}
    for column, hidden in (("completion_mask", 0), ("labels", -100), ("attention_mask", 0)):
        if isinstance(row, Mapping) and row.get(column) is not None:
            columns[column] = [value != hidden for value in torch.as_tensor(row[column]).tolist()]
            if len(columns[column]) != len(ids):
                raise ValueError(f"{name} has {len(ids)} `input_ids`, but {len(columns[column])} in `{column}`.")
    if not all(columns.get("attention_mask", ())):
        raise ValueError(f"{name} has padding, an `attention_mask` of 0: leave the padding out of the row.")
    masks = [columns[column] for column in ("completion_mask", "labels") if column in columns]
    return [all(values) for values in zip(*masks, strict=True)] if masks else [True] * len(ids)


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token inside a text: at the beginning of one, some tokenizers drop its space."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
