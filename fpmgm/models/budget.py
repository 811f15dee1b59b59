# SPDX-License-Identifier: Apache-2.0
"""A budget of block evaluations becomes a number of denoising steps and of iterations at each (Section 4, F.10)."""

import math
from dataclasses import dataclass
from numbers import Integral


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
    """`iterations[i]` fixed-point iterations at step i, in sampling order (the first step is the noisiest)."""

    num_steps: int
    iterations: list[int]
    block_evaluations: int


def plan_budget(
    config, budget: int, num_steps: int | None = None, allocation: str | list[int] = "decreasing"
) -> BudgetPlan:
    """Spend `budget` block evaluations on denoising steps, as completely as whole iterations allow.

    A step costs `num_pre_layers + iterations * num_fixed_point_layers + num_post_layers`.

    Args:
        config: A model configuration with the three layer counts.
        budget (`int`): Block evaluations per sequence.
        num_steps (`int`, *optional*): Denoising steps. `None`: what affords about four iterations per step (for a
            model without fixed-point layers, all that the budget pays).
        allocation (`str` or `list[int]`, defaults to `"decreasing"`): How iterations are shared over the steps:
            `"fixed"`, `"decreasing"`, `"increasing"`, `"cosine"`, `"front_loaded"`, or the iterations themselves.

    Returns:
        [`BudgetPlan`]: `num_steps`, `iterations` and `block_evaluations` (at most `budget`).

    Raises:
        `ValueError`: if the budget cannot pay one iteration per step, naming the least that can.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, plan_budget
    >>> plan = plan_budget(FPMDLMConfig(), budget=96)
    >>> plan.num_steps, plan.iterations[0], plan.iterations[-1], plan.block_evaluations
    (16, 6, 2, 96)

    ```
    """
    budget = check_whole("budget", budget, minimum=1, unit="block evaluations")
    if not isinstance(allocation, (list, tuple)) and allocation not in ALLOCATIONS:
        raise ValueError(f"`allocation`={allocation!r} must be one of {tuple(ALLOCATIONS)} or a list of iterations.")
    explicit, shared = config.num_pre_layers + config.num_post_layers, config.num_fixed_point_layers
    if not isinstance(allocation, str):
        plan = explicit_plan(config, allocation, num_steps)
        if plan.block_evaluations > budget:
            raise ValueError(
                f"`allocation` costs {plan.block_evaluations} block evaluations, more than `budget`={budget}: "
                "give fewer iterations or a larger budget."
            )
        return plan
    if num_steps is None:
        num_steps = max(1, budget // (explicit + 4 * shared))
    num_steps = check_whole("num_steps", num_steps, minimum=1, unit="denoising steps")
    least = num_steps * (explicit + shared)
    if budget < least:
        raise ValueError(
            f"`budget`={budget} cannot pay {num_steps} step(s) of at least {explicit + shared} block evaluations: "
            f"give at least {least}" + (", or fewer `num_steps`." if num_steps > 1 else ".")
        )
    if shared == 0:
        return explicit_plan(config, [0] * num_steps)
    total = (budget - num_steps * explicit) // shared
    return explicit_plan(config, allocate(total, num_steps, allocation))


def explicit_plan(config, iterations: int | list[int], num_steps: int | None = None) -> BudgetPlan:
    """The plan of given iterations: one number for every step, or one for each.

    Raises:
        `ValueError`: if the list and `num_steps` disagree, an entry is below 1 (below 0 without fixed-point layers),
            or a single number comes without `num_steps`.
    """
    minimum = 1 if config.num_fixed_point_layers else 0
    if isinstance(iterations, Integral):
        if num_steps is None:
            raise ValueError(f"`iterations`={iterations} needs `num_steps`: give the number of denoising steps.")
        iterations = [iterations] * check_whole("num_steps", num_steps, minimum=1, unit="denoising steps")
    iterations = [check_whole("iterations", n, minimum=minimum, unit="iterations at a step") for n in iterations]
    if not iterations or (num_steps is not None and num_steps != len(iterations)):
        raise ValueError(
            f"`num_steps`={num_steps} must be the length {len(iterations)} of the list of iterations, at least 1."
        )
    explicit = config.num_pre_layers + config.num_post_layers
    cost = len(iterations) * explicit + sum(iterations) * config.num_fixed_point_layers
    return BudgetPlan(len(iterations), iterations, cost)


def allocate(total: int, num_steps: int, allocation: str) -> list[int]:
    """Share `total` iterations over the steps: one each, and the largest-remainder share of the rest.

    >>> allocate(12, 4, "decreasing")
    [4, 3, 3, 2]
    """
    weights = [ALLOCATIONS[allocation](i / max(num_steps - 1, 1)) for i in range(num_steps)]
    quotas = [(total - num_steps) * weight / sum(weights) for weight in weights]
    shares = [math.floor(quota + 1e-9) for quota in quotas]  # 1e-9: a whole quota is whole whatever the rounding
    remainders = sorted(range(num_steps), key=lambda i: (-round(quotas[i] - shares[i], 9), i))
    extra = set(remainders[: total - num_steps - sum(shares)])
    return [1 + shares[i] + (i in extra) for i in range(num_steps)]


def check_whole(name: str, value: int, minimum: int, unit: str) -> int:
    """`value` as an int, or a `ValueError` that names it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"`{name}`={value!r} must be a whole number of {unit}, at least {minimum}.")
    return int(value)
