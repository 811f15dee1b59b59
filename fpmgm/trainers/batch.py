# SPDX-License-Identifier: Apache-2.0
"""The place of a micro-batch in the global batch of an optimizer step, and its noise.

Shapes: B sequences of a micro-batch, L length, M micro-batches of a rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences that share one loss: all ranks' and micro-batches' of an optimizer step.

    `key` seeds their noise; `total` is their number n, `positions` that of their real tokens; `offsets[m]` is the
    place of the first sequence of this rank's micro-batch m.
    """

    key: tuple
    total: int
    positions: int
    offsets: list[int]


class MicroBatch(NamedTuple):
    """The noise of a micro-batch of B sequences, and its shares in the loss of the optimizer step.

    `places` (B,) in the global batch with seed `key`; times `t` (B,); `uniforms` (B, L), masked where small;
    `iterations` of the solver, the same for all of the step (SJFB), with how many are kept. The shares are those of
    this micro-batch's real positions and of one sequence, times the number of ranks, over which gradients are
    averaged.
    """

    key: tuple
    places: torch.Tensor
    t: torch.Tensor
    uniforms: torch.Tensor
    iterations: dict[str, int | None]
    share_of_positions: float
    share_of_a_sequence: float

    @property
    def share_of_sequences(self) -> float:
        """The share of all its sequences."""
        return len(self.places) * self.share_of_a_sequence


def place(samples: list[dict], key: tuple, accelerator: Accelerator) -> GlobalBatch:
    """Find this rank's micro-batches in the global batch, whose order is that of the data: micro-batch, rank."""
    sizes = torch.tensor([[len(inputs["input_ids"]), count_positions(inputs)] for inputs in samples])
    ranks = accelerator.num_processes
    if ranks > 1:
        sizes = accelerator.gather(sizes.to(accelerator.device)).cpu()
    sizes = sizes.view(ranks, -1, 2)  # (ranks, M, 2)
    sequences = sizes[:, :, 0].T.flatten()  # micro-batch, then rank
    firsts = sequences.cumsum(0) - sequences
    positions = int(sizes[:, :, 1].sum())
    return GlobalBatch(key, int(sequences.sum()), positions, firsts[accelerator.process_index :: ranks].tolist())


def count_positions(inputs: dict[str, torch.Tensor]) -> int:
    """Real positions of a batch."""
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
