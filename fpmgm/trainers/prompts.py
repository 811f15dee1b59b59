# SPDX-License-Identifier: Apache-2.0
"""Rows of prompts and completions become rows of ids that say which positions a model learns to write.

The ids are those that generation meets: the prompt as `tokenizer(prompt)` or the chat template gives it, then what is
to be written behind it, then EOS.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.arguments import check_whole, one_of
from ..models.text_input import boundary_ids, encode_marked, framing_ids
from .random_states import kept_random_states


logger = logging.get_logger(__name__)

IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features({"input_ids": IDS, "completion_mask": IDS})
LONG_ROWS = ("error", "cut", "drop")
PAIR, CHAT = ("prompt", "completion"), "messages"
LEAVE_OUT = "leave the row out, say by `dataset.filter(...)`"


class Turn(NamedTuple):
    """A prompt and what is to be written behind it; words for the row that they are of, and whether a chat template
    wrote them."""

    where: str
    prompt: str
    completion: str
    chat: bool


def encode_prompts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    *,
    completion_multiple: int = 32,
    long_rows: str = "error",
    source: str = "data",
    num_proc: int | None = None,
) -> Any:
    """Rows of `prompt` and `completion`, or of `messages`, as rows of `input_ids` and `completion_mask`.

    A completion ends with EOS, and with as many more as bring it to a multiple of `completion_multiple` tokens, or to
    the model's length: a model learns where its answer ends, and what is behind it. Of `messages` every turn of the
    assistant makes a row, whose prompt is all before it, as the tokenizer's chat template writes it.

    Special tokens that a text names are special, as in `tokenizer(prompt)`, but for the mask's name, which is text.

    Args:
        dataset (`Dataset`, `IterableDataset` or a list of rows): Each row has `prompt` and `completion`, both texts or
            both lists of messages, or `messages`. Anything without these columns is given back as it is.
        tokenizer (`PreTrainedTokenizerBase`): Has EOS (or SEP), and a chat template where there are messages.
        max_length (`int`): The most tokens of a row.
        completion_multiple (`int`, defaults to 32): 1 adds one EOS.
        long_rows (`str`, defaults to `"error"`): What happens to a row of more tokens: `"error"`; `"cut"`, its
            completion ends early, without EOS; `"drop"`, it is left out.
        source (`str`, defaults to `"data"`): Words for the data in errors.
        num_proc (`int`, *optional*): Processes, not for a stream. `None`: this one.

    Raises:
        `ValueError`: for a row that holds something else, is too long, or has nothing to write; it names the row. For
            a tokenizer that lacks EOS, or a chat template where one is needed.

    Example:

    ```python
    >>> from fpmgm.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["sort: bca"], 258)
    >>> row = encode_prompts([{"prompt": "ba: ", "completion": "ab"}], tokenizer, 16, completion_multiple=4)[0]
    >>> tokenizer.decode(row["input_ids"])
    'ba: ab<|endoftext|><|endoftext|>'
    >>> row["completion_mask"]
    [0, 0, 0, 0, 1, 1, 1, 1]

    ```
    """
    check_whole("completion_multiple", completion_multiple, minimum=1, unit="tokens")
    one_of(LONG_ROWS).check("long_rows", long_rows)
    columns = columns_of_prompts(dataset, source)
    if columns is None:
        return dataset
    _check_tokenizer(tokenizer, source)
    function = partial(
        _encode_rows, tokenizer=tokenizer, max_length=max_length, multiple=completion_multiple, long_rows=long_rows,
        source=source,
    )  # fmt: skip
    options = {"batched": True, "with_indices": True, "remove_columns": _names(dataset), "features": FEATURES}
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(function, **options)
    if isinstance(dataset, datasets.Dataset):
        encoded = dataset.map(function, num_proc=num_proc, desc=f"prompts of the {source}", **options)
    else:
        rows = [_mapping(dataset[i], f"row {i} of the {source}") for i in range(len(dataset))]
        columns_of_rows = {name: [row.get(name) for row in rows] for name in columns}
        encoded = datasets.Dataset.from_dict(function(columns_of_rows, range(len(rows))), features=FEATURES)
    if len(encoded) == 0:
        raise ValueError(f"no row of the {source} is left: all have more than {max_length} tokens.")
    if columns == PAIR and len(encoded) < len(dataset):
        logger.info(f"{len(dataset) - len(encoded)} of {len(dataset)} rows of the {source} are too long and left out.")
    return encoded


def read_prompts(dataset: Any, source: str, tokenizer: Any, args: Any, config: PreTrainedConfig) -> Any:
    """[`encode_prompts`] as `args` of a trainer say, for its model's `config`; of several datasets each."""
    if config.model_type != "fpmdlm":
        return dataset
    if isinstance(dataset, dict):
        return {
            name: read_prompts(part, f"{source} {name!r}", tokenizer, args, config) for name, part in dataset.items()
        }
    options = {"completion_multiple": args.completion_multiple, "long_rows": args.long_rows, "source": source}
    with args.main_process_first(desc="prompts"):  # the others find what it has written
        return encode_prompts(dataset, tokenizer, config.max_position_embeddings, **options)


