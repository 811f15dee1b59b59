# SPDX-License-Identifier: Apache-2.0
"""The metrics of `evaluate` give what the functions give, whole or batch by batch, without a hub."""

import numpy as np
import pytest

from fpmgm.evaluation import distinct_n, generative_perplexity, repetition_rate, unigram_entropy
from tests.evaluation.helpers import TEXTS, tiny_judge


pytest.importorskip("evaluate")
from fpmgm.evaluation.metrics import GenerativePerplexity, Mauve, Repetition, UnigramEntropy


def test_generative_perplexity_by_batches_equals_the_function():
    judge = tiny_judge()
    metric = GenerativePerplexity()
    metric.add_batch(predictions=TEXTS[:4])
    metric.add_batch(predictions=TEXTS[4:])
    expected = generative_perplexity(TEXTS, judge, max_length=24, batch_size=3)
    assert metric.compute(judge=judge, max_length=24, batch_size=3) == expected
    assert GenerativePerplexity().compute(predictions=TEXTS, judge=judge, max_length=24, batch_size=3) == expected


def test_token_metrics_equal_the_functions_and_state_their_protocol():
    rows = [[1, 2, 1, 2, 1, 2], [3, 4, 5, 6, 7]]
    found = UnigramEntropy().compute(predictions=rows)
    assert found["unigram_entropy"] == unigram_entropy(rows)
    assert found["protocol"]["num_samples"] == 2 and found["protocol"]["num_tokens"] == 11
    found = Repetition().compute(predictions=np.array([[1, 2, 1, 2], [3, 4, 5, 6]]), distinct=(2,), repeated=2)
    assert found["distinct_2"] == distinct_n([[1, 2, 1, 2], [3, 4, 5, 6]], 2)
    assert found["repetition_2"] == repetition_rate([[1, 2, 1, 2], [3, 4, 5, 6]], 2) and "distinct_1" not in found


def test_mauve_of_texts_against_themselves_is_one():
    pytest.importorskip("mauve")
    texts = [f"{i} {i * i % 7}" for i in range(100)]

    def numbers(chunk: list[str]) -> np.ndarray:
        return np.array([[1.0, *map(float, text.split())] for text in chunk])

    found = Mauve().compute(predictions=texts, references=texts, featurizer=numbers, num_samples=100)
    assert found["mauve"] == pytest.approx(1) and found["protocol"]["featurizer"] == "numbers"
