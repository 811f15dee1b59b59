# SPDX-License-Identifier: Apache-2.0
"""The loss that evaluation reports: an average over draws of times and masks, with its standard error.

Of a row x with draw (t, m) the loss is X = w(t) Σ_i m_i ℓ_i, ℓ_i = −log p(x_i | what m leaves visible); its mean over
draws is, of text, −ELBO(x), what `fpmgm.evaluation.elbo_perplexity` estimates too. Times are spread evenly over
rows and draws, so that the noise is that of the masks: the m_i are independent, with probability p(t). For given ℓ_i

    Var(X) = w² p (1 − p) Σ_i ℓ_i²,  estimated without bias by  w² (1 − p) Σ_i m_i ℓ_i².

Shapes: B rows, L length, P masked positions.
"""

import math
from collections.abc import Callable

import torch

from ..models.head import losses_of_positions
from ..models.noise import sequential_times, stream_generator
from ..models.transfer import to_device
from .corruption import NoisedBatch


TARGET_ERROR = 0.02  # of the perplexity, relative to it
MOST_DRAWS = 64
FEWEST_TIMES = 64  # rows times draws: of fewer times neither the loss nor its error tells much
BETWEEN_DRAWS = 2**0.5 - 1  # the step of the times from draw to draw, with which that from row to row has no pattern


def times_of_rows(
    key: tuple, draw: int, rows: torch.Tensor, time: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Times (B,) of the rows with places `rows` (B,) in draw `draw` of an evaluation named by `key`, spread evenly
    over rows and draws however many there are.

    The unit interval is folded in two, so that its ends meet: a mean over evenly spread points is the more exact the
    smoother the function is around the circle.
    """
    shift = torch.rand((), generator=stream_generator(*key, "shift")).item() + draw * BETWEEN_DRAWS
    return sequential_times(shift, rows, lambda uniforms: time(1 - (2 * uniforms - 1).abs()))


@torch.no_grad()
def estimate_rows(model: Callable, state: NoisedBatch, probabilities: torch.Tensor) -> torch.Tensor:
    """(B, 2) of one draw: X of each row in nats, and the estimate of Var(X); float64.

    Args:
        model (`Callable`): The model, in evaluation.
        state ([`NoisedBatch`]): The rows, hidden in part.
        probabilities (`torch.Tensor`): (B,) p(t).
    """
    positions, device = state.positions, state.labels.device
    rows = to_device(positions // state.labels.shape[1], device)  # (P,)
    targets = state.labels.flatten()[to_device(positions, device)]  # (P,)
    losses = losses_of_positions(model, targets, **state.seen())
    terms = torch.stack([losses, losses.square()], dim=1)  # (P, 2)
    sums = terms.new_zeros(len(state.labels), 2).index_add_(0, rows, terms)
    weights, visible = state.weights.double(), to_device(1 - probabilities.double(), device)
    return sums * torch.stack([weights, weights.square() * visible], dim=1)


def draws_needed(total: float, variance: float, positions: float, rows: float) -> int:
    """Draws that bring the standard error of the perplexity below `TARGET_ERROR`, at most `MOST_DRAWS`, and at least
    `FEWEST_TIMES` times.

    Args:
        total, variance (`float`): Σ X and Σ Var(X) over the rows of one draw.
        positions (`float`): Their scored positions.
        rows (`float`): Their number.

    >>> draws_needed(400.0, 36.0, 100, 10)  # nats per position 4 ± 0.06
    9
    """
    if not math.isfinite(total):
        return 1
    error = math.sqrt(variance) / positions  # of nats per position, and of the perplexity relative to it
    return min(MOST_DRAWS, max(math.ceil(FEWEST_TIMES / rows), math.ceil((error / TARGET_ERROR) ** 2)))


def summary(total: float, variance: float, positions: float, draws: int) -> dict[str, float]:
    """`loss` in nats per position, `perplexity` with its standard error, and the number of draws.

    Args:
        total, variance, positions (`float`): Σ X, Σ Var(X) and scored positions over the rows of all draws.
        draws (`int`): Their number.
    """
    loss = total / positions
    perplexity = math.exp(min(loss, 700))
    error = perplexity * math.sqrt(variance) / positions
    return {"loss": loss, "perplexity": perplexity, "perplexity_stderr": error, "num_draws": draws}
