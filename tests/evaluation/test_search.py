# SPDX-License-Identifier: Apache-2.0
"""Successive halving on functions whose best candidate is known; frontiers by hand."""

import math

import numpy as np
import pytest

from fpmgm import plan_budget
from fpmgm.evaluation import (
    common_entropies,
    perplexity_at_entropy,
    sampling_candidates,
    successive_halving,
    undominated,
)
from tests.testing_utils import refused, tiny_config


def test_halving_finds_the_best_candidate_through_noise_that_resources_remove():
    rng = np.random.default_rng(0)
    true = rng.permutation(27).astype(float)
    noise, asked = rng.normal(size=27), []

    def score(candidate: int, resource: int) -> float:
        asked.append((candidate, resource))
        return true[candidate] + 6 * noise[candidate] / resource

    rungs = successive_halving(range(27), score, [1, 3, 9], factor=3, keep=[int(true.argmax())])
    assert rungs[0][0].index != true.argmin() == rungs[-1][0].index  # the first rung alone is fooled
    assert len(rungs[0]) == 27 and len(rungs[1]) in (9, 10) and len(rungs[2]) in (4, 5)
    assert all(any(trial.index == true.argmax() for trial in rung) for rung in rungs)  # kept, though the worst
    assert sorted(asked) == sorted((t.index, t.resource) for rung in rungs for t in rung)
    for rung in rungs:
        assert [t.score for t in rung] == sorted(t.score for t in rung)


def test_what_is_out_or_not_a_number_never_goes_on():
    scores = [math.inf, math.nan, 3.0, 2.0, math.inf, math.inf]
    rungs = successive_halving(range(6), lambda i, resource: scores[i], [1, 2], factor=2)
    assert [trial.index for trial in rungs[1]] == [3, 2]
    # Where all are out, the one that is kept is left.
    rungs = successive_halving(range(3), lambda i, resource: math.inf, [1, 2], keep=[0])
    assert [trial.index for trial in rungs[1]] == [0]


def test_candidates_are_different_payable_plans_after_the_defaults():
    config = tiny_config()
    plans = sampling_candidates(config, 96, 40)
    assert plans[0] == {} and len(plans) == 40 and plans == sampling_candidates(config, 96, 40)
    assert all(plans.count(plan) == 1 for plan in plans)
    for plan in plans[1:]:
        spent = plan_budget(config, 96, plan["num_steps"], plan["allocation"]).block_evaluations
        assert spent <= 96 and ("gamma_masked" in plan) == (plan["reuse"] == "3sr")
    assert {plan["reuse"] for plan in plans[1:]} == {"none", "full", "3sr"}
    assert len({plan["num_steps"] for plan in plans[1:]}) > 4
    assert sampling_candidates(tiny_config(num_fixed_point_layers=0), 96, 40) == [{}]
    looped = sampling_candidates(tiny_config(input_injection="none"), 96, 40)
    assert len(looped) > 10 and {plan["reuse"] for plan in looped[1:]} == {"none"}  # it refuses the others
    refused("cannot pay", sampling_candidates, config, 2, 5)


def test_perplexity_at_an_entropy_lies_on_the_line_between_neighbours():
    entropies, perplexities = [5.4, 5.0, 5.2], [90.0, 10.0, 30.0]
    assert perplexity_at_entropy(entropies, perplexities, 5.2) == pytest.approx(30)
    halfway = perplexity_at_entropy(entropies, perplexities, 5.1)
    assert halfway == pytest.approx(math.sqrt(10 * 30))
    assert perplexity_at_entropy(entropies, perplexities, 5.41) is None
    assert perplexity_at_entropy([], [], 5.0) is None
    refused(r"`perplexities` are 3 and `entropies` 2", perplexity_at_entropy, [1.0, 2.0], [1.0, 2.0, 3.0], 1.5)
    assert common_entropies([[1.0, 3.0], [2.0, 5.0]], count=2) == [2.0, 3.0]
    assert common_entropies([[1.0, 2.0], [3.0, 5.0]]) == []


def test_the_frontier_holds_what_nothing_beats():
    rng = np.random.default_rng(1)
    points = [{"entropy": h, "perplexity": p} for h, p in rng.integers(0, 8, (25, 2)).tolist()]

    def beats(a: dict, b: dict) -> bool:
        no_worse = a["entropy"] >= b["entropy"] and a["perplexity"] <= b["perplexity"]
        return no_worse and a != b

    expected = {tuple(p.values()) for p in points if not any(beats(other, p) for other in points)}
    found = undominated(iter(points))
    assert {tuple(p.values()) for p in found} == expected
    assert [p["entropy"] for p in found] == sorted(p["entropy"] for p in found)
    for point in points:
        point["standard_error"] = 9.0
    assert len(undominated(points)) == len(points)  # noise beats nothing
