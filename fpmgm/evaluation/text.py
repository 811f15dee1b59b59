# SPDX-License-Identifier: Apache-2.0
"""Measures of token sequences."""

import numpy as np


def unigram_entropy(sequences: np.ndarray) -> float:
    """Mean over sequences of the entropy, in nats, of the tokens that a sequence uses (equation 5).

    Args:
        sequences (`np.ndarray`): (B, L) token ids.

    >>> round(unigram_entropy(np.array([[1, 1, 2, 2], [3, 3, 3, 3]])), 4)
    0.3466
    """
    entropies = []
    for row in np.asarray(sequences):
        _, counts = np.unique(row, return_counts=True)
        shares = counts / len(row)
        entropies.append(-(shares * np.log(shares)).sum())
    return float(np.mean(entropies))
