# SPDX-License-Identifier: Apache-2.0
"""What is read off the rows of a sweep: which value of an argument is best over all others (Table 22, D.1.2)."""

import json
import math
from collections.abc import Sequence
from typing import Any


def compare_values(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """How each value of one argument fares over all settings of the others, as in Table 22.

    Args:
        rows (`Sequence[dict]`): Rows of [`sweep`] over a full grid.
        name (`str`): The argument, such as `"allocation"`.

    Returns:
        `list[dict]`: For each value, best mean first: `name`, `mean_generative_perplexity`, `average_rank` (1 is best;
        equal perplexities share the better rank), `wins` (ties win for all) and `settings`, how many there are.

    Raises:
        `ValueError`: if a setting of the others lacks a value, or no row sets `name`.

    Example:

    ```python
    >>> rows = [{"generative_perplexity": p, "sampling": {"options": {"budget": b, "reuse": r}}}
    ...         for b, r, p in [(24, "none", 9.0), (24, "3sr", 7.0), (48, "none", 5.0), (48, "3sr", 5.0)]]
    >>> [(v["reuse"], v["average_rank"], v["wins"]) for v in compare_values(rows, "reuse")]
    [('3sr', 1.0, 2), ('none', 1.5, 1)]

    ```
    """
    groups, values = _groups(rows, [name])
    found = []
    for key, value in values.items():
        scores = [(group[key], list(group.values())) for group in groups]
        ranks = [1 + sum(other < score for other in others) for score, others in scores]
        found.append(
            {
                **value,
                "mean_generative_perplexity": math.fsum(score for score, _ in scores) / len(scores),
                "average_rank": sum(ranks) / len(ranks),
                "wins": ranks.count(1),
                "settings": len(ranks),
            }
        )
    return sorted(found, key=lambda v: v["mean_generative_perplexity"])


def pool_settings(
    rows: Sequence[dict[str, Any]], default: dict[str, Any], entropy_slack: float = 0.05
) -> list[dict[str, Any]]:
    """Values of some arguments over all settings of the others, those that lose entropy last (D.1.2).

    Args:
        rows (`Sequence[dict]`): Rows of [`sweep`] over a full grid.
        default (`dict`): The values to compare with, one of the grid; its names are the arguments.
        entropy_slack (`float`, defaults to 0.05): Nats that a row may lose against the default's.

    Returns:
        `list[dict]`: For each combination of values, best first: the values as `setting`, `generative_perplexity` (the
        geometric mean: other arguments, such as budgets, move it by factors) with its standard error, `entropy_loss`
        (the largest) and `allowed`.

    Raises:
        `ValueError`: if the grid is not full, or lacks the default.
    """
    scores, values = _groups(rows, list(default))
    errors, _ = _groups(rows, list(default), "generative_perplexity_standard_error")
    entropies, _ = _groups(rows, list(default), "unigram_entropy")
    standard = json.dumps(default)
    if standard not in values:
        raise ValueError(f"`default`={default} is not among the rows: add it to the grid.")
    found = []
    for key, value in values.items():
        loss = max(group[standard] - group[key] for group in entropies)
        mean = math.exp(math.fsum(math.log(group[key]) for group in scores) / len(scores))
        relative = [(error[key] or 0) / score[key] for error, score in zip(errors, scores, strict=True)]
        found.append(
            {
                "setting": value,
                "generative_perplexity": mean,
                "generative_perplexity_standard_error": mean * math.hypot(*relative) / len(relative),
                "entropy_loss": loss,
                "allowed": loss <= entropy_slack,
            }
        )
    return sorted(found, key=lambda v: (not v["allowed"], v["generative_perplexity"]))


def _groups(
    rows: Sequence[dict[str, Any]], names: list[str], measure: str = "generative_perplexity"
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
        groups.setdefault(json.dumps(rest, sort_keys=True), {})[json.dumps(chosen)] = row[measure]
    for rest, group in groups.items():
        lacking = [value for key, value in values.items() if key not in group]
        if lacking:
            raise ValueError(f"at {rest} the rows lack {lacking}: compare over a full grid.")
    return list(groups.values()), values
