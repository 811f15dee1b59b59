# SPDX-License-Identifier: Apache-2.0
"""Some positions of a batch: where logits are wanted, so that the last block and the head run there only, or which
positions are computed at all.

Shapes: B batch, L length, D hidden size, P positions, N positions that there are to select from, A some sequences,
Q the most positions of one sequence.
"""

from typing import NamedTuple

import torch

from .transfer import to_device


class Selection(NamedTuple):
    """P positions of a batch.

    `rows` and `columns` (P,) say where in the batch they are, `places` (P,) where among the N that `pick` is given
    (`None`: they are all of these, in order). For attention each sequence's are laid out in a row of `shape` (B, Q),
    at the indices `slots` (P,) into B·Q (`None`: all rows are full, in order).
    """

    rows: torch.Tensor
    columns: torch.Tensor
    places: torch.Tensor | None
    slots: torch.Tensor | None
    shape: tuple[int, int]

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """(P, …) of `x` (N, …)."""
        return x if self.places is None else x[self.places]

    def vector(self, x: torch.Tensor) -> torch.Tensor:
        """Each position's of one vector for a sequence, (B, 1, D), or of one for each of N, (N, D): (P, D). One for
        all, of either shape, stays one, (1, D)."""
        if len(x) == 1:
            return x.flatten(0, -2)
        return x[self.rows, 0] if x.dim() == 3 else self.pick(x)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Q, …) of `x` (P, …), 0 where a sequence has fewer than Q positions."""
        if self.slots is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy_(0, self.slots, x)
        return x.unflatten(0, self.shape)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(P, …) of `x` (B, Q, …): undoes `pad`."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x[self.slots]

    def filled(self) -> torch.Tensor | None:
        """(B, Q) bool: the slots that hold a position. `None`: all."""
        return None if self.slots is None else self.pad(torch.ones_like(self.rows, dtype=torch.bool))

    def of_rows(self, rows: torch.Tensor) -> tuple["Selection", torch.Tensor]:
        """The positions of the sequences `rows` (A,), ascending, and their indices into P; waits for the device."""
        place = torch.full((self.shape[0],), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        index = (place[self.rows] >= 0).nonzero().squeeze(1)
        width = self.shape[1]
        slots = index if self.slots is None else self.slots[index]
        slots = place[self.rows[index]] * width + slots % width
        places = index if self.places is None else self.places[index]
        return Selection(place[self.rows[index]], self.columns[index], places, slots, (len(rows), width)), index


def select(
    positions: torch.Tensor,
    batch_size: int,
    length: int,
    device: torch.device,
    width: int | None = None,
    among: torch.Tensor | None = None,
) -> Selection:
    """The selection of `positions`, indices (P,) into B·L in any order. With them on the CPU, no device waits.

    Args:
        positions (`torch.LongTensor`): (P,).
        batch_size, length (`int`): B and L.
        device (`torch.device`): Of the states.
        width (`int`, *optional*): Positions of a sequence that states have, registers among them. `None`: L.
        among (`torch.LongTensor`, *optional*): (N,) ascending indices into B·`width` of the positions that there are
            states of, on the CPU. `None`: all.

    Raises:
        `ValueError`: for a position that is not `among` them.
    """
    positions, width = positions.cpu(), length if width is None else width
    rows, columns = positions // length, positions % length
    places = rows * width + columns
    if among is not None:
        if not torch.isin(places, among).all():
            raise ValueError("`logits_positions` must be among `active_positions`: the others are not computed.")
        places = torch.searchsorted(among, places)
    counts = torch.bincount(rows, minlength=batch_size)
    by_row = rows.argsort(stable=True)
    slots = torch.empty_like(rows)  # place within its row
    slots[by_row] = torch.arange(len(rows), device="cpu") - (counts.cumsum(0) - counts)[rows[by_row]]
    most = max(1, int(counts.max()))
    slots = rows * most + slots
    full = len(slots) == batch_size * most and torch.equal(slots, torch.arange(len(slots), device="cpu"))
    rows, columns, places = (to_device(x, device) for x in (rows, columns, places))
    return Selection(rows, columns, places, None if full else to_device(slots, device), (batch_size, most))
