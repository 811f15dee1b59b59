# SPDX-License-Identifier: Apache-2.0
"""Two sets of features: how far apart they are, and how far two sets of one kind would be.

Shapes: N and M features, D channels, S = N + M, P permutations.
"""

import numpy as np

from ..models.arguments import check_whole


def energy_distance(
    first: np.ndarray, second: np.ndarray, num_permutations: int = 200, seed: int = 0
) -> dict[str, float | list[float]]:
    """2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ (Székely & Rizzo, 2013), 0 for equal distributions only.

    Args:
        first, second (`np.ndarray`): (N, D) and (M, D).
        num_permutations (`int`, defaults to 200): Ways P to deal all features out into sets of the same sizes, which
            say what the distance would be if both were of one kind.
        seed (`int`, defaults to 0): Of the permutations.

    Returns:
        `dict`: `energy_distance`; `energy_distance_same`, the 2.5 % and 97.5 % quantiles over permutations; and
        `energy_distance_p`, the share of permutations, the one given among them, that are as far apart.

    Raises:
        `ValueError`: for features that are not finite or not of one width, an empty set, and no permutation.

    Examples:
        >>> import numpy as np
        >>> energy_distance(np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]), num_permutations=1)["energy_distance"]
        0.0
    """
    shapes = [np.shape(first), np.shape(second)]
    if any(len(shape) != 2 or not shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"`first` and `second` of shapes {shapes} must be (N, D) and (M, D), none of them empty.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("`first` and `second` must be finite: the network that gives NaN has been used.")
    check_whole("num_permutations", num_permutations, minimum=1, unit="permutations")
    features = np.concatenate([first, second]).astype(np.float64)  # (S, D)
    products = features @ features.T
    squares = np.diag(products)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0))  # (S, S)
    np.fill_diagonal(apart, 0)
    weights = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])
    generator = np.random.default_rng(seed)
    dealt = np.stack([weights, *(generator.permutation(weights) for _ in range(num_permutations))])  # (1 + P, S)
    found = -((dealt @ apart) * dealt).sum(axis=1)  # the three means in one form
    return {
        "energy_distance": float(found[0]) + 0.0,
        "energy_distance_same": [float(x) for x in np.quantile(found[1:], [0.025, 0.975])],
        "energy_distance_p": float(np.mean(found >= found[0])),
    }
