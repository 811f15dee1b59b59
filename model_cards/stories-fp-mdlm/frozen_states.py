# SPDX-License-Identifier: Apache-2.0
"""What is left of positions that are not computed again: their keys and values in every block, and their solution.

A call of a model that is given [`FrozenStates`] writes into them what it computes, and reads there what it does not:
keys and values of every position, in each block, are those of the last time they were computed; in the shared block
those of the last iteration. An empty one is filled by a call that computes all positions.

Shapes: B batch, L positions of a sequence (registers among them), D hidden size, H heads, K head size, P positions
that are computed, A some sequences.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .selection import Selection


class KeyValues:
    """Keys and values of one block, `stored` (2, B, L, H, K); made when all positions are first computed."""

    def __init__(self):
        self.stored: torch.Tensor | None = None

    def of(self, computed: Selection | None = None, rows: torch.Tensor | None = None) -> "KeyValuesPart":
        """For a call of the block with the positions `computed` (`None`: all) of the sequences `rows` (A,) (`None`:
        all)."""
        return KeyValuesPart(self, None if computed is None else computed.places, rows)


class KeyValuesPart(NamedTuple):
    """`store` for a call of its block: at `places` (P,), indices into B·L (`None`: all of L), for `rows` (A,) (`None`:
    all of B)."""

    store: KeyValues
    places: torch.Tensor | None
    rows: torch.Tensor | None

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep `key` and `value`, (B or A, L, H, K) or, of P positions, (1, P, H, K): those of all positions of these
        sequences, (B or A, L, H, K)."""
        if self.store.stored is None:  # the first call has all of it
            self.store.stored = key.new_empty(2, *key.shape)
        stored = self.store.stored
        for kept, new in zip(stored, (key, value), strict=True):
            if self.places is not None:
                kept.flatten(0, 1).index_copy_(0, self.places, new.flatten(0, 1))
            elif self.rows is not None:
                kept.index_copy_(0, self.rows, new)
            else:
                kept.copy_(new)
        if self.places is None:
            return key, value
        return tuple(stored if self.rows is None else stored[:, self.rows])


@dataclass
class FrozenStates:
    """Keys and values of `blocks`, in the order P, F, H, and the `solution` (B, L, D) of all positions (`None` before
    the first call, and without fixed-point layers).

    Example:

    ```python
    >>> import torch
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
    >>> from fpmgm.models.frozen_states import FrozenStates
    >>> config = FPMDLMConfig(vocab_size=11, mask_token_id=10, hidden_size=8, num_attention_heads=2,
    ...                       intermediate_size=16, conditioning_size=4, max_position_embeddings=6)
    >>> model, ids = FPMDLMForMaskedDiffusion(config).eval(), torch.tensor([[1, 2, 3, 4, 10, 10]])
    >>> with torch.no_grad():
    ...     frozen = FrozenStates.empty(config)
    ...     output = model(ids, frozen_states=frozen)  # all positions
    ...     ids[0, 4] = 7
    ...     active, wanted = torch.tensor([4, 5]), torch.tensor([5])
    ...     output = model(ids, frozen_states=frozen, active_positions=active, logits_positions=wanted)
    >>> output.logits.shape, output.fixed_point_state.shape
    (torch.Size([1, 11]), torch.Size([1, 6, 8]))

    ```
    """

    blocks: list[KeyValues] = field(default_factory=list)
    solution: torch.Tensor | None = None

    @classmethod
    def empty(cls, config) -> "FrozenStates":
        """For a model of this configuration, before its first call."""
        return cls([KeyValues() for _ in range(config.num_hidden_layers)])

    @property
    def filled(self) -> bool:
        """Whether a call has computed all positions."""
        return all(block.stored is not None for block in self.blocks)

    def solved(self, state: torch.Tensor, active: Selection | None) -> torch.Tensor:
        """The solution (B, L, D) after a call that found `state`, (B, L, D) or, at the `active` positions, (P, D)."""
        if active is not None:
            flat = self.solution.flatten(0, 1).index_copy(0, active.places, state)
            state = flat.view_as(self.solution)
        self.solution = state
        return state

    def repeat(self, rows: torch.Tensor) -> None:
        """Let sequence i be what `rows[i]` was, for `rows` (B,)."""
        for block in self.blocks:
            block.stored = block.stored[:, rows]
        if self.solution is not None:
            self.solution = self.solution[rows]


def stores(frozen: FrozenStates | None, config) -> tuple[list[KeyValues | None], ...]:
    """Of each block of P, of F and of H what it writes: `None` where nothing is kept."""
    blocks = [None] * config.num_hidden_layers if frozen is None else frozen.blocks
    pre, shared = config.num_pre_layers, config.num_pre_layers + config.num_fixed_point_layers
    return blocks[:pre], blocks[pre:shared], blocks[shared:]


def check_frozen(options: dict, learning: bool) -> None:
    """Raise a `ValueError` for options about frozen positions that a call cannot honour."""
    frozen, active = options.get("frozen_states"), options.get("active_positions")
    if frozen is not None and learning:
        raise ValueError("`frozen_states` are for sampling: call under `torch.no_grad()` and out of training mode.")
    if active is None:
        return
    if frozen is None or not frozen.filled:
        raise ValueError(
            "`active_positions` leaves the others as `frozen_states` have them: give those of a call that computed "
            "all positions."
        )
    if "logits_positions" not in options:
        raise ValueError("`active_positions` has logits at some of them alone: give `logits_positions` too.")
