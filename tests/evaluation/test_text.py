# SPDX-License-Identifier: Apache-2.0
"""Measures of text against counts by hand."""

from collections import Counter
from math import exp, log

import numpy as np
import pytest

from fpmgm.evaluation import NGramJudge, distinct_n, repetition_rate, unigram_entropy


def witten_bell(train: list[list[int]], context: tuple[int, ...], token: int, vocab_size: int) -> float:
    """p(token | context) by the recursion of the definition, counting anew at every level."""
    if context == ():
        lower = 1 / vocab_size
    else:
        lower = witten_bell(train, context[1:], token, vocab_size)
    n = len(context)
    after = Counter(row[i + n] for row in train for i in range(len(row) - n) if tuple(row[i : i + n]) == context)
    if not after:
        return lower
    return (after[token] + len(after) * lower) / (after.total() + len(after))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_judge_follows_the_interpolated_recursion(order):
    rng = np.random.default_rng(0)
    train, text = rng.integers(0, 5, (6, 9)).tolist(), rng.integers(0, 6, (3, 7)).tolist()
    judge = NGramJudge(np.array(train), vocab_size=6, order=order)
    found = judge.log_probabilities(np.array(text))
    for row, values in zip(text, found, strict=True):
        for i, value in enumerate(values):
            context = tuple(row[max(0, i - order + 1) : i])
            assert exp(value) == pytest.approx(witten_bell(train, context, row[i], 6))
    # A distribution: the probabilities of all tokens after a context sum to 1.
    every = np.array([[*text[0][:3], token] for token in range(6)])
    assert np.exp(judge.log_probabilities(every)[:, 3]).sum() == pytest.approx(1)
    assert judge.perplexity(np.array(text)) == pytest.approx(exp(-np.mean([v[1:].mean() for v in found])))


def test_entropy_is_the_mean_over_texts():
    for second in ([5, 5, 5, 5], [5, 5]):
        assert unigram_entropy([[1, 2, 3, 4], second]) == pytest.approx(log(4) / 2)


def test_distinct_and_repetition_count_n_grams_across_and_within_texts():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 4, length).tolist() for length in (9, 12, 5)]
    for n in (1, 2, 4):
        grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
        together = Counter(gram for row in grams for gram in row)
        assert distinct_n(rows, n) == pytest.approx(len(together) / together.total())
        repeated = [sum(gram in row[:i] for i, gram in enumerate(row)) / len(row) for row in grams]
        assert repetition_rate(rows, n) == pytest.approx(np.mean(repeated))
    assert repetition_rate(np.array([[7] * 8])) == pytest.approx(4 / 5)
    assert distinct_n([[1], [1, 2]], n=2) == 1.0  # a text shorter than n has no n-gram to count
