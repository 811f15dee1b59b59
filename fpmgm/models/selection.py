# SPDX-License-Identifier: Apache-2.0
"""Some positions of a batch: where logits are wanted, so that the last block and the head run there only.

Shapes: B batch, L length, D hidden size, P positions, Q the most positions of one sequence.
"""

from typing import NamedTuple

import torch

from .transfer import to_device


class Selection(NamedTuple):
    """P positions of a batch: `rows` and `columns` (P,); padded per row, `queries` (B, Q) columns and `slots` (P,)
    indices into B·Q of those that count."""

    rows: torch.Tensor
    columns: torch.Tensor
    queries: torch.Tensor
    slots: torch.Tensor

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """(P, D) of `x` (B, L, D); of one vector for a sequence or for all, (B or 1, 1, D), each position's."""
        if x.shape[1] > 1:
            return x[self.rows, self.columns]
        return x[self.rows, 0] if x.shape[0] > 1 else x[0]


def select(positions: torch.Tensor, batch_size: int, length: int, device: torch.device) -> Selection:
    """The selection of `positions`, indices (P,) into B·L in any order. With them on the CPU, no device waits."""
    positions = positions.cpu()
    rows, columns = positions // length, positions % length
    counts = torch.bincount(rows, minlength=batch_size)
    by_row = rows.argsort(stable=True)
    slots = torch.empty_like(rows)  # place within its row
    slots[by_row] = torch.arange(len(rows), device="cpu") - (counts.cumsum(0) - counts)[rows[by_row]]
    queries = torch.zeros(batch_size, max(1, int(counts.max())), dtype=torch.long, device="cpu")
    queries[rows, slots] = columns
    slots = rows * queries.shape[1] + slots
    return Selection(*(to_device(x, device) for x in (rows, columns, queries, slots)))
