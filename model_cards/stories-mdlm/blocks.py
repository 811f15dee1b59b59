# SPDX-License-Identifier: Apache-2.0
"""Text block by block: at which steps a position may be revealed.

A sequence's masked positions are cut into blocks, in their order, and its steps are shared over the blocks by their
sizes. A block begins when the one before it is written. Later blocks stay masked in the input, as in LLaDA, and are
not left out of it, as in BD3-LM: a bidirectional denoiser was trained on texts of full length, where masks also say
how much there is to come.

Shapes: B batch, L length.
"""

from typing import NamedTuple

import torch


class Windows(NamedTuple):
    """Steps of the positions: `counts` (B, L) of them from `first` (B, L) on; without blocks all of them."""

    first: torch.Tensor
    counts: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """(B, L): the step after which the position is written."""
        return self.first + self.counts - 1


def whole_window(wanted: torch.Tensor, num_steps: int) -> Windows:
    """Every step for every position of `wanted` (B, L)."""
    first = torch.zeros_like(wanted, dtype=torch.long)
    return Windows(first, torch.full_like(first, num_steps))


def block_windows(wanted: torch.Tensor, num_steps: int, block_length: int) -> Windows:
    """The steps of each block of `block_length` positions of `wanted` (B, L) bool.

    Raises:
        `ValueError`: if there are fewer steps than blocks.

    Example:

    ```python
    >>> import torch
    >>> wanted = torch.tensor([[False, True, True, True, True, True]])
    >>> block_windows(wanted, num_steps=5, block_length=2).first[:, 1:].tolist()  # two steps, two steps and one
    [[0, 0, 2, 2, 4]]

    ```
    """
    sizes = wanted.sum(dim=1, keepdim=True)  # (B, 1)
    most = -(-int(sizes.max()) // block_length)
    if num_steps < most:
        raise ValueError(
            f"`block_length`={block_length} makes {most} blocks of a row's {int(sizes.max())} masked positions, but "
            f"there are {num_steps} steps, and each block needs one: give longer blocks, more `num_steps` or a larger "
            "`budget`."
        )
    place = (wanted.cumsum(dim=1) - 1).clamp(min=0)  # (B, L) among the masked ones
    starts = place - place % block_length
    first, after = (place * num_steps // sizes for place in (starts, torch.minimum(starts + block_length, sizes)))
    return Windows(first, after - first)


def block_starts(wanted: torch.Tensor, block_length: int, num_steps: int) -> list[int]:
    """The steps at which a block begins in the row of `wanted` (B, L) with the most positions."""
    longest = wanted[wanted.sum(dim=1).argmax()][None]
    return block_windows(longest, num_steps, block_length).first[longest].unique().tolist()
