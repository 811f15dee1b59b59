# SPDX-License-Identifier: Apache-2.0
"""Rows of training and evaluation data: read with their numbers, collated, and checked before they are copied to a
device."""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, SequentialSampler
from transformers.utils import logging

from .atomic_trainer import AtomicCheckpointTrainer
from .collator import BadRow


logger = logging.get_logger(__name__)


class NumberedRow(NamedTuple):
    """A row and its number in the dataset."""

    number: int
    row: Any


class NumberedRows(Dataset):
    """The rows of a dataset with their numbers, so that an error can name one."""

    def __init__(self, rows: Sequence):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> NumberedRow:
        return NumberedRow(number, self.rows[number])

    def __getitems__(self, numbers: list[int]) -> list[NumberedRow]:
        """Many at once, which some datasets read faster."""
        if hasattr(self.rows, "__getitems__"):
            return [NumberedRow(*pair) for pair in zip(numbers, self.rows.__getitems__(numbers), strict=True)]
        return [self[number] for number in numbers]

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


@dataclass
class RowReader:
    """Makes a checked batch of rows: what the data loaders of a trainer call.

    Args:
        collate (`Callable`): Makes a batch of rows.
        check (`Callable`): Gives the batch back as the model needs it, or raises [`BadRow`].
        source (`str`): Words for the data, such as `"training data"`.
        columns (`tuple[str, ...]`, *optional*): Other columns are dropped before `collate` sees them. `None`: none is.

    Raises:
        `ValueError`: names the row and the column.
    """

    collate: Callable[[list], Mapping]
    check: Callable[[Mapping], dict]
    source: str
    columns: tuple[str, ...] | None
    rows_read: int = 0  # of a stream, whose rows come without numbers

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        if isinstance(rows[0], NumberedRow):
            numbers, rows = zip(*rows, strict=True)
        else:
            numbers = range(self.rows_read, self.rows_read + len(rows))
            self.rows_read += len(rows)
        try:
            return self.check(self.collate([self._without_others(row) for row in rows]))
        except BadRow as bad:
            which = f"row {numbers[bad.place]}" if bad.place < len(numbers) else f"one of the rows {[*numbers]}"
            problem = f"{which} of the {self.source}: `{bad.column}` {bad.problem}"
        raise ValueError(problem)

    def _without_others(self, row: Any) -> Any:
        if self.columns is None or not isinstance(row, Mapping):
            return row
        return {name: value for name, value in row.items() if name in self.columns} or row


class CheckedRowsTrainer(AtomicCheckpointTrainer):
    """A `Trainer` whose rows, of whatever dataset, are checked before they reach the device."""

    columns: tuple[str, ...] = ()  # that are read of a row, or refused by name

    def batch_check(self) -> Callable[[Mapping], dict]:
        """What gives a collated batch back as the model needs it, or raises [`BadRow`]; workers get a copy of it."""
        raise NotImplementedError

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """As in `Trainer`, with rows that know their numbers; `dataloader_drop_last` is of training: an evaluation
        reads all rows."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return self._dataloader_of_numbered(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _dataloader_of_numbered(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        if isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)
        if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            kind = f"has the parts {[*dataset]}" if isinstance(dataset, Mapping) else f"is a {type(dataset).__name__}"
            raise ValueError(
                f"the {description.lower()} data {kind}: give one list of rows, a dataset, or an `IterableDataset`, "
                "which can be read more than once."
            )
        if len(dataset) == 0:
            raise ValueError(f"the {description.lower()} data has no rows: give some, or look at what filtered them.")
        # The sampler sees all columns, of which one may hold the lengths to group by.
        sampler = None if sampler_fn is None else lambda _, whole=dataset: sampler_fn(whole)
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description)
        return super()._get_dataloader(NumberedRows(dataset), description, batch_size, sampler, **kwargs)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        """What `Trainer` wraps around a collator to drop columns."""
        columns = self.columns if self.args.remove_unused_columns else None
        return RowReader(data_collator, self.batch_check(), f"{description.lower()} data", columns)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Of matrices and kernels alone: transformers goes by names, which norms such as `norm1` escape."""
        named = model.named_parameters(remove_duplicate=False)
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in named}  # ZeRO-3 may have split it
        return [name for name in super().get_decay_parameter_names(model) if len(shapes[name]) > 1]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, but for the end of a stream that fills no optimizer step: without a step of its own its
        gradient would go into the next one's, so it is left out."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(samples) == num_batches:
            return samples, num_items
        if self.state.global_step == 0:
            batch = f"`per_device_train_batch_size`={self.args.per_device_train_batch_size}"
            raise ValueError(
                f"the training data fills no optimizer step: it gives {len(samples)} of {num_batches} micro-batches "
                f"of {batch} (`gradient_accumulation_steps`={self.args.gradient_accumulation_steps}, "
                f"`dataloader_drop_last`={self.args.dataloader_drop_last}). Lower them, or give more rows."
            )
        if samples:
            logger.info(
                f"A pass over the stream ends with {len(samples)} of the {num_batches} micro-batches of a step, which "
                "are left out."
            )
        return [], None

    def start_evaluation(self, dataset: Any) -> None:
        """Count the rows of `dataset` from the first batch on, in [`rows_of_batch`]."""
        self._eval_batch, self._eval_rows = 0, len(dataset) if isinstance(dataset, Sized) else math.inf

    def rows_of_batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the evaluation data of the next batch of this process, (B,), of `size` B, and which of its rows
        are there for the first time, (B,) bool: accelerate fills the last batch with rows that were evaluated already.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first, places = self._eval_batch * ranks * self.args.eval_batch_size, torch.arange(size)
        self._eval_batch += 1
        if self._eval_rows < math.inf:
            rows = first + rank * self.args.eval_batch_size + places
            return rows, rows < self._eval_rows
        # Of a stream each process gets an equal part of what is left, and accelerate tells how much that is.
        places, left = rank * size + places, self.accelerator.gradient_state.remainder
        return first + places, places < (left if left > 0 else math.inf)

    def _get_eval_sampler(self, eval_dataset):
        """In order, also where training groups rows by length: noise and predictions belong to a row's place."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
