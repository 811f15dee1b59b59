# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset become a batch.

Shapes: B rows, L length of the longest.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..models.noise import IGNORE_INDEX


WHOLE = ("input_ids", "labels", "class_labels")


class BadRow(ValueError):
    """What is wrong with a row of a batch: its place there, its column, and the rest of the sentence."""

    def __init__(self, place: int, column: str, problem: str):
        super().__init__(f"row {place} of the batch: `{column}` {problem}")
        self.place, self.column, self.problem = place, column, problem


def stack_and_pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack `input_ids` (and any other column); rows of unequal length are padded on the right and masked out.

    Args:
        rows (`list[dict]`): Lists, arrays or tensors of numbers of any type by column. Columns that are `None`
            everywhere are left out.

    Raises:
        `ValueError`: if a row lacks a column that another has, holds what is no number, or a column of its positions
        is not as long as its `input_ids`.

    >>> batch = stack_and_pad([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.get("input_ids") is None:
            kind = f"a {type(row).__name__}" if not isinstance(row, Mapping) else f"one with {sorted(row)}"
            raise BadRow(
                place, "input_ids",
                f"is not there: a row is a dict that has it, but this is {kind}. Plain text becomes such rows by "
                "`fpmgm.data.pack`; text with prompts is given in a `datasets.Dataset`, a stream of it, or a list.",
            )  # fmt: skip
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    columns = {name: [_numbers(row.get(name), k, name) for k, row in enumerate(rows)] for name in names}
    for place, ids in enumerate(columns["input_ids"]):
        if ids.dim() != 1:
            raise BadRow(place, "input_ids", f"has {ids.dim()} dimensions: flatten it into one list of ids.")
    lengths = [len(ids) for ids in columns["input_ids"]]
    for name, values in columns.items():
        for place, value in enumerate(values):
            if value.dim() != values[0].dim() or (value.dim() and len(value) != lengths[place]):
                raise BadRow(place, name, f"is of shape {tuple(value.shape)} for {lengths[place]} `input_ids`.")
    if len(set(lengths)) > 1 and "attention_mask" not in columns:
        columns["attention_mask"] = [torch.ones(length, dtype=torch.long) for length in lengths]
    return {name: _together(values, IGNORE_INDEX if name == "labels" else 0) for name, values in columns.items()}


def _numbers(value: Any, place: int, column: str) -> torch.Tensor:
    """`value` as a tensor, whole numbers of any size as int64."""
    try:
        tensor = value if torch.is_tensor(value) else torch.from_numpy(_widened(np.asarray(value)))
    except (TypeError, ValueError):  # None, texts, lists of unequal lengths
        raise BadRow(place, column, f"is {str(value)[:60]!r}: give numbers, or drop the column.") from None
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        return tensor.long()
    if column in WHOLE:
        raise BadRow(place, column, f"holds {str(value)[:60]}: give whole numbers.")
    return tensor.float()


def _widened(array: np.ndarray) -> np.ndarray:
    """A copy that PyTorch can hold: it has no operations on unsigned types, and empty lists come as floats."""
    if array.dtype.kind in "iu" or array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "bf":
        raise TypeError
    return array.copy()


def _together(values: list[torch.Tensor], padding: int) -> torch.Tensor:
    if len({value.dtype for value in values}) > 1:
        values = [value.float() for value in values]
    return pad_sequence(values, batch_first=True, padding_value=padding) if values[0].dim() else torch.stack(values)
