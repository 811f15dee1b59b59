# SPDX-License-Identifier: Apache-2.0
"""Perplexity against entropy: models are compared where their entropies agree."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def perplexity_at_entropy(entropies: Sequence[float], perplexities: Sequence[float], entropy: float) -> float | None:
    """Perplexity of a swept model where its entropy is `entropy`: log-perplexity, linear in entropy between points.

    Args:
        entropies, perplexities (`Sequence[float]`): Of the points of the sweep, in any order.
        entropy (`float`): Where to compare.

    Returns:
        `float`, or `None` outside the entropies swept: nothing is extrapolated.

    >>> round(perplexity_at_entropy([5.0, 5.5], [20.0, 80.0], 5.25), 6)
    40.0
    >>> perplexity_at_entropy([5.0, 5.5], [20.0, 80.0], 4.9)
    """
    order = np.argsort(entropies)
    x, y = np.asarray(entropies, dtype=float)[order], np.log(np.asarray(perplexities, dtype=float)[order])
    if not len(x) or not x[0] <= entropy <= x[-1]:
        return None
    return float(np.exp(np.interp(entropy, x, y)))


def undominated(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other beats in both: those of the frontier, by rising entropy.

    Args:
        points (`Iterable[dict]`): With `perplexity` and `entropy`.

    >>> [p["entropy"] for p in undominated([{"perplexity": 9, "entropy": 5}, {"perplexity": 7, "entropy": 4},
    ...                                     {"perplexity": 8, "entropy": 3}])]
    [4, 5]
    """
    frontier, lowest = [], float("inf")
    for point in sorted(points, key=lambda p: (-p["entropy"], p["perplexity"])):
        if point["perplexity"] < lowest:
            frontier.append(point)
            lowest = point["perplexity"]
    return frontier[::-1]


def common_entropies(curves: Iterable[Sequence[float]], count: int = 3) -> list[float]:
    """`count` entropies, evenly over the range that all curves reach; none where there is no such range.

    >>> common_entropies([[4.0, 6.0], [5.0, 7.0]])
    [5.0, 5.5, 6.0]
    """
    curves = list(curves)
    low, high = max(map(min, curves)), min(map(max, curves))
    return [float(value) for value in np.linspace(low, high, count)] if low <= high else []
