# SPDX-License-Identifier: Apache-2.0
"""Masked copies of many requests go through the model together, with logits at the masked positions only.

Shapes: R masked copies (rows) in a batch, L longest of them, n tokens of a request, P masked positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from ...models.draw import COARSE_TIE


POSITIONS_AT_ONCE = 256  # of the float64 softmax: bounds its memory at about V · 6 KiB


class Block(NamedTuple):
    """Masked copies of one request.

    `request` is its number, `input_ids` (n,) its tokens, `masked` (R, n) bool, `weights` (R,) float64, `times` (R,).
    """

    request: int
    input_ids: torch.Tensor
    masked: torch.Tensor
    weights: torch.Tensor
    times: torch.Tensor

    def part(self, rows: slice) -> "Block":
        """Some of the copies."""
        return self._replace(masked=self.masked[rows], weights=self.weights[rows], times=self.times[rows])


class Batch(NamedTuple):
    """Rows on the CPU: `input_ids` and `masked` (bool), `attention_mask` or `None`, each (R, L); `times` (R,)."""

    input_ids: torch.Tensor
    masked: torch.Tensor
    attention_mask: torch.Tensor | None
    times: torch.Tensor

    def rows(self, rows: torch.Tensor) -> "Batch":
        """Some of the rows."""
        return Batch(*(None if values is None else values[rows] for values in self))


class Denoiser(NamedTuple):
    """What is asked for logits: a model, and the iterations of its solver (`None`: the model's own)."""

    model: Callable
    iterations: int | None

    @property
    def mask_token_id(self) -> int:
        """The model's, whatever it is now."""
        return self.model.config.mask_token_id

    def logits(self, batch: Batch) -> torch.Tensor:
        """(P, V) at the masked positions, row by row; −∞ at the mask id."""
        device = self.model.device
        output = self.model(
            batch.input_ids.masked_fill(batch.masked, self.mask_token_id).to(device),
            timesteps=batch.times.to(device),
            attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(device),
            num_iterations=self.iterations,
            logits_positions=batch.masked.flatten().nonzero().squeeze(1),
        )
        output.logits[:, self.mask_token_id] = float("-inf")
        return output.logits


def fill(blocks: Iterable[Block], batch_size: int) -> Iterator[list[Block]]:
    """Groups of blocks, cut where needed, of `batch_size` rows each; the last may have fewer."""
    group, room = [], batch_size
    for block in blocks:
        first = 0
        while first < len(block.masked):
            part = block.part(slice(first, first + room))
            group.append(part)
            first, room = first + len(part.masked), room - len(part.masked)
            if room == 0:
                yield group
                group, room = [], batch_size
    if group:
        yield group


def collate(blocks: list[Block]) -> Batch:
    """One batch, padded on the right; without an attention mask where all requests are equally long."""
    lengths = torch.cat([torch.full((len(block.masked),), len(block.input_ids)) for block in blocks])  # (R,)
    longest = int(lengths.max())
    input_ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    masked = torch.zeros(len(lengths), longest, dtype=torch.bool)
    first = 0
    for block in blocks:
        rows, length = slice(first, first + len(block.masked)), len(block.input_ids)
        input_ids[rows, :length], masked[rows, :length] = block.input_ids, block.masked
        first = rows.stop
    real = None
    if int(lengths.min()) < longest:
        real = (torch.arange(longest) < lengths[:, None]).long()
    times = torch.cat([block.times for block in blocks])
    return Batch(input_ids, masked, real, times)


@torch.no_grad()
def weighted_sums(denoiser: Denoiser, blocks: Iterable[Block], batch_size: int, count: int) -> list[float]:
    """For each of `count` requests, Σ over its copies of weight · Σ over masked positions of −log p(token)."""
    totals = [0.0] * count
    for group in fill(blocks, batch_size):
        batch = collate(group)
        losses = negative_log_probabilities(denoiser.logits(batch), batch.input_ids[batch.masked])  # (P,)
        rows = batch.masked.nonzero()[:, 0]
        sums = losses.new_zeros(len(batch.masked)).index_add_(0, rows, losses)  # (R,)
        parts = sums.split([len(block.masked) for block in group])
        for block, part in zip(group, parts, strict=True):
            totals[block.request] += float(part @ block.weights)
    return totals


def negative_log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log softmax(`logits`) (P, V) at `labels` (P,), in float64, on the CPU."""
    losses = []
    for some, tokens in zip(logits.split(POSITIONS_AT_ONCE), labels.split(POSITIONS_AT_ONCE), strict=True):
        some = some.double()
        losses.append(some.logsumexp(dim=-1) - some.gather(1, tokens[:, None].to(some.device)).squeeze(1))
    return torch.cat(losses).cpu()


@torch.no_grad()
def greedy_matches(denoiser: Denoiser, batch: Batch, at_once: bool) -> torch.Tensor:
    """(R,) bool: whether decoding the masked positions greedily gives `input_ids` back.

    Either every masked position takes its most likely token in one forward pass, or the most confident position of a
    row takes it and the rest waits for the next pass. A row ends at its first wrong token: what has been written up to
    there is `input_ids` itself.

    Args:
        denoiser ([`Denoiser`]): The model.
        batch ([`Batch`]): A row for each request, its target masked.
        at_once (`bool`): One forward pass, or one token at a time.
    """
    targets = batch.masked.sum(dim=1)
    masked, matches = batch.masked.clone(), torch.ones_like(targets, dtype=torch.bool)
    while masked.any():
        rows = masked.any(dim=1)
        wanted = masked[rows]
        part = batch.rows(rows)._replace(masked=wanted, times=(masked.sum(dim=1) / targets)[rows])
        logits = denoiser.logits(part)
        likely = logits.argmax(dim=-1).cpu()  # (P,)
        right = torch.zeros_like(wanted).masked_scatter(wanted, likely == part.input_ids[wanted])
        chosen = wanted if at_once else most_confident(logits, likely, wanted)
        good = (right | ~chosen).all(dim=1)
        matches[rows] = good
        masked[rows] = wanted & ~chosen & good[:, None]
    return matches


def most_confident(logits: torch.Tensor, likely: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """(R, L) bool: in each row, the masked position whose most likely token has the highest probability; the first of
    those that rounding alone tells apart."""
    confidence = -negative_log_probabilities(logits, likely)  # (P,)
    table = confidence.new_full(masked.shape, float("-inf")).masked_scatter(masked, confidence)
    near = table >= table.amax(dim=1, keepdim=True) - COARSE_TIE
    return near & (near.cumsum(dim=1) == 1)