def check_prompt_options(args: Any, config: PreTrainedConfig, data: Iterable[Any]) -> None:
    """Raise a `ValueError` for options of prompts that would do nothing.

    Args:
        args: A trainer's configuration.
        config (`PreTrainedConfig`): The model's.
        data (`Iterable`): Its datasets, or `None`.
    """
    parts = [part for rows in data for part in (rows.values() if isinstance(rows, dict) else [rows])]
    columns = [columns for columns in map(_names, parts) if columns]
    of_ids = columns and all("input_ids" in names for names in columns)
    of_masks = any("completion_mask" in names for names in columns)
    images = config.model_type != "fpmdlm"
    for name, default, idle in (
        ("completion_multiple", 32, of_ids or images),
        ("long_rows", "error", of_ids or images),
        ("completion_only_loss", True, (of_ids and not of_masks) or images),
        ("random_length_share", 0.0, images),
    ):
        if idle and getattr(args, name) != default:
            reason = "images have one length, and no prompts" if images else f"the rows have the columns {columns[0]}"
            raise ValueError(f"`{name}`={getattr(args, name)!r} would do nothing: {reason}. Leave it out.")


def columns_of_prompts(dataset: Any, source: str = "data") -> tuple[str, ...] | None:
    """The columns that hold prompts and completions: `("prompt", "completion")` or `("messages",)`; `None` where the
    rows are ids already, or nothing is known of them.

    Raises:
        `ValueError`: for rows that have both, or a prompt alone.
    """
    names = set(_names(dataset))
    pair = names & set(PAIR)
    if "input_ids" in names or not (pair or CHAT in names):
        return None
    if "tools" in names:
        raise ValueError(f"the {source} has `tools`, which are not read: write them into the prompts, or remove them.")
    if (CHAT in names) == (pair == set(PAIR)):  # a prompt alone beside messages repeats their first
        raise ValueError(
            f"the {source} has the columns {sorted(names)}: a row has `prompt` and `completion`, or `messages`. "
            "Rename or remove columns so that it is one of them."
        )
    return (CHAT,) if CHAT in names else PAIR


def _names(dataset: Any) -> list[str]:
    """The columns of a dataset, or of its first row."""
    if getattr(dataset, "column_names", None) is not None and not isinstance(dataset, Mapping):
        return list(dataset.column_names)
    first = None
    with kept_random_states():  # a row may be made at random, when it is looked at
        if isinstance(dataset, datasets.IterableDataset):
            first = next(iter(dataset), None)
        elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, Mapping):
            first = dataset[0] if len(dataset) else None
    return list(first) if isinstance(first, Mapping) else []


def _mapping(row: Any, where: str) -> Mapping:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is a {type(row).__name__}, but the first is a dict with a prompt: give all as dicts."
        )
    return row


def _check_tokenizer(tokenizer: Any, source: str) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"the {source} holds prompts as text, but `processing_class` is {type(tokenizer).__name__}: give the "
            "model's tokenizer, `AutoTokenizer.from_pretrained(...)`."
        )
    if boundary_ids(tokenizer)[1] is None:
        raise ValueError(
            "`processing_class` has no EOS token, by which a model ends its answer: set `tokenizer.eos_token`."
        )


# --- rows ------------------------------------------------------------------------------------------------------------


def _encode_rows(
    rows: Mapping[str, Sequence],
    indices: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    multiple: int,
    long_rows: str,
    source: str,
) -> dict[str, list]:
    """Columns of ids and masks for a batch of rows."""
    turns, encoded = [], {name: [] for name in FEATURES}
    for place, index in enumerate(indices):
        row = {name: values[place] for name, values in rows.items()}
        turns += _turns_of(row, tokenizer, f"row {index} of the {source}")
    eos, (begin, end) = boundary_ids(tokenizer)[1], framing_ids(tokenizer)
    for turn, (prompt, completion) in zip(turns, _ids_of(turns, tokenizer, parted=bool(end)), strict=True):
        prompt = prompt if turn.chat else [*begin, *prompt, *end]
        completion = _without_end(completion, eos, tokenizer)
        if not completion:
            raise ValueError(f"{turn.where}: `completion` has nothing to write before its end: {LEAVE_OUT}.")
        room = max_length - len(prompt)
        if len(completion) < room:
            length = math.ceil((len(completion) + 1) / multiple) * multiple
            completion = completion + [eos] * (length - len(completion))
        elif long_rows == "drop":
            continue
        elif long_rows == "error" or room < 1:
            raise ValueError(_too_long(turn.where, len(prompt), len(completion), max_length))
        completion = completion[:room]
        encoded["input_ids"].append(prompt + completion)
        encoded["completion_mask"].append([0] * len(prompt) + [1] * len(completion))
    return encoded


