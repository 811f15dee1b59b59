# SPDX-License-Identifier: Apache-2.0
"""The text of a recipe: where it comes from, its tokenizer, and the blocks it is cut into."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fpmgm.command_line import DatasetName, LocalPath, ModelName
from fpmgm.data import add_mask_token, load_text, pack, train_tokenizer
from fpmgm.data.text_files import list_files
from fpmgm.models.text_input import read_tokenizer
from fpmgm.trainers.run_record import describe_files
from narration import say


@dataclass
class SourceArguments:
    """Where the text comes from."""

    text_files: list[LocalPath] | None = field(
        default=None, metadata={"help": "Local .txt, .jsonl, .parquet files, or folders."}
    )
    eval_text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Local files to validate on."})
    dataset_name: DatasetName | None = field(default=None, metadata={"help": "Hub dataset, instead of local files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the hub dataset, e.g. train[:-100000]."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of the hub dataset to validate on."})
    eval_share: float = field(
        default=0.01, metadata={"help": "Share of the training rows, the last ones, to validate on without a split."}
    )
    tokenizer: ModelName | None = field(
        default=None, metadata={"help": "Hub name or folder; null: that of the model to go on from, or train one."}
    )
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer that is trained here."})

    def __post_init__(self):
        if self.eval_text_files is not None or self.eval_split is not None:
            self.refuse("eval_share", "`eval_text_files` or `eval_split`")
        if self.eval_text_files is not None:
            self.refuse("eval_split", "`eval_text_files`")

    def refuse(self, name: str, beside: str) -> None:
        """Raise a `ValueError` for an option that what is `beside` it makes idle, if it is given."""
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(f"`{name}`={value} does nothing beside {beside}: leave it out, or at {default}.")

    @property
    def words(self) -> list[str]:
        """The options by which another recipe reads the same text."""
        if self.text_files is None:
            return ["--dataset_name", self.dataset_name]
        return ["--text_files", *self.text_files]

    @property
    def description(self) -> str:
        """For the model's card."""
        return self.dataset_name or f"{len(self.text_files)} local file(s)"


@dataclass
class DataArguments(SourceArguments):
    """Where the text comes from and how it is cut into blocks."""

    eval_blocks: int | None = field(default=None, metadata={"help": "Most blocks to validate on; null: all."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    streaming: bool = field(default=False, metadata={"help": "Read the training text while training."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise; null: one."})

    def texts(self) -> Iterable[str]:
        """What a tokenizer is trained on."""
        source = (self.text_files, self.dataset_name, self.dataset_config, self.train_split, self.text_column)
        return load_text(*source)["text"]


@dataclass
class PromptArguments(SourceArguments):
    """Where the prompts and completions, or messages, come from."""

    def rows(self, evaluation: bool = False) -> Dataset:
        """Rows to train on, or those to validate on that are given apart."""
        if evaluation and self.eval_text_files is not None:
            return load_text(self.eval_text_files, column=None)
        split = self.eval_split if evaluation else self.train_split
        return load_text(self.text_files, self.dataset_name, self.dataset_config, split, column=None)

    def texts(self) -> Iterator[str]:
        """What a tokenizer is trained on."""
        for row in self.rows():
            for part in (row.get("prompt"), row.get("completion"), row.get("messages")):
                yield from [part] if isinstance(part, str) else [message["content"] for message in part or ()]


def load_tokenizer(
    data: DataArguments | PromptArguments,
    model_name: str | None,
    checkpoint: str | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer named, that of the `checkpoint` to resume from, the model's (at its `revision`), or one trained on
    the training text; with a mask token.

    Raises:
        `ValueError`: for a size beside a tokenizer that is there already.
    """
    if (data.tokenizer or model_name) is not None:
        data.refuse("tokenizer_vocab_size", f"`{'model_name_or_path' if data.tokenizer is None else 'tokenizer'}`")
    if checkpoint is not None and not (Path(checkpoint) / "tokenizer_config.json").is_file():
        checkpoint = None
    name = data.tokenizer or checkpoint or model_name
    if name is not None:
        of_model = {"revision": revision} if name == model_name and revision is not None else {}
        return add_mask_token(read_tokenizer(name, **of_model))
    tokenizer = train_tokenizer(data.texts(), data.tokenizer_vocab_size)
    say(f"tokenizer: trained here on {data.description}, {len(tokenizer):,} tokens")
    return tokenizer


def load_blocks(data: DataArguments, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple:
    """Blocks to train and to validate on."""
    source = (data.dataset_name, data.dataset_config)
    text = load_text(data.text_files, *source, data.train_split, data.text_column, data.streaming)
    train_blocks = pack(text, tokenizer, length, None if data.streaming else data.num_proc)
    if data.eval_text_files is not None or data.eval_split is not None:
        apart = data.eval_text_files is not None
        eval_source = (data.eval_text_files, None, None) if apart else (data.text_files, *source)
        eval_text = load_text(*eval_source, data.eval_split or "train", data.text_column)
        eval_blocks = pack(eval_text, tokenizer, length, data.num_proc)
    elif data.streaming:
        raise ValueError("`streaming`=True needs `eval_split` or `eval_text_files`: a stream has no last blocks.")
    else:
        train_blocks, eval_blocks = hold_out(train_blocks, data.eval_share)
    if data.eval_blocks is not None:
        eval_blocks = eval_blocks.select(range(min(data.eval_blocks, len(eval_blocks))))
    return train_blocks, eval_blocks


def load_prompts(data: PromptArguments, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Dataset, Dataset]:
    """Rows of prompts to train and to validate on, which the trainer encodes."""
    rows = data.rows()
    if data.eval_text_files is not None or data.eval_split is not None:
        return rows, data.rows(evaluation=True)
    return hold_out(rows, data.eval_share)


def hold_out(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """`rows` without the last `share` of them, and these."""
    if not 0 < share < 1:
        raise ValueError(f"`eval_share`={share} must lie between 0 and 1: a share of the training rows.")
    held_out = max(1, round(share * len(rows)))
    if held_out >= len(rows):
        raise ValueError(f"the text gives {len(rows)} row(s), too few to hold some out: give more text.")
    return rows.select(range(len(rows) - held_out)), rows.select(range(len(rows) - held_out, len(rows)))


def describe_text(data: SourceArguments) -> dict:
    """What a checkpoint records of the text: its files' contents, or where it is on the hub."""
    names = ("dataset_name", "dataset_config", "train_split", "eval_split", "eval_share", "eval_blocks", "text_column")
    given = {"text_files": data.text_files, "eval_text_files": data.eval_text_files}
    return {
        **{name: describe_files(None if files is None else list_files(files)) for name, files in given.items()},
        **{name: getattr(data, name) for name in names if hasattr(data, name)},
    }
