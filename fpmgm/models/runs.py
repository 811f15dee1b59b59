# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch the denoiser runs: not those that are finished, and of equal ones one.

Shapes: B batch, R rows (B, or 2B with guidance), K rows that run, L length, P positions.
"""

from typing import NamedTuple

import torch


class Runs(NamedTuple):
    """`ran` (K,) of R rows; `stands` (R,): whose result, among them, each row takes; `idle` (R,): it needs none."""

    ran: torch.Tensor
    stands: torch.Tensor
    idle: torch.Tensor

    def positions(self, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`positions` (P,), indices into R·L, as different indices into K·L, and which of these each one is, (P,)."""
        return (self.stands[positions // length] * length + positions % length).unique(return_inverse=True)


def rows_to_run(
    unfinished: torch.Tensor,
    copies: int,
    batch_size: int,
    classes: torch.Tensor | None = None,
    alike: bool = False,
) -> Runs | None:
    """The rows to run. `None`: all of them.

    Args:
        unfinished (`torch.Tensor`): (B,) bool on the CPU.
        copies (`int`): Rows of each sequence, R / B: 2 with guidance, first all with their class, then all without.
        batch_size (`int`): B.
        classes (`torch.Tensor`, *optional*): (R,). `None`: no classes.
        alike (`bool`, defaults to `False`): Whether rows of one class are equal.

    Example:

    ```python
    >>> import torch
    >>> rows_to_run(torch.tensor([True, False, True]), copies=2, batch_size=3).ran.tolist()
    [0, 2, 3, 5]
    >>> rows_to_run(torch.ones(4, dtype=torch.bool), copies=1, batch_size=4, alike=True).stands.tolist()
    [0, 0, 0, 0]

    ```
    """
    num_rows = copies * batch_size
    if alike:
        of_class = torch.zeros(num_rows, dtype=torch.long, device="cpu") if classes is None else classes
        _, stands = of_class.unique(return_inverse=True)  # (R,)
        ran = torch.full((int(stands.max()) + 1,), num_rows, device="cpu")
        ran = ran.scatter_reduce(0, stands, torch.arange(num_rows, device="cpu"), "amin")
        return Runs(ran, stands, torch.zeros(num_rows, dtype=torch.bool, device="cpu"))
    if unfinished.all():
        return None
    run = unfinished.repeat(copies)  # (R,)
    return Runs(run.nonzero().squeeze(1), (run.cumsum(0) - 1).clamp(min=0), ~run)