def _too_long(where: str, prompt: int, completion: int, max_length: int) -> str:
    cut = "" if prompt >= max_length else ", `long_rows='cut'` ends their completions early, without EOS"
    return (
        f"{where} has {prompt} tokens of its prompt and {completion + 1} of its completion with EOS, but the model "
        f"reads at most {max_length} (`max_position_embeddings`): `long_rows='drop'` leaves such rows out{cut}."
    )


def _ids_of(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, parted: bool) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt and of its completion: what follows the prompt's in those of both, or, where the tokenizer
    joins what the border parts, or a token stands between them (`parted`, not in a chat), those of the completion
    alone (which some tokenizers begin with a space)."""
    prompts = encode_marked(tokenizer, [turn.prompt for turn in turns])
    wholes = encode_marked(tokenizer, [turn.prompt + turn.completion for turn in turns])
    alone = encode_marked(tokenizer, [turn.completion for turn in turns])
    return [
        (prompt, whole[len(prompt) :] if whole[: len(prompt)] == prompt and (turn.chat or not parted) else apart)
        for turn, prompt, whole, apart in zip(turns, prompts, wholes, alone, strict=True)
    ]


def _without_end(completion: list[int], eos: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without EOS at the end, and without white space that a chat template writes behind it."""
    if eos in completion:
        last = len(completion) - 1 - completion[::-1].index(eos)
        if not tokenizer.decode(completion[last + 1 :]).strip():
            return _without_end(completion[:last], eos, tokenizer)
    return completion


# --- texts and messages ----------------------------------------------------------------------------------------------


def _turns_of(row: Mapping, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Turn]:
    if CHAT in row:
        messages = _messages(row[CHAT], CHAT, where)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            roles = [message["role"] for message in messages]
            raise ValueError(f"{where}: `messages` has no turn of the assistant, but roles {roles}: {LEAVE_OUT}.")
        return [_render(tokenizer, messages[:i], messages[i : i + 1], where) for i in answers]
    prompt, completion = (row[name] for name in PAIR)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError(f"{where}: `completion` is empty: {LEAVE_OUT}.")
        return [Turn(where, prompt, completion, chat=False)]
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = {name: type(row[name]).__name__ for name in PAIR}
        raise ValueError(f"{where}: `prompt` and `completion` are {kinds}: give two texts, or two lists of messages.")
    return [_render(tokenizer, *(_messages(row[name], name, where) for name in PAIR), where)]


def _messages(value: Any, column: str, where: str) -> list[dict]:
    """Messages as plain dicts, without what Arrow fills in where other rows have more."""
    whole = isinstance(value, Sequence) and all(isinstance(m, Mapping) and _is_message(m) for m in value)
    if not whole or isinstance(value, str) or not value:
        raise ValueError(
            f"{where}: `{column}` is {str(value)[:80]!r}: give text, or messages, each with `role` and `content`; or "
            f"{LEAVE_OUT}."
        )
    return [{name: part for name, part in message.items() if part is not None} for message in value]


def _is_message(message: Mapping) -> bool:
    """Whether it says something under the names that templates read: they write nothing for others."""
    said = message.get("content") is not None or message.get("tool_calls")
    return bool(message.get("role") and said)


def _render(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], answer: list[dict], where: str) -> Turn:
    """A prompt that ends with the beginning of an answer, and the answer, as the chat template writes them."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} holds messages, but `processing_class` has no chat template: set `tokenizer.chat_template`, or "
            "give `prompt` and `completion` as texts."
        )
    try:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    except (TemplateError, TypeError, KeyError, IndexError) as error:  # what templates raise is theirs
        raise ValueError(f"{where}: the tokenizer's chat template refuses the messages: {error}.") from error
    if not any(message.get("content") or message.get("tool_calls") for message in answer):
        raise ValueError(f"{where}: the answer has nothing to write, its `content` is empty: {LEAVE_OUT}.")
    if not whole.startswith(before):
        raise ValueError(
            f"{where}: the tokenizer's chat template does not write the prompt {before[-80:]!r} before the answer, "
            f"but {whole[: len(before)][-80:]!r}: give `prompt` and `completion` as texts, or another template."
        )
    return Turn(where, before, whole[len(before) :], chat=True)
