# SPDX-License-Identifier: Apache-2.0
"""Budget plans: what every plan must keep, and the allocation formulas in exact arithmetic."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpmgm import FPMDLMConfig, plan_budget
from fpmgm.models.budget import ALLOCATIONS, allocate, explicit_plan
from tests.testing_utils import refused


# The same examples at every run, and no folder of past ones.
quick = settings(max_examples=150, derandomize=True, database=None, deadline=None)

layer_counts = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).filter(any)
allocations = st.sampled_from(sorted(ALLOCATIONS))

EXACT_WEIGHTS = {
    "fixed": lambda x: Fraction(1),
    "decreasing": lambda x: Fraction(3, 2) - x,
    "increasing": lambda x: Fraction(1, 2) + x,
    "front_loaded": lambda x: Fraction(2) if x < Fraction(1, 4) else Fraction(2, 3),
}


def layers(pre: int, fixed_point: int, post: int) -> SimpleNamespace:
    return SimpleNamespace(num_pre_layers=pre, num_fixed_point_layers=fixed_point, num_post_layers=post)


def cost(config, iterations) -> int:
    return sum(config.num_pre_layers + n * config.num_fixed_point_layers + config.num_post_layers for n in iterations)


@quick
@given(layer_counts, st.integers(1, 3000), st.none() | st.integers(1, 60), allocations)
def test_every_plan_is_affordable_complete_and_runs_each_step(counts, budget, num_steps, allocation):
    config = layers(*counts)
    least = (num_steps or 1) * sum(counts)
    if budget < least:
        refused(rf"`budget`={budget} .*at least {least}\b", plan_budget, config, budget, num_steps, allocation)
        return
    plan = plan_budget(config, budget, num_steps, allocation)
    assert len(plan.iterations) == plan.num_steps
    assert plan.block_evaluations == cost(config, plan.iterations) <= budget
    if num_steps is None:
        assert plan.num_steps == max(1, math.floor(budget / (counts[0] + 4 * counts[1] + counts[2])))
    else:
        assert plan.num_steps == num_steps
    if counts[1] == 0:
        assert plan.iterations == [0] * plan.num_steps
        assert num_steps is not None or budget - plan.block_evaluations < sum(counts)
    else:
        assert min(plan.iterations) >= 1
        assert budget - plan.block_evaluations < counts[1]  # not one more iteration fits


@quick
@given(st.integers(1, 80), st.integers(0, 2000), allocations)
def test_iterations_follow_the_order_of_the_weights(num_steps, extra, allocation):
    iterations = allocate(num_steps + extra, num_steps, allocation)
    assert sum(iterations) == num_steps + extra
    falling = {"fixed": True, "decreasing": True, "front_loaded": True, "increasing": False, "cosine": False}
    assert iterations == sorted(iterations, reverse=falling[allocation])


@quick
@given(st.integers(1, 80), st.integers(0, 2000), st.sampled_from(sorted(EXACT_WEIGHTS)))
def test_allocation_is_the_largest_remainder_in_exact_arithmetic(num_steps, extra, allocation):
    weights = [EXACT_WEIGHTS[allocation](Fraction(i, max(num_steps - 1, 1))) for i in range(num_steps)]
    quotas = [extra * weight / sum(weights) for weight in weights]
    expected = [1 + math.floor(quota) for quota in quotas]
    while sum(expected) < num_steps + extra:  # give the rest one by one, ties to the earlier step
        step = max(range(num_steps), key=lambda i: (1 + quotas[i] - expected[i], -i))
        expected[step] += 1
    assert allocate(num_steps + extra, num_steps, allocation) == expected


@quick
@given(st.integers(2, 80), st.integers(0, 2000))
def test_cosine_allocation_stays_within_one_of_its_quota(num_steps, extra):
    weights = [1 - math.cos(math.pi * i / (num_steps - 1)) / 2 for i in range(num_steps)]
    for n, weight in zip(allocate(num_steps + extra, num_steps, "cosine"), weights, strict=True):
        assert abs(n - 1 - extra * weight / sum(weights)) < 1 + 1e-9


@pytest.mark.parametrize(("budget", "fixed_point_steps", "mdlm_steps"), [
    (96, 16, 8), (192, 32, 16), (384, 64, 32), (768, 128, 64),
])  # fmt: skip
def test_the_papers_budgets(budget, fixed_point_steps, mdlm_steps):
    plan = plan_budget(FPMDLMConfig(), budget)
    assert plan.num_steps == fixed_point_steps and plan.block_evaluations == budget
    assert sum(plan.iterations) == 4 * fixed_point_steps
    assert plan.iterations[0] > plan.iterations[-1]  # decreasing is the default
    plan = plan_budget(FPMDLMConfig(num_pre_layers=12, num_fixed_point_layers=0, num_post_layers=0), budget)
    assert plan.num_steps == mdlm_steps and plan.block_evaluations == budget
    assert plan.iterations == [0] * mdlm_steps


def test_steps_are_as_many_as_the_iterations_of_each_allow():
    found = [plan_budget(layers(1, 1, 1), 24, iterations_per_step=n) for n in (1, 2, 4, 22)]
    assert [plan.num_steps for plan in found] == [8, 6, 4, 1]
    assert [sum(plan.iterations) for plan in found] == [8, 12, 16, 22]


def test_plans_written_out():
    config = layers(1, 1, 1)
    # 24 − 4·2 = 16 iterations: one each, and 12 shared as 4.5, 3.5, 2.5, 1.5; the halves go to the earlier steps.
    assert plan_budget(config, 24, num_steps=4).iterations == [6, 5, 3, 2]
    assert plan_budget(config, 24, 4, "increasing").iterations == [3, 4, 4, 5]
    assert plan_budget(config, 24, 4, "front_loaded").iterations == [7, 3, 3, 3]
    assert plan_budget(config, 5).iterations == [3]
    assert plan_budget(layers(4, 1, 4), np.int64(30), np.int64(3)).iterations == [3, 2, 1]
    plan = plan_budget(config, 24, allocation=[5, 1, 2])
    assert (plan.num_steps, plan.iterations, plan.block_evaluations) == (3, [5, 1, 2], 14)
    assert explicit_plan(config, 3, num_steps=2).iterations == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 2}, r"`budget`=2 .*at least 3\b"),
        ({"budget": 11, "num_steps": 4}, r"`budget`=11 .*at least 12\b.*fewer `num_steps`"),
        ({"budget": 0}, "`budget`=0 must be a whole number"),
        ({"budget": -96}, "`budget`=-96 must be a whole number"),
        ({"budget": 96.0}, "`budget`=96.0 must be a whole number"),
        ({"budget": "96"}, "`budget`='96' must be a whole number"),
        ({"budget": True}, "`budget`=True must be a whole number"),
        ({"budget": None}, "`budget`=None must be a whole number"),
        ({"num_steps": 0}, "`num_steps`=0 must be a whole number"),
        ({"num_steps": 2.5}, "`num_steps`=2.5 must be a whole number"),
        ({"num_steps": True}, "`num_steps`=True must be a whole number"),
        ({"allocation": "linear"}, "`allocation`='linear' must be one of"),
        ({"allocation": None}, "`allocation`=None must be"),
        ({"allocation": [90, 90]}, "`allocation` costs 184 .*`budget`=96"),
        ({"allocation": [4, 4], "num_steps": 3}, "`num_steps`=3 must be the length 2"),
        ({"allocation": []}, "at least 1"),
        ({"allocation": [4, 0]}, "must be a whole number .*at least 1"),
        ({"allocation": [4, 1.5]}, "=1.5 must be a whole number"),
        ({"allocation": [1] * 10**6}, r"must be the length 1000000 .* at most 100,000"),
        ({"allocation": ("cosine",)}, "='cosine' must be a whole number"),
        ({"budget": 10**30}, "`budget`=1000000000000000000000000000000 must be .* at most 1,000,000"),
        ({"budget": float("nan")}, "`budget`=nan must be a whole number"),
        ({"num_steps": 10**9}, "`num_steps`=1000000000 must be .* at most 100,000"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    refused(message, plan_budget, layers(1, 1, 1), **{"budget": 96, **arguments})


def test_single_number_of_iterations_needs_the_steps():
    refused("`iterations`=4 needs `num_steps`", explicit_plan, layers(1, 1, 1), 4)


def test_iterations_that_a_model_cannot_take_or_that_never_end_are_refused():
    refused("`iterations`=3 is for fixed-point layers, which the model lacks", explicit_plan, layers(2, 0, 0), [0, 3])
    for iterations, steps in ((10**9, 1), (1000, 1000)):
        refused("`iterations`", explicit_plan, layers(1, 1, 1), iterations, steps)


def test_a_plan_prints_on_a_line():
    assert (
        repr(plan_budget(layers(1, 1, 1), 24, 4))
        == "BudgetPlan(4 steps of 6, 5, 3, 2 iterations, 24 block evaluations)"
    )
    assert repr(plan_budget(layers(3, 0, 0), 96)) == "BudgetPlan(32 steps of 0×32 iterations, 96 block evaluations)"
    assert len(repr(explicit_plan(layers(1, 1, 1), [1, 2] * 500))) < 150


def test_the_largest_plans_are_made_at_once():
    plan = plan_budget(layers(1, 1, 1), 10**6)
    assert plan.num_steps == len(plan.iterations) == 10**5 and plan.block_evaluations == 10**6
