# SPDX-License-Identifier: Apache-2.0
"""What is read off the rows of a sweep: which value of an argument is best over all others (Table 22, D.1.2).

A difference that noise explains is none: nothing is called better within its error.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


CLEAR = 2.0  # standard errors of a difference


def clearly_below(value: float, error: float | None, other: float, other_error: float | None) -> bool:
    """Whether `value` is under `other` by more than two standard errors of their difference.

    Args:
        value, other (`float`): Such as two perplexities.
        error, other_error (`float`, *optional*): Their standard errors. `None`: unknown, and nothing is clear.

    Examples:
        >>> clearly_below(758, 54, 790, 90), clearly_below(758, 5, 790, 9)
        (False, True)
    """
    return error is not None and other_error is not None and other - value > CLEAR * math.hypot(error, other_error)


def plus_minus(value: float, error: float | None, digits: int = 2) -> str:
    """A number with its standard error, where there is one.

    Examples:
        >>> plus_minus(758.25, 54.0, 1), plus_minus(43.4, None)
        ('758.2 ± 54.0', '43.40')
    """
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def over_seeds(values: Sequence[float | None], digits: int = 3) -> str | None:
    """Mean of a figure over training runs, with its standard error where there are several; `None` where one has none.

    Examples:
        >>> over_seeds([1.0, 2.0]), over_seeds([1.0]), over_seeds([1.0, None])
        ('1.500 ± 0.500', '1.000', None)
    """
    if None in values:
        return None
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return plus_minus(float(np.mean(values)), error, digits)


def compare_values(rows: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """How each value of one argument fares over all settings of the others, as in Table 22.

    Args:
        rows (`Iterable[dict]`): Rows of [`sweep`] over a full grid.
        name (`str`): The argument, such as `"allocation"`.

    Returns:
        `list[dict]`: For each value, best mean first: `name`, `mean_generative_perplexity` with its standard error,
        `average_rank` (1 is best; equal perplexities share the better rank), `unbeaten`, the settings in which no
        other value is clearly better (by two standard errors of the difference), and `settings`, how many there are.

    Raises:
        `ValueError`: if a setting of the others lacks a value or has one twice, or no row sets `name`.

    Example:

    ```python
    >>> rows = [{"generative_perplexity": p, "generative_perplexity_standard_error": 0.5,
    ...          "sampling": {"options": {"budget": b, "reuse": r}}}
    ...         for b, r, p in [(24, "none", 9.0), (24, "3sr", 7.0), (48, "none", 5.2), (48, "3sr", 5.0)]]
    >>> [(v["reuse"], v["average_rank"], v["unbeaten"]) for v in compare_values(rows, "reuse")]
    [('3sr', 1.0, 2), ('none', 2.0, 1)]

    ```
    """
    rows = list(rows)
    groups, values = _groups(rows, [name])
    errors, _ = _groups(rows, [name], "generative_perplexity_standard_error")
    found = []
    for key, value in values.items():
        scores, noise = [group[key] for group in groups], [group[key] for group in errors]
        error = None if None in noise else math.hypot(*noise) / len(noise)
        ranks = [1 + sum(other < group[key] for other in group.values()) for group in groups]
        beaten = [
            any(clearly_below(group[other], around[other], group[key], around[key]) for other in group)
            for group, around in zip(groups, errors, strict=True)
        ]
        found.append(
            {
                **value,
                "mean_generative_perplexity": math.fsum(scores) / len(scores),
                "mean_generative_perplexity_standard_error": error,
                "average_rank": sum(ranks) / len(ranks),
                "unbeaten": beaten.count(False),
                "settings": len(ranks),
            }
        )
    return sorted(found, key=lambda v: v["mean_generative_perplexity"])


def pool_settings(
    rows: Iterable[dict[str, Any]], default: dict[str, Any], entropy_slack: float = 0.05
) -> list[dict[str, Any]]:
    """Values of some arguments over all settings of the others, those that lose entropy last (D.1.2).

    Args:
        rows (`Iterable[dict]`): Rows of [`sweep`] over a full grid.
        default (`dict`): The values to compare with, one of the grid; its names are the arguments.
        entropy_slack (`float`, defaults to 0.05): Nats that a row may lose against the default's.

    Returns:
        `list[dict]`: For each combination of values, best first: the values as `setting`, `generative_perplexity` (the
        geometric mean: other arguments, such as budgets, move it by factors) with its standard error, `better` (than
        the default's, by two standard errors of the difference), `entropy_loss` (the largest) and `allowed`.

    Raises:
        `ValueError`: if the grid is not full, has a setting twice, or lacks the default.
    """
    rows = list(rows)
    scores, values = _groups(rows, list(default))
    errors, _ = _groups(rows, list(default), "generative_perplexity_standard_error")
    entropies, _ = _groups(rows, list(default), "unigram_entropy")
    standard = json.dumps(default)
    if standard not in values:
        raise ValueError(f"`default`={default} is not among the rows: add it to the grid.")
    usual = _geometric_mean([group[standard] for group in scores], [group[standard] for group in errors])
    found = []
    for key, value in values.items():
        loss = max(group[standard] - group[key] for group in entropies)
        mean, error = _geometric_mean([group[key] for group in scores], [group[key] for group in errors])
        found.append(
            {
                "setting": value,
                "generative_perplexity": mean,
                "generative_perplexity_standard_error": error,
                "better": clearly_below(mean, error, *usual),
                "entropy_loss": loss,
                "allowed": loss <= entropy_slack,
            }
        )
    return sorted(found, key=lambda v: (not v["allowed"], v["generative_perplexity"]))


def _geometric_mean(values: list[float], errors: list[float | None]) -> tuple[float, float | None]:
    """With its standard error, where all values have one."""
    mean = math.exp(math.fsum(map(math.log, values)) / len(values))
    if None in errors:
        return mean, None
    relative = [error / value for error, value in zip(errors, values, strict=True)]
    return mean, mean * math.hypot(*relative) / len(relative)


def _groups(
    rows: list[dict[str, Any]], names: list[str], measure: str = "generative_perplexity"
) -> tuple[list[dict[str, float]], dict[str, dict]]:
    """For each setting of the other arguments the measure by values of `names`, and what these values are."""
    groups: dict[str, dict[str, float]] = {}
    values: dict[str, dict[str, Any]] = {}
    for row in rows:
        options = row["sampling"]["options"]
        missing = [name for name in names if name not in options]
        if missing:
            raise ValueError(f"a row does not set {missing}: sweep over them, or compare another argument.")
        chosen = {name: options[name] for name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        values[json.dumps(chosen)] = chosen
        group = groups.setdefault(json.dumps(rest, sort_keys=True), {})
        if json.dumps(chosen) in group:
            raise ValueError(f"two rows have the setting {options}: compare those of one model and one seed.")
        group[json.dumps(chosen)] = row[measure]
    for rest, group in groups.items():
        lacking = [value for key, value in values.items() if key not in group]
        if lacking:
            raise ValueError(f"at {rest} the rows lack {lacking}: compare over a full grid.")
    return list(groups.values()), values
