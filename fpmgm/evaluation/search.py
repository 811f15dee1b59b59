# SPDX-License-Identifier: Apache-2.0
"""The search for a checkpoint's best plan under a budget: candidates, and successive halving over them."""

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..models.arguments import check_whole
from ..models.budget import ALLOCATIONS, plan_budget
from ..models.reuse import REUSES


Candidate = TypeVar("Candidate")

ITERATIONS_PER_STEP = (1, 1.5, 2, 3, 4, 6, 8, 12)  # averages, from which the numbers of steps follow
GAMMAS = {
    "gamma_unchanged": (0.8, 0.9, 1.0),
    "gamma_masked": ([0.5, 0.7], [0.6, 0.8], [0.75, 0.9], [0.9, 1.0]),
    "gamma_changed": (0.0, 0.2, 0.5),
}


@dataclass(frozen=True)
class Trial:
    """A candidate's place among the candidates (`index`), what it was given (`resource`) and what it scored."""

    index: int
    resource: int
    score: float


def successive_halving(
    candidates: Iterable[Candidate],
    score: Callable[[Candidate, int], float],
    resources: Iterable[int],
    factor: float = 3.0,
    keep: Iterable[int] = (),
) -> list[list[Trial]]:
    """Give few resources to all candidates, more to the best 1/`factor` of them, and so on.

    This is successive halving (Jamieson & Talwalkar, 2016).

    Args:
        candidates (`Iterable`): Anything that `score` takes.
        score (`Callable`): Of a candidate and a resource; lower is better, infinity is out.
        resources (`Iterable[int]`): Of each rung, rising.
        factor (`float`, defaults to 3.0): How many times fewer candidates a rung has than the one before, above 1.
        keep (`Iterable[int]`, *optional*): Places of candidates that every rung holds, such as the defaults.

    Returns:
        `list[list[Trial]]`: The rungs, each from the best candidate to the worst; ties keep the candidates' order.

    Raises:
        `ValueError`: without candidates, for resources that do not rise, a factor of 1 or less, or a place to keep
            that there is not.

    Example:

    ```python
    >>> rungs = successive_halving([3, 1, 2, 5], lambda x, resource: abs(x - 2) + 1 / resource, [1, 4], factor=2)
    >>> [[trial.index for trial in rung] for rung in rungs]
    [[2, 0, 1, 3], [2, 0]]

    ```
    """
    candidates, resources, keep = list(candidates), list(resources), list(keep)
    if not candidates:
        raise ValueError("`candidates` is empty: give at least one.")
    if not resources or any(low >= high for low, high in itertools.pairwise(resources)):
        raise ValueError(f"`resources`={resources} must be one or more numbers that rise.")
    if isinstance(factor, str) or not factor > 1:
        raise ValueError(f"`factor`={factor} must be above 1: it is how many times fewer candidates a rung has.")
    if not set(keep) <= set(range(len(candidates))):
        raise ValueError(f"`keep`={keep} must be places among the {len(candidates)} candidates, from 0.")
    rungs, left = [], list(range(len(candidates)))
    for place, resource in enumerate(resources):
        if place:
            best = [trial.index for trial in rungs[-1] if math.isfinite(trial.score)]
            survivors = set(best[: max(1, math.ceil(len(left) / factor))]) | set(keep)
            left = sorted(survivors)
        trials = [Trial(index, resource, score(candidates[index], resource)) for index in left]
        rungs.append(sorted(trials, key=lambda trial: math.inf if math.isnan(trial.score) else trial.score))
    return rungs


def sampling_candidates(config, budget: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Plans to try for a budget: first the defaults (`{}`), then `count` − 1 different ones drawn at random.

    A plan sets `num_steps`, `allocation`, `reuse` and, for `reuse="3sr"`, the γ of the reuse states; a looped model
    reuses nothing. A model without fixed-point layers has nothing to plan: its only candidate are the defaults.

    Args:
        config: A model configuration with the three layer counts.
        budget (`int`): Block evaluations per sequence.
        count (`int`): Plans, or fewer where there are no more.
        seed (`int`, defaults to 0): Of the draw.

    Raises:
        `ValueError`: if the budget pays no step.
    """
    plan_budget(config, budget)
    check_whole("count", count, minimum=1, unit="plans")
    explicit, shared = config.num_pre_layers + config.num_post_layers, config.num_fixed_point_layers
    if shared == 0:
        return [{}]
    affordable = {max(1, int(budget // (explicit + n * shared))) for n in ITERATIONS_PER_STEP}
    choices = {
        "num_steps": sorted(steps for steps in affordable if steps * (explicit + shared) <= budget),
        "allocation": list(ALLOCATIONS),
        "reuse": ("none",) if config.is_looped else REUSES,
    }
    generator, plans = random.Random(seed), [{}]
    for _ in range(100 * count):  # repeated draws are left out
        plan = {name: generator.choice(values) for name, values in choices.items()}
        if plan["reuse"] == "3sr":
            plan |= {name: generator.choice(values) for name, values in GAMMAS.items()}
        if plan not in plans:
            plans.append(plan)
        if len(plans) >= count:
            break
    return plans[:count]
