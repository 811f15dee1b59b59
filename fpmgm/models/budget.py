# SPDX-License-Identifier: Apache-2.0
"""A budget of block evaluations becomes a number of denoising steps and of iterations at each (Section 4, F.10)."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from .arguments import check_whole, shown


# More would not end in a lifetime, or would not fit into memory before the first step.
MOST_STEPS = 100_000
MOST_BLOCK_EVALUATIONS = 1_000_000

# Weight of a step at x = i/(T − 1), from the first (noisiest) step at 0 to the last at 1.
ALLOCATIONS = {
    "fixed": lambda x: 1.0,
    "decreasing": lambda x: 1.5 - x,
    "increasing": lambda x: 0.5 + x,
    "cosine": lambda x: 1 - 0.5 * math.cos(math.pi * x),
    "front_loaded": lambda x: 2.0 if x < 0.25 else 2 / 3,
}


@dataclass(frozen=True)
class BudgetPlan:
    """`iterations[i]` fixed-point iterations at step i, in sampling order (the first step is the noisiest).

    `shares[i]` is the share of positions that it is expected to compute (`None`: all, at every step).
    """

    num_steps: int
    iterations: list[int]
    block_evaluations: int
    shares: list[float] | None = None

    def __repr__(self) -> str:
        """On one line: iterations that repeat are counted."""
        runs = [(n, len(list(group))) for n, group in itertools.groupby(self.iterations)]
        parts = [f"{n}" if count == 1 else f"{n}×{count}" for n, count in runs]
        if len(parts) > 16:
            parts = [*parts[:8], "…", *parts[-7:]]
        return (
            f"BudgetPlan({self.num_steps} steps of {', '.join(parts)} iterations, "
            f"{self.block_evaluations} block evaluations)"
        )


def plan_budget(
    config,
    budget: int,
    num_steps: int | None = None,
    allocation: str | list[int] = "decreasing",
    starts: Callable[[int], list[int]] | None = None,
    shares: Callable[[int], list[float]] | None = None,
    iterations_per_step: int = 4,
) -> BudgetPlan:
    """Spend `budget` block evaluations on denoising steps, as completely as whole iterations allow.

    A step costs `num_pre_layers + iterations * num_fixed_point_layers + num_post_layers`.

    Args:
        config: A model configuration with the three layer counts.
        budget (`int`): Block evaluations per sequence.
        num_steps (`int`, *optional*): Denoising steps. `None`: what affords about `iterations_per_step` (for
            a model without fixed-point layers, all that the budget pays).
        allocation (`str` or `list[int]`, defaults to `"decreasing"`): How iterations are shared over the steps:
            `"fixed"`, `"decreasing"`, `"increasing"`, `"cosine"`, `"front_loaded"`, or the iterations themselves,
            which have to be paid at all positions.
        starts (`Callable`, *optional*): For a number of steps, those at which a block of text begins; each block has
            the allocation for itself. `None`: one block.
        shares (`Callable`, *optional*): For a number of steps, the share of positions that each is expected to compute
            and is charged for, where others are frozen. `None`: all. So it is where that buys neither a step nor an
            iteration.
        iterations_per_step (`int`, defaults to 4): What the number of steps is chosen for, where it is not given.

    Returns:
        [`BudgetPlan`]: `num_steps`, `iterations` and `block_evaluations` (at most `budget`).

    Raises:
        `ValueError`: if the budget cannot pay one iteration per step, naming the least that can; for more than 10⁶
            block evaluations or 10⁵ steps.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, plan_budget
    >>> plan = plan_budget(FPMDLMConfig(), budget=96)
    >>> plan.num_steps, plan.iterations[0], plan.iterations[-1], plan.block_evaluations
    (16, 6, 2, 96)
    >>> plan
    BudgetPlan(16 steps of 6, 5×5, 4×4, 3×5, 2 iterations, 96 block evaluations)
    >>> plan_budget(FPMDLMConfig(), 96, shares=lambda num_steps: [1.0] + [0.5] * (num_steps - 1)).num_steps
    31

    ```
    """
    budget = check_whole("budget", budget, 1, "block evaluations", MOST_BLOCK_EVALUATIONS)
    aim = check_whole("iterations_per_step", iterations_per_step, 1, "iterations at a step", MOST_BLOCK_EVALUATIONS)
    listed = isinstance(allocation, (list, tuple))
    if not listed and not (isinstance(allocation, str) and allocation in ALLOCATIONS):
        raise ValueError(
            f"`allocation`={shown(allocation)} must be one of {tuple(ALLOCATIONS)} or a list of iterations."
        )
    explicit, shared = config.num_pre_layers + config.num_post_layers, config.num_fixed_point_layers
    if listed:
        plan = explicit_plan(config, allocation, num_steps)
        if plan.block_evaluations > budget:
            raise ValueError(
                f"`allocation` costs {plan.block_evaluations} block evaluations, more than `budget`={budget}: "
                "give fewer iterations or a larger budget."
            )
        return plan
    if num_steps is None:
        num_steps = min(MOST_STEPS, max(1, budget // (explicit + aim * shared)))
        if shares is not None:
            aim = aim if shared else 0
            num_steps = _most(num_steps, MOST_STEPS, lambda n: _cost(config, [aim] * n, shares(n)) <= budget)
    num_steps = check_whole("num_steps", num_steps, 1, "denoising steps", MOST_STEPS)
    expected = None if shares is None else shares(num_steps)
    least = _cost(config, [1] * num_steps, expected)
    if budget < least:
        raise ValueError(
            f"`budget`={budget} cannot pay {num_steps} step(s) of at least {explicit + shared} block evaluations: "
            f"give at least {least}" + (", or fewer `num_steps`." if num_steps > 1 else ".")
        )
    if shared == 0:
        iterations = [0] * num_steps
    else:
        total, places = (budget - num_steps * explicit) // shared, starts and starts(num_steps)
        if shares is not None:
            total = _most(
                max(total, num_steps),
                MOST_BLOCK_EVALUATIONS,
                lambda total: _cost(config, allocate(total, num_steps, allocation, places), expected) <= budget,
            )
        iterations = allocate(total, num_steps, allocation, places)
    if expected is not None and _cost(config, iterations, None) <= budget:  # nothing is bought with what is frozen
        expected = [1.0] * num_steps
    return BudgetPlan(num_steps, iterations, _cost(config, iterations, expected), expected)


def step_costs(config, iterations: list[int]) -> list[int]:
    """Block evaluations of each step with these iterations, at all positions."""
    explicit = config.num_pre_layers + config.num_post_layers
    return [explicit + count * config.num_fixed_point_layers for count in iterations]


def _cost(config, iterations: list[int], shares: list[float] | None) -> int:
    """Block evaluations of all steps, at the `shares` of positions in each, rounded up."""
    costs = step_costs(config, iterations)
    if shares is None:
        return sum(costs)
    return math.ceil(math.fsum(share * cost for share, cost in zip(shares, costs, strict=True)) - 1e-9)


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low`, which is taken to fit, to `high` that fits; none beyond one that does not."""
    step = 1
    while low + step <= high and fits(low + step):
        low, step = low + step, 2 * step
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def explicit_plan(config, iterations: int | list[int], num_steps: int | None = None) -> BudgetPlan:
    """The plan of given iterations: one number for every step, or one for each.

    Raises:
        `ValueError`: if the list and `num_steps` disagree, an entry is below 1 (below 0 without fixed-point layers),
            or a single number comes without `num_steps`; for iterations of a model without fixed-point layers, and
            for more than 10⁶ block evaluations or 10⁵ steps.
    """
    shared = config.num_fixed_point_layers
    if num_steps is not None:
        num_steps = check_whole("num_steps", num_steps, 1, "denoising steps", MOST_STEPS)
    if not isinstance(iterations, (list, tuple)):
        if num_steps is None:
            raise ValueError(
                f"`iterations`={shown(iterations)} needs `num_steps`: give the number of denoising steps."
            )
        iterations = [iterations] * num_steps
    if not iterations or len(iterations) > MOST_STEPS or (num_steps is not None and num_steps != len(iterations)):
        raise ValueError(
            f"`num_steps`={num_steps} must be the length {len(iterations)} of the list of iterations, at least 1 and "
            f"at most {MOST_STEPS:,}."
        )
    least = 1 if shared else 0
    iterations = [
        check_whole("iterations", n, least, "iterations at a step", MOST_BLOCK_EVALUATIONS) for n in iterations
    ]
    if shared == 0 and any(iterations):
        raise ValueError(
            f"`iterations`={max(iterations)} is for fixed-point layers, which the model lacks: give 0, or a budget."
        )
    cost = sum(step_costs(config, iterations))
    if cost > MOST_BLOCK_EVALUATIONS:
        raise ValueError(
            f"`iterations` cost {cost:,} block evaluations in {len(iterations):,} steps, more than "
            f"{MOST_BLOCK_EVALUATIONS:,}: give fewer."
        )
    return BudgetPlan(len(iterations), iterations, cost)


def allocate(total: int, num_steps: int, allocation: str, starts: list[int] | None = None) -> list[int]:
    """Share `total` iterations over the steps: one each, and the largest-remainder share of the rest.

    With `starts`, the steps at which blocks of text begin, each block is like a run of its own. `None`: one block.

    >>> allocate(12, 4, "decreasing")
    [4, 3, 3, 2]
    >>> allocate(12, 4, "decreasing", starts=[0, 2])
    [4, 2, 4, 2]
    """
    weights = []
    for first, after in itertools.pairwise([*(starts or [0]), num_steps]):
        weights += [ALLOCATIONS[allocation](i / max(after - first - 1, 1)) for i in range(after - first)]
    whole_weight = sum(weights)
    quotas = [(total - num_steps) * weight / whole_weight for weight in weights]
    shares = [math.floor(quota + 1e-9) for quota in quotas]  # 1e-9: a whole quota is whole whatever the rounding
    remainders = sorted(range(num_steps), key=lambda i: (-round(quotas[i] - shares[i], 9), i))
    extra = set(remainders[: total - num_steps - sum(shares)])
    return [1 + shares[i] + (i in extra) for i in range(num_steps)]
