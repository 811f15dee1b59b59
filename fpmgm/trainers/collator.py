# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset become a batch."""

import torch
from torch.nn.utils.rnn import pad_sequence


def stack_and_pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack `input_ids` (and any other field); rows of unequal length are padded on the right and masked out.

    >>> stack_and_pad([{"input_ids": [5, 6]}, {"input_ids": [7]}])["attention_mask"].tolist()
    [[1, 1], [1, 0]]
    """
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
    if len({len(ids) for ids in columns["input_ids"]}) > 1 and "attention_mask" not in columns:
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    return {name: pad_sequence(values, batch_first=True) if values[0].dim() else torch.stack(values)
            for name, values in columns.items()}  # fmt: skip
