# SPDX-License-Identifier: Apache-2.0
"""Measures of text against counts by hand."""

from collections import Counter
from math import exp, log

import numpy as np
import pytest

from fpmgm.evaluation import NGramJudge, unigram_entropy


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


def test_the_judge_refuses_what_its_keys_cannot_hold():
    with pytest.raises(ValueError, match=r"`vocab_size`=60000 to the power `order`=4"):
        NGramJudge(np.zeros((1, 5), dtype=int), vocab_size=60000)


def test_entropy_is_the_mean_over_texts():
    assert unigram_entropy(np.array([[1, 2, 3, 4], [5, 5, 5, 5]])) == pytest.approx(log(4) / 2)
