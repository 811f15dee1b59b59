# SPDX-License-Identifier: Apache-2.0
"""Documents from local files or the hub, packed into blocks of equal length."""

from collections.abc import Iterable
from functools import partial
from glob import escape
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..models.arguments import check_whole
from ..models.text_input import boundary_ids, encode_text
from .text_files import READERS, check_encoding, explain, kind, list_files


TOGETHER = 1000  # documents that are packed as one stream


def load_text(
    text_files: str | Path | Iterable[str | Path] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    column: str | None = "text",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Documents, one per row of the column `"text"`, or rows of prompts as they are.

    Args:
        text_files (`str`, `Path` or `Iterable` of them, *optional*): Local .txt (one document each), .jsonl, .json or
            .parquet files in UTF-8, also with .gz, or folders of them. Names are taken literally. `None`:
            `dataset_name`.
        dataset_name (`str`, *optional*): Hub name, instead of files.
        dataset_config (`str`, *optional*): Configuration of the hub dataset. `None`: its default.
        split (`str`, defaults to `"train"`): Split of the hub dataset, or a part of it, such as `"train[:-100000]"`.
            All files together are the split `"train"`.
        column (`str`, *optional*, defaults to `"text"`): Column that holds the text. `None`: all columns as they are,
            such as `"prompt"` and `"completion"`.
        streaming (`bool`, defaults to `False`): Read while training instead of caching first.

    Raises:
        `ValueError`: for a file that is missing, empty, of an unknown suffix or not UTF-8, a missing column, or not
            exactly one source.
    """
    if (text_files is None) == (dataset_name is None):
        raise ValueError(
            f"`text_files`={text_files} and `dataset_name`={dataset_name}: give one of them as the source of text."
        )
    if dataset_config is not None and dataset_name is None:
        raise ValueError(f"`dataset_config`={dataset_config!r} is of a `dataset_name`, not of files: leave it out.")
    if text_files is None:
        dataset = load_dataset(dataset_name, dataset_config, split=split, streaming=streaming)
    else:
        dataset = _load_files(list_files(text_files), split, streaming)
    columns = dataset.column_names
    if columns is not None and column not in (None, *columns):
        raise ValueError(f"`column`={column!r} is not among the columns {columns} of the data: name one of them.")
    # There may be a "text" beside the column.
    return dataset if column in (None, "text") else dataset.select_columns([column]).rename_column(column, "text")


def _load_files(files: list[Path], split: str, streaming: bool) -> Dataset | IterableDataset:
    reader, options = READERS[kind(files[0])]
    for file in files:
        check_encoding(file, whole=streaming)  # a stream would meet a bad byte in the midst of training
    literal = [escape(str(file.absolute())) for file in files]  # `datasets` reads names as patterns
    try:
        return load_dataset(reader, data_files=literal, split=split, streaming=streaming, **options)
    except Exception as error:
        reason = explain(files)
        if reason is None:
            raise
        raise ValueError(reason) from error


def pack(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Blocks of `length` ids: BOS, `length` − 2 tokens of the concatenated documents (EOS after each), EOS.

    This is the packing of MDLM's OpenWebText runs. What is left at the end of 1,000 documents is dropped, and so are
    rows without text. Special tokens' names in a document are text.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows with `"text"`, as of [`load_text`].
        tokenizer (`PreTrainedTokenizerBase`): Has EOS (or SEP); BOS defaults to CLS, or else to EOS.
        length (`int`): Block length, at least 3.
        num_proc (`int`, *optional*): Processes, of 1,000 documents each at least. What is left at the end of each
            one's is dropped too, so that blocks depend on their number. `None`: this one.

    Raises:
        `ValueError`: if the text is shorter than one block, a row holds something else than text, or the tokenizer
            has no EOS token.
    """
    length = check_whole("length", length, minimum=3, unit="tokens (BOS, EOS and what is between)")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"`dataset` is of type {type(dataset).__name__}: give a `Dataset`, such as `load_text`'s.")
    columns = dataset.column_names
    if columns is not None and "text" not in columns:
        raise ValueError(f'`dataset` has the columns {columns}, and no "text": rename one of them to it.')
    bos, eos = boundary_ids(tokenizer)
    if eos is None:
        raise ValueError("`tokenizer` has no EOS token: set `tokenizer.eos_token`, which ends every document.")
    function = partial(_pack_documents, tokenizer=tokenizer, length=length, bos=bos, eos=eos)
    options = {"batched": True, "batch_size": TOGETHER, "with_indices": True, "remove_columns": columns or ["text"]}
    if isinstance(dataset, IterableDataset):
        if num_proc is not None:
            raise ValueError(
                f"`num_proc`={num_proc} is for data that is read before training, not a stream: leave it out."
            )
        return dataset.map(function, **options)
    if num_proc is not None and len(dataset) < num_proc * TOGETHER:  # fewer documents would drop more of their text
        num_proc = len(dataset) // TOGETHER or None
    blocks = dataset.map(function, num_proc=num_proc, desc="packing", **options)
    if len(blocks) == 0:
        raise ValueError(
            f"the text is shorter than one block of `length`={length} tokens: give more text or a smaller length."
        )
    return blocks


def _pack_documents(
    rows: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerBase, length: int, bos: int, eos: int
) -> dict[str, list]:
    texts, inner = [], length - 2
    for index, text in zip(indices, rows["text"], strict=True):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"row {index} of the text is {text!r}, of type {type(text).__name__}: give strings.")
        if text:
            texts.append(text)
    stream = [token for ids in encode_text(tokenizer, texts) for token in (*ids, eos)]
    starts = range(0, len(stream) - inner + 1, inner)
    return {"input_ids": [[bos, *stream[start : start + inner], eos] for start in starts]}
