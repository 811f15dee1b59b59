# SPDX-License-Identifier: Apache-2.0
"""How a masked model scores a continuation: three published Monte-Carlo rules, each under its name (Appendix D.2.2).

All of them mask a part of the sequence M times, ask the model for the masked tokens, and average
−weight · log p(token) over the draws. They differ in what may be masked, in the weights and in the normalisation, so
their scores must not be compared with each other.

Shapes: M draws, L positions that may be masked, R distinct masks, n tokens of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...models.noise import antithetic_times, loss_weight, masked_probability


class Draws(NamedTuple):
    """`masked` (M, L) bool, `weights` (M,) float64 of a draw's masked positions, `times` (M,) diffusion times."""

    masked: torch.Tensor
    weights: torch.Tensor
    times: torch.Tensor


@dataclass(frozen=True)
class Protocol:
    """A scoring rule.

    Args:
        description (`str`): The rule in one line; it goes into lm-eval's results.
        mc_num (`int`): Monte-Carlo draws of the original.
        draws (`Callable`): (L, M, generator) → [`Draws`].
        joint (`bool`): Whether the prefix is masked and scored too, between BOS and EOS, prefix and target are
            tokenized apart, and the score is the mean over all tokens. Otherwise only the target is, without special
            tokens, and the score is its sum.
        greedy_at_once (`bool`): Whether `is_greedy` asks for the whole target in one forward pass, or one token at a
            time, the most confident first.
    """

    description: str
    mc_num: int
    draws: Callable[[int, int, torch.Generator], Draws]
    joint: bool
    greedy_at_once: bool


def spread(draws: int, generator: torch.Generator) -> torch.Tensor:
    """(M,) float64 points (u + m/M) mod 1 with one uniform u: one in each M-th of the interval."""
    shift = torch.rand((), generator=generator, dtype=torch.float64)
    return (shift + torch.arange(draws, dtype=torch.float64) / draws) % 1


def antithetic_draws(length: int, draws: int, generator: torch.Generator) -> Draws:
    """Each position masked with probability (1 − ε)t, weight 1/t, t antithetic in [1e-3, 1]: the training loss."""
    shift = torch.rand((), generator=generator).item()
    times = antithetic_times(shift, torch.arange(draws), draws)
    masked = torch.rand(draws, length, generator=generator) < masked_probability(times)[:, None]
    return Draws(masked, loss_weight(times.double()), times)


def exact_count_draws(length: int, draws: int, generator: torch.Generator) -> Draws:
    """Exactly k of the L positions masked, k spread evenly over 1 … L, weight L/k."""
    counts = 1 + (length * spread(draws, generator)).long().clamp(max=length - 1)
    ranks = torch.rand(draws, length, generator=generator).argsort(dim=1).argsort(dim=1)
    return Draws(ranks < counts[:, None], length / counts.double(), counts / length)


def bernoulli_draws(length: int, draws: int, generator: torch.Generator) -> Draws:
    """Each position masked with probability t, weight 1/t, t spread evenly over [0, 1)."""
    times = spread(draws, generator)
    masked = torch.rand(draws, length, generator=generator) < times[:, None]
    return Draws(masked, 1 / times, times.float())


PROTOCOLS = {
    "pgm": Protocol(
        "Deschenaux & Gulcehre: bound of BOS + prefix + target + EOS, every token maskable, antithetic t, weight 1/t, "
        "mean over all tokens; greedy: the target in one forward pass",
        mc_num=1024,
        draws=antithetic_draws,
        joint=True,
        greedy_at_once=True,
    ),
    "llada": Protocol(
        "Nie et al., LLaDA: bound of the target given the prefix, k of L target tokens masked, weight L/k, sum; "
        "greedy: one token at a time by confidence",
        mc_num=128,
        draws=exact_count_draws,
        joint=False,
        greedy_at_once=False,
    ),
    "smdm": Protocol(
        "Nie et al., SMDM: bound of the target given the prefix, each target token masked with probability t, weight "
        "1/t, sum; greedy: one token at a time by confidence",
        mc_num=1024,
        draws=bernoulli_draws,
        joint=False,
        greedy_at_once=False,
    ),
}


def thinned(draws: Draws, time_conditioning: bool = False) -> Draws:
    """The same estimate in fewer rows: draws that mask nothing are left out, equal masks share one row.

    Their weights add up. A model that is told the time answers equal masks differently, so it keeps them apart.

    >>> masked = torch.tensor([[True, False], [False, False], [True, False]])
    >>> thinned(Draws(masked, torch.tensor([2.0, 9.0, 3.0]), torch.ones(3))).weights
    tensor([5.])
    """
    busy = draws.masked.any(dim=1)
    draws = Draws(*(values[busy] for values in draws))
    if time_conditioning or len(draws.masked) == 0:
        return draws
    masked, inverse = draws.masked.unique(dim=0, return_inverse=True)  # (R, L), (M,)
    weights = draws.weights.new_zeros(len(masked)).index_add_(0, inverse, draws.weights)
    return Draws(masked, weights, torch.ones(len(masked)))  # no one reads the times


class Request(NamedTuple):
    """`input_ids` (n tokens) of which `start` … `stop` − 1 are the target."""

    input_ids: tuple[int, ...]
    start: int
    stop: int


def assemble(
    prefix: list[int], target: list[int], protocol: Protocol, max_length: int, bos: int | None, eos: int | None
) -> Request:
    """The sequence that the model sees; what does not fit into `max_length` is cut off on the left.

    An empty target says that the text ends: it is EOS. A sum over no token would beat every other target.

    Raises:
        `ValueError`: for an empty target where there is no EOS.

    >>> assemble([1, 2, 3], [4, 5], PROTOCOLS["pgm"], 6, bos=0, eos=9)
    Request(input_ids=(0, 2, 3, 4, 5, 9), start=3, stop=5)
    >>> assemble([1, 2, 3], [], PROTOCOLS["llada"], 6, bos=0, eos=9)
    Request(input_ids=(1, 2, 3, 9), start=3, stop=4)
    """
    if not target and eos is None:
        raise ValueError("a continuation has no token, and the tokenizer no EOS that could stand for it: give it one.")
    if not target and protocol.joint:
        text = prefix[-(max_length - 2) :]
        return Request((bos, *text, eos), len(text) + 1, len(text) + 2)
    target = target or [eos]
    room = max_length - 2 if protocol.joint else max_length
    text = (prefix + target)[-room:]
    start = len(text) - min(len(target), room)
    if not protocol.joint:
        return Request(tuple(text), start, len(text))
    return Request((bos, *text, eos), start + 1, len(text) + 1)
