# SPDX-License-Identifier: Apache-2.0
"""The place of a micro-batch in the global batch of an optimizer step, and its noise.

Shapes: B sequences of a micro-batch, L length, M micro-batches of a rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..models.noise import stream_generator


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


class Noise(NamedTuple):
    """The noise of a micro-batch of B sequences, and what its sums are divided by.

    `places` (B,) in the global batch with seed `key`; times `t` (B,); `uniforms` (B, L), masked where small;
    `iterations` of the solver, the same for all of the step (SJFB), with how many are kept. Sums over positions are
    divided by `num_items`, sums over sequences by `num_sequences`: those of the whole optimizer step, per rank, since
    gradients are averaged over ranks.
    """

    key: tuple
    places: torch.Tensor
    t: torch.Tensor
    uniforms: torch.Tensor
    iterations: dict[str, int | None]
    num_items: float
    num_sequences: float

    @property
    def share_of_sequences(self) -> float:
        """Of the optimizer step: times it, a mean over this micro-batch is a part of the mean over all."""
        return len(self.places) / self.num_sequences

    def streams(self, purpose: str) -> list[torch.Generator]:
        """A generator for each sequence, the same wherever it runs."""
        return [stream_generator(*self.key, j, purpose) for j in self.places.tolist()]


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
