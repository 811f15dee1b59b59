# SPDX-License-Identifier: Apache-2.0
"""Documents from local files or the hub, packed into blocks of equal length."""

from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase


READERS = {  # suffix → reader of `datasets`, and its options: a .txt file is one document
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}


def load_text(
    text_files: str | list[str] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Documents, one per row of the column `"text"`.

    Args:
        text_files (`str` or `list[str]`, *optional*): Local .txt (one document each), .jsonl, .json or .parquet files,
            also with .gz. `None`: `dataset_name`.
        dataset_name (`str`, *optional*): Hub name, instead of files.
        dataset_config (`str`, *optional*): Configuration of the hub dataset. `None`: its default.
        split (`str`, defaults to `"train"`): Split of the hub dataset, such as `"train[:-100000]"`.
        column (`str`, defaults to `"text"`): Column that holds the text.
        streaming (`bool`, defaults to `False`): Read while training instead of caching first.

    Raises:
        `ValueError`: for a missing or empty file, an unknown suffix, a missing column, or not exactly one source.
    """
    if (text_files is None) == (dataset_name is None):
        raise ValueError(
            f"`text_files`={text_files} and `dataset_name`={dataset_name}: give one of them as the source of text."
        )
    if text_files is None:
        dataset = load_dataset(dataset_name, dataset_config, split=split, streaming=streaming)
    else:
        files = [text_files] if isinstance(text_files, str) else list(text_files)
        reader, options = _reader(files)
        dataset = load_dataset(reader, data_files=files, split="train", streaming=streaming, **options)
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise ValueError(f"`column`={column!r} is not among the columns {columns} of the data: name one of them.")
    return dataset.rename_column(column, "text") if column != "text" else dataset


def _reader(files: list[str]) -> tuple[str, dict]:
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"`text_files`: {file!r} does not exist.")
        if Path(file).stat().st_size == 0:
            raise ValueError(f"`text_files`: {file!r} is empty.")
    suffixes = {Path(file.removesuffix(".gz")).suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= set(READERS):
        raise ValueError(
            f"`text_files` end in {sorted(suffixes)}: give files of one kind of {tuple(READERS)} (or .gz)."
        )
    return READERS[suffixes.pop()]


def pack(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Blocks of `length` ids: BOS, `length` − 2 tokens of the concatenated documents (EOS after each), EOS.

    This is the packing of MDLM's OpenWebText runs. What is left at the end of 1,000 documents is dropped.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows with `"text"`.
        tokenizer (`PreTrainedTokenizerBase`): Has an EOS token; BOS defaults to it.
        length (`int`): Block length, at least 3.
        num_proc (`int`, *optional*): Processes. `None`: this one.

    Raises:
        `ValueError`: if the text is shorter than one block, or the tokenizer has no EOS token.
    """
    if length < 3:
        raise ValueError(f"`length`={length} must be at least 3: each block holds BOS, EOS and what is between.")
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no EOS token: set `tokenizer.eos_token`, which ends every document.")
    options = {"batched": True, "remove_columns": dataset.column_names or ["text"]}
    function = partial(_pack_documents, tokenizer=tokenizer, length=length)
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, **options)
    blocks = dataset.map(function, num_proc=num_proc, desc="packing", **options)
    if len(blocks) == 0:
        raise ValueError(
            f"the text is shorter than one block of `length`={length} tokens: give more text or a smaller length."
        )
    return blocks


def _pack_documents(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list]:
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    eos, inner = tokenizer.eos_token_id, length - 2
    texts = [text for text in rows["text"] if text]
    if not texts:
        return {"input_ids": []}
    # verbose=False: documents longer than the tokenizer's model_max_length are what packing is for
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    stream = [token for ids in encoded for token in (*ids, eos)]
    starts = range(0, len(stream) - inner + 1, inner)
    return {"input_ids": [[bos, *stream[start : start + inner], eos] for start in starts]}
