# SPDX-License-Identifier: Apache-2.0
"""The bound against the enumeration of all masks, and its errors against their definitions."""

import itertools
import logging
import math
from functools import partial

import numpy as np
import pytest
import torch

import fpmgm.evaluation
from fpmgm.evaluation import elbo_perplexity
from fpmgm.evaluation.likelihood import corruption, negative_elbo
from tests.testing_utils import refused, tiny_model


MASK = 10


@torch.no_grad()
def cross_entropy(model, row: list[int], masked: list[int], **options) -> float:
    """Σ over `masked` of −log p(token), the mask id excluded, in one plain forward of one sequence."""
    if not masked:
        return 0.0
    noisy = torch.tensor([[MASK if i in masked else token for i, token in enumerate(row)]])
    logits = model(noisy, **options).logits[0].double()
    logits[:, MASK] = -math.inf
    return -sum(logits[i].log_softmax(-1)[row[i]].item() for i in masked)


def enumerated_bound(model, row: list[int], **options) -> float:
    """E over t, uniform in [1e-3, 1], of 1/t Σ over all masks of P(mask | t) Σ −log p; midpoints in t."""
    length, points = len(row), 20_000
    t = 1e-3 + (1 - 1e-3) * (np.arange(points) + 0.5) / points
    p = (1 - 1e-3) * t
    total = 0.0
    for count in range(1, length + 1):
        weight = (p**count * (1 - p) ** (length - count) / t).mean()
        total += weight * sum(
            cross_entropy(model, row, list(masked), **options)
            for masked in itertools.combinations(range(length), count)
        )
    return total


@pytest.mark.parametrize("layers", [1, 0])
def test_the_bound_is_that_of_all_masks(layers):
    model = tiny_model(num_fixed_point_layers=layers).double()
    rows = [[1, 4, 4, 9], [0, 2, 7], [3, 3, 8, 5], [6, 1, 0, 2]]  # one is shorter: padded in its batch
    options = {"num_iterations": 3} if layers else {}
    tokens = sum(map(len, rows))
    exact = sum(enumerated_bound(model, row, **options) for row in rows) / tokens
    found = elbo_perplexity(model, 100 * rows, num_draws=20, batch_size=400, **options)
    assert found["standard_error_draws"] < 0.015 * exact
    assert abs(found["nats_per_token"] - exact) < 4 * found["standard_error_draws"]
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    protocol = found["protocol"]
    assert protocol["num_tokens"] == 100 * tokens and protocol["num_iterations"] == options.get("num_iterations")


def test_one_draw_is_the_weighted_cross_entropy_of_its_mask():
    model = tiny_model(scale=0.6).double()
    rows = [[1, 4, 4, 9, 2], [0, 2, 7], [3, 3]]
    times, uniforms = torch.tensor([0.9, 0.5, 1e-3]), torch.rand(3, 8)
    every = [[True] * len(row) for row in rows]
    found = negative_elbo(model, rows, every, times, uniforms, num_iterations=2)
    for value, row, t, uniform in zip(found.tolist(), rows, times.tolist(), uniforms.tolist(), strict=True):
        masked = [i for i in range(len(row)) if uniform[i] < 0.999 * t]
        assert value == pytest.approx(cross_entropy(model, row, masked, num_iterations=2) / t, rel=1e-6)
    assert negative_elbo(model, rows[2:], every[2:], times[2:], uniforms[2:]).tolist() == [0]  # nothing masked


def test_prompts_are_visible_and_not_scored():
    model = tiny_model(scale=0.6).double()
    rows = [{"input_ids": [1, 4, 4, 9], "completion_mask": [0, 0, 1, 1]}, {"input_ids": [0, 2], "labels": [-100, 2]}]
    exact = 0.0
    for prompt, answer in (([1, 4], [4, 9]), ([0], [2])):
        row, places = prompt + answer, range(len(prompt), len(prompt) + len(answer))
        one = sum(cross_entropy(model, row, [place], num_iterations=3) for place in places)
        both = cross_entropy(model, row, list(places), num_iterations=3)
        # E over t of 1/t Σ P(mask) Σ −log p: with one position to write it is its cross-entropy
        exact += one * 0.999 if len(answer) == 1 else moment(1, 2) * one + moment(2, 2) * both
    found = elbo_perplexity(model, 200 * rows, num_draws=20, batch_size=400, num_iterations=3)
    assert abs(found["nats_per_token"] - exact / 3) < 4 * found["standard_error_draws"] < 0.1 * exact / 3
    assert found["protocol"]["num_tokens"] == 600 and "scored" in found["protocol"]
    whole = elbo_perplexity(model, [row["input_ids"] for row in rows], num_draws=1)
    assert whole["protocol"]["num_tokens"] == 6 and "scored" not in whole["protocol"]
    for row, message in (
        ({"input_ids": [1, 2], "completion_mask": [0, 0]}, "none of them empty or without a position to score"),
        (
            {"input_ids": [1, 2], "completion_mask": [1]},
            r"`sequences`\[0\] has 2 `input_ids`, but 1 in `completion_mask`",
        ),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, r"`sequences`\[0\] has padding"),
    ):
        refused(message, elbo_perplexity, model, [row])


