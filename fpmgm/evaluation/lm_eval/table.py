# SPDX-License-Identifier: Apache-2.0
"""lm-eval's table of results with the protocol beside each task: a score means nothing without it."""

from typing import Any

from lm_eval import utils


plain_table = utils.make_table  # before the command puts `make_table` in its place


def make_table(results: dict[str, Any], column: str = "results", sort_results: bool = False) -> str:
    """lm-eval's `make_table`, where each task's name is followed by the protocol and its number of draws.

    Args:
        results (`dict`): What `lm_eval.simple_evaluate` returned.
        column (`str`, defaults to `"results"`): `"results"` or `"groups"`.
        sort_results (`bool`, defaults to `False`): Sort the tasks by name.

    Returns:
        `str`: A Markdown table.
    """
    config = results["config"]
    if "protocol" in config:  # of a model of ours
        label = f"{config['protocol']}, {config['mc_num']} draws"
        rows = {name: {**row, "alias": f"{row.get('alias', name)} ({label})"} for name, row in results[column].items()}
        results = {**results, column: rows}
    return plain_table(results, column, sort_results)
