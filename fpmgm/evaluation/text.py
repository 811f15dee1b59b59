# SPDX-License-Identifier: Apache-2.0
"""Measures of token sequences that need no judge: diversity within texts and across them."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..models.arguments import check_whole
from ..models.text_input import token_rows


def unigram_entropy(sequences: np.ndarray | Iterable[Sequence[int]]) -> float:
    """Mean over sequences of the entropy, in nats, of the tokens that a sequence uses (equation 5).

    Args:
        sequences (`np.ndarray`): (B, L) token ids, or B sequences of any lengths above 0; blocks of
            `fpmgm.data.pack` too.

    Raises:
        `ValueError`: for text instead of ids, if there is no sequence, or an empty one.

    Examples:
        >>> round(unigram_entropy(np.array([[1, 1, 2, 2], [3, 3, 3, 3]])), 4)
        0.3466
    """
    return float(np.mean(_each(sequences, _entropy)))


def distinct_n(sequences: np.ndarray | Iterable[Sequence[int]], n: int = 2) -> float:
    """Share of different ones among the n-grams of all sequences together (Li et al., 2016).

    It falls with the number of texts: compare equal numbers of equal lengths only.

    Args:
        sequences (`np.ndarray`): (B, L) token ids, or B sequences of any lengths.
        n (`int`, defaults to 2): Tokens of an n-gram, at least 1.

    Raises:
        `ValueError`: for text instead of ids, or if no sequence holds an n-gram.

    Examples:
        >>> distinct_n([[1, 2, 1, 2], [1, 2, 3]], n=2)
        0.6
    """
    check_whole("n", n, minimum=1, unit="tokens")
    grams = [gram for row in token_rows(sequences) for gram in _ngrams(row, n)]
    if not grams:
        raise ValueError(f"`sequences` hold no n-gram of `n`={n} tokens: give longer ones.")
    return len(set(grams)) / len(grams)


def repetition_rate(sequences: np.ndarray | Iterable[Sequence[int]], n: int = 4) -> float:
    """Mean over sequences of the share of n-grams that the sequence had before (rep-n of Welleck et al., 2020).

    Args:
        sequences (`np.ndarray`): (B, L) token ids, or B sequences of any lengths from `n` on.
        n (`int`, defaults to 4): Tokens of an n-gram, at least 1.

    Raises:
        `ValueError`: for text instead of ids, if there is no sequence, or one shorter than `n`.

    Examples:
        >>> repetition_rate([[1, 2, 1, 2], [1, 2, 3, 4]], n=2)
        0.16666666666666669
    """
    check_whole("n", n, minimum=1, unit="tokens")

    def repeated(row: Sequence[int]) -> float:
        grams = _ngrams(row, n)
        return 1 - len(set(grams)) / len(grams)

    return float(np.mean(_each(sequences, repeated, shortest=n)))


def _each(sequences, measure, shortest: int = 1) -> list[float]:
    rows = token_rows(sequences)
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) < shortest:
        raise ValueError(
            f"`sequences` are {len(rows)}, the shortest of {min(lengths, default=0)} tokens: give at least one, each "
            f"of {shortest} token(s) or more."
        )
    return [measure(row) for row in rows]


def _entropy(row: Sequence[int]) -> float:
    _, counts = np.unique(np.asarray(row), return_counts=True)
    shares = counts / len(row)
    return float(-(shares * np.log(shares)).sum())


def _ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