def moment(count: int, length: int) -> float:
    """E over t of P(these `count` of `length` positions are masked)/t."""
    t = 1e-3 + (1 - 1e-3) * (np.arange(20_000) + 0.5) / 20_000
    p = (1 - 1e-3) * t
    return (p**count * (1 - p) ** (length - count) / t).mean()


def test_passes_are_antithetic_and_their_spread_is_the_error():
    model, generator = tiny_model().double(), np.random.default_rng(0)
    rows, every = generator.integers(0, 10, (6, 8)).tolist(), [[True] * 8] * 6
    times = [corruption(range(6), 6, 8, (5, "likelihood", draw))[0] for draw in range(3)]
    for t in times:
        steps = np.diff(np.sort(t.numpy().astype(float)))
        assert np.allclose(steps, 0.999 / 6, atol=1e-6)
    values = np.array(
        [
            negative_elbo(model, rows, every, *corruption(range(6), 6, 8, (5, "likelihood", d))).tolist()
            for d in range(3)
        ]
    )
    found = elbo_perplexity(model, rows, num_draws=3, batch_size=4, seed=5)
    draws, texts = values.mean(axis=1) / 8, values.mean(axis=0) / 8
    assert found["nats_per_token"] == pytest.approx(draws.mean())
    assert found["standard_error_draws"] == pytest.approx(draws.std(ddof=1) / math.sqrt(3))
    assert found["standard_error_texts"] == pytest.approx(texts.std(ddof=1) / math.sqrt(6))
    single = elbo_perplexity(model, rows, num_draws=1, seed=5)
    assert single["standard_error_draws"] is None and single["nats_per_token"] == pytest.approx(draws[0])
    assert elbo_perplexity(model, rows, num_draws=1, seed=6)["nats_per_token"] != single["nats_per_token"]


def test_more_draws_go_on_from_fewer(tmp_path, monkeypatch):
    model, rows = tiny_model().double(), [[1, 2, 3, 4]] * 5
    straight = elbo_perplexity(model, rows, num_draws=3, batch_size=2)
    elbo_perplexity(model, rows, num_draws=2, batch_size=2, cache_dir=tmp_path)
    calls = []
    monkeypatch.setattr("fpmgm.evaluation.likelihood.negative_elbo", lambda *a: calls.append(1) or negative_elbo(*a))
    assert elbo_perplexity(model, rows, num_draws=3, batch_size=2, cache_dir=tmp_path) == straight
    assert len(calls) == 3  # the third pass only
    elbo_perplexity(model, rows, num_draws=1, num_iterations=2, batch_size=2, cache_dir=tmp_path)
    assert len(calls) == 6  # other iterations are another measurement


def test_passes_that_masked_nothing_are_not_the_end():
    model, row = tiny_model(scale=0.3), [[3]]
    drawn = ([corruption(range(1), 1, 1, (seed, "likelihood", draw)) for draw in range(4)] for seed in range(999))
    seed = next(seed for seed, noise in enumerate(drawn) if all(uniforms >= t for t, uniforms in noise))
    assert elbo_perplexity(model, row, num_draws=4, seed=seed)["perplexity"] == 1
    assert elbo_perplexity(model, row, seed=seed)["perplexity"] > 1


def test_passes_go_on_until_the_error_is_small(tmp_path, monkeypatch, caplog):
    model, rows = tiny_model().double(), np.random.default_rng(0).integers(0, 10, (60, 8)).tolist()
    assert fpmgm.evaluation.likelihood.RELATIVE_ERROR == 0.02
    monkeypatch.setattr("fpmgm.evaluation.likelihood.RELATIVE_ERROR", 0.2)  # texts this short would take long
    elbo_perplexity = partial(fpmgm.evaluation.elbo_perplexity, batch_size=60)
    found = elbo_perplexity(model, rows, cache_dir=tmp_path)
    draws, error = found["protocol"]["num_draws"], found["standard_error_draws"]
    assert 4 < draws < 256 and error <= 0.2
    assert found["perplexity_standard_error"] == pytest.approx(error * found["perplexity"])
    assert found == elbo_perplexity(model, rows, num_draws=draws)  # the passes are those of a given number
    assert elbo_perplexity(model, rows, num_draws=draws // 2)["standard_error_draws"] > 0.2
    calls = []
    monkeypatch.setattr("fpmgm.evaluation.likelihood.negative_elbo", lambda *a: calls.append(1))
    assert found == elbo_perplexity(model, rows, cache_dir=tmp_path) and not calls
    monkeypatch.setattr("fpmgm.evaluation.likelihood.negative_elbo", negative_elbo)
    monkeypatch.setattr("fpmgm.evaluation.likelihood.MOST_DRAWS", 6)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    bounded = elbo_perplexity(model, rows)
    assert bounded["protocol"]["num_draws"] == 6 and bounded["standard_error_draws"] > 0.2
    assert (
        f"After 6 passes the standard error of the perplexity is {bounded['standard_error_draws']:.1%}" in caplog.text
    )
