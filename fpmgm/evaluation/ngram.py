# SPDX-License-Identifier: Apache-2.0
"""A judge of generated text that needs no download: an interpolated n-gram model of the training tokens.

Its perplexity sees local fluency only and is no stand-in for a large language model's. Report it under its name.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..models.arguments import check_whole
from ..models.text_input import token_rows
from .judge import summary


class NGramJudge:
    """Interpolated n-gram model with Witten–Bell weights, over token ids.

    p_n(w | h) = (c(hw) + T(h) p_{n−1}(w | h′)) / (c(h) + T(h)), where T(h) is the number of distinct tokens seen after
    the context h, h′ is h without its first token, and p_0 is uniform. An unseen context leaves p_{n−1}.

    Args:
        sequences (`Dataset`, `np.ndarray` or `Iterable`): N rows of L token ids of the training text, such as
            `fpmgm.data.pack` gives; an n-gram never spans two rows.
        vocab_size (`int`): Number of token ids, V.
        order (`int`, defaults to 4): Longest n-gram; V to this power must stay below 2⁶³.
        name (`str`, *optional*): What its scores carry. `None`: such as `"4-gram model"`.

    Raises:
        `ValueError`: if the vocabulary is too large for the order, ids lie outside it, or rows differ in length.

    Example:

    ```python
    >>> judge = NGramJudge(np.array([[0, 1, 2, 0, 1, 2, 0, 1, 2]]), vocab_size=3)
    >>> judge.perplexity(np.array([[0, 1, 2, 0]])) < judge.perplexity(np.array([[0, 2, 1, 1]]))
    True

    ```
    """

    def __init__(
        self, sequences: np.ndarray | Iterable[Sequence[int]], vocab_size: int, order: int = 4, name: str | None = None
    ):
        check_whole("vocab_size", vocab_size, minimum=1, unit="token ids")
        check_whole("order", order, minimum=1, unit="tokens")
        if vocab_size**order >= 2**63:
            raise ValueError(f"`vocab_size`={vocab_size} to the power `order`={order} exceeds 2**63: lower the order.")
        self.vocab_size, self.order, self.name = vocab_size, order, name or f"{order}-gram model"
        sequences = self._checked(sequences)
        if sequences.shape[1] < order:
            raise ValueError(
                f"`order`={order} is longer than the rows of {sequences.shape[1]} tokens: lower the order."
            )
        self.tables = [self._count(sequences, n) for n in range(1, order + 1)]

    @cached_property
    def weights(self) -> str:
        """Short name of the counts, which scores carry."""
        grams, counts = self.tables[-1][:2]
        return hashlib.blake2b(grams.tobytes() + counts.tobytes(), digest_size=8).hexdigest()

    def _checked(self, sequences: np.ndarray | Iterable[Sequence[int]]) -> np.ndarray:
        if not (isinstance(sequences, np.ndarray) and sequences.ndim == 2 and sequences.dtype.kind in "iu"):
            rows = token_rows(sequences)
            lengths = sorted({len(row) for row in rows})
            if len(lengths) > 1:
                raise ValueError(f"`sequences` have {lengths[:5]} tokens: give rows of one length.")
            sequences = np.array(rows)
        if sequences.size == 0:
            raise ValueError("`sequences` hold no token: give one or more rows of one length.")
        sequences = sequences.astype(np.int64)
        if not 0 <= sequences.min() <= sequences.max() < self.vocab_size:
            raise ValueError(
                f"`sequences` hold ids from {sequences.min()} to {sequences.max()}, the vocabulary {self.vocab_size}: "
                "judge and model must have one tokenizer."
            )
        return sequences

    def _keys(self, sequences: np.ndarray, n: int) -> np.ndarray:
        """(B, L − n + 1): one number for each n-gram, its last token in the lowest digit."""
        length = sequences.shape[1] - n + 1
        return sum(sequences[:, i : i + length] * self.vocab_size ** (n - 1 - i) for i in range(n))

    def _count(self, sequences: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
        """Sorted n-grams with counts, and sorted contexts with the tokens and the distinct tokens after them."""
        grams, counts = np.unique(self._keys(sequences, n), return_counts=True)
        contexts, first, distinct = np.unique(grams // self.vocab_size, return_index=True, return_counts=True)
        return grams, counts, contexts, np.add.reduceat(counts, first), distinct

    def log_probabilities(self, sequences: np.ndarray | Iterable[Sequence[int]]) -> np.ndarray:
        """(B, L) natural log-probability of each token given those before it in its row."""
        sequences = self._checked(sequences)
        probabilities = np.full(sequences.shape, 1 / self.vocab_size)
        for n, (grams, counts, contexts, totals, distinct) in enumerate(self.tables, start=1):
            if n > sequences.shape[1]:
                break
            keys = self._keys(sequences, n)
            count, seen = _lookup(grams, keys), _lookup(contexts, keys // self.vocab_size)
            c, total, kinds = (
                np.where(i >= 0, x[i], 0) for x, i in ((counts, count), (totals, seen), (distinct, seen))
            )
            lower = probabilities[:, n - 1 :]
            probabilities[:, n - 1 :] = np.where(seen >= 0, (c + kinds * lower) / np.maximum(total + kinds, 1), lower)
        return np.log(probabilities)

    def perplexity(self, sequences: np.ndarray | Iterable[Sequence[int]]) -> float:
        """exp of the mean over sequences of the mean negative log-probability; the first token, BOS, is given.

        Raises:
            `ValueError`: as [`generative_perplexity`].
        """
        return self.generative_perplexity(sequences)["generative_perplexity"]

    def generative_perplexity(self, sequences: np.ndarray | Iterable[Sequence[int]]) -> dict[str, Any]:
        """What [`fpmgm.evaluation.generative_perplexity`] returns, of (B, L) token ids instead of texts.

        Raises:
            `ValueError`: if ids lie outside the vocabulary, or L is 1.
        """
        log_p = self.log_probabilities(sequences)[:, 1:]
        protocol = {
            "metric": "generative perplexity",
            "judge": self.name,
            "judge_weights": self.weights,
            "tokenization": "none: the sequences' own token ids",
            "max_length": log_p.shape[1] + 1,
            "first_token": "given",
            "end_of_text": "scored like any token",
            "dtype": "float64",
        }
        return summary([(float(row.sum()), len(row), False) for row in log_p], protocol)


def _lookup(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Index of each key in the sorted table, −1 where it is absent."""
    index = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(table[index] == keys, index, -1)
