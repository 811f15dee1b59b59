# SPDX-License-Identifier: Apache-2.0
"""Perplexity against entropy: models are compared where their entropies agree."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .comparison import CLEAR


def perplexity_at_entropy(entropies: Sequence[float], perplexities: Sequence[float], entropy: float) -> float | None:
    """Perplexity of a swept model where its entropy is `entropy`: log-perplexity, linear in entropy between points.

    Args:
        entropies, perplexities (`Sequence[float]`): Of the points of the sweep, in any order.
        entropy (`float`): Where to compare.

    Returns:
        `float`, or `None` outside the entropies swept: nothing is extrapolated.

    Examples:
        >>> round(perplexity_at_entropy([5.0, 5.5], [20.0, 80.0], 5.25), 6)
        40.0
        >>> perplexity_at_entropy([5.0, 5.5], [20.0, 80.0], 4.9)
    """
    x, y = _sorted(entropies, perplexities=perplexities)
    if not len(x) or not x[0] <= entropy <= x[-1]:
        return None
    return float(np.exp(np.interp(entropy, x, np.log(y))))


def standard_error_at_entropy(
    entropies: Sequence[float], perplexities: Sequence[float], standard_errors: Sequence[float], entropy: float
) -> float | None:
    """The standard error of [`perplexity_at_entropy`], from those of the two points beside it; `None` where it is.

    Examples:
        >>> round(standard_error_at_entropy([5.0, 5.5], [20.0, 80.0], [2.0, 8.0], 5.25), 3)  # 40 · 0.1 / √2
        2.828
    """
    x, y, errors = _sorted(entropies, perplexities=perplexities, standard_errors=standard_errors)
    if not len(x) or not x[0] <= entropy <= x[-1]:
        return None
    shares = [np.interp(entropy, x, unit) for unit in np.eye(len(x))]  # of each point in the logarithm
    relative = np.hypot.reduce(np.array(shares) * errors / y)
    return float(np.exp(np.interp(entropy, x, np.log(y))) * relative)


def _sorted(entropies: Sequence[float], **measures: Sequence[float]) -> list[np.ndarray]:
    """By rising entropy."""
    order = np.argsort(entropies)
    for name, values in measures.items():
        if len(values) != len(order):
            raise ValueError(f"`{name}` are {len(values)} and `entropies` {len(order)}: give one for each point.")
    return [np.asarray(values, dtype=float)[order] for values in (entropies, *measures.values())]


def undominated(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other beats in both: those of the frontier, by rising entropy.

    Args:
        points (`Iterable[dict]`): With `perplexity` and `entropy`; where they have a `standard_error` of the
            perplexity, only two standard errors of the difference beat a point.

    Examples:
        >>> points = [(9, 5), (7, 4), (8, 3)]
        >>> [p["entropy"] for p in undominated({"perplexity": p, "entropy": e} for p, e in points)]
        [4, 5]
    """
    points = sorted(points, key=lambda p: (p["entropy"], -p["perplexity"]))
    return [point for point in points if not any(_beats(other, point) for other in points)]


def _beats(point: dict[str, Any], other: dict[str, Any]) -> bool:
    noise = CLEAR * np.hypot(point.get("standard_error") or 0, other.get("standard_error") or 0)
    both = point["entropy"] >= other["entropy"] and point["perplexity"] <= other["perplexity"] - noise
    return both and (point["entropy"] > other["entropy"] or point["perplexity"] < other["perplexity"])


def common_entropies(curves: Iterable[Sequence[float]], count: int = 3) -> list[float]:
    """`count` entropies, evenly over the range that all curves reach; none where there is no such range.

    Examples:
        >>> common_entropies([[4.0, 6.0], [5.0, 7.0]])
        [5.0, 5.5, 6.0]
    """
    curves = list(curves)
    low, high = max(map(min, curves)), min(map(max, curves))
    return [float(value) for value in np.linspace(low, high, count)] if low <= high else []
