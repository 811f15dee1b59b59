# SPDX-License-Identifier: Apache-2.0
"""The place of a micro-batch in the global batch of an optimizer step, and its noise.

Shapes: B sequences of a micro-batch, L length, M micro-batches of a rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..models.noise import IGNORE_INDEX, stream_generator


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences that share one loss: all ranks' and micro-batches' of an optimizer step.

    `key` seeds their noise; `total` is their number n, `tokens` that of their real tokens, `positions` that of those
    which may be masked; `offsets[m]` is the place of the first sequence of this rank's micro-batch m.
    """

    key: tuple
    total: int
    tokens: int
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
    sizes = torch.tensor([[len(x["input_ids"]), int(real(x).sum()), int(maskable(x).sum())] for x in samples])
    ranks = accelerator.num_processes
    if ranks > 1:
        sizes = accelerator.gather(sizes.to(accelerator.device)).cpu()
    sizes = sizes.view(ranks, -1, 3)  # (ranks, M, 3)
    sequences = sizes[:, :, 0].T.flatten()  # micro-batch, then rank
    firsts = sequences.cumsum(0) - sequences
    total, tokens, positions = sizes.sum(dim=(0, 1)).tolist()
    return GlobalBatch(key, total, tokens, positions, firsts[accelerator.process_index :: ranks].tolist())


def real(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, L) bool on the CPU: all but padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool().cpu()
    return torch.ones(batch["input_ids"].shape, dtype=torch.bool)


def maskable(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, L) bool on the CPU: all but padding and positions whose label is -100. These alone are masked, scored and
    counted."""
    return real(batch) & (batch["labels"] != IGNORE_INDEX).cpu() if "labels" in batch else real(batch)
