# SPDX-License-Identifier: Apache-2.0
"""The budget report: quality, diversity and cost of a checkpoint's samples at several budgets (Tables 2, 6, 9, 12)."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.arguments import check_whole
from .comparison import plus_minus
from .report import table
from .sweep import AnyJudge, list_settings, sweep


SHOWN = {  # measure → its name in a table
    "generative_perplexity": "Gen. PPL ↓",
    "excess": "Excess, nats ↓",
    "unigram_entropy": "Entropy ↑",
    "mauve": "MAUVE ↑",
    "energy_distance": "Energy distance ↓",
    "milliseconds_per_sequence": "ms per sequence",
    "plan": "steps (iterations)",
}
DIGITS = {"generative_perplexity": 2, "milliseconds_per_sequence": 1}  # of others 3


def evaluate_budgets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: AnyJudge,
    budgets: Iterable[int],
    settings: Iterable[dict[str, Any]],
    **options: Any,
) -> list[dict[str, Any]]:
    """A row of measures for each setting and budget.

    Args:
        model, tokenizer, judge: See [`sweep`].
        budgets (`Iterable[int]`): Block evaluations per sequence.
        settings (`Iterable[dict]`): Options of `generate` beside the budget, such as `{"reuse": "3sr"}`.
        options: `num_samples`, `batch_size`, `cache_dir` and all others of [`sweep`].

    Returns:
        `list[dict]`: Rows of [`sweep`], the budgets of a setting beside each other.

    Raises:
        `ValueError`: for a budget that is no whole number, a setting with a budget of its own, and from [`sweep`].
    """
    return sweep(model, tokenizer, judge, under_budgets(budgets, settings), **options)


def under_budgets(budgets: Iterable[int], settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each setting under each budget, as [`evaluate_budgets`] samples them."""
    budgets = [check_whole("budgets", budget, minimum=1, unit="block evaluations each") for budget in budgets]
    if len(set(budgets)) < len(budgets):
        raise ValueError(f"`budgets`={budgets} have one twice: give each once.")
    settings = list_settings(settings)
    for setting in settings:
        if "budget" in setting:
            raise ValueError(f"`settings` have {setting}, but the budgets are `budgets`={budgets}: leave its own out.")
    return [{"budget": budget, **setting} for setting in settings for budget in budgets]


def budget_table(rows: Iterable[dict[str, Any]], name: str) -> str:
    """Rows of [`evaluate_budgets`] in Markdown: a column per budget, a group of lines per setting.

    Args:
        rows (`Iterable[dict]`): Rows of one or several settings.
        name (`str`): The model's.

    Raises:
        `ValueError`: for two rows of one setting and budget, as of two models.
    """
    rows = list(rows)
    budgets = sorted({row["budget"] for row in rows})
    groups: dict[str, dict[int, dict]] = {}
    for row in rows:
        group = groups.setdefault(setting_name(row, name), {})
        if row["budget"] in group:
            raise ValueError(
                f"two rows are {setting_name(row, name)!r} at budget {row['budget']}: give those of one model and one "
                "seed, and each setting once."
            )
        group[row["budget"]] = row
    lines = []
    for title, group in groups.items():
        shown = [measure for measure in SHOWN if measure == "plan" or any(measure in row for row in group.values())]
        for measure in shown:
            cells = [_cell(group.get(budget), measure) for budget in budgets]
            lines.append([title, SHOWN[measure], *cells])
            title = None
    return table(["Method", "Metric", *budgets], lines) + "\n"


def setting_name(row: dict[str, Any], name: str) -> str:
    """The model's name with what a row sets beside the budget.

    >>> setting_name({"reuse": "3sr", "top_p": 0.9}, "fp_mdlm")
    'fp_mdlm, reuse 3sr, top_p 0.9'
    """
    options = row.get("sampling", {"options": row})["options"]
    return ", ".join([name, *(f"{key} {value}" for key, value in options.items() if key != "budget")])


def _cell(row: dict[str, Any] | None, measure: str) -> str | None:
    if row is None:
        return None
    if measure == "plan":
        steps, iterations = row["num_steps"], row["iterations"]
        if not any(iterations):
            return str(steps)
        first, last = iterations[0], iterations[-1]
        return f"{steps} ({first})" if len(set(iterations)) == 1 else f"{steps} ({first}…{last})"
    return plus_minus(row[measure], row.get(f"{measure}_standard_error"), DIGITS.get(measure, 3))
