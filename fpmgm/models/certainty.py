# SPDX-License-Identifier: Apache-2.0
"""How certain a model is of its masked positions, and which of them may be revealed together.

The certainty of a position is a property of the model's own distribution there: at temperature 1, over all tokens but
the mask, with guidance where there is. Temperature, top-k and top-p change the draw alone. They sharpen what the
model says without making it more certain: at temperature 0 every position would be beyond doubt, and all would be
revealed in one step.

Nor does a choice depend on what is drawn. Which positions a step reveals is a function of the visible tokens, so that
with an exact denoiser the order adds no error: what is left is that tokens of one step do not see each other.

Shapes: B batch, P masked positions of all rows, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .draw import CHUNK_ELEMENTS, TIE


# --- how certain ----------------------------------------------------------------------------------------------------


def negative_entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Σ p log p in nats, (P,): 0 where one token is sure."""
    return torch.special.entr(log_p.exp()).sum(dim=-1).neg()


def top_probability(log_p: torch.Tensor) -> torch.Tensor:
    """The largest probability, (P,)."""
    return log_p.amax(dim=-1).exp()


def margin(log_p: torch.Tensor) -> torch.Tensor:
    """The largest probability less the second largest, (P,)."""
    first, second = log_p.topk(2, dim=-1).values.exp().unbind(dim=-1)
    return first - second


def certainty(
    logits: torch.Tensor, mask_token_id: int, measure: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`measure` of the float64 log-probabilities of the tokens but the mask; (P, V) → (P,)."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return torch.cat([_measured(chunk, mask_token_id, measure) for chunk in logits.split(size)])


def _measured(logits, mask_token_id, measure) -> torch.Tensor:
    logits = logits.to(torch.float64, copy=True)
    logits[:, mask_token_id] = float("-inf")
    return measure(logits.log_softmax(dim=-1))


# --- which together -------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """Positions by row and falling certainty, all (P,): their indices into P, the rank of each in its row, from 0, its
    row, and how certain it is."""

    order: torch.Tensor
    rank: torch.Tensor
    rows: torch.Tensor
    certainties: torch.Tensor


def ranked(certainties: torch.Tensor, rows: torch.Tensor, tie: float = TIE) -> Ranking:
    """The ranking of P positions in `rows` (P,), which ascend.

    Neighbours in this order that differ by at most `tie` are equal, and of equals the first positions come first:
    positions that see the same are equally certain but for rounding, which depends on the batch.
    """
    order = certainties.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    row, falling = rows[order], certainties[order]
    begins = torch.ones_like(order)  # a group of equals
    begins[1:] = (row[1:] != row[:-1]) | (falling[:-1] - falling[1:] > tie)
    order = torch.empty_like(order).index_copy(0, order, begins.cumsum(0)).argsort(stable=True)
    sizes = torch.bincount(rows)
    rank = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows[order]]
    return Ranking(order, rank, rows[order], certainties[order])


def most_confident(
    probabilities: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, tie: float = TIE
) -> torch.Tensor:
    """Ascending indices into P of the `counts[b]` most probable draws of each row b; logarithms within `tie` are
    equal."""
    ranking = ranked(probabilities.log(), rows, tie)
    return ranking.order[ranking.rank < counts.to(rows.device)[ranking.rows]].sort().values


def most_certain(ranking: Ranking, steps_left: torch.Tensor) -> torch.Tensor:
    """Ascending indices into P of each row's most certain positions, as many as are due where its positions are
    revealed evenly in `steps_left` (P,) steps; in the last one all."""
    order, rank, rows, _ = ranking
    return order[rank * steps_left[order] < torch.bincount(rows)[rows]].sort().values


def certain_enough(ranking: Ranking, least: float, tie: float = TIE) -> torch.Tensor:
    """Ascending indices into P of the positions that are at least so certain, and of each row's most certain one."""
    return ranking.order[(ranking.rank == 0) | (ranking.certainties >= least - tie)].sort().values


def within_entropy(ranking: Ranking, bound: float, tie: float = TIE) -> torch.Tensor:
    """Ascending indices into P of the largest sets of each row's most certain positions with Σ H − max H ≤ `bound`.

    What independent draws of a set miss is the total correlation of its tokens, which is at most Σ H − max H, since
    their joint entropy is at least that of each (EB-Sampler, arXiv 2505.24857). A single position misses nothing.

    Args:
        ranking ([`Ranking`]): By negative entropies.
        bound (`float`): In nats.
    """
    order, rank, rows, certainties = ranking
    table = certainties.new_zeros(int(rows.max()) + 1, int(rank.max()) + 1)  # a row does not depend on the others
    table[rows, rank] = -certainties
    before = F.pad(table, (1, 0)).cumsum(dim=1)[rows, rank]  # the last of a set has the largest entropy
    return order[before <= bound + tie].sort().values
